"""Rows on an integer grid, one scale (and zero point) per group."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from mq_jax import formats, layouts
from mq_jax._pytrees import pytree_dataclass, static

# Shares of the min-max range that a clipping search tries, as GPTQ's and
# AWQ's do; 1 comes first so that a tie changes nothing.
_SHRINK = tuple(1.0 - 0.05 * i for i in range(11))

# Balanced levels that take fewer bits than the next power of two.
LEVELS = (3, 5, 11)


@pytree_dataclass
class IntegerRows:
  """Uniform integers: RTN without compensation, GPTQ with it.

  Attributes:
    bits: Width of an element.
    group: Rows under one scale, per output.
    symmetric: Levels around zero without a zero point, or min-max with one.
    clip: 'none', 'share' for `share` of the range, or 'search' for the share
      with the least saliency-weighted squared error.
    share: Of the range that the levels span; what is beyond is clipped.
    levels: So many around zero in the place of those that `bits` have; odd.

  Codes: row `level` i8 (u8 stored), group `scale` f16[n] and `zero` u8[n].
  """

  bits: jax.typing.ArrayLike
  group: int = static()
  symmetric: bool = static(False)
  clip: str = static('none')
  share: jax.typing.ArrayLike = 1.0
  levels: int = static(0)

  def _format(self):
    if self.levels:
      return formats.Balanced(self.levels)
    return formats.Integer(self.bits, symmetric=self.symmetric)

  def prepare(self, weight, saliency):
    del weight, saliency
    return ()

  def _range(self, rows):
    """Scale as stored, and zero point, of each column of rows [g, n]."""
    fmt = self._format()
    if self.symmetric:
      scale = jax.vmap(lambda x: formats.absmax_scale(x, fmt), 1)(rows)
      scale = formats.stored_scale(scale)
      return scale, jnp.zeros(scale.shape, jnp.float32)
    low = jnp.minimum(jnp.min(rows, axis=0), 0.0)
    scale, _ = jax.vmap(lambda x: formats.minmax_scale(x, fmt), 1)(rows)
    scale = formats.stored_scale(scale)
    # The zero point belongs to the scale as stored.
    wide = scale.astype(jnp.float32)
    safe = jnp.where(wide > 0, wide, 1.0)
    return scale, fmt.round(-low / safe)

  def fit(self, rows, saliency, whole) -> Any:
    del whole
    if self.clip == 'none':
      scale, zero = self._range(rows)
    elif self.clip == 'share':
      scale, zero = self._range(rows * self.share)
    elif self.clip == 'search':
      fmt = self._format()

      def attempt(share):
        scale, zero = self._range(rows * share)
        wide = scale.astype(jnp.float32)[None]
        value = formats.fake_quantize(rows, fmt, wide, zero[None])
        error = jnp.square(value - rows) * saliency[:, None]
        return scale, zero, jnp.sum(error, axis=0)

      scales, zeros, errors = jax.lax.map(attempt, jnp.array(_SHRINK))
      best = jnp.argmin(errors, axis=0)[None]
      pick = lambda x: jnp.take_along_axis(x, best, axis=0)[0]
      scale, zero = pick(scales), pick(zeros)
    else:
      raise ValueError(
        f"IntegerRows: clip={self.clip!r} is not 'none', 'share' or 'search'"
      )
    return {'scale': scale, 'zero': zero.astype(jnp.uint8)}

  def apply(self, row, saliency, whole, fitted, index):
    del saliency, whole, index
    scale = fitted['scale'].astype(jnp.float32)
    zero = fitted['zero'].astype(jnp.float32)
    safe = jnp.where(scale > 0, scale, 1.0)
    level = self._format().round(row / safe + zero)
    level = jnp.where(scale > 0, level, zero)
    value = (level - zero) * scale
    return value, {'level': level.astype(jnp.int16)}

  def layout(self):
    if self.levels:
      return layouts.Balanced(self.levels, self.group)
    return layouts.Integer(self.bits, self.group, self.symmetric)

  def collect(self, whole, fitted, codes):
    del whole
    if self.levels:
      fitted = {'scale': fitted['scale']}
    return {**fitted, **codes}

  def counts(self, weight, codes):
    del weight, codes
    return {}


def check_integer(name: str, bits: int, group: int) -> None:
  """Refuse widths and groups that the layout can't hold."""
  if not isinstance(bits, int) or not 2 <= bits <= 8:
    raise ValueError(f'{name}: bits={bits!r} is not a whole number in 2..8')
  if not isinstance(group, int) or group < 1:
    raise ValueError(f'{name}: group={group!r} is not a whole number >= 1')


def integer_rows(
  name: str, bits: int, group: int, symmetric: bool, clip: str | float
) -> IntegerRows:
  """Rows from the options of a factory, checked."""
  check_integer(name, bits, group)
  return IntegerRows(bits, group, symmetric, *_clipping(name, clip))


def balanced_rows(
  name: str, levels: int, group: int, clip: str | float
) -> IntegerRows:
  """Rows of an odd number of levels around zero, checked."""
  if not isinstance(levels, int) or levels not in LEVELS:
    raise ValueError(f'{name}: levels={levels!r} is not one of {LEVELS}')
  bits = (levels - 1).bit_length()
  check_integer(name, bits, group)
  return IntegerRows(bits, group, True, *_clipping(name, clip), levels)


def _clipping(name: str, clip: str | float) -> tuple[str, float]:
  """Its rule and share."""
  if isinstance(clip, str):
    if clip not in ('none', 'search'):
      raise ValueError(
        f"{name}: clip={clip!r} is not 'none', 'search' or a number"
      )
    return clip, 1.0
  number = isinstance(clip, int | float) and not isinstance(clip, bool)
  if not number or not 0 < clip < math.inf:
    raise ValueError(f'{name}: clip={clip!r} is not a share of the range, > 0')
  return 'share', clip
