"""Quantizers of rows against plain numpy, and their gradients."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mq_jax import activations, rotations
from mq_jax.activations import MXInt, Tensor, Token, _options, _quantizers

QUANTIZERS = [
  Token(4),
  Token(8, symmetric=False),
  Token(3, clip=0.7),
  Tensor(4, dynamic=True),
  Tensor(8, largest=2.5, clip=0.5),
  MXInt(4, group=8),
  MXInt(8, group=16, exponent='ceil'),
]


def by_default(*quick):
  """All quantizers, those not named as slow tests."""
  return pytest.mark.parametrize(
    'quantizer',
    [
      pytest.param(
        q,
        id=activations.Activations(q).label,
        marks=[] if q in quick else [pytest.mark.slow],
      )
      for q in QUANTIZERS
    ],
  )


# One of each kind.
every = by_default(*QUANTIZERS[:2], *QUANTIZERS[3:6])


@pytest.fixture(scope='module')
def x():
  """Rows [2, 5, 20] with outlier channels, a zero row, a row of one sign."""
  rng = np.random.default_rng(0)
  x = rng.standard_t(5, (2, 5, 20)) * np.where(np.arange(20) % 9 == 4, 8.0, 1.0)
  x[0, 1] = 0.0
  x[1, 2] = np.abs(x[1, 2])
  return x.astype(np.float32)


def f16(scale):
  """Rounded up, give or take."""
  return np.float32(np.float16(np.float32(scale) * np.float32(1 + 2.0**-11)))


def by_numpy(q, x):
  """The same by loops over rows, in the words of the docstrings."""
  if isinstance(q, MXInt):
    top = 2 ** (q.bits - 1) - 1
    out = np.zeros_like(x)
    for *where, start in np.ndindex(*x.shape[:-1], -(-x.shape[-1] // q.group)):
      span = (*where, slice(start * q.group, (start + 1) * q.group))
      group, best = x[span], None
      if not group.any():
        continue
      r = np.float64(np.abs(group).max()) / top
      low = int(np.floor(np.log2(r)))
      tried = [low + d for d in (0, 1, -1, -2, -3)]
      if q.exponent == 'ceil':
        tried = [int(np.ceil(np.log2(r)))]
      for e in tried:
        values = np.clip(np.round(group / 2.0**e), -top, top) * 2.0**e
        error = ((values - group) ** 2).sum()
        if best is None or error < best:
          best, out[span] = error, values
    return out
  rows = x.reshape(-1, x.shape[-1])
  if isinstance(q, Tensor):
    rows = x.reshape(x.shape[0], -1)
  out = np.zeros_like(rows)
  for i, row in enumerate(rows):
    if q.symmetric:
      top, bottom = 2 ** (q.bits - 1) - 1, -(2 ** (q.bits - 1) - 1)
      largest = np.abs(row).max()
      if isinstance(q, Tensor) and not q.dynamic:
        largest = q.largest
      scale, zero = f16(largest * np.float32(q.clip) / top), 0.0
    else:
      top, bottom = 2**q.bits - 1, 0
      low, high = min(row.min(), 0.0), max(row.max(), 0.0)
      scale = f16((high - low) / top)
      zero = np.clip(np.round(-low / scale), 0, top) if scale else 0.0
    if scale:
      levels = np.clip(np.round(row / scale + np.float32(zero)), bottom, top)
      out[i] = (levels - zero) * scale
  return out.reshape(x.shape)


@every
def test_values_are_those_of_numpy(quantizer, x):
  # One level may differ where a value lies in the middle of two, to float32.
  got, want = np.asarray(quantizer(x)), by_numpy(quantizer, x)
  far = np.abs(got - want) > 1e-5 * np.abs(want).max()
  assert far.mean() <= 0.01, np.argwhere(far)
  assert np.abs(want).max() > 0 and not np.array_equal(want, x)


@every
def test_codes_decode_to_the_values_and_fit_their_bits(quantizer, x):
  q = quantizer.encode(x)
  np.testing.assert_array_equal(quantizer.decode(q), quantizer(x))
  level, bits = np.asarray(q.level), quantizer.bits
  symmetric = getattr(quantizer, 'symmetric', True)
  top = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
  assert level.max() <= top
  assert level.min() >= (-top if symmetric else 0)
  assert q.level.shape == x.shape
  assert q.scale.dtype == (jnp.int8 if type(quantizer) is MXInt else 'float16')


def test_bits_count_scales():
  assert Token(4).bits_per_element(32) == 4 + 16 / 32
  assert Token(4, symmetric=False).bits_per_element(32) == 4 + 20 / 32
  assert Tensor(8, largest=1.0).bits_per_element(32) == 8
  assert MXInt(4).bits_per_element(256) == 4 + 8 / 128
  assert MXInt(4).bits_per_element(130) == 4 + 8 * 2 / 130  # a short group
  x = jnp.ones((3, 256))
  assert MXInt(4).encode(x).scale.size * 8 + 4 * x.size == pytest.approx(
    MXInt(4).bits_per_element(256) * x.size
  )


@every
def test_gradient_is_straight_through(quantizer, x):
  """The identity within the range, zero outside, whatever the rounding."""
  weights = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
  loss = lambda x: jnp.sum(quantizer(x) * weights)
  got = np.asarray(jax.grad(loss)(x)) / weights
  q = quantizer.encode(x)
  if type(quantizer) is MXInt:
    scale = np.exp2(np.asarray(q.scale, np.float32))
    scale = np.repeat(scale, quantizer.group, -1)[..., : x.shape[-1]]
  else:
    scale = np.broadcast_to(np.asarray(q.scale, np.float32), x.shape)
  some = scale > 1e-30  # a row of zeros has no scale, and no say
  level = x / np.where(some, scale, 1.0)
  if q.zero is not None:
    level = level + np.asarray(q.zero)
  symmetric = getattr(quantizer, 'symmetric', True)
  top = 2 ** (quantizer.bits - symmetric) - 1
  bottom = -top if symmetric else 0
  inside = some & (level < top - 1e-4) & (level > bottom + 1e-4)
  outside = some & ((level > top + 1e-4) | (level < bottom - 1e-4))
  np.testing.assert_allclose(got[inside], 1.0, rtol=1e-5)
  np.testing.assert_array_equal(got[outside], 0.0)
  assert inside.sum() > 100
  if quantizer in (Token(4), Tensor(4, dynamic=True)):
    # Nothing is clipped: the largest of a row has a gradient, too.
    np.testing.assert_allclose(got[some], 1.0, rtol=1e-5)


def test_gradient_of_a_static_range_is_that_of_finite_differences(x):
  """Of the soft path: what is clipped moves with the range's end."""

  def soft(largest):
    return np.clip(np.abs(x), -largest, largest).sum()

  def hard(largest):
    return jnp.sum(Tensor(8, largest=largest)(np.abs(x)))

  got = float(jax.grad(hard)(jnp.float32(2.0)))
  want = (soft(2.001) - soft(1.999)) / 0.002
  # Besides, LSQ adds the rounding errors of what is inside, |error| < 1/127
  # of the range each.
  inside = (np.abs(x) < 2).sum()
  assert abs(got - want) < 0.5 * inside / 127 + 1e-2
  assert want > 20  # so many are clipped


@by_default(MXInt(4, group=8))
def test_vmap_is_a_loop_and_bits_may_be_traced(quantizer, x):
  loop = np.stack([np.asarray(quantizer(row)) for row in x])
  np.testing.assert_array_equal(jax.vmap(quantizer)(x), loop)
  run = jax.jit(lambda q, x: q(x))
  np.testing.assert_allclose(run(quantizer, x), quantizer(x), rtol=1e-6)
  if not isinstance(quantizer, Tensor):
    one = jax.tree.map(jnp.asarray, quantizer)
    assert run._cache_size() <= 2
    np.testing.assert_array_equal(run(one, x), quantizer(x))


def test_static_scales_ignore_the_rest_of_the_batch(x):
  static, dynamic = Tensor(4, largest=3.0), Tensor(4, dynamic=True)
  louder = x.copy()
  louder[0, 0] *= 100
  np.testing.assert_array_equal(static(louder)[0, 1:], static(x)[0, 1:])
  assert not np.array_equal(dynamic(louder)[0, 2:], dynamic(x)[0, 2:])
  with pytest.raises(ValueError, match='a static scale is missing'):
    Tensor(4)(x)


@pytest.mark.parametrize(
  'options, message',
  [
    ({'format': 'mxint'}, 'nearest are mx_int'),
    ({'format': 'token', 'bits': 1}, 'bits=1 is not a whole number in 2..8'),
    ({'format': 'token', 'group': 3}, "unknown option 'group'"),
    ({'format': 'mx_int', 'group': 0}, 'group=0'),
    ({'format': 'mx_int', 'exponent': 'flor'}, 'not one of floor'),
    ({'format': 'token', 'clip': 0.0}, 'clip=0.0'),
    ({'format': 'tensor', 'symmetric': False}, 'static scales are symmetric'),
    ({'format': 'tensor', 'rotate': True}, 'not gathered'),
    ({'format': 'token', 'smooth': 1.5}, 'smooth=1.5'),
    ({'format': 'token', 'fold': True}, 'nothing to fold'),
    ({'format': 'none', 'sees': 'quantized'}, 'needs a quantizer'),
    ({'format': 'tensor', 'largest': 3.0}, "unknown option 'largest'"),
    ({'bits': 3}, 'a format or'),
  ],
)
def test_bad_options_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    activations.from_json(options)


def test_options_survive_json():
  for spec in (
    'token',
    {'format': 'mx_int', 'bits': 4, 'smooth': 'search', 'rotate': True},
    {'format': 'tensor', 'bits': 8, 'dynamic': True, 'symmetric': False},
    {'format': 'none', 'rotate': True, 'seed': 3},
  ):
    made = activations.from_json(spec)
    assert activations.from_json(made.to_json()) == made
    assert hash(made) == hash(activations.from_json(spec))


def test_examples():
  for module in (_quantizers, _options, rotations):
    found = doctest.testmod(module)
    assert found.attempted and not found.failed, module
