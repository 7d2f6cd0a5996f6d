"""What a recipe is: rows, their layout, and how errors are compensated."""

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any, Protocol

import jax

from mq_jax._pytrees import pytree_dataclass, static
from mq_jax.activations import Activations
from mq_jax.compensation import Compensation, RowRecipe
from mq_jax.recipes._learning import Learning


class Rows(RowRecipe, Protocol):
  """A row recipe that knows how its result is stored."""

  def layout(self) -> Any:
    """The layout of its codes; numbers may be traced."""

  def collect(self, whole: Any, fitted: Any, codes: dict) -> dict:
    """The layout's codes, from what the solver returned."""

  def counts(self, weight: jax.Array, codes: dict) -> dict:
    """Numbers for the record, e.g. outliers and saturated weights."""


@pytree_dataclass
class Recipe:
  """How one weight matrix is quantized: plain data, made by a factory.

  Attributes:
    rows: What is done to a group of rows.
    compensation: Options of the error compensation; None for none.
    input_scales: Search for a scale per input before quantization, or None.
    activations: What is done to the inputs that the weight meets, an
      `mq_jax.activations.Activations`; None leaves them as they are.
    learning: How codes are learned, for `mq_jax.learn`; None for not at all.
    name: For tables, e.g. 'gptq'.
    options: The factory's arguments that were given, for tables and plans.
  """

  rows: Any
  compensation: Compensation | None = None
  input_scales: Any = None
  activations: Any = None
  learning: Learning | None = static(None)
  name: str = static('')
  options: tuple[tuple[str, Any], ...] = static(())

  @property
  def label(self) -> str:
    """Name and given options, e.g. 'gptq(bits=2, group=64)'."""
    if not self.options:
      return self.name
    inner = ', '.join(f'{name}={_shown(x)}' for name, x in self.options)
    return f'{self.name}({inner})'

  @property
  def calibrated(self) -> bool:
    """Whether it does better with a Hessian than without."""
    parts = getattr(self.rows, 'parts', ())
    return (
      self.compensation is not None
      or self.input_scales is not None
      or any(part.calibrated for part in parts)
    )

  @property
  def scales_inputs(self) -> bool:
    """Whether it, or a part of it, searches a scale per input."""
    parts = getattr(self.rows, 'parts', ())
    return self.input_scales is not None or any(p.scales_inputs for p in parts)

  def with_activations(self, activations: Any) -> 'Recipe':
    """The same for weights, with these `mq_jax.activations.Activations`."""
    return self._with('activations', activations)

  def with_learning(self, learning: Learning | None) -> 'Recipe':
    """The same, learned in this way, or not at all.

    Raises:
      ValueError: for the rounding 'nearest' of compensated errors.
    """
    nearest = learning is not None and learning.rounding == 'nearest'
    if nearest and self.compensation is not None:
      raise ValueError(
        f"{self.label}: learning with rounding='nearest' rounds weights to "
        'nearest, which undoes error compensation; take '
        "rounding='straight', or a recipe without"
      )
    return self._with('learning', learning)

  def _with(self, name: str, value: Any) -> 'Recipe':
    rest = tuple(x for x in self.options if x[0] != name)
    named = () if value is None else ((name, value),)
    return dataclasses.replace(self, **{name: value}, options=(*rest, *named))

  def to_json(self) -> dict[str, Any]:
    """Plain data: 'recipe', its name, and its options."""
    return {'recipe': self.name} | {n: _plain(x) for n, x in self.options}


def _shown(value: Any) -> Any:
  """An option in a label: recipes by theirs, equal ones in a row counted."""
  if isinstance(value, Recipe | Activations | Learning):
    return value.label
  if not isinstance(value, tuple):
    return value
  runs = itertools.groupby(map(_shown, value))
  runs = [(x, len([*same])) for x, same in runs]
  words = [f'{count} x {x}' if count > 1 else f'{x}' for x, count in runs]
  return f'[{", ".join(words)}]'


def _plain(value: Any) -> Any:
  if isinstance(value, tuple):
    return [_plain(x) for x in value]
  own = isinstance(value, Recipe | Activations | Learning)
  return value.to_json() if own else value


def recipe(factory: Callable[..., Recipe]) -> Callable[..., Recipe]:
  """Name a factory's recipes after it, and after the options given."""

  @functools.wraps(factory)
  def named(*args, **kwargs):
    given = inspect.signature(factory).bind(*args, **kwargs).arguments
    return dataclasses.replace(
      factory(*args, **kwargs),
      name=factory.__name__,
      options=tuple(given.items()),
    )

  return named
