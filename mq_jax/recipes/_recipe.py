"""What a recipe is: rows, their layout, and how errors are compensated."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, Protocol

import jax

from mq_jax._pytrees import pytree_dataclass, static
from mq_jax.compensation import Compensation, RowRecipe


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
    name: For tables, e.g. 'gptq'.
    options: The factory's arguments that were given, for tables.
  """

  rows: Any
  compensation: Compensation | None = None
  input_scales: Any = None
  name: str = static('')
  options: tuple[tuple[str, Any], ...] = static(())

  @property
  def label(self) -> str:
    """Name and given options, e.g. 'gptq(bits=2, group=64)'."""
    if not self.options:
      return self.name
    inner = ', '.join(f'{name}={value}' for name, value in self.options)
    return f'{self.name}({inner})'


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
