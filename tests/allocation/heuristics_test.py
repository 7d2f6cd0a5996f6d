import itertools
import math

import numpy as np
import pytest
from allocation.problems import RELEASED, draw, hawq_v3, loss, ranking
from hypothesis import given, settings
from hypothesis import strategies as st

from mq_jax import allocation

SOLVERS = {
  'lagrangian': allocation.lagrangian,
  'greedy': allocation.greedy,
  'greedy_up': lambda p: allocation.greedy(p, start='cheapest'),
  'in_order': lambda p: allocation.in_order(p, np.arange(len(p.sites))),
  'inverse_order': lambda p: allocation.inverse_order(p, _importance(p)),
  'random': lambda p: allocation.random_choice(p, seed=0),
}


def _importance(problem):
  return np.sin(np.arange(len(problem.sites)) * 7.0)


@settings(max_examples=50)
@given(
  seed=st.integers(0, 2**32 - 1),
  sites=st.integers(1, 12),
  candidates=st.integers(1, 5),
  quantities=st.integers(1, 3),
  whole=st.booleans(),
)
def test_never_exceeds_a_budget(seed, sites, candidates, quantities, whole):
  rng = np.random.default_rng(seed)
  problem = draw(rng, sites, candidates, quantities, whole=whole)
  try:
    best = loss(problem, allocation.integer_program(problem))
  except allocation.InfeasibleError:
    for solver in SOLVERS.values():
      with pytest.raises(allocation.InfeasibleError):
        solver(problem)
    return
  for name, solver in SOLVERS.items():
    choice = solver(problem)
    assert allocation.feasible(problem, choice), name
    assert loss(problem, choice) >= best - 1e-9, name
  try:
    choice = allocation.monotone_pareto(problem, _importance(problem))
  except allocation.InfeasibleError:
    return  # not every problem has a monotone choice
  assert allocation.feasible(problem, choice)


def test_without_budgets_all_take_the_best():
  rng = np.random.default_rng(0)
  problem = draw(rng, 9, 4, 2).with_budget(q0=np.inf, q1=np.inf)
  best = problem.sensitivity.argmin(axis=1)
  if len(np.unique(problem.groups)) == 9:
    assert allocation.greedy(problem).tolist() == best.tolist()
  best = loss(problem, allocation.integer_program(problem))
  for name in ('lagrangian', 'greedy', 'greedy_up'):
    assert loss(problem, SOLVERS[name](problem)) == pytest.approx(best)


@pytest.mark.parametrize('start', ['best', 'cheapest'])
@pytest.mark.parametrize('quantity, ratio', RELEASED)
def test_greedy_on_hawq_v3(quantity, ratio, start):
  problem, bits = hawq_v3(quantity, ratio)
  best = loss(problem, [int(b == '8') for b in bits])
  none = loss(problem, [0] * len(bits))
  got = loss(problem, allocation.greedy(problem, start=start))
  # The notes measured 0.991 to 1 from below; from above the last step may
  # overshoot, and what it leaves not be of use.
  share = {'cheapest': 0.99, 'best': 0.98}[start]
  assert none - got >= share * (none - best)


def test_greedy_starts():
  with pytest.raises(ValueError, match="'best' or 'cheapest'"):
    allocation.greedy(hawq_v3('bytes', 0.5)[0], start='top')


# monotone


def _monotone_by_listing(problem, importance, order):
  """All choices whose place in `order` does not fall with importance."""
  rank = np.argsort(importance, kind='stable')
  count, best = 0, None
  for places in itertools.combinations_with_replacement(
    range(len(order)), len(rank)
  ):
    count += 1
    choice = np.zeros(len(rank), int)
    choice[rank] = np.asarray(order)[list(places)]
    if allocation.feasible(problem, choice):
      value = loss(problem, choice)
      best = value if best is None else min(best, value)
  return count, best


@pytest.mark.parametrize('quantities', [1, 2])
def test_monotone_equals_the_listing(quantities):
  rng = np.random.default_rng(quantities)
  solved = 0
  for _ in range(40):
    sites, candidates = rng.integers(1, 9), rng.integers(1, 4)
    problem = draw(rng, sites, candidates, quantities, room=0.6)
    if len(np.unique(problem.groups)) < sites:
      continue
    importance = rng.random(sites)
    order = rng.permutation(candidates)
    count, best = _monotone_by_listing(problem, importance, order)
    assert count == math.comb(sites + candidates - 1, candidates - 1)
    if best is None:
      with pytest.raises(allocation.InfeasibleError):
        allocation.monotone_pareto(problem, importance, order=order)
      continue
    choice = allocation.monotone_pareto(problem, importance, order=order)
    assert loss(problem, choice) == pytest.approx(best, rel=1e-9)
    places = np.argsort(order)[choice][np.argsort(importance)]
    assert (np.diff(places) >= 0).all()
    solved += 1
  assert solved > 10


def test_monotone_of_tied_sites_goes_by_their_mean():
  loss_ = np.array([[1.0, 0.0]] * 3)
  bits = np.tile([2.0, 4.0], (3, 1))
  problem = allocation.make_problem(
    loss_, {'bits': bits}, {'bits': 10}, ties=[(0, 2)]
  )
  # The pair has a mean of 2: not less than the other one, so it goes first.
  choice = allocation.monotone_pareto(problem, [0.0, 1.0, 4.0])
  assert choice.tolist() == [1, 0, 1]
  choice = allocation.monotone_pareto(problem, [0.0, 3.0, 4.0])
  assert choice.tolist() == [0, 1, 0]


def test_monotone_refuses():
  loss_ = np.array([[1.0, np.inf], [np.inf, 1.0]])
  problem = allocation.make_problem(
    loss_, {'bits': np.tile([2.0, 4.0], (2, 1))}, {}, candidates=['w2', 'w4']
  )
  assert allocation.monotone_pareto(problem, [0.0, 1.0]).tolist() == [0, 1]
  with pytest.raises(allocation.InfeasibleError, match='order w2, w4'):
    allocation.monotone_pareto(problem, [1.0, 0.0])
  with pytest.raises(ValueError, match='2 finite numbers'):
    allocation.monotone_pareto(problem, [1.0, np.nan])
  with pytest.raises(ValueError, match='no order of the 2'):
    allocation.monotone_pareto(problem, [1.0, 0.0], order=[0, 0])


def test_levels_go_by_cost():
  problem = allocation.make_problem(
    np.array([[1.0, 1.0, np.inf], [1.0, 1.0, 1.0]]),
    {'bits': np.array([[8, 4, 0], [80, 40, 20]])},
    {},
  )
  assert allocation.levels(problem).tolist() == [2, 1, 0]


# bisection and order


def _chain(sites, budget=np.inf):
  bits = np.tile([2.0, 4.0, 8.0], (sites, 1))
  return allocation.make_problem(
    np.tile([3.0, 1.0, 0.0], (sites, 1)), {'bits': bits}, {'bits': budget}
  )


def test_bisection_equals_the_scan_of_prefixes():
  rng = np.random.default_rng(0)
  for _ in range(100):
    sites = int(rng.integers(1, 12))
    problem = _chain(sites)
    harm = np.cumsum(rng.random((sites, 3)), axis=1)[:, ::-1]  # falls in bits
    harm = harm - harm[:, -1:]
    order = rng.permutation(sites)
    calls = []

    def accuracy(choice, harm=harm, calls=calls):
      calls.append(choice)
      return -harm[np.arange(len(choice)), choice].sum()

    threshold = -rng.random() * sites
    got = allocation.bisection(problem, order, accuracy, threshold)
    assert len(calls) <= 2 * math.ceil(math.log2(sites + 1)) + 1

    scanned = np.full(sites, 2)
    for candidate in (1, 0):
      start = scanned.copy()
      for k in range(sites + 1):
        trial = start.copy()
        trial[order[:k]] = candidate
        if accuracy(trial) >= threshold:
          scanned = trial
    assert got.tolist() == scanned.tolist()
    assert got.dtype == np.int64


def test_bisection_refuses():
  everything = lambda choice: 1.0
  sites = np.arange(4)
  choice = allocation.bisection(_chain(4, 8), sites, everything, 0.5)
  assert choice.tolist() == [0] * 4
  with pytest.raises(ValueError, match='below 2'):
    allocation.bisection(_chain(4), sites, everything, 2.0)
  with pytest.raises(ValueError, match='NaN'):
    allocation.bisection(_chain(4), sites, lambda _: np.nan, 0.5)
  with pytest.raises(ValueError, match='each of the 4 once'):
    allocation.bisection(_chain(4), [0, 1, 2, 2], everything, 0.5)
  few = lambda choice: float((choice == 2).sum() >= 3)
  with pytest.raises(allocation.InfeasibleError, match='bits = 26 of 20'):
    allocation.bisection(_chain(4, 20), sites, few, 0.5)


def test_sites_go_down_in_order():
  problem = _chain(4, 20)
  choice = allocation.in_order(problem, [2, 0, 3, 1])
  assert choice.tolist() == [1, 2, 1, 1]
  choice = allocation.in_order(problem.with_budget(bits=13), [2, 0, 3, 1])
  assert choice.tolist() == [0, 1, 0, 1]
  choice = allocation.inverse_order(problem, [0.0, 9.0, 1.0, 5.0])
  assert choice.tolist() == [2, 1, 1, 1]  # the least important one keeps 8


# random


def test_random_choices_are_uniform():
  rng = np.random.default_rng(2)
  problem = draw(rng, 4, 3, 1, room=0.5)
  every = [x for _, x in ranking(problem)]
  drawn = allocation.random_choices(problem, 4000, seed=1)
  names, counts = np.unique(drawn, axis=0, return_counts=True)
  assert sorted(map(tuple, names.tolist())) == sorted(every)
  expected = 4000 / len(every)
  chi2 = ((counts - expected) ** 2 / expected).sum()
  freedom = len(every) - 1
  assert chi2 < freedom + 5 * math.sqrt(2 * freedom)


def test_random_chains_are_uniform():
  # 3 ** -12 of all choices fit but one step: drawing at random finds none.
  sites = 12
  cost = np.tile([0.0, 1.0, 1.0], (sites, 1))
  problem = allocation.make_problem(cost * 0.0, {'ms': cost}, {'ms': 1.0})
  drawn = allocation.random_choices(problem, 2000, seed=0)
  assert all(allocation.feasible(problem, x) for x in drawn)
  names, counts = np.unique(drawn, axis=0, return_counts=True)
  assert len(names) == 1 + 2 * sites
  expected = 2000 / len(names)
  chi2 = ((counts - expected) ** 2 / expected).sum()
  assert chi2 < 2 * sites + 5 * math.sqrt(4 * sites)


def test_random_choice_follows_its_seed():
  problem = draw(np.random.default_rng(0), 12, 4, 2, room=0.5)
  one, two, three = (
    allocation.random_choice(problem, seed=s).tolist() for s in (0, 0, 1)
  )
  assert one == two != three
