"""Solvers that are broken in one way each, and what the suite says of them."""

import dataclasses

import numpy as np
import pytest

from mq_jax import allocation, testing

CHECKS = (
  *('solves', 'budgets', 'ties', 'lacking', 'near_best', 'did_something'),
  *('deterministic', 'pure', 'infeasible', 'units'),
)

best = allocation.brute_force


def _cheapest(problem):
  reduced, index = allocation.collapse(problem)
  cost = np.where(reduced.allowed, reduced.cost.sum(axis=0), np.inf)
  return cost.argmin(axis=1)[index]


def _free(problem):
  reduced, index = allocation.collapse(problem)
  return reduced.sensitivity.argmin(axis=1)[index]


def _untied(problem):
  alone = np.arange(len(problem.sites))
  return best(dataclasses.replace(problem, groups=alone))


def _forgives(problem):
  try:
    return best(problem)
  except allocation.InfeasibleError:
    return _cheapest(problem)


def _spoils(problem):
  choice = best(problem)
  problem.sensitivity[0] += 1.0
  return choice


def _has_units(problem):
  small = problem.budget[0] < 100 or np.isinf(problem.budget[0])
  return best(problem) if small else _cheapest(problem)


def _lacking(problem):
  # What a site lacks costs nothing: the cheapest of all.
  return problem.cost.sum(axis=0).argmin(axis=1)


BROKEN = [
  ('solves', lambda p: best(p).astype(float), 'a whole number for each site'),
  ('solves', lambda p: best(p) + 1, 'problem . of 4 candidates got'),
  ('solves', lambda p: best(p)[1:], 'got int64.4.;'),
  ('budgets', _free, 'q. is .* of'),
  ('ties', _untied, 'tied sites got'),
  ('lacking', _lacking, 'which it lacks'),
  (
    'near_best',
    lambda p: allocation.random_choice(p, seed=0),
    'more than 1 times the least',
  ),
  ('did_something', _cheapest, 'as it does with them'),
  (
    'deterministic',
    lambda p: allocation.random_choice(p, seed=np.random.default_rng()),
    'from a seed',
  ),
  ('pure', _spoils, 'its sensitivity was changed'),
  ('infeasible', _forgives, 'a problem that has no choice got'),
  ('units', _has_units, 'in units of'),
]


@pytest.mark.parametrize(
  'name, solve, told', BROKEN, ids=[x[0] for x in BROKEN]
)
def test_is_caught(name, solve, told):
  within = 0.0 if name == 'near_best' else None
  with pytest.raises(AssertionError, match=f': {name}: .*{told}'):
    testing.check_solver(solve, within=within)


def test_every_check_has_an_offender():
  assert {name for name, *_ in BROKEN} == set(CHECKS)


def test_report():
  report = testing.check_solver(best)
  assert report.thing == 'brute_force'
  assert report.skipped == {
    'near_best': 'within was not given: nothing is promised'
  }
  assert testing.check_solver(best, quantities=1, within=0.0).skipped == {
    'infeasible': 'one budget that can be met alone can be met'
  }
