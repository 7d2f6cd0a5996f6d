"""Tests of number formats against NumPy float64 and ml_dtypes."""

import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mq_jax import formats
from mq_jax.formats import (
  E2M1,
  E2M3,
  E3M2,
  E4M3,
  E5M2,
  Float,
  Grid,
  Integer,
  Ternary,
)

NF4_LIKE = np.array([-1.0, -0.7, -0.3, 0.0, 0.08, 0.2, 0.5, 1.0], np.float32)

OCP = {
  'E2M1': (E2M1, ml_dtypes.float4_e2m1fn, 6.0),
  'E2M3': (E2M3, ml_dtypes.float6_e2m3fn, 7.5),
  'E3M2': (E3M2, ml_dtypes.float6_e3m2fn, 28.0),
  'E4M3': (E4M3, ml_dtypes.float8_e4m3fn, 448.0),
  'E5M2': (E5M2, ml_dtypes.float8_e5m2, 57344.0),
}

FORMATS = {
  **{f'int{b}': Integer(b) for b in range(2, 9)},
  **{f'uint{b}': Integer(b, symmetric=False) for b in range(1, 9)},
  'ternary': Ternary(),
  **{f'e{e}m{m}': Float(e, m) for e in range(1, 6) for m in range(0, 8 - e)},
  'e3m4': Float(3, 4),
  'e1m2_bias0': Float(1, 2, bias=0),
  'e4m3_bias11': Float(4, 3, bias=11),
  'e3m3_ieee': Float(3, 3, finite='ieee'),
  **{name: fmt for name, (fmt, _, _) in OCP.items()},
  'grid': Grid(NF4_LIKE),
  'grid_pair': Grid(np.array([-2.0, 5.0], np.float32)),
}

# Of so many widths every second one by default.
each_format = pytest.mark.parametrize(
  'fmt',
  [
    pytest.param(
      fmt,
      id=name,
      marks=[pytest.mark.slow]
      * bool(re.fullmatch('u?int[357]|e[135]m[13]', name)),
    )
    for name, fmt in FORMATS.items()
  ],
)


@pytest.fixture(autouse=True)
def strict():
  with (
    jax.numpy_dtype_promotion('strict'),
    jax.numpy_rank_promotion('raise'),
  ):
    yield


# A format's numbers are leaves, so one compile serves all formats of a class.
round_ = jax.jit(lambda fmt, x: fmt.round(x))
encode_ = jax.jit(lambda fmt, x: fmt.encode(x))
decode_ = jax.jit(lambda fmt, code: fmt.decode(code))
fake_ = jax.jit(formats.fake_quantize)
minmax_ = jax.jit(formats.minmax_scale)
mx_ = jax.jit(formats.fake_quantize_mx, static_argnames='rule')


def codes_of(fmt):
  """Every code of a format, the ones without a number left out."""
  if isinstance(fmt, Integer) and fmt.symmetric or isinstance(fmt, Ternary):
    top = 2 ** (fmt.bits - 1) - 1
    return np.arange(-top, top + 1, dtype=np.int32)
  if isinstance(fmt, Grid):
    return np.arange(len(fmt.levels), dtype=np.int32)
  return np.arange(2**fmt.bits, dtype=np.int32)


def levels_of(fmt):
  """The format's values by the book, float64: independent of `decode`."""
  if isinstance(fmt, Grid):
    return np.asarray(fmt.levels, np.float64)
  if isinstance(fmt, Ternary):
    return np.array([-1.0, 0.0, 1.0])
  if isinstance(fmt, Integer):
    top = 2 ** (fmt.bits - fmt.symmetric) - 1
    return np.arange(-top if fmt.symmetric else 0, top + 1.0)
  e, m = fmt.exponent_bits, fmt.mantissa_bits
  bias = 2 ** (e - 1) - 1 if fmt.bias is None else fmt.bias
  values = []
  for field in range(2**e - (fmt.finite == 'ieee')):
    for mantissa in range(2**m):
      hidden, exponent = (1, field) if field else (0, 1)
      values.append((hidden + mantissa / 2**m) * 2.0 ** (exponent - bias))
  if fmt.finite == 'ocp_e4m3':
    values.pop()
  return np.unique(np.concatenate([np.negative(values), values]))


def probes(fmt):
  """Levels, middles, their float32 neighbours, and points in between."""
  levels = levels_of(fmt).astype(np.float32)
  middles = (levels[1:] + levels[:-1]) / 2
  points = np.concatenate([levels, middles, [0.0, -0.0]]).astype(np.float32)
  rng = np.random.default_rng(0)
  span = levels[-1] - levels[0]
  points = np.concatenate(
    [
      points,
      np.nextafter(points, np.float32(np.inf)),
      np.nextafter(points, np.float32(-np.inf)),
      rng.uniform(levels[0] - 0.1 * span, levels[-1] + 0.1 * span, 500),
      rng.choice(levels, 500) * rng.uniform(0.5, 1.5, 500),
    ]
  )
  points[np.abs(points) < 1e-37] = 0  # subnormals may be flushed
  assert len(points) <= 4096
  return np.resize(points.astype(np.float32), 4096)  # one shape, one compile


def nearest(fmt, x):
  """Brute force over all levels in float64, ties to the even code."""
  levels = levels_of(fmt)
  x = np.clip(np.asarray(x, np.float64), levels[0], levels[-1])
  distance = np.abs(x[:, None] - levels)
  best = distance.min(axis=1, keepdims=True)
  tied = distance == best
  low, high = (
    levels[np.argmax(tied, axis=1)],
    levels[len(levels) - 1 - np.argmax(tied[:, ::-1], axis=1)],
  )
  if isinstance(fmt, Grid):
    return low
  if isinstance(fmt, Float):
    # Even multiple of the spacing between the two neighbours; for a tie of
    # neighbours that spacing is the ulp of the lower binade.
    spacing = np.where(high > low, high - low, 1.0)
  else:
    spacing = 1.0
  return np.where(np.round(low / spacing) % 2 == 0, low, high)


# Every code, every level.


@each_format
def test_every_code_decodes_and_encodes_to_itself(fmt):
  codes = np.resize(codes_of(fmt), 256)
  values = np.asarray(decode_(fmt, codes))
  finite = np.isfinite(values)
  values = np.where(finite, values, 0)
  assert values.dtype == np.float32
  np.testing.assert_array_equal(np.unique(values[finite]), levels_of(fmt))
  encoded = np.asarray(encode_(fmt, values))
  assert encoded.dtype == np.int32
  np.testing.assert_array_equal(encoded[finite], codes[finite])
  np.testing.assert_array_equal(round_(fmt, values), values)
  assert len(codes_of(fmt)) <= 2 ** int(fmt.bits)


@each_format
def test_range_and_saturation(fmt):
  levels = levels_of(fmt)
  assert float(fmt.max) == levels[-1] and float(fmt.min) == levels[0]
  assert fmt.max.dtype == fmt.min.dtype == np.float32
  big = np.array([np.inf, 3e38, 1e30, -np.inf, -3e38, -1e30], np.float32)
  expected = [fmt.max] * 3 + [fmt.min] * 3
  np.testing.assert_array_equal(fmt.round(big), expected)
  np.testing.assert_array_equal(fmt.decode(fmt.encode(big)), expected)


@each_format
def test_round_is_the_brute_force_nearest(fmt):
  x = probes(fmt)
  expected = nearest(fmt, x)
  got = np.asarray(round_(fmt, x), np.float64)
  if isinstance(fmt, Grid):  # promised up to rounding around the middles
    clipped = np.clip(x.astype(np.float64), fmt.levels[0], fmt.levels[-1])
    excess = np.abs(clipped - got) - np.abs(clipped - expected)
    assert np.all(excess <= np.spacing(fmt.levels[-1] - fmt.levels[0]))
  else:
    np.testing.assert_array_equal(got, expected)
  np.testing.assert_array_equal(decode_(fmt, encode_(fmt, x)), got)


@each_format
def test_nan_propagates_and_has_a_code_where_there_is_one(fmt):
  x = jnp.array([jnp.nan, 0.0])
  assert np.isnan(fmt.round(x)).tolist() == [True, False]
  has_nan = isinstance(fmt, Float) and fmt.finite != 'all'
  back = fmt.decode(fmt.encode(x))
  assert np.isnan(back).tolist() == [has_nan, False]
  for rounding in (
    formats.round_straight_through,
    formats.rounder('stochastic', jax.random.key(0)),
  ):
    assert np.isnan(fmt.round(x, rounding)).tolist() == [True, False]


@pytest.mark.parametrize('name', OCP)
def test_ocp_formats_match_ml_dtypes(name):
  fmt, dtype, largest = OCP[name]
  codes = np.arange(2**fmt.bits, dtype=np.uint8)
  theirs = codes.view(dtype).astype(np.float32)
  ours = np.asarray(fmt.decode(codes.astype(np.int32)))
  np.testing.assert_array_equal(ours, theirs)
  np.testing.assert_array_equal(np.signbit(ours[:1]), np.signbit(theirs[:1]))
  assert float(fmt.max) == largest == float(ml_dtypes.finfo(dtype).max)

  x = probes(fmt)
  x = np.clip(x, -largest, largest)  # beyond it ml_dtypes need not saturate
  theirs = x.astype(dtype)
  np.testing.assert_array_equal(round_(fmt, x), theirs.astype(np.float32))
  np.testing.assert_array_equal(encode_(fmt, x), theirs.view(np.uint8))


def test_e4m3_with_all_codes_finite_reaches_480():
  assert float(Float(4, 3).max) == 480.0
  assert float(Float(5, 2).max) == 114688.0
  assert float(Float(3, 4).max) == 31.0  # e3m4 of the MicroScopiQ digest
  assert float(Float(1, 2, bias=0).max) == 3.5  # its e1m2


@pytest.mark.parametrize('fmt', [E4M3, E5M2, Float(7, 2)])
def test_all_powers_of_two_are_exact(fmt):
  x = np.exp2(np.arange(-126, 128, dtype=np.float64)).astype(np.float32)
  levels = levels_of(fmt)
  smallest = levels[levels > 0][0]
  inside = (x >= smallest) & (x <= levels[-1])
  for sign in (1, -1):
    got = np.asarray(round_(fmt, sign * x))
    np.testing.assert_array_equal(got[inside], sign * x[inside])
    # Exactly half the smallest is a tie, which goes to zero.
    np.testing.assert_array_equal(got[x < smallest], 0.0)


def test_signed_zero():
  x = jnp.array([-0.0, 0.0, -0.1])
  assert np.signbit(E2M1.round(x)).tolist() == [True, False, True]
  assert E2M1.encode(x).tolist() == [8, 0, 8]
  assert np.signbit(E2M1.decode(jnp.array([8, 0]))).tolist() == [True, False]
  assert Integer(4).encode(x).tolist() == [0, 0, 0]


def test_no_mantissa_is_the_power_of_two_grid():
  fmt = Float(3, 0)
  assert levels_of(fmt).tolist() == [
    *(-16.0, -8.0, -4.0, -2.0, -1.0, -0.5, -0.25, 0.0),
    *(0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0),
  ]
  got = fmt.round(jnp.array([2.9, 3.0, 3.1]))
  assert got.tolist() == [2.0, 4.0, 4.0]


def test_grid_ties_go_to_the_lower_index():
  fmt = Grid(jnp.array([-3.0, -1.0, 0.0, 4.0]))
  x = jnp.array([-2.0, -0.5, 2.0])
  assert fmt.round(x).tolist() == [-3.0, -1.0, 0.0]
  assert fmt.encode(x).tolist() == [0, 1, 2]
  assert fmt.bits == 2 and Grid(np.arange(5.0)).bits == 3


def test_a_grid_of_integers_is_the_integer_format():
  x = np.random.default_rng(1).normal(size=1000).astype(np.float32) * 5
  grid = Grid(np.arange(-7, 8, dtype=np.float32))
  np.testing.assert_array_equal(grid.round(x), Integer(4).round(x))


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize('fmt', [Integer(4), E2M1, Grid(NF4_LIKE)])
def test_low_precision_inputs_are_computed_in_float32(fmt, dtype):
  x = jnp.linspace(-3.0, 3.0, 50).astype(dtype)
  got = fmt.round(x)
  assert got.dtype == jnp.float32
  np.testing.assert_array_equal(got, fmt.round(x.astype(jnp.float32)))
  fake = formats.fake_quantize(x, fmt, formats.absmax_scale(x, fmt))
  assert fake.dtype == jnp.float32
  slope = jax.grad(lambda x: fmt.round(x, formats.round_straight_through).sum())
  assert slope(x).dtype == dtype


# Rounding.


def test_round_nearest_has_no_gradient_and_straight_through_has_one():
  x = jnp.array([-1.5, -0.2, 0.5, 2.5])
  assert formats.round_nearest(x).tolist() == [-2.0, 0.0, 0.0, 2.0]
  assert formats.round_straight_through(x).tolist() == [-2.0, 0.0, 0.0, 2.0]
  slope = lambda f: jax.grad(lambda x: f(x).sum())(x).tolist()
  assert slope(formats.round_nearest) == [0.0] * 4
  assert slope(formats.round_straight_through) == [1.0] * 4
  stochastic = formats.rounder('stochastic', jax.random.key(0))
  assert slope(stochastic) == [1.0] * 4
  _, tangent = jax.jvp(formats.round_straight_through, (x,), (2 * x,))
  np.testing.assert_array_equal(tangent, 2 * x)


@pytest.mark.parametrize(
  'fmt', [Integer(4), E2M1, E4M3, Ternary(), Grid(NF4_LIKE)]
)
@pytest.mark.parametrize('mode', ['straight_through', 'stochastic'])
def test_surrogate_gradient_is_one_within_the_range(fmt, mode):
  rounding = formats.rounder(mode, jax.random.key(0))
  inside = jnp.linspace(fmt.min, fmt.max, 33)  # both ends included
  outside = jnp.stack([fmt.min * 2 - 1, fmt.max * 2 + 1])
  slope = jax.grad(lambda x: fmt.round(x, rounding).sum())
  np.testing.assert_allclose(slope(inside), 1.0, rtol=1e-6)
  np.testing.assert_array_equal(slope(outside), 0.0)
  flat = jax.grad(lambda x: fmt.round(x).sum())
  np.testing.assert_array_equal(flat(inside), 0.0)


@pytest.mark.parametrize(
  'fmt', [Integer(4), Integer(3, symmetric=False), E2M1, Grid(NF4_LIKE)]
)
def test_stochastic_rounding_is_unbiased_between_neighbours(fmt):
  n = 20_000
  levels = levels_of(fmt)
  x = np.linspace(levels[0], levels[-1], 41).astype(np.float32)
  keys = jax.random.split(jax.random.key(0), n)
  draw = lambda key: fmt.round(x, formats.rounder('stochastic', key))
  drawn = np.asarray(jax.jit(jax.vmap(draw))(keys), np.float64)  # [n, x]
  below = levels[np.searchsorted(levels, x, side='right') - 1]
  above = levels[np.searchsorted(levels, x, side='left')]
  assert np.all((drawn == below) | (drawn == above))
  sigma = (above - below) / 2 / np.sqrt(n)
  assert np.all(np.abs(drawn.mean(axis=0) - x) <= 5 * sigma + 1e-6)


def test_rounder_names_the_alternatives():
  with pytest.raises(ValueError, match="'stocastic'.*'stochastic'"):
    formats.rounder('stocastic')
  with pytest.raises(ValueError, match='needs a key'):
    formats.rounder('stochastic')


# Traced widths.


def test_one_compile_for_all_widths():
  x = np.random.default_rng(0).normal(size=256).astype(np.float32) * 3
  traces = []

  @jax.jit
  def run(fmt, x):
    traces.append(fmt)
    values, exponent = formats.fake_quantize_mx(x, fmt)
    return fmt.round(x), fmt.encode(x), values, exponent

  for bits in (2, 3, 4, 8):
    for got, expected in zip(run(Integer(bits), x), run(Integer(bits), x)):
      np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(
      run(Integer(bits), x)[0], nearest(Integer(bits), x)
    )
  assert len(traces) == 1
  for e, m in ((2, 1), (4, 3), (5, 2), (3, 0)):
    fmt = Float(e, m)
    np.testing.assert_array_equal(run(fmt, x)[0], nearest(fmt, x))
    np.testing.assert_array_equal(run(fmt, x)[1], fmt.encode(x))
  assert len(traces) == 2


@pytest.mark.parametrize('dtype', [np.int32, np.float32])
def test_vmap_over_bits_equals_a_loop(dtype):
  x = np.random.default_rng(0).normal(size=64).astype(np.float32)
  bits = np.array([2, 3, 4, 8], dtype)
  run = lambda bits: formats.fake_quantize_mx(x, Integer(bits))
  values, exponents = jax.jit(jax.vmap(run))(bits)
  for i, b in enumerate((2, 3, 4, 8)):
    expected, exponent = mx_(x, Integer(b))
    np.testing.assert_array_equal(values[i], expected)
    assert exponents[i] == exponent
  stacked = Float(np.array([2, 4]), np.array([1, 3]))
  rounded = jax.jit(jax.vmap(lambda fmt: fmt.round(x)))(stacked)
  np.testing.assert_array_equal(rounded[0], round_(E2M1, x))
  np.testing.assert_array_equal(rounded[1], round_(Float(4, 3), x))


def test_traced_grid_is_learned_through_its_levels():
  x = jnp.array([-0.9, 0.1, 0.9, 3.0])
  fmt = Grid(jnp.array([-1.0, 0.0, 1.0]))
  slope = jax.jit(jax.grad(lambda fmt: fmt.round(x).sum()))(fmt)
  assert slope.levels.tolist() == [1.0, 1.0, 2.0]  # values at each level
  meet = Grid(jnp.array([-1.0, 1.0, 1.0]))
  slope = jax.jit(
    jax.grad(lambda f: f.round(x, formats.round_straight_through).sum())
  )(meet)
  assert np.all(np.isfinite(slope.levels))


# Errors.


def test_errors_say_what_is_wrong():
  with pytest.raises(ValueError, match=r'bits=1 .* 2\.\.24'):
    Integer(1).round(1.0)
  with pytest.raises(ValueError, match='bits=2.5'):
    _ = Integer(2.5).max
  with pytest.raises(ValueError, match='exponent_bits=8'):
    Float(8, 3).round(1.0)
  with pytest.raises(ValueError, match='mantissa_bits=0'):
    Float(4, 0, finite='ocp_e4m3').round(1.0)
  with pytest.raises(ValueError, match="'ocp'.*'ocp_e4m3'"):
    Float(4, 3, finite='ocp')
  with pytest.raises(ValueError, match=r'levels\[0\]=3.0'):
    Grid(jnp.array([3.0, 1.0, 2.0])).round(1.0)
  with pytest.raises(ValueError, match='drop duplicates'):
    _ = Grid(jnp.array([1.0, 1.0])).max
  with pytest.raises(ValueError, match='shape'):
    Grid(jnp.array([1.0])).encode(1.0)
  asymmetric = Integer(4, symmetric=False)
  x = jnp.ones(4)
  for call in (formats.absmax_scale, formats.shared_exponent):
    with pytest.raises(ValueError, match='minmax_scale'):
      call(x, asymmetric)
  with pytest.raises(ValueError, match='Integer'):
    formats.minmax_scale(x, E2M1)
  with pytest.raises(ValueError, match="'flor'.*'floor'"):
    formats.shared_exponent(x, E2M1, rule='flor')
  with pytest.raises(ValueError, match='vmap'):
    formats.shared_exponent(jnp.ones((2, 4)), E2M1)
  with pytest.raises(ValueError, match=r'weight has shape \(3,\)'):
    formats.shared_exponent(x, E2M1, weight=jnp.ones(3))


# Real scales.


@pytest.mark.parametrize('fmt', [Integer(4), E2M1, Ternary(), Grid(NF4_LIKE)])
@pytest.mark.parametrize('mode', ['nearest', 'straight_through'])
def test_an_all_zero_block_is_exact_and_has_finite_gradients(fmt, mode):
  rounding = formats.rounder(mode)

  def run(x, scale):
    return formats.fake_quantize(x, fmt, scale, rounding=rounding).sum()

  zeros = jnp.zeros(8)
  scale = formats.absmax_scale(zeros, fmt)
  assert float(scale) == 0.0
  np.testing.assert_array_equal(
    formats.fake_quantize(zeros, fmt, scale, rounding=rounding), 0.0
  )
  for gradient in jax.jit(jax.grad(run, argnums=(0, 1)))(zeros, scale):
    np.testing.assert_array_equal(gradient, 0.0)
  through = jax.grad(lambda x: run(x, formats.absmax_scale(x, fmt)))
  assert np.all(np.isfinite(jax.jit(through)(zeros)))


@pytest.mark.parametrize('bits', range(2, 9))
def test_minmax_scale_keeps_zero_exact_and_errors_small(bits):
  fmt = Integer(bits, symmetric=False)
  rng = np.random.default_rng(bits)
  for low, high in ((-1.0, 2.0), (0.5, 3.0), (-4.0, -1.0), (-1e-6, 1e3)):
    x = rng.uniform(low, high, 200).astype(np.float32)
    scale, zero = minmax_(x, fmt)
    assert 0 <= zero <= 2**bits - 1 and zero == np.round(zero)
    x[0] = 0
    got = fake_(x, fmt, scale, zero)
    assert got[0] == 0
    assert np.abs(got - x).max() <= scale * 0.5001
    # The oracle, from the definition.
    lo, hi = min(x.min(), 0.0), max(x.max(), 0.0)
    np.testing.assert_allclose(scale, (hi - lo) / (2**bits - 1), rtol=1e-6)
    assert abs(zero + lo / scale) <= 0.5001
  scale, zero = minmax_(jnp.zeros(4), fmt)
  assert (float(scale), float(zero)) == (0.0, 0.0)


def test_gradient_in_the_scale_is_that_of_lsq():
  x = jnp.array([-3.0, -0.33, 0.1, 0.8, 5.0])
  scale = 0.25
  run = lambda s: formats.fake_quantize(
    x, Integer(3), s, rounding=formats.round_straight_through
  )
  got = jax.jit(jax.jacobian(run))(scale)
  v = np.asarray(x) / scale
  expected = np.where(
    np.abs(v) <= 3, np.round(v) - v, np.where(v > 0, 3.0, -3.0)
  )
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


# Shared exponents.


@functools.partial(jax.jit, static_argnums=3)
def exponents_(x, weight, fmt, rule):
  run = lambda x, w: formats.shared_exponent(x, fmt, w, rule)
  return jax.vmap(run)(x, weight)


def oracle_exponent(x, fmt, rule, weight=None):
  """By the definitions, in float64 with NumPy's frexp."""
  x = np.asarray(x, np.float64)
  weight = np.ones_like(x) if weight is None else weight
  x = np.where(weight > 0, x, 0.0)
  absmax, largest = np.abs(x).max(), levels_of(fmt)[-1]
  if absmax == 0:
    return -127
  r = np.log2(absmax / largest)
  ratio = np.frexp(absmax)[0] / np.frexp(largest)[0]
  ocp = int(np.frexp(absmax)[1] - np.frexp(largest)[1])
  floor = ocp - (ratio < 1)
  if rule == 'mse':
    loss = {}
    for d in (0, 1, -1, -2, -3):
      step = 2.0 ** (floor + d)
      error = nearest(fmt, x / step) * step - x
      loss[d] = np.sum(weight * np.square(error))
    best = floor + min(loss, key=loss.get)
  else:
    best = {
      'ocp': ocp,
      'floor': floor,
      'ceil': ocp + (ratio > 1),
      'nearest': int(np.round(r)),
    }[rule]
  return int(np.clip(best, -127, 127))


RULES = ('floor', 'ceil', 'nearest', 'ocp', 'mse')
# Of most kinds only these two by default: floor and ceil are much like ocp.
SOME_RULES = [
  r if r in ('ocp', 'mse') else pytest.param(r, marks=pytest.mark.slow)
  for r in RULES
]
MX_FORMATS = [Integer(2), Integer(4), Integer(8), E2M1, E2M3, E4M3, Ternary()]


@pytest.mark.parametrize('rule', SOME_RULES)
@pytest.mark.parametrize('fmt', MX_FORMATS)
@pytest.mark.parametrize('weighted', [False, True])
def test_shared_exponent_matches_the_oracle(fmt, rule, weighted):
  rng = np.random.default_rng(0)
  scale = 2.0 ** rng.uniform(-80, 80, size=(60, 1))
  x = (rng.standard_t(4, size=(60, 32)) * scale).astype(np.float32)
  x[0] = 0
  x[1, 1:] = 0  # one outlier
  weight = rng.uniform(0, 3, size=x.shape).astype(np.float32)
  weight[:, ::5] = 0
  weight[2] = 0
  got = exponents_(x, weight if weighted else None, fmt, rule)
  assert got.dtype == jnp.int32
  expected = [
    oracle_exponent(row, fmt, rule, w if weighted else None)
    for row, w in zip(x, weight)
  ]
  assert got.tolist() == expected


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('fmt', MX_FORMATS)
def test_exponents_of_exact_powers_of_two(fmt, rule):
  # A block whose largest value is the format's, times every power of two.
  largest = float(fmt.max)
  exponents = np.arange(-100, 100)
  x = np.float32(largest) * np.exp2(exponents).astype(np.float32)
  got = exponents_(x[:, None], np.ones_like(x)[:, None], fmt, rule)
  np.testing.assert_array_equal(got, exponents)


def test_weight_zero_ignores_padding_and_ties_go_to_the_nearest_shift():
  x = jnp.array([1.0, -0.3, 0.2, 1e6])
  weight = jnp.array([1.0, 1.0, 1.0, 0.0])
  for rule in RULES:
    _, alone = mx_(x[:3], Integer(4), rule=rule)
    _, padded = mx_(x, Integer(4), weight, rule=rule)
    # Scaling all weights changes nothing.
    _, scaled = mx_(x, Integer(4), 7 * weight, rule=rule)
    assert alone == padded == scaled
  # 4 = 4 * 2^0 = 2 * 2^1 = 1 * 2^2 without error; r = 4/7 has floor -1.
  assert int(formats.shared_exponent(jnp.array([4.0]), Integer(4))) == 0
  # 1.0 and 2.0 are exact under floor(log2(2/7)) = -2 + {0, 1}.
  assert int(formats.shared_exponent(jnp.array([2.0]), Integer(8))) == -5


@pytest.mark.parametrize('rule', SOME_RULES)
def test_mx_extremes(rule):
  for value, low, high in (
    (3e38, 120, 127),
    (1.2e-38, -127, -120),
    (np.inf, 120, 127),
  ):
    for fmt in (Integer(2), E2M1):
      x = jnp.array([value, 0.0, -value], jnp.float32)
      values, exponent = mx_(x, fmt, rule=rule)
      assert low <= int(exponent) <= high
      assert np.all(np.isfinite(values))
      assert values[1] == 0.0 and values[0] == -values[2]
      if 1e30 < value < np.inf:
        # A Python float: twice the value is no number in float32.
        assert 0.5 * value <= float(values[0]) <= 2 * value
  zeros, exponent = formats.fake_quantize_mx(jnp.zeros(4), E2M1, rule=rule)
  np.testing.assert_array_equal(zeros, 0.0)
  assert int(exponent) == -127
  bad = jnp.array([jnp.nan, 1.0])
  values, exponent = formats.fake_quantize_mx(bad, E2M1, rule=rule)
  assert np.isnan(values[0]) and -127 <= int(exponent) <= 127


def test_mx_gradient_is_finite_at_zero_and_straight_through():
  run = lambda x: formats.fake_quantize_mx(
    x, Integer(4), rule='ceil', rounding=formats.round_straight_through
  )[0].sum()
  assert np.all(np.isfinite(jax.jit(jax.grad(run))(jnp.zeros(4))))
  x = jnp.array([0.1, -3.0, 0.7, 2.2])
  np.testing.assert_array_equal(jax.jit(jax.grad(run))(x), 1.0)
  stochastic = formats.rounder('stochastic', jax.random.key(1))
  values, exponent = formats.fake_quantize_mx(
    x, Integer(4), rounding=stochastic
  )
  np.testing.assert_array_less(np.abs(values - x), 2.0 ** int(exponent))


def test_exp2i_and_ldexp_are_exact():
  exponents = np.arange(-149, 128)
  expected = np.ldexp(1.0, exponents).astype(np.float32)
  got = np.asarray(jax.jit(formats.exp2i)(exponents))
  # Compared as bits: arithmetic might flush subnormals.
  np.testing.assert_array_equal(got.view(np.int32), expected.view(np.int32))
  assert formats.exp2i(jnp.array([-150, 128, 1000])).tolist() == [
    0.0,
    np.inf,
    np.inf,
  ]
  x = np.float32(1.7)
  shifts = np.arange(-126, 127)
  np.testing.assert_array_equal(
    jax.jit(formats.ldexp)(np.full(shifts.shape, x), shifts),
    np.ldexp(x, shifts),
  )
  assert float(jax.jit(formats.ldexp)(1e-30, 200)) == np.ldexp(
    np.float32(1e-30), 200
  )


@pytest.mark.parametrize(
  'bits, rule, published',
  [
    (2, 'ceil', (0.70, 0.70, 0.70)),
    (2, 'nearest', (0.66, 0.41, 0.37)),
    (2, 'floor', (0.24, 0.34, 0.30)),
    (2, 'mse', (0.21, 0.18, 0.19)),
    (4, 'ceil', (0.027, 0.030, 0.025)),
    (4, 'nearest', (0.0129, 0.0150, 0.0184)),
    (4, 'floor', (0.035, 0.016, 0.021)),
    (4, 'mse', (0.0129, 0.0139, 0.0172)),
  ],
)
def test_relative_error_of_microscopiq_inliers(bits, rule, published):
  # MicroScopiQ digest 2.3 S3: blocks of 128, 3-sigma outliers kept exact,
  # distributions of scale 0.02 (their place within an octave matters).
  rng = np.random.default_rng(0)
  shape = (4096, 128)
  for x, expected in zip(
    (rng.normal(size=shape), rng.standard_t(5, shape), rng.laplace(size=shape)),
    published,
  ):
    x = (0.02 * x).astype(np.float32)
    centred = np.abs(x - x.mean(axis=1, keepdims=True))
    inlier = centred <= 3 * x.std(axis=1, keepdims=True)
    weight = inlier.astype(np.float32)
    values = jax.jit(
      jax.vmap(
        lambda x, w: formats.fake_quantize_mx(x, Integer(bits), w, rule)[0]
      )
    )(x, weight)
    error = np.sum(weight * np.square(values - x)) / np.sum(np.square(x))
    assert abs(error - expected) < (0.02 if bits == 2 else 0.003)


# Properties.

blocks = st.lists(
  st.floats(-1e3, 1e3, width=32, allow_subnormal=False),
  min_size=16,
  max_size=16,
).map(lambda values: np.array(values, np.float32))
any_format = st.sampled_from(
  [Integer(2), Integer(4), Integer(8), E2M1, E3M2, E4M3]
)
few = settings(max_examples=30, deadline=None)


@few
@given(blocks, any_format, st.sampled_from(RULES), st.integers(-20, 20))
def test_scaling_by_a_power_of_two_commutes(x, fmt, rule, shift):
  x = np.where(np.abs(x) < 1e-20, 0, x).astype(np.float32)
  factor = np.float32(2.0**shift)
  values, exponent = mx_(x, fmt, rule=rule)
  scaled, moved = mx_(x * factor, fmt, rule=rule)
  np.testing.assert_array_equal(scaled, values * factor)
  assert moved == (exponent + shift if np.any(x) else -127)


@few
@given(blocks, any_format)
def test_quantizing_again_with_the_scale_kept_changes_nothing(x, fmt):
  _, exponent = mx_(x, fmt)
  scale = formats.exp2i(jnp.maximum(exponent, -126))
  once = fake_(x, fmt, scale)
  np.testing.assert_array_equal(fake_(once, fmt, scale), once)


@few
@given(blocks, st.sampled_from([2, 3, 4, 8]))
def test_error_of_unclipped_integers_is_at_most_half_a_step(x, bits):
  x = np.where(np.abs(x) < 1e-20, 0, x).astype(np.float32)
  scale = float(formats.absmax_scale(x, Integer(bits)))
  got = np.asarray(fake_(x, Integer(bits), scale), np.float64)
  assert np.abs(got - x).max() <= scale / 2 * (1 + 1e-4)
  values, exponent = mx_(x, Integer(bits), rule='ceil')
  error = np.abs(np.asarray(values, np.float64) - x).max()
  assert error <= 2.0 ** (int(exponent) - 1)


@few
@given(blocks, any_format)
def test_mse_is_no_worse_than_floor_and_ceil(x, fmt):
  x = np.where(np.abs(x) < 1e-10, 0, x).astype(np.float32)
  loss = {}
  for rule in ('mse', 'floor', 'ceil', 'nearest'):
    values, _ = mx_(x, fmt, rule=rule)
    loss[rule] = np.sum(np.square(np.asarray(values, np.float64) - x))
  best = min(loss.values())
  assert loss['mse'] <= best * (1 + 1e-4)
