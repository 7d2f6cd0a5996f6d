import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mq_jax import calibration, plans, recipes, sites
from mq_jax.compensation import Status

# Tokens of expert 0 are positive, those of expert 1 negative.
ROWS = np.random.default_rng(0).normal(size=(24, 8)).astype(np.float32)
ROWS[:, 0] = np.abs(ROWS[:, 0])
ROWS[20:, 0] *= -1
PARAMS = {
  'w': jnp.asarray(
    np.random.default_rng(1).normal(size=(2, 8, 16)), jnp.float32
  )
}
RECIPE = recipes.make('gptq', bits=3, group=8)


def experts(params, x):
  """Each row by the matrix of its sign, as `models.decoder` does it."""
  own = jnp.stack([x[:, 0] > 0, x[:, 0] < 0])[..., None]
  y = jnp.einsum('emk,ekn->emn', jnp.where(own, x[None], 0.0), params['w'])
  return jnp.sum(y, axis=0)


def calibrated(rows, **options):
  return calibration.calibrate(experts, PARAMS, [rows], **options)


@pytest.fixture(scope='module')
def plan():
  return plans.uniform(sites.find(experts, PARAMS, ROWS), RECIPE)


def test_an_expert_has_statistics_of_its_own_rows():
  found = calibrated(ROWS)['w']
  assert found.count.tolist() == [20, 4]
  for e, rows in enumerate((ROWS[:20], ROWS[20:])):
    want = calibration.of_rows(jnp.asarray(rows))
    np.testing.assert_allclose(found.gram[e], want.gram, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.total[e], want.total, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.largest[e], want.largest)
  assert calibration.of_rows(jnp.zeros((3, 8))).count == 0


def test_experts_without_tokens_are_refused(plan):
  message = 'w: no row .* reached 1 of 2 matrices .1.'
  with pytest.raises(ValueError, match=message):
    calibrated(ROWS[:20])
  with pytest.raises(ValueError, match='only 4 rows .* where 5 are needed'):
    calibrated(ROWS, least=5)
  statistics = calibrated(ROWS[:20], least=0)
  with pytest.raises(ValueError, match=message):
    plans.compress(PARAMS, plan, statistics=statistics)
  with pytest.raises(ValueError, match="uncovered='skip'"):
    plans.compress(PARAMS, plan, coverage=plans.Coverage(uncovered='skip'))


def test_experts_with_few_tokens_are_rounded(plan):
  statistics = calibrated(ROWS)
  compress = lambda **options: plans.compress(PARAMS, plan, **options)['w']
  usual = compress(statistics=statistics)
  plain = compress()
  found = compress(
    statistics=statistics, coverage=plans.Coverage(least=5, uncovered='round')
  )
  assert (usual.dequantize() != plain.dequantize()).any((1, 2)).all()
  np.testing.assert_array_equal(found.dequantize()[0], usual.dequantize()[0])
  np.testing.assert_array_equal(found.dequantize()[1], plain.dequantize()[1])
  assert found.record['status'].tolist() == [Status.ok, Status.no_hessian]
  assert found.record['rows_seen'].tolist() == [20, 4]
  assert 'rows_seen' not in plain.record
  (row,) = plans.records({'w': found})
  assert (row['rows_seen'], row['rows_seen_least']) == (24, 4)
  assert row['status'] == 'no_hessian'
  jax.tree.map(
    np.testing.assert_array_equal,
    compress(
      statistics=statistics, coverage=plans.Coverage(least=4, uncovered='round')
    ).codes,
    usual.codes,
  )
