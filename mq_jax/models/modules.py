"""Flax NNX modules as pure functions of nested dicts of arrays."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx


def abstract(make: Callable[[], nnx.Module]) -> dict:
  """Shapes of a module's parameters; nothing is computed.

  Args:
    make: Makes the module.

  Returns:
    Nested dict of `jax.ShapeDtypeStruct`, batch statistics included.
  """
  return nnx.to_pure_dict(nnx.state(nnx.eval_shape(make)))


def functional(make: Callable[[], nnx.Module], what: str) -> Callable[..., Any]:
  """A module as a pure function.

  Args:
    make: Makes the module; called without memory for its parameters.
    what: Name for messages.

  Returns:
    `apply(params, *args)`, where `params` is a nested dict of arrays as
    `abstract` describes. It raises ValueError for one of another structure.
  """
  graph, state = nnx.split(nnx.eval_shape(make))
  wanted = nnx.to_pure_dict(state)

  def apply(params: dict, *args: Any) -> Any:
    check(params, wanted, what)
    return nnx.merge(graph, params)(*args)

  return apply


def check(params: dict, wanted: dict, what: str) -> None:
  """Raise ValueError unless both dicts are nested alike, naming leaves."""
  if jax.tree.structure(params) != jax.tree.structure(wanted):
    # nnx matches leaves by order: a renamed one would be taken for another.
    got, want = set(names(params)), set(names(wanted))
    raise ValueError(
      f'parameters do not fit the {what}: missing {sorted(want - got)}, '
      f'unexpected {sorted(got - want)}'
    )


def names(params: dict) -> dict[str, tuple[str | int, ...]]:
  """Paths of the leaves of a nested dict, by their text with '/'."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(params)
  paths = [tuple(key.key for key in path) for path, _ in leaves]
  return {'/'.join(map(str, path)): path for path in paths}
