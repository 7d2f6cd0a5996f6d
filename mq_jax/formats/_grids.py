"""Formats: grids at unit scale, and their codes."""

from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from mq_jax._pytrees import pytree_dataclass, static
from mq_jax.formats._numbers import (
  check_option,
  exp2i,
  f32,
  saturate,
  split,
  whole,
)
from mq_jax.formats._rounding import Rounding, round_nearest


class Format(Protocol):
  """What every format offers; `decode(encode(x)) == round(x)`.

  Attributes:
    bits: Stored bits per element.
    min: Smallest representable value, f32 scalar.
    max: Largest representable value, f32 scalar.
  """

  bits: ArrayLike

  @property
  def min(self) -> jax.Array: ...

  @property
  def max(self) -> jax.Array: ...

  def round(
    self, x: ArrayLike, rounding: Rounding = round_nearest
  ) -> jax.Array:
    """The nearest representable value, f32 of the shape of `x`."""

  def encode(self, x: ArrayLike) -> jax.Array:
    """The int32 code of `round(x)`."""

  def decode(self, code: ArrayLike) -> jax.Array:
    """The f32 value of a code."""


class _Levels:
  """Consecutive integers `min..max`; the code is the signed level itself."""

  def round(
    self, x: ArrayLike, rounding: Rounding = round_nearest
  ) -> jax.Array:
    return rounding(saturate(f32(x), self.min, self.max))

  def encode(self, x: ArrayLike) -> jax.Array:
    value = self.round(x)
    return jnp.where(jnp.isnan(value), 0.0, value).astype(jnp.int32)

  def decode(self, code: ArrayLike) -> jax.Array:
    return f32(code)


@pytree_dataclass
class Integer(_Levels):
  """Integers of `bits` bits.

  The code is the level as an int32; its low `bits` bits are what is stored,
  two's complement when symmetric.

  Attributes:
    bits: 2..24 (1..24 when asymmetric; float32 holds no more). May be traced,
      as an int or a float, so one program serves all widths.
    symmetric: True for levels -(2**(bits-1) - 1) .. 2**(bits-1) - 1, without
      two's complement's most negative one, so 2 bits are ternary. False for
      0 .. 2**bits - 1, to be used with a zero point (see `minmax_scale`).

  Examples:
    >>> Integer(4).round(jnp.array([-9., 2.5, 3.5, 6.8]))
    Array([-7.,  2.,  4.,  7.], dtype=float32)
    >>> Integer(4, symmetric=False).encode(jnp.array([-9., 20.]))
    Array([ 0, 15], dtype=int32)
  """

  bits: ArrayLike
  symmetric: bool = static(True)

  @property
  def max(self) -> jax.Array:
    bits = whole('bits', self.bits, 2 if self.symmetric else 1, 24)
    return exp2i(bits - int(self.symmetric)) - 1.0

  @property
  def min(self) -> jax.Array:
    return -self.max if self.symmetric else f32(0.0)


@pytree_dataclass
class Balanced(_Levels):
  """An odd number of levels around zero, e.g. -2 .. 2 for 5.

  Attributes:
    levels: 3 or more.

  Examples:
    >>> Balanced(5).round(jnp.array([-3., 0.4, 1.6]))
    Array([-2.,  0.,  2.], dtype=float32)
  """

  levels: int = static()

  @property
  def bits(self) -> int:
    """Of a level stored by itself."""
    return (self.levels - 1).bit_length()

  @property
  def max(self) -> jax.Array:
    return f32((self.levels - 1) // 2)

  @property
  def min(self) -> jax.Array:
    return -self.max


@pytree_dataclass
class Ternary(_Levels):
  """{-1, 0, 1}, the levels and codes of `Integer(2)`.

  Stored in 2 bits; log2(3) = 1.585 is what a denser packing could reach with
  equally frequent levels.

  Examples:
    >>> Ternary().round(jnp.array([-3., 0.4, 0.6]))
    Array([-1.,  0.,  1.], dtype=float32)
  """

  @property
  def bits(self) -> int:
    return 2

  @property
  def max(self) -> jax.Array:
    return f32(1.0)

  @property
  def min(self) -> jax.Array:
    return f32(-1.0)


_FINITE = ('all', 'ocp_e4m3', 'ieee')


@pytree_dataclass
class Float:
  """Binary floating point: a sign, exponent bits, mantissa bits.

  Subnormals are kept and ties go to the even significand. With no mantissa
  bit this is the signed power-of-two grid and zero (ties then go up).

  Attributes:
    exponent_bits: 1..7; may be traced.
    mantissa_bits: 0..16; may be traced.
    bias: Of the exponent; None is the usual 2**(exponent_bits-1) - 1. The
      smallest and largest value must stay normal float32 numbers.
    finite: Which codes are numbers. 'all': each one (OCP's FP4 and FP6).
      'ocp_e4m3': all but the two of largest magnitude, which are NaN.
      'ieee': the top exponent means infinity and NaN (E5M2). `decode` knows
      them, but unlike IEEE 754 overflow gives the largest number, never inf.

  Source:
    OCP Microscaling Formats v1.0, section 5.3; saturation is its option for
    conversions to FP8 and its rule for FP6 and FP4.

  Examples:
    >>> E2M1.round(jnp.array([0.3, 2.4, 5.0, 100.0]))
    Array([0.5, 2. , 4. , 6. ], dtype=float32)
    >>> E2M1.encode(jnp.array([0.5, 2., -6.0]))
    Array([ 1,  4, 15], dtype=int32)
    >>> float(E4M3.max), float(E5M2.max), float(Float(4, 3).max)
    (448.0, 57344.0, 480.0)
  """

  exponent_bits: ArrayLike
  mantissa_bits: ArrayLike
  bias: ArrayLike | None = None
  finite: str = static('all')

  def __post_init__(self):
    check_option('finite', self.finite, _FINITE)

  def _fields(self) -> tuple[jax.Array, jax.Array, jax.Array]:
    # Without a mantissa bit a top code for NaN would take a whole exponent.
    least = 0 if self.finite == 'all' else 1
    E = whole('exponent_bits', self.exponent_bits, 1, 7)
    M = whole('mantissa_bits', self.mantissa_bits, least, 16)
    if self.bias is None:
      return E, M, (1 << (E - 1)) - 1
    return E, M, whole('bias', self.bias, -126, 126)

  @property
  def bits(self) -> ArrayLike:
    return 1 + self.exponent_bits + self.mantissa_bits

  @property
  def max(self) -> jax.Array:
    E, M, bias = self._fields()
    top = (1 << E) - 1 - bias - int(self.finite == 'ieee')
    unused = 2.0 if self.finite == 'ocp_e4m3' else 1.0
    return (2.0 - unused * exp2i(-M)) * exp2i(top)

  @property
  def min(self) -> jax.Array:
    return -self.max

  def round(
    self, x: ArrayLike, rounding: Rounding = round_nearest
  ) -> jax.Array:
    _, M, bias = self._fields()
    x = saturate(f32(x), self.min, self.max)
    # Spacing within the binade of x; subnormals share that of the first one.
    ulp = jnp.maximum(split(x)[0], 1 - bias) - M
    return rounding(x * exp2i(-ulp)) * exp2i(ulp)

  def encode(self, x: ArrayLike) -> jax.Array:
    E, M, bias = self._fields()
    value = self.round(x)
    nan = jnp.isnan(value)
    value = jnp.where(nan, 0.0, value)
    exponent = jnp.maximum(split(value)[0], 1 - bias)
    significand = (jnp.abs(value) * exp2i(M - exponent)).astype(jnp.int32)
    # A normal significand has its hidden bit at M, which adds the 1 that turns
    # the binade's number into the exponent field; a subnormal has none.
    code = ((exponent - (1 - bias)) << M) + significand
    code += jnp.signbit(value).astype(jnp.int32) << (E + M)
    if self.finite == 'all':
      return code
    return jnp.where(nan, (1 << (E + M)) - 1, code)

  def decode(self, code: ArrayLike) -> jax.Array:
    E, M, bias = self._fields()
    code = jnp.asarray(code, jnp.int32)
    field = (code >> M) & ((1 << E) - 1)
    mantissa = code & ((1 << M) - 1)
    significand = mantissa + jnp.where(field > 0, 1 << M, 0)
    exponent = jnp.maximum(field, 1) - bias - M
    value = significand.astype(jnp.float32) * exp2i(exponent)
    if self.finite != 'all':
      top = field == (1 << E) - 1
      nan = mantissa > 0
      if self.finite == 'ocp_e4m3':
        top = nan = top & (mantissa == (1 << M) - 1)
      value = jnp.where(top, jnp.where(nan, jnp.nan, jnp.inf), value)
    return jnp.where((code >> (E + M)) & 1 > 0, -value, value)


E2M1, E2M3, E3M2 = Float(2, 1), Float(2, 3), Float(3, 2)  # OCP FP4 and FP6
E4M3, E5M2 = Float(4, 3, finite='ocp_e4m3'), Float(5, 2, finite='ieee')


@pytree_dataclass
class Grid:
  """Any increasing levels; the code is the index of the nearest one.

  Ties go to the lower index. Rounding happens between the two levels around a
  value, so stochastic rounding has no bias and a straight-through gradient
  reaches values and levels alike. A value which float32 hardly tells from the
  middle of two levels may go to either.

  Attributes:
    levels: f32[n], n >= 2, strictly increasing; may be traced or learned.

  Raises:
    ValueError: at use, if the levels have the wrong shape or, unless traced,
      do not increase.

  Examples:
    >>> Grid(jnp.array([-1., 0., 4.])).round(jnp.array([-9., 2.0, 2.1]))
    Array([-1.,  0.,  4.], dtype=float32)
  """

  levels: ArrayLike

  def _checked(self) -> jax.Array:
    levels = f32(self.levels)
    if levels.ndim != 1 or levels.size < 2:
      raise ValueError(
        f'Grid levels have shape {levels.shape}; give one axis of at least'
        ' two levels (and vmap over several grids)'
      )
    if not isinstance(levels, jax.core.Tracer):
      values = np.asarray(levels)
      wrong = np.flatnonzero(~(values[1:] > values[:-1]))
      if wrong.size:
        i = int(wrong[0])
        raise ValueError(
          f'Grid levels must increase: levels[{i}]={values[i]} is not below'
          f' levels[{i + 1}]={values[i + 1]}; sort them and drop duplicates'
        )
    return levels

  @property
  def bits(self) -> int:
    return (jnp.size(self.levels) - 1).bit_length()

  @property
  def max(self) -> jax.Array:
    return self._checked()[-1]

  @property
  def min(self) -> jax.Array:
    return self._checked()[0]

  def _locate(self, x):
    """The index below x, the levels around x, where x lies between them."""
    levels = self._checked()
    x = saturate(f32(x), levels[0], levels[-1])
    # Tables are small: comparing with all levels beats a loop of bisections.
    i = jnp.searchsorted(levels, x, side='right', method='compare_all') - 1
    i = jnp.clip(i, 0, levels.size - 2)
    low, high = levels[i], levels[i + 1]
    # Learned levels may meet.
    width = jnp.where(high > low, high - low, 1.0)
    return i, low, high, (x - low) / width

  def round(
    self, x: ArrayLike, rounding: Rounding = round_nearest
  ) -> jax.Array:
    _, low, high, fraction = self._locate(x)
    up = rounding(fraction)  # one half goes to the even 0, the lower index
    return (1.0 - up) * low + up * high  # exact for 0 and 1

  def encode(self, x: ArrayLike) -> jax.Array:
    i, _, _, fraction = self._locate(x)
    return i.astype(jnp.int32) + (fraction > 0.5).astype(jnp.int32)

  def decode(self, code: ArrayLike) -> jax.Array:
    return self._checked()[jnp.asarray(code, jnp.int32)]
