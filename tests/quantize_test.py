"""quantize_matrix: bad input, and that it did something."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mq_jax as mq


def weights(k=32, n=16):
  return jax.random.normal(jax.random.key(0), (k, n))


@pytest.mark.parametrize(
  ('weight', 'error', 'match'),
  [
    (jnp.float32(1.0), ValueError, r'shape \(\)'),
    (jnp.ones(8), ValueError, r'shape \(8,\)'),
    (jnp.ones((2, 4, 4)), ValueError, 'one matrix'),
    (jnp.ones((0, 4)), ValueError, 'empty'),
    (jnp.ones((4, 4), jnp.int32), TypeError, 'int32'),
    (jnp.ones((4, 4), jnp.complex64), TypeError, 'complex64'),
    (jnp.ones((4, 4)).at[1, 2].set(jnp.nan), ValueError, r'\(1, 2\): nan'),
    (jnp.ones((4, 4)).at[0, 3].set(jnp.inf), ValueError, 'not finite'),
  ],
  ids=lambda x: str(getattr(x, 'shape', x)),
)
def test_unusable_weights_are_refused(weight, error, match):
  with pytest.raises(error, match=match):
    mq.quantize_matrix(weight, mq.recipes.rtn())


@pytest.mark.parametrize(
  ('hessian', 'match'),
  [
    (jnp.eye(31), r'needs \(32, 32\)'),
    (jnp.eye(32).at[0, 0].set(jnp.nan), 'hessian has 1 values'),
  ],
  ids=['shape', 'nan'],
)
def test_unusable_hessians_are_refused(hessian, match):
  with pytest.raises(ValueError, match=match):
    mq.quantize_matrix(weights(), mq.recipes.gptq(), hessian=hessian)


def test_groups_far_beyond_the_inputs_are_refused():
  with pytest.raises(ValueError, match='group=1000000 is far more than the 32'):
    mq.quantize_matrix(weights(), mq.recipes.rtn(group=1000000))
  # One scale per output of any layer is asked for by a large group.
  wide = mq.quantize_matrix(weights(), mq.recipes.rtn(bits=3, group=4096))
  own = mq.quantize_matrix(weights(), mq.recipes.rtn(bits=3, group=32))
  np.testing.assert_array_equal(wide.dequantize(), own.dequantize())


def test_a_missing_hessian_is_a_status():
  recipe = mq.recipes.gptq(bits=3, group=32)
  q = mq.quantize_matrix(weights(), recipe)
  assert q.status is mq.Status.no_hessian
  plain = mq.quantize_matrix(weights(), mq.recipes.rtn(bits=3, group=32))
  assert plain.status is mq.Status.ok
  np.testing.assert_array_equal(np.asarray(q), np.asarray(plain))
  awq = mq.quantize_matrix(weights(), mq.recipes.awq(bits=3, group=32))
  assert awq.status is mq.Status.no_hessian


def test_activation_scales_help_where_inputs_differ():
  key = jax.random.key(1)
  inputs = (
    jax.random.normal(key, (300, 32))
    * jnp.where(jnp.arange(32) % 8 == 0, 20.0, 1.0)[None]
  )
  hessian = inputs.T @ inputs
  options = {'bits': 3, 'group': 32, 'clip': 'search'}
  rtn = mq.quantize_matrix(
    weights(), mq.recipes.rtn(**options), hessian=hessian
  )
  awq = mq.quantize_matrix(
    weights(), mq.recipes.awq(**options), hessian=hessian
  )
  assert awq.record['output_error'] < 0.8 * rtn.record['output_error']


def test_the_readme_example_runs():
  q = mq.quantize_matrix(weights(), mq.recipes.microscopiq(bits=2))
  assert q.dequantize().shape == (32, 16)
  assert 8 * q.pack().nbytes / q.size == q.ebw
  again = mq.layouts.unpack(q.pack())
  np.testing.assert_array_equal(again.dequantize(), q.dequantize())
