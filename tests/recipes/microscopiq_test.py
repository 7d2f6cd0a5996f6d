"""MicroScopiQ against the oracle and the digest's checks 1 to 4 and 7."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from mq_jax import quantize, recipes
from mq_jax.quantize import quantize_matrix


def student(shape, seed=0):
  return 0.02 * jax.random.t(jax.random.key(seed), 5.0, shape)


@pytest.mark.parametrize(
  'prune, bits',
  [
    (True, 2),
    pytest.param(True, 3, marks=pytest.mark.slow),
    (True, 4),
    pytest.param(False, 2, marks=pytest.mark.slow),
    (False, 3),
    pytest.param(False, 4, marks=pytest.mark.slow),
  ],
)
def test_values_are_those_of_the_oracle(prune, bits):
  weight = student((40, 256))
  recipe = recipes.microscopiq(bits=bits, sigma=2.5, prune=prune)
  found = np.asarray(quantize_matrix(weight, recipe))
  for row, values in zip(np.asarray(weight), found, strict=True):
    for start in (0, 128):
      part = slice(start, start + 128)
      expected, *_ = oracles.microscopiq_block(row[part], bits, 2.5, 8, prune)
      np.testing.assert_allclose(values[part], expected, rtol=1e-6)


@pytest.mark.slow
def test_blocks_along_the_inputs_are_those_of_the_transpose():
  weight = student((256, 24))
  options = {'bits': 2, 'compensate': False}
  along = recipes.microscopiq(axis='in', **options)
  across = recipes.microscopiq(axis='out', **options)
  np.testing.assert_array_equal(
    np.asarray(quantize_matrix(weight, along)),
    np.asarray(quantize_matrix(weight.T, across)).T,
  )


@pytest.mark.slow
def test_bits_of_student_weights_are_those_of_the_paper():
  """At 3 sigma t5 weights have 9 % of micro-blocks with outliers: 2.36."""
  weight = student((512, 512))
  q = quantize_matrix(weight, recipes.microscopiq(bits=2))
  assert abs(q.ebw_paper - 2.36) < 0.03
  flagged = q.layout.flagged(q.codes).mean()
  # Elements, permutation and MXScale; then a flag and an exponent byte.
  full = 2 + flagged * 32 / 8 + 1 / 8 + 8 / 128
  np.testing.assert_allclose(q.ebw, full, rtol=1e-6)
  assert q.record['saturated_exponents'] == 0
  wide = quantize_matrix(weight, recipes.microscopiq(bits=4))
  assert wide.layout.flagged(wide.codes).mean() == flagged


@pytest.mark.parametrize(
  'sigma_mse_bits',
  [
    (2.0, 0.123, 3.39),
    pytest.param((2.5, 0.150, 2.71), marks=pytest.mark.slow),
    (3.0, 0.177, 2.36),
    pytest.param((3.5, 0.200, 2.19), marks=pytest.mark.slow),
    (float('inf'), 0.272, 2.00),
  ],
  ids=lambda x: str(x[0]),
)
def test_sigma_sweep_of_the_digest(sigma_mse_bits):
  """Relative squared error and paper bits on t5 weights, digest section 7."""
  sigma, mse, bits = sigma_mse_bits
  q = quantize_matrix(
    student((512, 512), seed=1), recipes.microscopiq(bits=2, sigma=sigma)
  )
  # The digest's own sample differs; t5 has a heavy tail.
  assert abs(float(q.record['weight_mse']) - mse) < 0.012
  assert abs(q.ebw_paper - bits) < 0.06


def test_quantizing_the_result_again_changes_nothing():
  """With the outliers kept; detected afresh, others may be found."""
  weight = student((32, 128))
  recipe = recipes.microscopiq(bits=2, sigma=jnp.inf, compensate=False)
  once = np.asarray(quantize_matrix(weight, recipe))
  np.testing.assert_array_equal(
    np.asarray(quantize_matrix(jnp.asarray(once), recipe)), once
  )


def test_more_outliers_than_room_become_inliers():
  size = jnp.array([1.0, 2.0, 4.0, 5.0, 6.0, 7.0])
  weight = jnp.full((1, 128), 0.01).at[0, :6].set(size)
  q = quantize_matrix(weight, recipes.microscopiq(bits=4, sigma=0.5))
  values = np.asarray(q)[0]
  # The four largest of six are outliers, four slots are pruned.
  assert q.record['outliers'] == 4
  np.testing.assert_array_equal(values[2:6], size[2:])
  assert (values[:8] == 0).sum() >= 2


def test_meta_exists_only_where_outliers_are():
  row = jnp.where(jnp.arange(256) == 77, 3.0, 0.1)
  weight = jnp.tile(row[None], (4, 1))
  q = quantize_matrix(weight, recipes.microscopiq(bits=2))
  packed = q.pack()
  assert packed.buffers['mxscale'].size == 4
  assert packed.buffers['permutation'].size == 4 * 3
  assert packed.nbytes == 4 * (256 // 4 + 2 + 4) + 4 * 4


@pytest.mark.slow
def test_clipped_inliers_are_those_of_the_oracle_on_clipped_weights():
  weight = student((8, 128))
  recipe = recipes.microscopiq(bits=2, sigma=2.5, inlier_clip=0.6)
  found = np.asarray(quantize_matrix(weight, recipe))
  for row, values in zip(np.asarray(weight), found, strict=True):
    centred = np.abs(row - row.mean())
    deviation = np.sqrt(np.mean((row - row.mean()) ** 2))
    outlier = centred > 2.5 * deviation
    # At most one outlier in each micro-block of 8 here, so that all are kept,
    # and the least of their neighbours is pruned.
    kept = np.ones(128, bool)
    for start in range(0, 128, 8):
      part = slice(start, start + 8)
      count = int(outlier[part].sum())
      cost = np.where(outlier[part], np.inf, np.abs(row[part]))
      kept[start + np.argsort(cost, kind='stable')[:count]] = False
    inlier = kept & ~outlier
    limit = np.float32(0.6) * np.abs(row[inlier]).max()
    clipped = np.clip(row[inlier], -limit, limit)
    errors = []
    for exponent in range(-20, 1):
      level = np.clip(np.round(clipped / 2.0**exponent), -1, 1)
      errors.append((np.sum((level * 2.0**exponent - clipped) ** 2), exponent))
    scale = 2.0 ** min(errors)[1]
    expected = np.clip(np.round(clipped / scale), -1, 1) * scale
    np.testing.assert_allclose(values[inlier], expected, rtol=1e-6)
  plain = recipes.microscopiq(bits=2, sigma=2.5)
  compiled = quantize._quantize_batch._cache_size()
  assert np.any(found != np.asarray(quantize_matrix(weight, plain)))
  assert quantize._quantize_batch._cache_size() == compiled  # it is a leaf


@pytest.mark.parametrize(
  'options', [{'inlier_clip': 0.0}, {'inlier_clip': 0.9, 'axis': 'in'}]
)
def test_clips_that_do_not_fit_are_refused(options):
  with pytest.raises(ValueError, match='inlier_clip'):
    recipes.microscopiq(**options)
