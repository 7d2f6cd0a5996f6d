"""Splitting outliers into two halves, the low one in a pruned slot."""

import jax
import jax.numpy as jnp

from mq_jax import formats
from mq_jax._pytrees import pytree_dataclass
from mq_jax.clusters import Cluster


def _half_bits(bits: jax.typing.ArrayLike) -> jax.Array:
  return jnp.asarray(bits, jnp.int32) // 2


def sign_magnitude(
  sign: jax.Array, magnitude: jax.Array, bits: jax.typing.ArrayLike
) -> jax.Array:
  """Element code {sign: top bit, magnitude: the rest} as uint8."""
  shift = jnp.asarray(bits, jnp.int32) - 1
  code = (sign.astype(jnp.int32) << shift) | magnitude.astype(jnp.int32)
  return code.astype(jnp.uint8)


def _paired(outlier, pruned):
  """Masks bool[n / 2, n] of the slots of each pair's two halves."""
  pair = jnp.arange(outlier.shape[0] // 2, dtype=jnp.int32)[:, None]
  nth = lambda mask: jnp.cumsum(mask, dtype=jnp.int32) - 1
  of_pair = lambda mask: (nth(mask)[None] == pair) & mask[None]
  return of_pair(outlier), of_pair(pruned)


def _slots(mask):
  index = jnp.arange(mask.shape[1], dtype=jnp.int32)
  return jnp.sum(jnp.where(mask, index, 0), axis=1).astype(jnp.uint8)


def pair_slots(
  outlier: jax.Array, pruned: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The slots of upper and lower halves; unused pairs are (0, 0).

  Args:
    outlier: bool[n], at most n / 2 of them.
    pruned: bool[n], as many.

  Returns:
    Two of u8[n / 2]; the i-th outlier is paired with the i-th pruned slot.
  """
  upper, lower = _paired(outlier, pruned)
  return _slots(upper), _slots(lower)


@pytree_dataclass
class SplitOutliers:
  """Give every element of a micro-block its `bits`-bit code.

  An outlier's mantissa of `bits` bits is cut in two; the upper half stays in
  its slot, the lower goes to a pruned slot, and both carry the sign. The i-th
  outlier is paired with the i-th pruned slot; unused pairs are (0, 0).

  Needs codes `sign`, `magnitude` and as many pruned slots as outliers. Adds
  `element` u8[n], `upper` and `lower` u8[n / 2].

  Source:
    MicroScopiQ, arXiv 2411.05282, section 4: halves and permutation list. The
    order of pairing and the code of an empty pair are our choice.
  """

  bits: jax.typing.ArrayLike = 2

  def __call__(self, cluster: Cluster) -> Cluster:
    outlier, pruned = cluster.outlier, ~cluster.kept
    is_upper, is_lower = _paired(outlier, pruned)
    sign = cluster.code['sign']
    magnitude = cluster.code['magnitude'].astype(jnp.int32)
    half = _half_bits(self.bits)
    # What the lower slots receive from the outlier they are paired with.
    pick = lambda x: jnp.sum(jnp.where(is_upper, x[None], 0), axis=1)
    give = lambda x: jnp.sum(jnp.where(is_lower, x[:, None], 0), axis=0)
    partner_sign = give(pick(sign.astype(jnp.int32))) > 0
    partner_low = give(pick(magnitude & ((1 << half) - 1)))
    sign = jnp.where(pruned, partner_sign, sign)
    magnitude = jnp.where(
      outlier, magnitude >> half, jnp.where(pruned, partner_low, magnitude)
    )
    code = {
      'element': sign_magnitude(sign, magnitude, self.bits),
      'upper': _slots(is_upper),
      'lower': _slots(is_lower),
    }
    return cluster._replace(code={**cluster.code, **code})


def _outlier_value(mantissa, osf, bits):
  steps = jnp.exp2(jnp.asarray(bits, jnp.float32))
  return formats.ldexp(1.0 + mantissa.astype(jnp.float32) / steps, osf)


def _fields(element, bits):
  """Sign and magnitude of element codes."""
  shift = jnp.asarray(bits, jnp.int32) - 1
  code = element.astype(jnp.int32)
  return (code >> shift) > 0, code & ((1 << shift) - 1)


def merge_outliers(
  element: jax.Array,
  upper: jax.Array,
  lower: jax.Array,
  isf: jax.Array,
  osf: jax.Array,
  bits: jax.typing.ArrayLike,
) -> jax.Array:
  """Decode one micro-block as `SplitOutliers` left it.

  Args:
    element: Element codes. u8[n].
    upper: Slot of each outlier's upper half. u8[n / 2].
    lower: Slot of its lower half; equal to `upper` where the pair is unused.
    isf: Exponent of the inliers. i8[].
    osf: Exponent of the outliers. i8[].
    bits: Width of an element.

  Returns:
    Values f32[n]; pruned slots are zero.
  """
  index = jnp.arange(element.shape[0], dtype=jnp.uint8)
  used = (upper != lower)[:, None]
  is_upper = used & (upper[:, None] == index[None])  # [pair, slot]
  is_lower = used & (lower[:, None] == index[None])
  sign, magnitude = _fields(element, bits)

  low = jnp.sum(jnp.where(is_lower, magnitude[None], 0), axis=1)
  low = jnp.sum(jnp.where(is_upper, low[:, None], 0), axis=0)
  mantissa = (magnitude << _half_bits(bits)) | low
  outlier = _outlier_value(mantissa, osf, bits)
  inlier = formats.ldexp(magnitude.astype(jnp.float32), isf)
  value = jnp.where(jnp.any(is_upper, axis=0), outlier, inlier)
  value = jnp.where(jnp.any(is_lower, axis=0), 0.0, value)
  return jnp.where(sign, -value, value)


def split_unpruned(
  sign: jax.Array,
  magnitude: jax.Array,
  outlier: jax.Array,
  bits: jax.typing.ArrayLike,
) -> tuple[jax.Array, jax.Array]:
  """Element codes, and the outliers' lower halves kept apart; u8[n] each.

  The ablation without pruning: no slot is freed for the lower halves.
  """
  half = _half_bits(bits)
  wide = magnitude.astype(jnp.int32)
  low = jnp.where(outlier, wide & ((1 << half) - 1), 0)
  high = jnp.where(outlier, wide >> half, wide)
  code = sign_magnitude(sign, high, bits)
  return code, sign_magnitude(sign & outlier, low, bits)


def merge_unpruned(
  element: jax.Array,
  outlier: jax.Array,
  low: jax.Array,
  isf: jax.Array,
  osf: jax.Array,
  bits: jax.typing.ArrayLike,
) -> jax.Array:
  """Decode one micro-block of `split_unpruned`; f32[n]."""
  sign, magnitude = _fields(element, bits)
  _, low = _fields(low, bits)
  mantissa = (magnitude << _half_bits(bits)) | low
  inlier = formats.ldexp(magnitude.astype(jnp.float32), isf)
  value = jnp.where(outlier, _outlier_value(mantissa, osf, bits), inlier)
  return jnp.where(sign, -value, value)
