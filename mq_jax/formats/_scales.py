"""Real scales."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mq_jax.formats._grids import Format, Integer
from mq_jax.formats._numbers import f32
from mq_jax.formats._rounding import Rounding, round_nearest


def fake_quantize(
  x: ArrayLike,
  fmt: Format,
  scale: ArrayLike,
  zero: ArrayLike = 0.0,
  rounding: Rounding = round_nearest,
) -> jax.Array:
  """Round to a scaled format and back.

  That is (fmt.round(x / scale + zero) - zero) * scale. With
  `round_straight_through` the gradient in `scale` is that of LSQ: the rounding
  error within the range, the range's end outside of it.

  Args:
    x: Values, any shape.
    fmt: The format at unit scale.
    scale: Of a shape that broadcasts against `x`; 0 gives exact zeros and
      zero gradients.
    zero: Zero point, in levels; broadcasts as `scale` does.
    rounding: From an array to its rounded values, see `rounder`.

  Returns:
    f32 values, in the shape of `x`.

  Source:
    LSQ, arXiv 1902.08153, equations 1-3, for the gradient in `scale`.

  Examples:
    >>> fake_quantize(jnp.array([0.2, -0.9]), Integer(3), 0.25)
    Array([ 0.25, -0.75], dtype=float32)
  """
  x, scale, zero = f32(x), f32(scale), f32(zero)
  some = scale != 0
  safe = jnp.where(some, scale, 1.0)  # 0/0 would poison the gradient
  value = (fmt.round(x / safe + zero, rounding) - zero) * safe
  return jnp.where(some, value, 0.0)


def span(fmt: Format) -> jax.Array:
  """The largest magnitude of a format that has negative levels."""
  if isinstance(fmt, Integer) and not fmt.symmetric:
    raise ValueError(
      'an asymmetric Integer has no negative levels; use minmax_scale, or'
      ' symmetric=True'
    )
  return jnp.maximum(fmt.max, -fmt.min)


def absmax_scale(x: ArrayLike, fmt: Format) -> jax.Array:
  """The scale which puts the largest magnitude at the end of the range.

  Args:
    x: One block, any shape.
    fmt: A format with negative values.

  Returns:
    max|x| / fmt.max, f32 scalar; 0 for an all-zero block.

  Raises:
    ValueError: if `fmt` is an asymmetric `Integer`.

  Examples:
    >>> float(absmax_scale(jnp.array([1., -14.]), Integer(4)))
    2.0
  """
  return jnp.max(jnp.abs(f32(x))) / span(fmt)


def minmax_scale(x: ArrayLike, fmt: Integer) -> tuple[jax.Array, jax.Array]:
  """Scale and zero point which map the range of x onto all levels.

  The range is extended to include 0, and the zero point is a level, so zero
  (padding, pruned weights) is exact. The zero point has no gradient.

  Args:
    x: One block, any shape.
    fmt: An `Integer`, usually with `symmetric=False`.

  Returns:
    scale and zero, f32 scalars; scale 0 for an all-zero block.

  Raises:
    ValueError: if `fmt` is not an `Integer`: its levels hold no zero point.

  Examples:
    >>> scale, zero = minmax_scale(jnp.array([-1., 2.]), Integer(2, False))
    >>> float(scale), float(zero)
    (1.0, 1.0)
  """
  if not isinstance(fmt, Integer):
    raise ValueError(f'minmax_scale needs an Integer format, not {fmt}')
  x = f32(x)
  low, high = jnp.minimum(jnp.min(x), 0.0), jnp.maximum(jnp.max(x), 0.0)
  levels = fmt.max - fmt.min
  scale = high / levels - low / levels  # high - low might overflow
  safe = jnp.where(scale != 0, scale, 1.0)
  return scale, fmt.round(fmt.min - low / safe)


_F16_MAX, _F16_TINY = 65504.0, 2.0**-24


def stored_scale(scale: jax.Array) -> jax.Array:
  """A scale as it is stored, float16; never zero unless it was zero.

  Rounding up to float16's smallest subnormal keeps tiny blocks alive; scales
  beyond its range saturate.
  """
  inside = jnp.clip(scale, _F16_TINY, _F16_MAX)
  return jnp.where(scale > 0, inside, 0.0).astype(jnp.float16)
