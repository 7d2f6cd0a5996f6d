import doctest
import re

import numpy as np
import pytest

from mq_jax import allocation
from mq_jax.allocation import exact, heuristics, population, problem

LOSS = np.array([[4.0, 2.0, 1.0], [3.0, 2.0, 1.5], [9.0, np.inf, 0.0]])
BITS = np.array([[20.0, 30.0, 40.0], [2.0, 3.0, 4.0], [8.0, 12.0, 16.0]])
NAMES = ('up', 'down', 'head')


def make(loss=LOSS, cost=None, budget=None, **options):
  cost = {'bits': BITS, 'cycles': BITS[::-1]} if cost is None else cost
  options.setdefault('sites', NAMES)
  return allocation.make_problem(
    loss, cost, {} if budget is None else budget, **options
  )


@pytest.mark.parametrize('module', [problem, exact, heuristics, population])
def test_examples(module):
  assert doctest.testmod(module).failed == 0


def test_evaluate_and_feasible():
  p = make(budget={'bits': 40})
  got = allocation.evaluate(p, [0, 2, 2])
  assert got == {'sensitivity': 5.5, 'bits': 40.0, 'cycles': 8 + 4 + 40}
  assert allocation.feasible(p, [0, 2, 2])
  assert not allocation.feasible(p, [1, 2, 2])  # over
  assert not allocation.feasible(p, [0, 0, 1])  # head has no such candidate
  tied = make(ties=[('up', 'head')])
  assert allocation.feasible(tied, [2, 0, 2])
  assert not allocation.feasible(tied, [0, 0, 2])


def test_budgets_left_out_do_not_matter():
  p = make()
  assert np.isinf(p.budget).all()
  assert allocation.feasible(p, [2, 2, 2])
  q = p.with_budget(cycles=33)
  assert q.budget.tolist() == [np.inf, 33.0]
  assert p.budget.tolist() == [np.inf, np.inf]


def test_collapse_adds_tied_sites():
  p = make(ties=[('head', 'up')])
  reduced, index = allocation.collapse(p)
  assert reduced.sites == ('up', 'down')
  assert index.tolist() == [0, 1, 0]
  np.testing.assert_array_equal(reduced.sensitivity[0], LOSS[0] + LOSS[2])
  assert reduced.cost[0][0].tolist() == [28.0, 30.0, 56.0]  # 12 is not there
  choice = np.array([2, 1])
  assert allocation.evaluate(reduced, choice) == allocation.evaluate(
    p, choice[index]
  )


def test_ties_join_across_and_overlap():
  p = make(ties=[(0, 1), ('down', 'head')])
  assert p.groups.tolist() == [0, 0, 0]
  assert make(ties=[()]).groups.tolist() == [0, 1, 2]


def test_infeasible_budget_names_the_smallest_feasible():
  with pytest.raises(allocation.InfeasibleError) as error:
    make(budget={'bits': 29})
  message = str(error.value)
  assert 'bits = 29' in message
  assert 'smallest feasible is 30' in message and 'up takes 20' in message
  with pytest.raises(allocation.InfeasibleError, match='smallest feasible'):
    make().with_budget(cycles=1)


def test_the_smallest_feasible_can_be_used():
  p = make(LOSS, {'bits': BITS * (1e7 / 3)})
  with pytest.raises(allocation.InfeasibleError) as error:
    p.with_budget(bits=1.0)
  least = re.search('smallest feasible is ([0-9.e+]+),', str(error.value))
  p = p.with_budget(bits=float(least[1]))
  assert exact.integer_program(p).tolist() == [0, 0, 0]


def test_budgets_that_only_together_cannot_be_met():
  # What is cheap in one is dear in the other.
  cost = {'bits': [[1, 5], [2, 9]], 'cycles': [[8, 1], [7, 1]]}
  p = allocation.make_problem(
    np.ones((2, 2)), cost, {'bits': 8, 'cycles': 7}, sites=('a', 'b')
  )
  for solver in (
    allocation.brute_force,
    allocation.dynamic_program,
    allocation.integer_program,
    allocation.lagrangian,
    allocation.greedy,
    lambda p: allocation.random_choice(p, seed=0),
    lambda p: allocation.evolve(p, seed=0),
  ):
    with pytest.raises(allocation.InfeasibleError) as error:
      solver(p)
    message = str(error.value)
    assert 'not together' in message
    assert 'smallest feasible bits is 14, of which b takes 9' in message
    assert 'smallest feasible cycles is 8' in message


@pytest.mark.parametrize(
  'arguments, message',
  [
    (dict(loss=np.zeros(3)), 'shape'),
    (dict(loss=np.zeros((3, 0))), 'at least one'),
    (dict(loss=np.where(LOSS == 3, np.nan, LOSS)), 'down with 0 is nan'),
    (dict(loss=np.where(LOSS == 3, -np.inf, LOSS)), 'down with 0 is -inf'),
    (dict(loss=np.full((3, 3), np.inf)), 'up has no candidate'),
    (dict(cost={}), 'no cost'),
    (dict(cost={'bits': BITS[:2]}), 'shape'),
    (dict(cost={'bits': -BITS}), "'bits' of up with 0 is -20"),
    (dict(cost={'bits': BITS * np.nan}), 'nan'),
    (dict(budget={'bit': 3}), "unknown quantity 'bit'.*bits"),
    (dict(budget={'bits': np.nan}), "'bits' is not a number"),
    (dict(sites=('a', 'b')), '2 names of sites'),
    (dict(sites=('a', 'b', 'a')), '2 of them different'),
    (dict(candidates=('w2', 'w4')), '2 names of candidates'),
    (dict(ties=[('up', 'dwn')]), "unknown site 'dwn'.*down"),
    (dict(ties=[(0, 3)]), 'site 3 of 3'),
  ],
)
def test_bad_input(arguments, message):
  with pytest.raises(ValueError, match=message):
    make(**arguments)


def test_contradictory_ties():
  loss = np.array([[1.0, np.inf], [np.inf, 1.0]])
  with pytest.raises(ValueError, match='in common.*tied'):
    allocation.make_problem(loss, {'bits': np.ones((2, 2))}, {}, ties=[(0, 1)])


def test_costs_of_missing_candidates_are_ignored():
  cost = np.where(np.isfinite(LOSS), BITS, np.nan)
  assert np.isfinite(make(cost={'bits': cost}).cost).all()


@pytest.mark.parametrize(
  'choice, message',
  [
    ([0, 0], r'shape \(2,\)'),
    ([0.0, 1.0, 2.0], 'float64'),
    ([0, 0, 3], 'candidates 0 to 3 chosen of 3'),
    ([0, -1, 0], 'candidates -1'),
  ],
)
def test_bad_choice(choice, message):
  for function in (allocation.evaluate, allocation.feasible):
    with pytest.raises(ValueError, match=message):
      function(make(), choice)
