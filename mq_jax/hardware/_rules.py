"""How tiles are counted and the slowest of several parts is found.

The formulas of an accelerator are written once. The exact rules count whole
tiles and take the maximum; the relaxed rules let both be differentiated.
"""

import dataclasses
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Rules:
  """Exact rules, or relaxed ones.

  Attributes:
    xp: numpy (float64: whole numbers exact to 2^53) or jax.numpy.
    tail: Share of a tile below which the last tile counts in proportion to
      its filling; 0 counts every begun tile in full, 1 counts a / b tiles.
    temperature: Of the soft maximum, relative to the longest part; 0 is hard.
  """

  xp: ModuleType = np
  tail: Any = 0.0
  temperature: Any = 0.0
  relaxed: bool = False

  def tiles(self, length, size):
    """Tiles of `size` that cover `length`, at least one.

    Exact: the ceiling. Relaxed: continuous in both, equal to the ceiling
    wherever the last tile is filled to `tail` or more or not begun; the
    gradient is 0 on the treads in between and, with tail=1, that of
    length / size everywhere.
    """
    xp = self.xp
    if not self.relaxed:
      # A quotient may be off by one: XLA multiplies by reciprocals. The
      # remainder is exact for whole numbers, and says so.
      full = xp.floor(length / size)
      rest = length - full * size
      full = full + xp.where(rest >= size, 1.0, 0.0)
      full = full - xp.where(rest < 0, 1.0, 0.0)
      return full + xp.where(length - full * size > 0, 1.0, 0.0)
    ratio = length / size
    base = xp.floor(ratio)
    tail = xp.maximum(self.tail, 1e-6)
    return xp.maximum(base + xp.minimum((ratio - base) / tail, 1.0), 1.0)

  def longest(self, *parts):
    """The largest part; softly, it is exceeded by log(parts) temperatures."""
    xp = self.xp
    hard = parts[0]
    for part in parts[1:]:
      hard = xp.maximum(hard, part)
    if not self.relaxed:
      return hard
    # Relative to the longest part, so that the temperature is a share; the
    # shift by it keeps the exponentials from overflowing.
    unit = xp.maximum(self.temperature, 1e-6) * xp.maximum(hard, 1e-30)
    total = sum(xp.exp((part - hard) / unit) for part in parts)
    return hard + unit * xp.log(total)

  def exceeds(self, need, room):
    """1 where `need` is more than `room`, 0 elsewhere; softly in between."""
    xp = self.xp
    if not self.relaxed:
      return xp.where(need > room, 1.0, 0.0)
    logit = xp.log(need + 1.0) - xp.log(room + 1.0)
    width = xp.maximum(self.temperature, 1e-3)
    return 0.5 * (1.0 + xp.tanh(0.5 * logit / width))


def module_of(*trees) -> ModuleType:
  """jax.numpy where a leaf is traced, numpy for plain numbers."""
  leaves = jax.tree.leaves(trees)
  traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
  return jnp if traced else np


def as_floats(xp: ModuleType, *trees):
  """All leaves as the widest floating point that there is."""
  if xp is np:
    convert = lambda x: np.asarray(x, np.float64)
  else:
    convert = lambda x: jnp.asarray(x).astype(float)
  return jax.tree.map(convert, trees)
