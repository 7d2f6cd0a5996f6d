"""Affine codes of keys and values: groups along an axis, float16 side data."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mq_jax import formats

_F16_MAX = 65504.0

# Of each group: a scale and a lowest value, float16 both.
SIDE_BITS = 32


class Codes(NamedTuple):
  """Groups of an array as whole numbers.

  Attributes:
    code: u8, in the shape of the array.
    scale: f16, the array's shape with n / group in place of n.
    low: f16, the value of code 0; like `scale`.
  """

  code: jax.Array
  scale: jax.Array
  low: jax.Array


def _split(x: jax.Array, axis: int, group: int) -> jax.Array:
  """[..., n, ...] -> [..., n / group, group, ...]; axis counts from behind."""
  n = x.shape[axis]
  at = axis % x.ndim
  return x.reshape(*x.shape[:at], n // group, group, *x.shape[at + 1 :])


def check_group(name: str, n: int, group: int) -> None:
  """Refuse a group that does not divide its axis.

  Raises:
    ValueError: that says so.
  """
  if not isinstance(group, int) or group < 1 or n % group:
    raise ValueError(f'{name}: {n} is not a multiple of group={group!r}')


def encode(x: jax.Array, bits: ArrayLike, axis: int, group: int) -> Codes:
  """Round groups of values to 2^bits equally spaced levels.

  Levels begin at the lowest value of a group and end at the highest; both
  that value and the spacing are rounded to float16 first, so the codes are the
  nearest to what is stored. A constant group is exact to float16.

  Args:
    x: Any shape.
    bits: 1..8; may be traced.
    axis: Along which values share a scale.
    group: So many do; divides the axis.

  Returns:
    The codes.

  Raises:
    ValueError: if `group` does not divide the axis.

  Source:
    KIVI, arXiv 2402.02750, section 3.1, asymmetric rounding between minimum
    and maximum. Which of the numbers are rounded first is ours.
  """
  check_group('encode', x.shape[axis], group)
  fmt = formats.Integer(bits, symmetric=False)
  at = axis % x.ndim + 1
  x = _split(x.astype(jnp.float32), axis % x.ndim, group)
  low = jnp.clip(jnp.min(x, at, keepdims=True), -_F16_MAX, _F16_MAX)
  low = low.astype(jnp.float16)
  wide = x - low.astype(jnp.float32)
  # Reciprocals spelled out: XLA divides by a constant that way, by a traced
  # number not, and codes would depend on which of them the width is.
  largest = jnp.max(wide, at, keepdims=True)
  scale = formats.stored_scale(largest * (1.0 / fmt.max))
  step = scale.astype(jnp.float32)
  level = fmt.encode(wide * (1.0 / jnp.where(step > 0, step, 1.0)))
  shape = (*x.shape[: at - 1], -1, *x.shape[at + 1 :])
  return Codes(
    level.astype(jnp.uint8).reshape(shape),
    jnp.squeeze(scale, at),
    jnp.squeeze(low, at),
  )


def decode(codes: Codes, axis: int, group: int) -> jax.Array:
  """Undo `encode`: f32 values, low + code * scale.

  The product is exact in float32 (11 bits times 8), so a fused multiply-add
  gives the same bits as the two operations.
  """
  at = axis % codes.code.ndim
  level = _split(codes.code, at, group).astype(jnp.float32)
  spread = lambda x: jnp.expand_dims(x.astype(jnp.float32), at + 1)
  value = spread(codes.low) + level * spread(codes.scale)
  return value.reshape(codes.code.shape)


def fake_quantize(
  x: jax.Array, bits: ArrayLike, axis: int, group: int
) -> jax.Array:
  """What `decode` makes of the codes of `x`, in its dtype."""
  return decode(encode(x, bits, axis, group), axis, group).astype(x.dtype)


def _along_last(x: jax.Array, ndim: int) -> jax.Array:
  """x [n] behind `ndim` axes of size 1."""
  return x.reshape((1,) * ndim + (-1,))


def pack_bits(code: jax.Array, bits: int) -> jax.Array:
  """Codes along the last axis as a bit stream, first code in the lowest bits.

  Args:
    code: u8[..., n] below 2^bits.
    bits: 1..8; n * bits must be whole bytes.

  Returns:
    u8[..., n * bits / 8], the stream of `layouts`.
  """
  shifts = _along_last(jnp.arange(bits, dtype=jnp.uint8), code.ndim)
  spread = (code[..., None] >> shifts) & jnp.uint8(1)
  flat = spread.reshape(*code.shape[:-1], -1)
  return jnp.packbits(flat, axis=-1, bitorder='little')


def unpack_bits(stream: jax.Array, bits: int) -> jax.Array:
  """Undo `pack_bits`: u8[..., n]."""
  if bits == 8:
    return stream
  if 8 % bits == 0:  # no code lies across two bytes
    shifts = _along_last(jnp.arange(0, 8, bits, dtype=jnp.uint8), stream.ndim)
    parts = (stream[..., None] >> shifts) & jnp.uint8((1 << bits) - 1)
    return parts.reshape(*stream.shape[:-1], -1)
  flat = jnp.unpackbits(stream, axis=-1, bitorder='little')
  parts = flat.reshape(*stream.shape[:-1], -1, bits)
  places = jnp.left_shift(jnp.uint8(1), jnp.arange(bits, dtype=jnp.uint8))
  weights = _along_last(places, stream.ndim)
  return jnp.sum(parts * weights, axis=-1, dtype=jnp.uint8)
