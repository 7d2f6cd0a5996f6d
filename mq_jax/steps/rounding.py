"""Rounding the weights of a cluster onto a number format."""

from typing import Any

import jax
import jax.numpy as jnp

from mq_jax import formats
from mq_jax._pytrees import pytree_dataclass, static
from mq_jax.clusters import Cluster


def _rounder(mode: str, cluster: Cluster):
  return formats.rounder(mode, key=cluster.key)


@pytree_dataclass
class RoundToNearest:
  """Round inliers to a symmetric integer grid with one scale per cluster.

  Codes: `level` i8[n], `scale` f32[]. The scale is `clip` times the largest
  magnitude over the largest level.
  """

  bits: jax.typing.ArrayLike = 4
  clip: jax.typing.ArrayLike = 1.0
  rounding: str = static('nearest')

  def __call__(self, cluster: Cluster) -> Cluster:
    fmt = formats.Integer(self.bits, symmetric=True)
    weight = jnp.where(cluster.inlier, cluster.weight, 0.0)
    scale = self.clip * formats.absmax_scale(weight, fmt)
    value = formats.fake_quantize(
      weight, fmt, scale, rounding=_rounder(self.rounding, cluster)
    )
    level = jnp.round(value / jnp.where(scale > 0, scale, 1.0))
    code = {'level': level.astype(jnp.int8), 'scale': scale}
    return cluster._replace(
      value=jnp.where(cluster.inlier, value, cluster.value),
      code={**cluster.code, **code},
    )


@pytree_dataclass
class RoundToFormat:
  """Round inliers to any format with one shared scale per cluster.

  `scale='absmax'` stores a float scale, `scale='exponent'` a power of two
  chosen by `rule` (an MX block). Codes: `index` i32[n] of the format's own
  encoding, and `scale` f32[] or `exponent` i8[].
  """

  fmt: Any
  scale: str = static('absmax')
  rule: str = static('mse')
  rounding: str = static('nearest')

  def __call__(self, cluster: Cluster) -> Cluster:
    weight = jnp.where(cluster.inlier, cluster.weight, 0.0)
    if self.scale == 'exponent':
      importance = jnp.where(cluster.inlier, cluster.saliency, 0.0)
      exponent = formats.shared_exponent(
        weight, self.fmt, importance, self.rule
      )
      scale = formats.exp2i(exponent)
      code = {'exponent': exponent.astype(jnp.int8)}
    elif self.scale == 'absmax':
      scale = formats.absmax_scale(weight, self.fmt)
      code = {'scale': scale}
    else:
      raise ValueError(
        f"RoundToFormat: scale={self.scale!r} is not 'absmax' or 'exponent'"
      )
    value = formats.fake_quantize(
      weight, self.fmt, scale, rounding=_rounder(self.rounding, cluster)
    )
    unit = value / jnp.where(scale > 0, scale, 1.0)
    code['index'] = self.fmt.encode(unit)
    return cluster._replace(
      value=jnp.where(cluster.inlier, value, cluster.value),
      code={**cluster.code, **code},
    )


def round_inlier(
  weight: jax.Array,
  exponent: jax.Array,
  bits: jax.typing.ArrayLike,
  rounding=formats.round_nearest,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Round to `level * 2^exponent`, |level| <= 2^(bits-1) - 1.

  Returns:
    Values, and the codes `sign` (True where negative; zero is positive) and
    `magnitude` u8, all of the shape of `weight`.

  Source:
    MicroScopiQ, arXiv 2411.05282, equations 1 and 2 (MX-INT). Sign and
    magnitude, as its halves need them, is our reading.
  """
  fmt = formats.Integer(bits, symmetric=True)
  level = fmt.round(formats.ldexp(weight, -exponent), rounding)
  code = {
    'sign': level < 0,
    'magnitude': jnp.abs(level).astype(jnp.uint8),
  }
  return formats.ldexp(level, exponent), code


def round_outlier(
  weight: jax.Array,
  exponent: jax.Array,
  bits: jax.typing.ArrayLike,
  rounding=formats.round_nearest,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Round to `+-(1 + m / 2^bits) * 2^exponent`, m in 0..2^bits - 1.

  There is no zero: what is smaller than `2^exponent` becomes just that.

  Returns:
    Values, and the codes `sign` and `magnitude` (= m) u8.

  Source:
    MicroScopiQ, arXiv 2411.05282, section 4: e1m2 at 2 bits and e3m4 at 4,
    with the exponent shared in the micro-block; 3 bits (e2m3) is ours.
  """
  steps = jnp.exp2(jnp.asarray(bits, jnp.float32))
  m = rounding((formats.ldexp(jnp.abs(weight), -exponent) - 1.0) * steps)
  m = jnp.clip(m, 0.0, steps - 1.0)
  sign = weight < 0
  value = formats.ldexp(1.0 + m / steps, exponent)
  code = {'sign': sign, 'magnitude': m.astype(jnp.uint8)}
  return jnp.where(sign, -value, value), code


def outlier_exponent_range(
  bits: jax.typing.ArrayLike,
) -> tuple[jax.Array, jax.Array]:
  """Smallest and largest exponent that an 8-bit MXScale can hold.

  The byte is {level-1 exponent: 9 - bits bits, two's complement; private
  exponent uX: bits - 1 bits, biased by 2^(bits-2) - 1}; it holds their sum,
  e.g. -64..64 at 2 bits and -19..19 at 4.

  Source:
    MicroScopiQ, arXiv 2411.05282, section 4 (7 + 1 and 5 + 3 bits); the bias
    of e3m4 is our choice.
  """
  bits = jnp.asarray(bits, jnp.int32)
  one = jnp.int32(1)
  level = one << (8 - bits)
  top = (one << (bits - 1)) - 1
  bias = (one << (bits - 2)) - 1
  return -level - bias, level - 1 + top - bias


@pytree_dataclass
class RoundInliers:
  """Round inliers to MX-INT: integers under one power-of-two scale.

  Codes: `sign` bool[n], `magnitude` u8[n], `isf` i8[] (exponent). `rule`
  picks the exponent, see `formats.shared_exponent`.

  Source:
    MicroScopiQ, arXiv 2411.05282, equations 1-2, MX-INT-b_128. The paper
    leaves open how the exponent is rounded; the default minimises the
    saliency-weighted squared error.
  """

  bits: jax.typing.ArrayLike = 2
  rule: str = static('mse')
  rounding: str = static('nearest')

  def __call__(self, cluster: Cluster) -> Cluster:
    weight = jnp.where(cluster.inlier, cluster.weight, 0.0)
    importance = jnp.where(cluster.inlier, cluster.saliency, 0.0)
    fmt = formats.Integer(self.bits, symmetric=True)
    exponent = formats.shared_exponent(weight, fmt, importance, self.rule)
    value, code = round_inlier(
      weight, exponent, self.bits, _rounder(self.rounding, cluster)
    )
    code['isf'] = exponent.astype(jnp.int8)
    return cluster._replace(
      value=jnp.where(cluster.inlier, value, cluster.value),
      code={**cluster.code, **code},
    )


@pytree_dataclass
class RoundOutliers:
  """Round the outliers of a micro-block to MX-FP with one shared exponent.

  Needs the codes of `RoundInliers`; sets `sign` and `magnitude` where the
  outliers are, and `osf` i8[], the exponent of the block's outliers.

  With `prescale` the stored exponent is that of outliers already multiplied
  by 2^isf, which moves the range of the byte and changes nothing else.
  `rule='floor'` takes the exponent of the largest outlier, 'mse' the best of
  it and its two neighbours.
  """

  bits: jax.typing.ArrayLike = 2
  rule: str = static('mse')
  prescale: bool = static(True)
  rounding: str = static('nearest')

  def __call__(self, cluster: Cluster) -> Cluster:
    outlier = cluster.outlier
    weight = jnp.where(outlier, cluster.weight, 0.0)
    _, exponent = jnp.frexp(jnp.max(jnp.abs(weight)))
    exponent = jax.lax.stop_gradient(exponent - 1)
    low, high = outlier_exponent_range(self.bits)
    if self.prescale:
      isf = cluster.code['isf'].astype(jnp.int32)
      low, high = low - isf, high - isf
    # -126: smaller powers of two are subnormal and flush to zero.
    low, high = jnp.maximum(low, -126), jnp.minimum(high, 127)
    rounding = _rounder(self.rounding, cluster)
    if self.rule == 'mse':
      candidates = exponent + jnp.array([0, -1, 1], jnp.int32)
      candidates = jnp.clip(candidates, low, high)
      rounded = jax.vmap(lambda e: round_outlier(weight, e, self.bits)[0])(
        candidates
      )
      cost = jnp.where(outlier, cluster.saliency, 0.0)
      error = jnp.sum(cost[None] * jnp.square(rounded - weight[None]), axis=-1)
      exponent = candidates[jnp.argmin(error)]
    elif self.rule != 'floor':
      raise ValueError(
        f"RoundOutliers: rule={self.rule!r} is not 'floor' or 'mse'"
      )
    exponent = jnp.clip(exponent, low, high)
    value, code = round_outlier(weight, exponent, self.bits, rounding)
    code = {
      name: jnp.where(outlier, code[name], cluster.code[name])
      for name in ('sign', 'magnitude')
    }
    code['osf'] = jnp.where(jnp.any(outlier), exponent, 0).astype(jnp.int8)
    return cluster._replace(
      value=jnp.where(outlier, value, cluster.value),
      code={**cluster.code, **code},
    )
