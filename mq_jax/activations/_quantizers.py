"""Quantizers of the inputs of matmuls: pure functions of rows [..., m, k].

Each is a frozen pytree. Called on rows it gives the values that they are
rounded to, float32 of the same shape; `encode` gives what an integer matmul
would read, `decode` takes it back to the very same values, and
`bits_per_element` counts what is stored or moved, scales included.

Gradients are straight-through: the identity where a value lies within the
range of its grid, zero outside. Scales taken from the rows count as constants
in it; a static scale gets LSQ's gradient (see `formats.fake_quantize`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mq_jax import clusters, formats
from mq_jax._pytrees import pytree_dataclass, static
from mq_jax.formats import Rounding, round_straight_through

SCALE_BITS = 16  # a float16
EXPONENT_BITS = 8  # a power of two, E8M0


class QuantizedActivation(NamedTuple):
  """Rows as an integer matmul reads them.

  Attributes:
    level: Of the quantizer's integer format. i32[..., m, k].
    scale: f16[..., m, 1] or [..., 1, 1]; for `MXInt` the exponents of its
      powers of two, i8[..., m, ceil(k / group)].
    zero: Zero point, in levels; None if symmetric. f32, as `scale`.
  """

  level: jax.Array
  scale: jax.Array
  zero: jax.Array | None = None


def _stored(scale: jax.Array) -> jax.Array:
  """As a float16 holds it, rounded up, in float32.

  Rounded to nearest, the largest value of half of all rows would lie outside
  of the range, and get no gradient.
  """
  half_ulp = 1.0 + 2.0**-11
  return formats.stored_scale(scale * half_ulp).astype(jnp.float32)


class _Scaled:
  """What quantizers with a real scale and a zero point have in common."""

  def _format(self):
    return formats.Integer(self.bits, symmetric=self.symmetric)

  def __call__(
    self, x: jax.Array, rounding: Rounding = round_straight_through
  ) -> jax.Array:
    """The rows' values on their grids. f32[..., m, k]."""
    x = x.astype(jnp.float32)
    scale, zero = self._scale(x)
    zero = jnp.zeros_like(scale) if zero is None else zero
    return formats.fake_quantize(x, self._format(), scale, zero, rounding)

  def encode(self, x: jax.Array) -> QuantizedActivation:
    """Levels, scales and zero points of rows [..., m, k]."""
    x = x.astype(jnp.float32)
    scale, zero = self._scale(x)
    rest = jnp.zeros_like(scale) if zero is None else zero
    safe = jnp.where(scale > 0, scale, 1.0)
    # A scale of zero: what decodes to zero.
    shifted = jnp.where(scale > 0, x / safe + rest, rest)
    level = self._format().encode(shifted)
    return QuantizedActivation(level, scale.astype(jnp.float16), zero)

  def decode(self, q: QuantizedActivation) -> jax.Array:
    """The values that `encode` stands for."""
    zero = 0.0 if q.zero is None else q.zero
    return (q.level.astype(jnp.float32) - zero) * q.scale.astype(jnp.float32)


@pytree_dataclass
class Token(_Scaled):
  """Integers with one float16 scale a row, taken from the row itself.

  Attributes:
    bits: Width, 2..8; a leaf, may be traced.
    symmetric: Levels around zero; or min-max with a zero point, whose range is
      extended to zero.
    clip: Share of the row's range that the levels span, in (0, 1].

  Examples:
    >>> Token(2)(jnp.array([[4.0, -3.0, 1.0, 0.0]]))
    Array([[ 4., -4.,  0.,  0.]], dtype=float32)
  """

  bits: ArrayLike = 8
  symmetric: bool = static(True)
  clip: ArrayLike = 1.0

  def _scale(self, x):
    """Scale as stored, in float32, and zero point; [..., m, 1]."""
    x = jax.lax.stop_gradient(x) * self.clip
    fmt = self._format()
    rows = x.reshape(-1, x.shape[-1])
    shape = (*x.shape[:-1], 1)
    if self.symmetric:
      scale = jax.vmap(lambda r: formats.absmax_scale(r, fmt))(rows)
      wide = _stored(scale).reshape(shape)
      return wide, None
    scale, _ = jax.vmap(lambda r: formats.minmax_scale(r, fmt))(rows)
    wide = _stored(scale).reshape(shape)
    # The zero point belongs to the scale as stored.
    low = jnp.minimum(jnp.min(x, axis=-1, keepdims=True), 0.0)
    return wide, fmt.round(-low / jnp.where(wide > 0, wide, 1.0))

  def bits_per_element(self, k: int) -> ArrayLike:
    """Bits of an element, with its share of what a row of k has in front."""
    zero = 0 if self.symmetric else self.bits
    return self.bits + (SCALE_BITS + zero) / k


@pytree_dataclass
class Tensor(_Scaled):
  """Integers with one float16 scale for all rows of a tensor.

  Dynamic: taken from the rows [..., m, k] at hand, each [m, k] its own.
  Static: given, as calibration found it; what is beyond saturates. What else
  is in a batch then has no say in the result.

  Attributes:
    bits: Width, 2..8; a leaf, may be traced.
    symmetric: Levels around zero; or min-max with a zero point (dynamic only).
    clip: Share of the range that the levels span, in (0, 1].
    dynamic: Whether the scale is taken from the rows.
    largest: Magnitude at the end of the static range, before `clip`; a leaf.
      Scalar, or one for each [m, k]. None until `choose` has set it.
  """

  bits: ArrayLike = 8
  symmetric: bool = static(True)
  clip: ArrayLike = 1.0
  dynamic: bool = static(False)
  largest: Any = None

  def __post_init__(self):
    if not self.dynamic and not self.symmetric:
      raise ValueError(
        'Tensor: static scales are symmetric; use symmetric=True or '
        'dynamic=True'
      )

  def _scale(self, x):
    if not self.dynamic:
      if self.largest is None:
        raise ValueError(
          'Tensor: a static scale is missing; set `largest`, or let '
          'mq_jax.activations.choose find it from calibration statistics'
        )
      largest = jnp.asarray(self.largest, jnp.float32)
      real = largest * self.clip / self._format().max
      stored = _stored(real)
      # As stored, but its rounding is no step for gradients.
      scale = real + jax.lax.stop_gradient(stored - real)
      if scale.ndim and scale.shape != x.shape[:-2]:
        raise ValueError(
          f'Tensor: scales of shape {scale.shape} for rows of shape {x.shape}'
        )
      return scale.reshape(*scale.shape, *[1] * (x.ndim - scale.ndim)), None
    x = jax.lax.stop_gradient(x)
    whole = x.reshape(*x.shape[:-2], 1, -1)
    return Token(self.bits, self.symmetric, self.clip)._scale(whole)

  def bits_per_element(self, k: int) -> ArrayLike:
    """Bits of an element; the one scale of a tensor is not counted."""
    del k
    return self.bits


@pytree_dataclass
class MXInt:
  """Integers under a power of two shared by `group` neighbours of a row.

  Attributes:
    bits: Width, 2..8; a leaf, may be traced.
    group: Elements along k that share a scale; the last may be fewer.
    exponent: How the power of two is chosen, see `formats.shared_exponent`.
      Relative squared errors on Gaussian rows, measured: at 4 bits 'mse'
      0.019, 'nearest' 0.020, 'ceil' 0.025, 'floor' 0.027; at 8 bits 'mse' and
      'ceil' 8e-5, 'nearest' 3e-3, 'floor' 1e-2, for what they clip.

  Source:
    MicroScopiQ, arXiv 2411.05282: activations are MX-INT-8_128 or
    MX-INT-4_128 along the reduction. That scales are of the row at hand, and
    how their exponent is rounded, are our choices.

  Examples:
    >>> MXInt(4, group=2, exponent='ceil')(jnp.array([[7.0, 2.4, 0.5, 0.3]]))
    Array([[7.  , 2.  , 0.5 , 0.25]], dtype=float32)
  """

  bits: ArrayLike = 8
  group: int = static(128)
  exponent: str = static('mse')

  def __call__(
    self, x: jax.Array, rounding: Rounding = round_straight_through
  ) -> jax.Array:
    """The rows' values on their groups' grids. f32[..., m, k]."""
    fmt = formats.Integer(self.bits)
    one = lambda g: formats.fake_quantize_mx(
      g, fmt, rule=self.exponent, rounding=rounding
    )[0]
    cut = clusters.cut(x.astype(jnp.float32), self.group)
    groups = jax.vmap(one)(cut.reshape(-1, self.group))
    return clusters.join(groups.reshape(cut.shape), x.shape[-1])

  def encode(self, x: jax.Array) -> QuantizedActivation:
    """Levels and exponents of rows [..., m, k]."""
    fmt = formats.Integer(self.bits)

    def one(group):
      exponent = formats.shared_exponent(group, fmt, rule=self.exponent)
      return fmt.encode(formats.ldexp(group, -exponent)), exponent

    cut = clusters.cut(x.astype(jnp.float32), self.group)
    level, exponent = jax.vmap(one)(cut.reshape(-1, self.group))
    level = clusters.join(level.reshape(cut.shape), x.shape[-1])
    return QuantizedActivation(
      level, exponent.reshape(cut.shape[:-1]).astype(jnp.int8)
    )

  def decode(self, q: QuantizedActivation) -> jax.Array:
    """The values that `encode` stands for."""
    cut = clusters.cut(q.level.astype(jnp.float32), self.group)
    values = formats.ldexp(cut, q.scale.astype(jnp.int32)[..., None])
    return clusters.join(values, q.level.shape[-1])

  def bits_per_element(self, k: int) -> ArrayLike:
    """Bits of an element, with its share of its group's exponent."""
    groups = clusters.number_of_clusters(k, self.group)
    return self.bits + EXPONENT_BITS * groups / k
