import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from mq_jax import layouts, rotations


@pytest.mark.parametrize('k', [1, 2, 6, 64, 352])
def test_hadamard_is_that_of_scipy_in_blocks(k):
  sizes = rotations.blocks_of(k)
  assert sum(sizes) == k
  want = scipy.linalg.block_diag(
    *[scipy.linalg.hadamard(n) / np.sqrt(n) for n in sizes]
  )
  got = np.asarray(rotations.hadamard(jnp.eye(k)))
  np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize('axis', [0, 1, -1])
def test_rotation_is_orthogonal_and_undone(axis):
  x = jax.random.normal(jax.random.key(0), (12, 24, 36))
  signs = rotations.draw_signs(1, 12)  # of 36 and 24: three and two runs
  turned = rotations.rotate(x, signs, axis)
  np.testing.assert_allclose(jnp.sum(turned**2), jnp.sum(x**2), rtol=1e-5)
  np.testing.assert_allclose(
    rotations.unrotate(turned, signs, axis), x, atol=1e-5
  )
  assert np.abs(turned - x).max() > 1
  assert not np.array_equal(signs, rotations.draw_signs(2, 12))


def test_an_outlier_is_spread_evenly():
  x = jnp.zeros(64).at[5].set(8.0)
  turned = rotations.rotate(x, rotations.draw_signs(0, 64))
  np.testing.assert_allclose(np.abs(turned), 1.0, rtol=1e-6)


def test_the_layout_stores_signs_bit_exactly():
  k, n = 20, 4
  rng = np.random.default_rng(0)
  inner = layouts.Integer(4, 10, True)
  layout = layouts.Rotated(inner, k)
  signs = rotations.draw_signs(3, k)
  codes = {
    'level': jnp.asarray(rng.integers(-7, 8, (k, n)), jnp.int16),
    'scale': jnp.asarray(rng.random((2, n)), jnp.float16),
    'zero': jnp.zeros((2, n), jnp.uint8),
    'input_sign': signs,
  }
  buffers = layout.pack(codes, k, n)
  assert sum(b.nbytes for b in buffers.values()) == layout.nbytes(codes, k, n)
  assert layout.nbytes(codes, k, n) == inner.nbytes(codes, k, n) + 3
  again = layout.unpack(buffers, k, n)
  want = layout.decode(codes, k, n)
  np.testing.assert_array_equal(layout.decode(again, k, n), want)
  np.testing.assert_allclose(
    rotations.rotate(want, signs, 0), inner.decode(codes, k, n), atol=1e-5
  )
  assert layouts.from_json(layouts.to_json(layout)) == layout
  with pytest.raises(ValueError, match='no whole number'):
    rotations.rotate(want, rotations.draw_signs(0, 7), 0)
