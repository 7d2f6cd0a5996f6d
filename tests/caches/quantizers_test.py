import cache_oracles
import jax.numpy as jnp
import numpy as np
import pytest

from mq_jax.caches import quantizers
from mq_jax.layouts import _bits

_quick = lambda f, *static: cache_oracles.jit(f, static_argnums=static)
fake_quantize = _quick(quantizers.fake_quantize, 2, 3)
encode = _quick(quantizers.encode, 2, 3)
decode = _quick(quantizers.decode, 1, 2)
pack_bits = _quick(quantizers.pack_bits, 1)
unpack_bits = _quick(quantizers.unpack_bits, 1)


@pytest.fixture(scope='module')
def x():
  return np.random.default_rng(0).normal(size=(2, 3, 8, 16)).astype(np.float32)


@pytest.mark.parametrize('axis, group', [(2, 4), (-1, 16)])
@pytest.mark.parametrize('bits', [1, 2, 3, 8])
def test_against_numpy(x, bits, axis, group):
  found = fake_quantize(jnp.asarray(x), bits, axis, group)
  expected = cache_oracles.affine(x, bits, axis, group)
  np.testing.assert_array_equal(found, expected)


def test_error_is_at_most_half_a_step_of_the_stored_scale(x):
  codes = encode(jnp.asarray(x), 3, 3, 8)
  step = np.repeat(np.asarray(codes.scale, np.float32), 8, axis=3)
  error = np.abs(decode(codes, 3, 8) - x)
  # The scale and the lowest value may be rounded down: what lies beyond the
  # last level is off by up to 7 of 2^-11 steps, and 2^-11 of the lowest value.
  assert (error <= step * (0.5 + 7 * 2**-11) + np.abs(x).max() * 2**-11).all()
  assert codes.code.max() == 7 and codes.code.min() == 0


def test_constant_groups_and_extremes():
  x = jnp.array([[0.0] * 4, [0.1] * 4, [-3.0] * 4, [1e6, 0, 0, -1e6]])
  found = np.asarray(fake_quantize(x, 2, 1, 4))
  assert (found[0] == 0).all()
  np.testing.assert_allclose(found[1], 0.1, rtol=2**-11)
  assert (found[2] == -3).all()
  assert np.isfinite(found).all()  # beyond float16 it saturates


@pytest.mark.parametrize('bits', [1, 2, 3, 8])
def test_packed_codes_are_the_stream_of_layouts(bits):
  codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 16))
  codes = codes.astype(np.uint8)
  packed = pack_bits(jnp.asarray(codes), bits)
  assert packed.shape == (3, 2 * bits)
  np.testing.assert_array_equal(
    np.asarray(packed).reshape(-1), _bits.pack_bits(codes, bits)
  )
  np.testing.assert_array_equal(unpack_bits(packed, bits), codes)


def test_a_group_that_does_not_fit():
  with pytest.raises(ValueError, match='10 is not a multiple of group=4'):
    quantizers.encode(jnp.zeros((2, 10)), 2, 1, 4)
