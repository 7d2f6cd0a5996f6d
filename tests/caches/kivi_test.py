import cache_oracles
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_oracles import affine, attention, drive, softmax_rows, text

from mq_jax import caches

SMALL = dict(group=4, value_group=8, residual=8)
T, FIRST = 24, 7


read = cache_oracles.jit(lambda policy, cache: policy.read(cache))


def read_at(k, v, length, bits, group, value_group, residual):
  """What KIVI reads of k, v [t, d] once `length` tokens are there."""
  keys, values = k[:length].copy(), v[:length].copy()
  block = residual or group
  n = length // block * block
  if n:
    keys[:n] = affine(k[:n], bits, 0, group)
  n = max(0, length - residual)
  values[:n] = affine(v[:n], bits, 1, value_group)
  return keys, values


@pytest.fixture(scope='module')
def given():
  return text(t=T)


@pytest.fixture(
  scope='module',
  params=[8, pytest.param(0, marks=pytest.mark.slow)],
  ids=['window', 'no window'],
)
def driven(given, request):
  options = SMALL | {'residual': request.param}
  policy = caches.kivi(2, **options)
  return options, policy, drive(policy, given, FIRST, T)


def test_reads_what_kivi_says_at_every_step(given, driven):
  options, _, (_, cache, (k, v, stored)) = driven
  for step, length in enumerate(range(FIRST, T)):
    for b in range(2):
      for g in range(2):
        keys, values = read_at(
          given.k[b, :, g], given.v[b, :, g], length, 2, **options
        )
        np.testing.assert_array_equal(k[step, b, g, :length], keys)
        np.testing.assert_array_equal(v[step, b, g, :length], values)
    assert stored[step, :, :, :length].all()
    assert not stored[step, :, :, length:].any()
  assert cache.length.tolist() == [T, T]


def test_attends_to_old_tokens_as_kept_and_to_the_new_one_exactly(
  given, driven
):
  options, _, (y, _, _) = driven
  # The first tokens come together and read each other exactly.
  exact = attention(given.q, given.k, given.v)
  np.testing.assert_allclose(y[:, :FIRST], exact[:, :FIRST], atol=1e-5)
  for length in range(FIRST, T):
    for b in range(2):
      for h in range(4):
        k, v = given.k[b, :, h // 2], given.v[b, :, h // 2]
        keys, values = read_at(k, v, length, 2, **options)
        keys = np.vstack([keys, k[length]])
        values = np.vstack([values, v[length]])
        p = softmax_rows(given.q[b, length : length + 1, h], keys, True)
        # Sums of 24 float32 products.
        np.testing.assert_allclose(y[b, length, h], (p @ values)[0], atol=1e-5)
  assert np.abs(y - exact).max() > 0.01  # it did something


@pytest.mark.parametrize(
  'bits, value_bits, dtype',
  [(3, 4, 'bfloat16'), pytest.param(8, 1, 'float32', marks=pytest.mark.slow)],
)
def test_packed_is_the_same_to_the_bit(given, bits, value_bits, dtype):
  options = SMALL if bits != 8 else SMALL | {'residual': 0}
  simulated = caches.kivi(bits, value_bits, **options)
  packed = caches.kivi(bits, value_bits, **options, packed=True)
  y, cache, (k, v, stored) = drive(simulated, given, FIRST, T, dtype=dtype)
  py, pcache, (pk, pv, pstored) = drive(packed, given, FIRST, T, dtype=dtype)
  np.testing.assert_array_equal(pstored, stored)
  there = np.asarray(stored)[..., None]
  as_f32 = lambda x: np.where(there, x.astype(np.float32), 0)
  np.testing.assert_array_equal(as_f32(pk), as_f32(k))
  np.testing.assert_array_equal(as_f32(pv), as_f32(v))
  np.testing.assert_array_equal(py, y)
  # Bits as counted are the bytes that are there, and of both the same.
  counted = simulated.bits(cache)
  assert packed.bits(pcache) == counted
  buffers = packed.buffers(pcache)
  assert 8 * sum(b.size for b in buffers.values()) == counted.total
  size = lambda *ends: (
    8 * sum(b.size for name, b in buffers.items() if name.endswith(ends))
  )
  assert size('code') == counted.codes
  assert size('scale', 'low') == counted.scales
  assert size('rest') == counted.full
  assert counted.elements == 2 * 2 * 2 * T * 16


@pytest.mark.parametrize('length', [0, 7, 8, 9, 15, 16, 17])
def test_bits_at_the_ends_of_the_window(length):
  policy = caches.kivi(2, **SMALL)
  cache = policy.init(1, 1, T, 16, jnp.float16)
  keys, values = length // 8 * 8, max(0, length - 8)
  found = policy.bits(type(cache)(cache.k, cache.v, jnp.array([length])))
  assert found.codes == 2 * 16 * (keys + values)
  assert found.scales == 32 * (keys // 4 * 16 + values * 2)
  assert found.full == 16 * 16 * (2 * length - keys - values)
  assert found.side == 0 and found.elements == 2 * 16 * length


def test_limit_of_a_long_text():
  # 2 bits, and 32 of scale and lowest value for 32 numbers: 3 bits.
  policy = caches.kivi(2, residual=0)
  shape = jax.eval_shape(lambda: policy.init(1, 8, 4096, 128, jnp.float16))
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shape)
  full = type(zeros)(zeros.k, zeros.v, np.array([4096]))
  assert policy.bits(full).ebw == 3


@pytest.mark.slow
def test_a_row_is_what_it_is_alone(given):
  """Rows of different lengths, padded on either side, side by side."""
  policy = caches.kivi(2, **SMALL)
  lengths = (7, 4)
  order = list(range(7)), [-1, 0, -1, 1, 2, 3, -1]
  place = lambda x: np.stack(
    [row[np.maximum(o, 0)] for row, o in zip(x, order)]
  )
  positions = np.array(order, np.int32)
  # Behind the prompts each row goes on where it is.
  later = np.arange(12)[None] + np.array(lengths)[:, None]
  join = lambda x: np.concatenate(
    [place(x), np.take_along_axis(x, later[..., None, None], axis=1)], axis=1
  )
  rows = type(given)(
    *map(join, given[:3]),
    np.concatenate([positions, later], 1).astype(np.int32),
  )
  y, cache, _ = drive(policy, rows, 7, T)
  assert cache.length.tolist() == [19, 16]
  for b, length in enumerate(lengths):
    one = type(given)(*(x[b : b + 1, : length + 12] for x in given))
    alone, cache_alone, _ = drive(policy, one, length, T)
    mine = np.asarray(y[b])[np.asarray(rows.positions[b]) >= 0]
    # Attention over more masked tokens may sum in another order.
    np.testing.assert_allclose(mine, alone[0], atol=1e-6)
    row = jax.tree.map(lambda x, b=b: x[b : b + 1], cache)
    ours, theirs = (read(policy, c) for c in (row, cache_alone))
    np.testing.assert_array_equal(ours[2], theirs[2])
    for x, z in zip(ours[:2], theirs[:2], strict=True):
      there = np.asarray(ours[2])[..., None]
      np.testing.assert_array_equal(
        np.where(there, x, 0), np.where(there, z, 0)
      )


def test_widths_are_swept_by_vmap(given, driven):
  options, _, (y, _, _) = driven
  if not options['residual']:
    pytest.skip('the other window is enough')

  @cache_oracles.jit
  @jax.vmap
  def run(bits):
    policy = caches.Kivi(bits, bits, **options)
    return cache_oracles.traced(policy, given, FIRST, T)[0]

  two, four = run(jnp.array([2, 4]))
  # Attention of more rows together may sum in another order.
  np.testing.assert_allclose(two, y, atol=1e-6)
  exact = attention(given.q, given.k, given.v)
  assert np.abs(four - exact).mean() < 0.5 * np.abs(two - exact).mean()


@pytest.mark.parametrize(
  'name', ['full', pytest.param('kivi', marks=pytest.mark.slow)]
)
def test_windows(given, name):
  # 8 bits: the window matters far more than rounding does.
  options = {} if name == 'full' else {'bits': 8, **SMALL}
  policy = caches.make(name, **options)
  y, _, _ = drive(policy, given, FIRST, T, window=5)
  exact = attention(given.q, given.k, given.v, window=5)
  assert np.abs(exact - attention(given.q, given.k, given.v)).max() > 0.3
  np.testing.assert_allclose(y, exact, atol=1e-5 if name == 'full' else 0.05)


@pytest.mark.parametrize(
  'packed', [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_what_has_no_room_is_lost_and_shows(given, packed):
  policy = caches.kivi(2, **SMALL, packed=packed)
  _, cache, (k, _, _) = drive(policy, given, FIRST, 12)
  assert cache.length.tolist() == [T, T]
  _, _, stored = read(policy, cache)
  assert stored.shape[-1] == 12 and stored.all()
  fits = type(given)(*(x[:, :12] for x in given))
  _, cache_12, _ = drive(policy, fits, FIRST, 12)
  for x, z in zip(read(policy, cache), read(policy, cache_12), strict=True):
    np.testing.assert_array_equal(x, z)
  assert policy.bits(cache) == policy.bits(cache_12)


@pytest.mark.parametrize(
  'options, message',
  [
    ({'bits': 9}, 'bits=9 .* 1..8'),
    ({'bits': 2, 'value_bits': 0}, 'value_bits=0'),
    ({'group': 0}, 'group=0'),
    ({'residual': 48}, 'residual=48 is not a multiple of group=32'),
    ({'residual': -1}, 'residual=-1'),
    ({'packed': True, 'bits': 2.5}, 'bits=2.5'),
    ({'blocks': 3}, "unknown option 'blocks'; known are bits"),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match=message):
    caches.make('kivi', **options)


def test_bad_shapes(given):
  with pytest.raises(ValueError, match='kivi cache: capacity=0'):
    caches.kivi().init(1, 1, 0, 64, jnp.float32)
  with pytest.raises(ValueError, match='80 is not a multiple of group=32'):
    caches.kivi().init(1, 1, 64, 80, jnp.float32)
  with pytest.raises(ValueError, match='no whole bytes'):
    caches.kivi(3, packed=True, value_group=4).init(1, 1, 64, 4, jnp.float32)
  with pytest.raises(ValueError, match='24 tokens at once, but capacity is 16'):
    drive(caches.full(), given, T, 16)
  with pytest.raises(ValueError, match="no cache 'kivy'; nearest: kivi"):
    caches.make('kivy')
