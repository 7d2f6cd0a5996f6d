"""Relaxed allocation of tables, against exact solutions."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mq_jax import allocation
from mq_jax.allocation import gradient


def _problem(rng, sites=32, candidates=5, quantities=1):
  """Losses that fall with bits, more on some sites than on others."""
  bits = np.sort(rng.uniform(1, 8, candidates))
  size = rng.uniform(0.2, 3, (sites, 1))
  loss = rng.gamma(1.0, 1.0, (sites, 1)) * np.exp(
    -bits / rng.uniform(0.7, 3, (sites, 1))
  )
  loss = loss * rng.uniform(0.7, 1.3, (sites, candidates))
  cost = {'bits': size * bits}
  if quantities > 1:
    cost['cycles'] = rng.uniform(0.5, 2, loss.shape) * size * bits
  span = lambda table: (table.min(1).sum(), table.max(1).sum())
  share = rng.uniform(0.2, 0.8)
  budget = {
    name: low + share * (high - low)
    for name, (low, high) in ((n, span(t)) for n, t in cost.items())
  }
  return allocation.make_problem(loss, cost, budget)


@pytest.mark.parametrize(
  'quantities, draws',
  [
    (1, 20),
    pytest.param(1, 100, marks=pytest.mark.slow),
    pytest.param(2, 40, marks=pytest.mark.slow),
  ],
)
def test_within_one_percent_of_the_optimum(quantities, draws):
  rng = np.random.default_rng(quantities)
  close = 0
  for _ in range(draws):
    problem = _problem(rng, quantities=quantities)
    best = allocation.integer_program(problem)
    found = gradient.gradient(problem)
    assert allocation.feasible(problem, found)
    value = lambda x, p=problem: allocation.evaluate(p, x)['sensitivity']
    close += value(found) <= 1.01 * value(best)
  assert close >= 0.95 * draws


def test_ties_and_missing_candidates_hold():
  rng = np.random.default_rng(0)
  loss = rng.uniform(0, 1, (6, 3))
  loss[2, 2] = np.inf
  bits = np.tile([2.0, 3.0, 4.0], (6, 1))
  problem = allocation.make_problem(
    loss, {'bits': bits}, {'bits': 18}, ties=[(0, 1), (2, 3)]
  )
  found = gradient.gradient(problem)
  assert found[0] == found[1] and found[2] == found[3] != 2
  best = allocation.evaluate(problem, allocation.brute_force(problem))
  mine = allocation.evaluate(problem, found)
  assert mine['sensitivity'] <= 1.01 * best['sensitivity']


class Priced(chex.TestCase):
  """Probabilities and prices."""

  @chex.variants(with_jit=True, without_jit=True)
  def test_budgets_are_met_and_prices_complement_them(self):
    rng = np.random.default_rng(2)
    score = jnp.asarray(rng.normal(size=(10, 4)), jnp.float32)
    cost = jnp.asarray(rng.uniform(0, 1, (2, 10, 4)), jnp.float32)
    room = jnp.array([3.0, jnp.inf])
    p, price = self.variant(gradient.priced)(
      score, cost, room, jnp.ones((10, 4), bool), jnp.arange(10), 0.1
    )
    np.testing.assert_allclose(p.sum(1), 1.0, rtol=1e-5)
    used = jnp.einsum('qlc,lc->q', cost, p)
    assert price[0] > 0 and price[1] == 0
    np.testing.assert_allclose(used[0], room[0], rtol=1e-3)

  def test_they_are_the_minimum(self):
    """Against projected gradients of the same convex problem, by hand."""
    score = jnp.array([[0.0, 1.0], [0.5, 0.0]])
    cost = jnp.array([[[2.0, 0.5], [0.5, 2.0]]])
    p, price = gradient.priced(
      score, cost, jnp.array([2.0]), jnp.ones((2, 2), bool), jnp.arange(2), 0.5
    )
    # Stationary: score + price cost + T log p is equal over candidates.
    value = score + price[0] * cost[0] + 0.5 * jnp.log(p)
    np.testing.assert_allclose(value[:, 0], value[:, 1], rtol=1e-4)
    np.testing.assert_allclose(jnp.sum(p * cost[0]), 2.0, rtol=1e-4)


def _run(steps, state=None, batches=(), total=None, **options):
  rng = np.random.default_rng(3)
  table = jnp.asarray(rng.uniform(0, 1, (8, 3)), jnp.float32)
  cost = jnp.tile(jnp.array([2.0, 3.0, 4.0]), (1, 8, 1))
  allowed, groups = jnp.ones((8, 3), bool), jnp.arange(8)
  if state is None:
    state = gradient.begin(allowed, 1, key=jax.random.key(0))
  return gradient.relax(
    lambda p, extra, batch: jnp.sum(p * table) + 0.0 * jnp.sum(batch[0]),
    lambda p, extra: jnp.einsum('qlc,lc->q', cost, p),
    allowed,
    groups,
    jnp.array([20.0]),
    state,
    batches,
    steps=total or steps,
    **options,
  )


@pytest.mark.parametrize(
  'gumbel', [pytest.param(False, marks=pytest.mark.slow), True]
)
def test_an_interrupted_relaxation_ends_the_same(gumbel):
  schedule = gradient.Schedule(gumbel=gumbel)
  data = (jnp.zeros((12, 2)),)
  whole, _ = _run(12, batches=data, schedule=schedule)
  half, _ = _run(5, batches=(data[0][:5],), total=12, schedule=schedule)
  rest, _ = _run(
    7, state=half, batches=(data[0][5:],), total=12, schedule=schedule
  )
  drop = lambda s: s._replace(key=jax.random.key_data(s.key))
  chex.assert_trees_all_equal(drop(whole), drop(rest))


def test_budgets_hold_along_the_way_and_choices_are_made():
  _, trace = _run(30, batches=(jnp.zeros((30, 2)),))
  # Uniform probabilities use 24 of 20: the first steps walk from there.
  assert np.all(np.asarray(trace.usage)[15:, 0] <= 1.001)
  assert trace.entropy[-1] < 0.1 < trace.entropy[0]


def test_other_numbers_are_learned_with_the_prices():
  """An accelerator's number: larger is dearer in loss, cheaper in cost."""
  allowed, groups = jnp.ones((2, 2), bool), jnp.arange(2)
  state = gradient.begin(
    allowed, 1, key=jax.random.key(0), extra=jnp.float32(0.0)
  )
  loss = lambda p, log_rows, batch: (
    jnp.sum(p * jnp.array([[1.0, 0.0], [1.0, 0.0]])) + 0.2 * jnp.exp(log_rows)
  )
  costs = lambda p, log_rows: (
    jnp.sum(p * jnp.array([[1.0, 2.0]]))[None] / jnp.exp(log_rows)
  )
  state, trace = gradient.relax(
    loss,
    costs,
    allowed,
    groups,
    jnp.array([2.0]),
    state,
    (),
    steps=300,
    schedule=gradient.Schedule(cold=0.05),
  )
  # Both sites with the second candidate need twice the rows: 0.4 instead of
  # 2.2 and 1.2.
  np.testing.assert_allclose(jnp.exp(state.extra), 2.0, rtol=0.05)
  np.testing.assert_allclose(state.probabilities[:, 1], 1.0, atol=0.02)
  assert trace.usage[-1, 0] <= 1.02
