import numpy as np
import pytest
from allocation.problems import RELEASED, draw, hawq_v3, loss, ranking
from hypothesis import given, settings
from hypothesis import strategies as st

from mq_jax import allocation

EXACT = [
  allocation.brute_force,
  allocation.dynamic_program,
  allocation.integer_program,
]


@pytest.mark.parametrize('solver', EXACT)
@pytest.mark.parametrize('quantity, ratio', RELEASED)
def test_hawq_v3_released_bits(solver, quantity, ratio):
  problem, bits = hawq_v3(quantity, ratio)
  choice = solver(problem)
  assert ''.join(problem.candidates[j] for j in choice) == bits


@pytest.mark.parametrize('quantity, ratio', RELEASED)
def test_lagrangian_on_hawq_v3(quantity, ratio):
  problem, bits = hawq_v3(quantity, ratio)
  best = loss(problem, [int(b == '8') for b in bits])
  none = loss(problem, [0] * len(bits))
  bound = allocation.lagrangian_bound(problem)
  assert allocation.feasible(problem, bound.choice)
  # Saved of what 8 bits can save, as the criterion has it.
  assert none - loss(problem, bound.choice) >= 0.985 * (none - best)
  assert bound.least <= best * (1 + 1e-9)
  budgeted = list(problem.quantities).index(quantity)
  assert bound.prices[budgeted] > 0 and (bound.prices > 0).sum() == 1


@pytest.mark.parametrize('quantities', [1, 2])
@pytest.mark.parametrize('whole', [False, True])
def test_equal_to_the_ranking_of_all(quantities, whole):
  rng = np.random.default_rng(quantities + 2 * whole)
  seconds = 0
  for _ in range(25):
    sites, candidates = rng.integers(2, 6), rng.integers(1, 5)
    problem = draw(rng, sites, candidates, quantities, whole=whole)
    best = ranking(problem)
    for solver in EXACT:
      if not best:
        with pytest.raises(allocation.InfeasibleError, match='not together'):
          solver(problem)
        continue
      choice = solver(problem)
      assert allocation.feasible(problem, choice)
      assert choice.dtype == np.int64
      np.testing.assert_allclose(
        loss(problem, choice), best[0][0], rtol=1e-9, atol=1e-12
      )
    if best:
      bound = allocation.lagrangian_bound(problem)
      assert bound.least <= best[0][0] + 1e-9 * (1 + abs(best[0][0]))
      assert loss(problem, bound.choice) >= best[0][0] - 1e-9
    seconds += _next_best(problem, best)
  assert seconds >= 5


def _next_best(problem, best) -> bool:
  """Forbid one after the other and compare to the ranking."""
  if len(best) < 4:
    return False
  seen = []
  for value, _ in best[:3]:
    choice = allocation.integer_program(problem, forbidden=seen)
    assert choice.tolist() not in [x.tolist() for x in seen]
    np.testing.assert_allclose(
      loss(problem, choice), value, rtol=1e-9, atol=1e-12
    )
    seen.append(choice)
  return True


@pytest.mark.parametrize('quantities', [1, 2])
def test_equal_to_brute_force_at_eight_sites(quantities):
  rng = np.random.default_rng(10 + quantities)
  for k in range(50):
    problem = draw(rng, 8, 4, quantities, whole=k % 3 == 0, room=0.4)
    best = loss(problem, allocation.brute_force(problem))
    for solver in EXACT[1:]:
      choice = solver(problem)
      assert allocation.feasible(problem, choice)
      np.testing.assert_allclose(loss(problem, choice), best, rtol=1e-9)


@settings(max_examples=40)
@given(
  seed=st.integers(0, 2**32 - 1),
  sites=st.integers(1, 20),
  candidates=st.integers(1, 6),
  quantities=st.integers(0, 3),
  whole=st.booleans(),
)
def test_large_ones_agree(seed, sites, candidates, quantities, whole):
  rng = np.random.default_rng(seed)
  problem = draw(rng, sites, candidates, quantities or 1, whole=whole, room=0.5)
  if quantities == 0:
    problem = problem.with_budget(q0=np.inf)
  try:
    choice = allocation.integer_program(problem)
  except allocation.InfeasibleError:
    with pytest.raises(allocation.InfeasibleError):
      allocation.dynamic_program(problem)
    return
  assert allocation.feasible(problem, choice)
  best = loss(problem, choice)
  other = allocation.dynamic_program(problem)
  assert allocation.feasible(problem, other)
  np.testing.assert_allclose(loss(problem, other), best, rtol=1e-9, atol=1e-12)
  bound = allocation.lagrangian_bound(problem)
  assert allocation.feasible(problem, bound.choice)
  assert bound.least <= best + 1e-9 * (1 + best)


def test_losses_of_very_different_size():
  # An absolute gap of 1e-6 would hide the differences that matter.
  rng = np.random.default_rng(0)
  loss_ = rng.gamma(1.0, 1e-9, (8, 3))
  loss_[:, 0] = 1e6
  cost = np.tile([1.0, 2.0, 4.0], (8, 1)) * rng.uniform(1, 1.01, (8, 3))
  problem = allocation.make_problem(loss_, {'bits': cost}, {'bits': 23.5})
  best = ranking(problem)
  for solver in EXACT:
    np.testing.assert_allclose(
      loss(problem, solver(problem)), best[0][0], rtol=1e-9
    )
  second = allocation.integer_program(
    problem, forbidden=[allocation.integer_program(problem)]
  )
  np.testing.assert_allclose(loss(problem, second), best[1][0], rtol=1e-9)


def test_budgets_finer_than_the_tolerance_of_the_program():
  # Of bytes in the billions one more is one too many.
  cost = np.array([[1e9, 2e9 + 1], [1e9 + 3, 2e9 + 7], [1e9, 2e9 + 2]])
  gain = np.array([[3.0, 0.0], [3.1, 0.0], [2.9, 0.0]])
  for budget in range(int(5e9), int(5e9 + 14)):
    problem = allocation.make_problem(gain, {'bytes': cost}, {'bytes': budget})
    best = ranking(problem)[0]
    for solver in EXACT:
      choice = solver(problem)
      # 1e-12 of the budget, the room for rounding, is far below a byte.
      assert allocation.feasible(problem, choice)
      np.testing.assert_allclose(loss(problem, choice), best[0])


def test_budget_met_exactly():
  # 0.1 added ten times is not 1.0; the budget still can be met.
  problem = allocation.make_problem(
    np.tile([1.0, 0.0], (10, 1)),
    {'ms': np.tile([0.05, 0.1], (10, 1))},
    {'ms': sum([0.1] * 10)},
  )
  for solver in (allocation.dynamic_program, allocation.integer_program):
    assert solver(problem).tolist() == [1] * 10
    tight = problem.with_budget(ms=sum([0.05] * 10))
    assert solver(tight).tolist() == [0] * 10


def test_forbidden():
  problem = allocation.make_problem(
    [[1.0, 0.0], [1.0, 0.0]], {'bits': np.ones((2, 2))}, {}, ties=[(0, 1)]
  )
  # One that breaks the tie is no choice: nothing changes.
  choice = allocation.integer_program(problem, forbidden=[[0, 1]])
  assert choice.tolist() == [1, 1]
  choice = allocation.integer_program(problem, forbidden=[[1, 1]])
  assert choice.tolist() == [0, 0]
  with pytest.raises(allocation.InfeasibleError, match='2 forbidden'):
    allocation.integer_program(problem, forbidden=[[1, 1], [0, 0]])
  with pytest.raises(ValueError, match='shape'):
    allocation.integer_program(problem, forbidden=[[1]])


def test_refusals():
  rng = np.random.default_rng(0)
  problem = draw(rng, 40, 6, 2, room=0.4)
  with pytest.raises(ValueError, match='integer_program'):
    allocation.brute_force(problem)
  # Loss is as good as cost everywhere: no bound tells states apart.
  weight = rng.random((40, 1)) * [0.0, 1.0]
  alike = allocation.make_problem(1 - weight, {'ms': weight}, {'ms': 10.0})
  with pytest.raises(ValueError, match='max_states=999; use `integer_program`'):
    allocation.dynamic_program(alike, max_states=999)
  with pytest.raises(TimeoutError, match='limit of 0.01 s'):
    allocation.integer_program(alike, time_limit=0.01)


@pytest.mark.parametrize('quantities', [1, 2, 3])
def test_many_sites(quantities):
  rng = np.random.default_rng(3)
  bits = np.array([2, 3, 4, 5, 6, 8])
  size = rng.uniform(1, 4, (100, 1))
  spread = rng.lognormal(0, 1.5, (100, 1))
  cost = {
    'bits': size * bits,
    'cycles': size * np.maximum(bits, 4) * rng.lognormal(0, 0.1, (100, 6)),
    'energy_pj': rng.random((100, 1)) * bits**2,
  }
  cost = dict(list(cost.items())[:quantities])
  budget = {k: v.min(axis=1).sum() * 1.7 for k, v in cost.items()}
  problem = allocation.make_problem(size * spread * 0.25**bits, cost, budget)
  best = loss(problem, allocation.integer_program(problem))
  other = loss(problem, allocation.dynamic_program(problem))
  np.testing.assert_allclose(other, best, rtol=1e-9)
  bound = allocation.lagrangian_bound(problem)
  assert 0.99 * best <= bound.least <= best
  assert loss(problem, bound.choice) <= 1.01 * best
