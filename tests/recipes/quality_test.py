"""Recipes on two trained models: the orders that the papers' digests expect."""

import jax
import numpy as np
import pytest

import mq_jax as mq
from mq_jax import plans
from mq_jax.lab import measure, opening

RECIPES = {
  'none': mq.recipes.none(),
  'rtn ternary': mq.recipes.rtn(bits=2, group=128, symmetric=True),
  'w4': mq.recipes.microscopiq(bits=4),
  'w2': mq.recipes.microscopiq(bits=2),
  'w2 alone': mq.recipes.microscopiq(bits=2, compensate=False),
  'fineq': mq.recipes.fineq(compensate=True),
  'fineq alone': mq.recipes.fineq(),
  'gptq': mq.recipes.gptq(bits=3, group=64),
  'gptq alone': mq.recipes.rtn(bits=3, group=64),
}


# Minutes on two cores.
pytestmark = pytest.mark.slow


@pytest.fixture(scope='module', params=['reference', 'reference-planted'])
def results(request):
  """Loss, and output error by site, of every recipe."""
  model = opening.open_any(request.param)
  calibration = measure.calibration_text(None)
  batches = measure.calibration_batches(model, calibration, 32, 16, 0)
  windows = measure.windows(model, measure.evaluation_text(None), 12)
  sites = mq.sites.find(model.apply, model.params, batches[0])
  statistics = mq.calibrate(model.apply, model.params, batches, sites=sites)
  found = {}
  for name, recipe in RECIPES.items():
    plan = plans.uniform(sites, recipe)
    packed = mq.compress(model.params, plan, statistics=statistics)
    jax.block_until_ready(jax.tree.leaves(packed))
    errors = {}
    for site, matrix in plans.matrices(packed).items():
      error = matrix.dequantize().astype(np.float32) - _weight(model, site)
      gram = statistics[site].gram
      errors[site] = float(np.sum(error * (gram @ error)))
    found[name] = measure.scores(model, packed, windows, 6)['nll'], errors
  return found


def _weight(model, name):
  leaves = mq.sites.leaf_names(model.params)
  at = list(leaves).index(name)
  return jax.tree.leaves(model.params)[at].astype(np.float32)


def test_losses_are_in_order(results):
  loss = {name: value for name, (value, _) in results.items()}
  assert loss['none'] <= loss['w4'] * 1.001
  assert loss['w4'] < loss['w2'] < loss['w2 alone']
  assert loss['w4'] <= 1.03 * loss['none']
  # Of ternary rounding with one scale for 128 weights little is left.
  assert loss['w2'] + 0.5 < loss['rtn ternary']
  assert loss['none'] < loss['gptq'] < loss['fineq'] < loss['rtn ternary']
  assert loss['fineq'] < loss['fineq alone']
  assert loss['gptq'] <= loss['gptq alone']


@pytest.mark.parametrize('name', ['w2', 'fineq', 'gptq'])
def test_compensation_lowers_the_output_error_of_every_site(results, name):
  compensated, alone = results[name][1], results[f'{name} alone'][1]
  assert set(compensated) == set(alone) and len(alone) == 42
  for site, error in compensated.items():
    assert error < alone[site], site
