"""Checks that every solver of the allocation problem must pass."""

import functools
from collections.abc import Callable, Mapping

import numpy as np

from mq_jax import allocation
from mq_jax.testing import _suite
from mq_jax.testing._suite import Report, check
from mq_jax.testing.problems import random_problem

Solver = Callable[[allocation.Problem], np.ndarray]


def check_solver(
  solve: Solver,
  *,
  within: float | None = None,
  sites: int = 5,
  candidates: int = 4,
  quantities: int = 2,
  problems: int = 12,
  seed: int = 0,
  skip: Mapping[str, str] | None = None,
) -> Report:
  """Run the suite on a solver, `Problem -> choice`.

  It solves small random problems, with ties, candidates that sites lack,
  equal numbers and budgets from tight to none, whose answers are known by
  trying everything. The checks, by name:
    solves: a whole number for each site, of a candidate that there is.
    budgets: no budget is ever exceeded.
    ties: sites that are tied choose alike.
    lacking: no site gets a candidate that it lacks.
    near_best: within `within` of the least loss (skipped without); less than
      the least is always an error.
    did_something: without budgets the choices are others than with them, and
      not just the cheapest; with `within` their losses are less, too.
    deterministic: the same choice twice.
    pure: the problem is left as it was.
    infeasible: budgets that can be met only alone raise `InfeasibleError`.
    units: costs and budgets times 1024 change nothing.

  Args:
    solve: Takes a problem, returns the candidate i64[l] of each site. Bind
      options with `functools.partial`.
    within: 0 for exact solvers; 0.1 lets the sum of losses over all problems
      be a tenth more than that of the least.
    sites: Of each problem; `candidates ** sites` choices are tried.
    candidates: Of each site.
    quantities: Budgeted ones.
    problems: How many are drawn.
    seed: Of the problems.
    skip: Reasons by name of checks to leave out.

  Returns:
    The checks that passed, and those skipped.

  Raises:
    AssertionError: naming every check that failed, and what was found.
    ValueError: if `skip` names no check.

  Examples:
    >>> check_solver(allocation.integer_program, within=0.0).skipped
    {}
  """
  rng = np.random.default_rng(seed)
  drawn, impossible = [], []
  while len(drawn) < problems or not impossible:
    index = len(drawn)
    problem = random_problem(
      rng, sites, candidates, quantities, whole=index % 3 == 2
    )
    try:
      best = allocation.brute_force(problem)
    except allocation.InfeasibleError:
      impossible.append(problem)
      continue
    if len(drawn) < problems:
      drawn.append((problem, best))
    elif quantities == 1:
      break  # one budget can always be met
  suite = _Solvers(solve, drawn, impossible, within)
  names = (
    *('solves', 'budgets', 'ties', 'lacking', 'near_best', 'did_something'),
    *('deterministic', 'pure', 'infeasible', 'units'),
  )
  checks = {name: getattr(suite, name) for name in names}
  inner = solve.func if isinstance(solve, functools.partial) else solve
  thing = getattr(inner, '__qualname__', None) or repr(solve)
  return _suite.run('check_solver', thing, checks, skip or {})


def _tables(problem):
  return problem.sensitivity, problem.cost, problem.budget, problem.groups


def _loss(problem, choice):
  return allocation.evaluate(problem, choice)['sensitivity']


class _Solvers:
  """A method for each check; every problem is solved once for most."""

  def __init__(self, solve, drawn, impossible, within):
    self.solve, self.drawn, self.impossible = solve, drawn, impossible
    self.within = within

  @functools.cached_property
  def choices(self):
    self.before = [
      tuple(x.copy() for x in _tables(problem)) for problem, _ in self.drawn
    ]
    return [np.asarray(self.solve(problem)) for problem, _ in self.drawn]

  @property
  def solved(self):
    """(number, problem, choice) of all problems."""
    problems = [problem for problem, _ in self.drawn]
    return list(zip(range(len(problems)), problems, self.choices))

  def solves(self):
    for i, problem, choice in self.solved:
      l, c = problem.sensitivity.shape
      check(
        choice.shape == (l,) and np.issubdtype(choice.dtype, np.integer),
        f'problem {i} of {l} sites got {choice.dtype}{list(choice.shape)}; '
        'a whole number for each site is needed',
      )
      check(
        bool(((choice >= 0) & (choice < c)).all()),
        f'problem {i} of {c} candidates got {choice.tolist()}',
      )

  def budgets(self):
    for i, problem, choice in self.solved:
      totals = allocation.evaluate(problem, choice)
      for name, budget in zip(problem.quantities, problem.budget):
        check(
          totals[name] <= budget * (1 + 1e-12),
          f'problem {i}: {name} is {totals[name]:.6g} of {budget:.6g}',
        )

  def ties(self):
    tied = 0
    for i, problem, choice in self.solved:
      for group in np.unique(problem.groups):
        mine = choice[problem.groups == group]
        tied += len(mine) > 1
        check(
          len(set(mine.tolist())) == 1,
          f'problem {i}: tied sites got {mine.tolist()}',
        )
    assert tied, 'no problem has ties: draw more'

  def lacking(self):
    for i, problem, choice in self.solved:
      has = problem.allowed[np.arange(len(choice)), choice]
      check(
        bool(has.all()),
        f'problem {i}: site {int(np.argmin(has))} got candidate '
        f'{choice[np.argmin(has)]}, which it lacks',
      )

  def near_best(self):
    total = least = 0.0
    for (i, problem, choice), (_, best) in zip(self.solved, self.drawn):
      loss, bound = _loss(problem, choice), _loss(problem, best)
      if not allocation.feasible(problem, choice):
        continue  # told elsewhere; its loss may be less
      check(
        loss >= bound - 1e-9 * (1 + bound),
        f'problem {i}: a loss of {loss}, less than the least, {bound}',
      )
      total, least = total + loss, least + bound
    if self.within is None:
      raise _suite.Skip('within was not given: nothing is promised')
    check(
      total <= (1 + self.within) * least * (1 + 1e-9) + 1e-12,
      f'the losses of all problems sum up to {total:.6g}, more than '
      f'{1 + self.within:.4g} times the least, {least:.6g}',
    )

  def did_something(self):
    changed, free, cheap, given = [], 0.0, 0.0, 0.0
    for _, problem, choice in self.solved:
      given += _loss(problem, choice)
      none = dict.fromkeys(problem.quantities, np.inf)
      problem = problem.with_budget(**none)
      roomy = np.asarray(self.solve(problem))
      free += _loss(problem, roomy)
      reduced, index = allocation.collapse(problem)
      cost = np.where(reduced.allowed, reduced.cost.sum(axis=0), np.inf)
      cheapest = cost.argmin(axis=1)[index]
      cheap += _loss(problem, cheapest)
      changed.append([(roomy != choice).any(), (roomy != cheapest).any()])
    told, beyond = np.any(changed, axis=0)
    check(bool(told), 'without budgets it chooses as it does with them')
    check(bool(beyond), 'without budgets it takes the cheapest')
    if self.within is not None:
      check(
        free < min(cheap, given),
        f'without budgets the losses sum up to {free:.4g}, with budgets to '
        f'{given:.4g}, those of the cheapest choices to {cheap:.4g}',
      )

  def deterministic(self):
    for i, problem, choice in self.solved:
      again = np.asarray(self.solve(problem))
      check(
        np.array_equal(again, choice),
        f'problem {i}: {choice.tolist()}, then {again.tolist()}; draw random '
        'numbers from a seed',
      )

  def pure(self):
    for i, problem, _ in self.solved:
      pairs = zip(self.before[i], _tables(problem))
      names = ('sensitivity', 'cost', 'budget', 'groups')
      for name, (old, new) in zip(names, pairs):
        check(np.array_equal(old, new), f'problem {i}: its {name} was changed')

  def infeasible(self):
    if not self.impossible:
      raise _suite.Skip('one budget that can be met alone can be met')
    for problem in self.impossible[:4]:
      try:
        choice = self.solve(problem)
      except allocation.InfeasibleError:
        continue
      raise AssertionError(
        f'a problem that has no choice got {np.asarray(choice).tolist()}'
      )

  def units(self):
    for i, problem, choice in self.solved[:4]:
      scaled = allocation.make_problem(
        problem.sensitivity,
        dict(zip(problem.quantities, 1024.0 * problem.cost)),
        dict(zip(problem.quantities, 1024.0 * problem.budget)),
        ties=[np.flatnonzero(problem.groups == g) for g in problem.groups],
      )
      other = np.asarray(self.solve(scaled))
      check(
        np.isclose(_loss(problem, other), _loss(problem, choice)),
        f'problem {i}: {choice.tolist()}, and {other.tolist()} in units of '
        'a 1024th',
      )
