"""Number formats, rounding and scales.

A format is a frozen pytree which rounds values to its own grid, at unit
scale. Scales stand beside it: a real one (`fake_quantize`) or a power of two
shared by a block (`fake_quantize_mx`). Everything is pure and works under
`jit`, `vmap` and `grad`; computations and results are float32, whatever the
input, so a caller who wants bfloat16 back casts once, knowingly.

Three facts hold for every format:

* Values beyond the range, infinities included, saturate. With a rounding that
  passes gradients, they pass within the range, its two ends included, and go
  to the range (hence to the scale) outside of it.
* NaN stays NaN in `round`, so that a diverged run shows. Only a format with a
  code for NaN can `encode` it; the others give the code of zero (`Grid`: some
  index).
* Widths are leaves, used as whole numbers without a gradient. A traced width
  is not checked.

float32 subnormals may count as zero, as XLA flushes them on most devices.
"""

import difflib
from collections.abc import Callable
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from mq_jax._pytrees import pytree_dataclass, static

Rounding = Callable[[jax.Array], jax.Array]

E8M0_MIN, E8M0_MAX = -127, 127  # exponents of an MX scale; OCP MX v1.0, 5.4.1


def _f32(x: ArrayLike) -> jax.Array:
  return jnp.asarray(x, jnp.float32)


def _check_option(kind: str, name: str, options: tuple[str, ...]) -> None:
  if name not in options:
    near = difflib.get_close_matches(str(name), options, n=2) or options
    raise ValueError(
      f'unknown {kind} {name!r}; did you mean {" or ".join(map(repr, near))}?'
      f' (all: {", ".join(options)})'
    )


def _whole(name: str, value: ArrayLike, low: int, high: int) -> jax.Array:
  """A width as int32 scalar, checked when it is a plain number."""
  if isinstance(value, int | float | np.number):
    if not low <= value <= high or value != round(value):
      raise ValueError(
        f'{name}={value} must be a whole number in {low}..{high}'
      )
  return jnp.asarray(jnp.round(jnp.asarray(value)), jnp.int32)


# Rounding.


@jax.custom_jvp
def _with_gradient_of(x, value):
  """`value`, with the gradient of `x`."""
  del x
  return value


@_with_gradient_of.defjvp
def _with_gradient_of_jvp(primals, tangents):
  return primals[1], tangents[0]


def round_nearest(x: jax.Array) -> jax.Array:
  """Round to the nearest integer, ties to even; the gradient is zero."""
  return jnp.round(x)


def round_straight_through(x: jax.Array) -> jax.Array:
  """Round as `round_nearest`; the surrogate gradient is the identity.

  Source:
    Bengio et al., arXiv 1308.3432, the straight-through estimator.

  Examples:
    >>> float(jax.grad(round_straight_through)(0.3))
    1.0
  """
  return _with_gradient_of(x, jnp.round(x))


def round_stochastic(key: jax.Array, x: jax.Array) -> jax.Array:
  """Round up with probability equal to the fraction, so without bias.

  The surrogate gradient is the identity, which is the gradient of the mean.

  Args:
    key: A JAX random key. Under `vmap` map over keys as well, or all blocks
      get the same noise.
    x: Values, any shape.

  Returns:
    An integer neighbour of `x`, with mean `x`. Same shape and dtype.
  """
  low = jnp.floor(x)
  up = jax.random.uniform(key, x.shape, x.dtype) < x - low
  # NaN must pass: `up` is False there and `low` is NaN.
  return _with_gradient_of(x, low + up.astype(x.dtype))


def rounder(
  mode: Literal['nearest', 'straight_through', 'stochastic'],
  key: jax.Array | None = None,
) -> Rounding:
  """Choose a rounding by name.

  Args:
    mode: 'nearest', 'straight_through' or 'stochastic'.
    key: Random key, needed by 'stochastic' and ignored by the others.

  Returns:
    A function from an array to its rounded values.

  Raises:
    ValueError: if the mode is unknown, or 'stochastic' has no key.

  Examples:
    >>> rounder('nearest')(jnp.array([0.5, 1.5, 2.6]))
    Array([0., 2., 3.], dtype=float32)
  """
  _check_option('rounding', mode, ('nearest', 'straight_through', 'stochastic'))
  if mode == 'nearest':
    return round_nearest
  if mode == 'straight_through':
    return round_straight_through
  if key is None:
    raise ValueError("rounding 'stochastic' needs a key; pass key=...")
  return lambda x: round_stochastic(key, x)


# Exact powers of two. `exp2` and `log2` may be off by an ulp on an
# accelerator, which would move a value to the wrong side of a binade.


def exp2i(exponent: ArrayLike) -> jax.Array:
  """2**exponent, exactly, for integer exponents.

  Args:
    exponent: Integers, any shape; below -149 the result is 0, above 127 inf.

  Returns:
    float32 powers of two, subnormal below 2**-126. Same shape.

  Examples:
    >>> exp2i(jnp.array([-1, 0, 10]))
    Array([5.000e-01, 1.000e+00, 1.024e+03], dtype=float32)
  """
  exponent = jnp.asarray(exponent, jnp.int32)
  normal = (jnp.clip(exponent, -126, 128) + 127) << 23
  subnormal = 0x400000 >> jnp.clip(-127 - exponent, 0, 31)
  bits = jnp.where(exponent < -126, subnormal, normal)
  return lax.bitcast_convert_type(bits, jnp.float32)


def ldexp(x: ArrayLike, exponent: ArrayLike) -> jax.Array:
  """x * 2**exponent for |exponent| <= 252, exact unless it over/underflows.

  Args:
    x: Values, any shape.
    exponent: Integers, of a shape that broadcasts against `x`.

  Returns:
    float32 products; differentiable in `x`.
  """
  exponent = jnp.asarray(exponent, jnp.int32)
  half = exponent >> 1  # both factors stay normal where 2**exponent is not
  return _f32(x) * exp2i(half) * exp2i(exponent - half)


def _split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """|x| = significand * 2**exponent, significand in [1, 2).

  Zeros and subnormals have exponent -127, infinities and NaN 128.
  """
  bits = lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
  significand = lax.bitcast_convert_type(
    (bits & 0x7FFFFF) | 0x3F800000, jnp.float32
  )
  return (bits >> 23) - 127, significand


def _saturate(x: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
  # Not `jnp.clip`: its gradient at the ends is 1/2, and a scale taken from the
  # largest value puts that value exactly there. Comparisons let NaN through.
  return jnp.where(x > high, high, jnp.where(x < low, low, x))


# Formats.


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
    return rounding(_saturate(_f32(x), self.min, self.max))

  def encode(self, x: ArrayLike) -> jax.Array:
    value = self.round(x)
    return jnp.where(jnp.isnan(value), 0.0, value).astype(jnp.int32)

  def decode(self, code: ArrayLike) -> jax.Array:
    return _f32(code)


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
    bits = _whole('bits', self.bits, 2 if self.symmetric else 1, 24)
    return exp2i(bits - int(self.symmetric)) - 1.0

  @property
  def min(self) -> jax.Array:
    return -self.max if self.symmetric else _f32(0.0)


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
    return _f32(1.0)

  @property
  def min(self) -> jax.Array:
    return _f32(-1.0)


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
    _check_option('finite', self.finite, _FINITE)

  def _fields(self) -> tuple[jax.Array, jax.Array, jax.Array]:
    # Without a mantissa bit a top code for NaN would take a whole exponent.
    least = 0 if self.finite == 'all' else 1
    E = _whole('exponent_bits', self.exponent_bits, 1, 7)
    M = _whole('mantissa_bits', self.mantissa_bits, least, 16)
    if self.bias is None:
      return E, M, (1 << (E - 1)) - 1
    return E, M, _whole('bias', self.bias, -126, 126)

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
    x = _saturate(_f32(x), self.min, self.max)
    # Spacing within the binade of x; subnormals share that of the first one.
    ulp = jnp.maximum(_split(x)[0], 1 - bias) - M
    return rounding(x * exp2i(-ulp)) * exp2i(ulp)

  def encode(self, x: ArrayLike) -> jax.Array:
    E, M, bias = self._fields()
    value = self.round(x)
    nan = jnp.isnan(value)
    value = jnp.where(nan, 0.0, value)
    exponent = jnp.maximum(_split(value)[0], 1 - bias)
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
    levels = _f32(self.levels)
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
    x = _saturate(_f32(x), levels[0], levels[-1])
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


# Real scales.


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
  x, scale, zero = _f32(x), _f32(scale), _f32(zero)
  some = scale != 0
  safe = jnp.where(some, scale, 1.0)  # 0/0 would poison the gradient
  value = (fmt.round(x / safe + zero, rounding) - zero) * safe
  return jnp.where(some, value, 0.0)


def _range(fmt: Format) -> jax.Array:
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
  return jnp.max(jnp.abs(_f32(x))) / _range(fmt)


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
  x = _f32(x)
  low, high = jnp.minimum(jnp.min(x), 0.0), jnp.maximum(jnp.max(x), 0.0)
  levels = fmt.max - fmt.min
  scale = high / levels - low / levels  # high - low might overflow
  safe = jnp.where(scale != 0, scale, 1.0)
  return scale, fmt.round(fmt.min - low / safe)


# Shared power-of-two scales (microscaling, MX).

_RULES = ('floor', 'ceil', 'nearest', 'ocp', 'mse')

# Nearest first, then up: argmin keeps the first of equals.
_MSE_SHIFTS = np.array([0, 1, -1, -2, -3], np.int32)


def shared_exponent(
  x: ArrayLike,
  fmt: Format,
  weight: ArrayLike | None = None,
  rule: str = 'mse',
) -> jax.Array:
  """The exponent of the power-of-two scale that a block shares.

  With r = max|x| / fmt.max, the range needed over the range there is:

  * 'floor' floor(log2 r), clips the largest values;
  * 'ceil' ceil(log2 r), never clips;
  * 'nearest' log2 r rounded;
  * 'ocp' floor(log2 max|x|) - floor(log2 fmt.max);
  * 'mse' floor(log2 r) + d, d in -3..1, of least squared error of x rounded
    to nearest. Ties go to the smaller |d|, then to the larger d.

  Exponents are compared as integers, so powers of two fall on the right side.

  Args:
    x: One block, shape [b].
    fmt: A format with negative values, at unit scale.
    weight: Cost of each squared error, >= 0, shape [b]; where 0 the value is
      ignored in every rule (padding, pruned). None weighs all equally.
    rule: One of the names above.

  Returns:
    int32 scalar in -127..127, the range of E8M0, and low enough for
    fmt.max * 2**exponent to be finite; -127 for an all-zero block.

  Raises:
    ValueError: if `x` has not one axis, `weight` not the shape of `x`, `rule`
      is unknown, or `fmt` is an asymmetric `Integer`.

  Source:
    'ocp': OCP Microscaling Formats v1.0, section 6.3. 'floor', 'ceil',
    'nearest': readings of MicroScopiQ, arXiv 2411.05282, equation 1, which
    does not give the rounding. 'mse' is ours.

  Examples:
    >>> x = jnp.array([0.1, -0.2, 3.0])
    >>> int(shared_exponent(x, Integer(2), rule='floor'))
    1
    >>> int(shared_exponent(x, Integer(2), rule='ceil'))
    2
  """
  _check_option('exponent rule', rule, _RULES)
  x = _f32(x)
  if x.ndim != 1:
    raise ValueError(f'x has shape {x.shape}; give one block [b], use vmap')
  if weight is not None:
    weight = _f32(weight)
    if weight.shape != x.shape:
      raise ValueError(f'weight has shape {weight.shape}, x has {x.shape}')
    x = jnp.where(weight > 0, x, 0.0)

  absmax = jnp.max(jnp.abs(x))
  exponent, significand = _split(absmax)
  fmt_exponent, fmt_significand = _split(_range(fmt))
  ocp = exponent - fmt_exponent  # log2 r = ocp + log2 of ratio, in (1/2, 2)
  ratio = significand / fmt_significand
  floor = ocp - (significand < fmt_significand).astype(jnp.int32)
  if rule == 'ocp':
    chosen = ocp
  elif rule == 'floor':
    chosen = floor
  elif rule == 'ceil':
    chosen = ocp + (significand > fmt_significand).astype(jnp.int32)
  elif rule == 'nearest':
    up, down = ratio > np.sqrt(2.0), ratio < np.sqrt(0.5)
    chosen = ocp + up.astype(jnp.int32) - down.astype(jnp.int32)
  else:
    # Relative to 2**floor, so that no square over- or underflows. [d, b]
    y = ldexp(x, -floor)[None, :]
    step = np.exp2(_MSE_SHIFTS).astype(np.float32)[:, None]
    error = jnp.square(fmt.round(y * (1 / step)) * step - y)
    if weight is not None:
      error *= weight[None, :]
    chosen = floor + jnp.asarray(_MSE_SHIFTS)[jnp.argmin(error.sum(axis=1))]
  highest = E8M0_MAX - jnp.maximum(fmt_exponent, 0)
  chosen = jnp.clip(chosen, E8M0_MIN, highest)
  return jnp.where(absmax > 0, chosen, E8M0_MIN)


def fake_quantize_mx(
  x: ArrayLike,
  fmt: Format,
  weight: ArrayLike | None = None,
  rule: str = 'mse',
  rounding: Rounding = round_nearest,
) -> tuple[jax.Array, jax.Array]:
  """Round one block to a format under a shared power-of-two scale, and back.

  Args:
    x: One block, shape [b].
    fmt: A format with negative values, at unit scale.
    weight: As in `shared_exponent`; ignored values are still rounded.
    rule: As in `shared_exponent`.
    rounding: From an array to its rounded values, see `rounder`. The exponent
      is always chosen with rounding to nearest, and has no gradient. At
      exponent -127 (an all-zero block) gradients may underflow to zero.

  Returns:
    f32 values [b] and the int32 exponent.

  Raises:
    ValueError: as `shared_exponent`.

  Examples:
    >>> values, exponent = fake_quantize_mx(jnp.array([3., -1.]), E2M1)
    >>> values, int(exponent)
    (Array([ 3., -1.], dtype=float32), -1)
  """
  exponent = shared_exponent(x, fmt, weight, rule)
  values = fmt.round(ldexp(x, -exponent), rounding)
  return ldexp(values, exponent), exponent
