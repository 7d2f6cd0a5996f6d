"""Frozen options as pytrees: numbers are leaves, decisions are static.

Options held as frozen data rather than captured by a closure can be printed,
pickled and compared; stacking their leaves sweeps them with `vmap`; and a
jitted function which takes them as an argument compiles once for all their
numbers.

Examples:
  >>> @pytree_dataclass
  ... class Round:
  ...   bits: int = 4                # a leaf: may be traced
  ...   saturate: bool = static(True)  # decides the program
  >>> jax.tree.leaves(Round(bits=2))
  [2]
  >>> Round(2) == Round(2), hash(Round(2)) == hash(Round(2))
  (True, True)
  >>> jax.tree.structure(Round()) == jax.tree.structure(Round(saturate=False))
  False
"""

import dataclasses
import typing
from typing import Any, TypeVar

import jax

T = TypeVar('T')


def static(default: Any = dataclasses.MISSING, **kwargs: Any) -> Any:
  """Declare a field that decides the program instead of being a leaf.

  A static value is part of the tree structure: it must be hashable, is
  compared by value, and a new one makes `jit` trace again.

  Args:
    default: Default of the field; without one (and without a
      `default_factory`) the field is required.
    **kwargs: Passed on to `dataclasses.field`, e.g. `default_factory`.

  Returns:
    The field specifier, typed `Any` so that annotations stay plain.

  Examples:
    >>> static(3).metadata['static']
    True
  """
  metadata = {**kwargs.pop('metadata', {}), 'static': True}
  return dataclasses.field(default=default, metadata=metadata, **kwargs)


@typing.dataclass_transform(
  frozen_default=True, field_specifiers=(dataclasses.field, static)
)
def pytree_dataclass(cls: type[T]) -> type[T]:
  """Make a class a frozen dataclass and register it as a pytree.

  Fields are leaves (or subtrees) unless declared with `static`. Equal options
  compare and hash equal where leaves are Python numbers; array leaves make an
  option unhashable, as arrays themselves are.

  JAX rebuilds the object with whatever a transformation puts in its leaves
  (tracers, `vmap` axes, gradients), and `__post_init__` runs each time: check
  static fields there, and leaves only where they are used.

  Args:
    cls: A class with annotated fields.

  Returns:
    The same class, frozen and registered.

  Examples:
    >>> @pytree_dataclass
    ... class Clip:
    ...   low: float
    ...   high: float = 1.0
    >>> jax.tree.map(lambda x: 2 * x, Clip(-1.0))
    Clip(low=-2.0, high=2.0)
  """
  return jax.tree_util.register_dataclass(
    dataclasses.dataclass(frozen=True)(cls)
  )
