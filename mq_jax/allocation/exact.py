"""Solvers that find the best choice, or say how far off it may be."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mq_jax.allocation import _dual, _program, _states, _tables
from mq_jax.allocation.problem import InfeasibleError, Problem, evaluate

_MOST_CONFIGURATIONS = 2e7
_MOST_BUCKETS = 5e6


def brute_force(problem: Problem) -> np.ndarray:
  """Try every choice; the first of equally good ones.

  Args:
    problem: Of at most 2e7 choices, tied sites counted once.

  Returns:
    The choice of least sensitivity that keeps the budgets. i64[l].

  Raises:
    ValueError: for larger problems.
    InfeasibleError: if no choice meets all budgets.
  """
  t = _tables.tables(problem)
  options = [np.flatnonzero(row) for row in t.allowed]
  count = np.prod([float(len(x)) for x in options])
  if count > _MOST_CONFIGURATIONS:
    raise ValueError(
      f'allocation: {count:.3g} choices are more than '
      f'{_MOST_CONFIGURATIONS:.0e}; use `integer_program`'
    )
  # The last sites are tabulated once, the first ones walked over.
  split = len(options)
  inner = 1
  while split and inner * len(options[split - 1]) <= 2**16:
    split -= 1
    inner *= len(options[split])
  loss, cost = _sums(t, options, range(split, len(options)))
  shape = tuple(len(x) for x in options[:split])
  best, best_at = np.inf, None
  for outer in np.ndindex(*shape):
    picks = [options[i][j] for i, j in enumerate(outer)]
    rows = np.arange(split)
    base = t.cost[:, rows, picks].sum(axis=1, keepdims=True)
    fit = (cost + base <= t.budget[:, None]).all(axis=0)
    total = np.where(fit, loss + t.loss[rows, picks].sum(), np.inf)
    at = int(total.argmin())
    if total[at] < best:
      best, best_at = total[at], (picks, at)
  if best_at is None:
    _program.anchor(problem, t)  # raises, with the reason
    raise InfeasibleError('allocation: no choice keeps every budget')
  picks, at = best_at
  tail = np.unravel_index(at, tuple(len(x) for x in options[split:]))
  choice = [*picks, *(options[split + i][j] for i, j in enumerate(tail))]
  return _tables.expand(problem, t, np.array(choice))


def _sums(t, options, sites):
  """Losses f64[n], costs f64[q, n] of all choices of some sites, in order."""
  loss, cost = np.zeros(1), np.zeros((len(t.budget), 1))
  for i in sites:
    loss = np.add.outer(loss, t.loss[i, options[i]]).ravel()
    step = t.cost[:, i, options[i]]
    cost = (cost[:, :, None] + step[:, None, :]).reshape(len(cost), len(loss))
  return loss, cost


def dynamic_program(
  problem: Problem, *, max_states: int = 100_000
) -> np.ndarray:
  """Best choice by dynamic programming over sites.

  With one budget and costs of whole numbers, and few enough units in the
  budget, the state is the cost so far. Otherwise states are all pairs of
  loss and costs that no other betters, less those that a Lagrangian bound
  shows to lead nowhere; costs may be any numbers, of any number of budgets.

  Args:
    problem: The problem.
    max_states: Most states to keep after a site.

  Returns:
    The choice of least sensitivity that keeps the budgets. i64[l].

  Raises:
    ValueError: if there are more states.
    InfeasibleError: if no choice meets all budgets.

  Source:
    ZeroQ, arXiv 2001.00281 (integer sizes); Morin and Marsten
    1976 for states under a bound.
  """
  t = _tables.tables(problem)
  start = _good(t, _program.anchor(problem, t))
  if len(t.budget) == 1:
    divisor = _divisor(t.cost[0])
    buckets = t.budget[0] // divisor + 1 if divisor else np.inf
    if buckets * len(t.loss) <= _MOST_BUCKETS:
      return _tables.expand(problem, t, _by_buckets(t, divisor))
  dual = _dual.ascend(t, start)
  upper = _best(t, _polished(t, dual.choices, start))
  upper = _tables.exchange(t, upper, dual.prices)
  choice = _states.search(
    t,
    upper=float(_tables.totals(t, upper[None])[0][0]),
    prices=dual.prices,
    max_states=max_states,
  )
  # Sums in another order may leave out the very choice of the bound.
  return _tables.expand(problem, t, upper if choice is None else choice)


def _divisor(cost) -> int:
  """The largest whole number that divides all costs; 0 if one isn't whole."""
  if cost.max() >= 2**53 or (cost != np.floor(cost)).any():
    return 0
  return int(np.gcd.reduce(cost.astype(np.int64), axis=None))


def _by_buckets(t, divisor) -> np.ndarray:
  """Least loss by cost so far: f64[buckets], a row per site."""
  units = (t.cost[0] / divisor).astype(np.int64)
  buckets = int(t.budget[0] // divisor) + 1
  best = np.zeros(buckets)  # of at most that cost
  picks = np.zeros((len(units), buckets), np.int16)
  for i, (row, loss) in enumerate(zip(units, t.loss)):
    new = np.full(buckets, np.inf)
    for j in np.flatnonzero(t.allowed[i]):
      if row[j] < buckets:
        total = np.full(buckets, np.inf)
        total[row[j] :] = best[: buckets - row[j]] + loss[j]
        less = total < new
        new[less] = total[less]
        picks[i, less] = j
    best = new
  choice = np.zeros(len(units), np.int64)
  left = buckets - 1
  for i in range(len(units) - 1, -1, -1):
    choice[i] = picks[i, left]
    left -= units[i, choice[i]]
  return choice


def integer_program(
  problem: Problem,
  *,
  forbidden: Sequence[Sequence[int]] = (),
  time_limit: float | None = None,
) -> np.ndarray:
  """Best choice by integer programming, with HiGHS and no gap.

  Where loss is nearly proportional to cost at every site, the proof that
  nothing is better can take very long: set a time limit.

  Args:
    problem: The problem.
    forbidden: Choices that must not be returned: with the best one forbidden
      comes the second best, and so on. Each i[l].
    time_limit: Seconds.

  Returns:
    The choice of least sensitivity that keeps the budgets. i64[l].

  Raises:
    ValueError: for forbidden choices that are none.
    InfeasibleError: if no choice meets all budgets, or all are forbidden.
    TimeoutError: at the time limit.

  Source:
    HAWQ-V3, arXiv 2011.10680; the cuts are from adaptive bit
    switching (Double Rounding), arXiv 2502.01199.

  Examples:
    >>> from mq_jax.allocation import make_problem
    >>> problem = make_problem([[4.0, 1.0], [2.0, 1.5]],
    ...                        {'bits': [[2, 4], [2, 4]]}, {'bits': 6})
    >>> first = integer_program(problem)
    >>> integer_program(problem, forbidden=[first])
    array([0, 1])
  """
  t = _tables.tables(problem)
  excluded = _rows_of(problem, t, forbidden)
  start = _good(t, _program.anchor(problem, t))
  near = np.concatenate([start[None], excluded])
  near = np.concatenate([near, *(_neighbours(t, x) for x in near)])
  near = near[_tables.fits(t, near)]
  loss, _ = _tables.totals(t, near)
  known = {x.tobytes() for x in excluded}
  upper = next(
    (loss[k] for k in np.argsort(loss) if near[k].tobytes() not in known),
    None,
  )
  choice = _program.solve(
    t, t.loss, forbidden=excluded, upper=upper, time_limit=time_limit
  )
  if choice is None:
    raise InfeasibleError(
      f'allocation: all choices that keep the budgets are among the '
      f'{len(forbidden)} forbidden'
    )
  return _tables.expand(problem, t, choice)


def _rows_of(problem, t, choices) -> np.ndarray:
  """Choices of all sites as ones of the rows of `t`. i64[n, l]."""
  _, first = np.unique(t.index, return_index=True)
  rows = [np.zeros((0, len(first)), np.int64)]
  for choice in choices:
    choice = np.asarray(choice)
    if choice.shape != (len(problem.sites),):
      raise ValueError(
        f'allocation: a forbidden choice has shape {choice.shape}, there are '
        f'{len(problem.sites)} sites'
      )
    row = choice[first]
    # One that breaks a tie cannot come out anyway.
    if (row[t.index] == choice).all():
      rows.append(row[None].astype(np.int64))
  return np.concatenate(rows)


def _neighbours(t, choice) -> np.ndarray:
  """All choices that differ at one site. i64[n, l]."""
  site, candidate = np.nonzero(t.allowed)
  near = np.repeat(choice[None], len(site), axis=0)
  near[np.arange(len(site)), site] = candidate
  return near


class Bound(NamedTuple):
  """A choice and how good any could be.

  Attributes:
    choice: One that keeps the budgets. i64[l].
    least: No choice that keeps the budgets has less sensitivity.
    prices: Sensitivity per cost by quantity, 0 where a budget doesn't bind:
      how much a unit more of each would save. f64[q].
  """

  choice: np.ndarray
  least: float
  prices: np.ndarray


def lagrangian_bound(problem: Problem) -> Bound:
  """Choice and lower bound from prices on the costs.

  Prices are raised to the top of the dual, the bound of the linear program.
  The choices best at the prices on the way are moved into the budgets, what
  is left over is spent, and the best of them, improved by exchanges between
  pairs of sites, is returned. The bound falls
  short of the optimum by at most the loss of a few sites' steps.

  Args:
    problem: The problem.

  Returns:
    Choice, bound and prices.

  Raises:
    InfeasibleError: if no choice meets all budgets.

  Source:
    Everett 1963; the dual is climbed by Kelley's cutting planes (1960).

  Examples:
    >>> from mq_jax.allocation import make_problem
    >>> problem = make_problem([[4.0, 1.0], [2.0, 1.5]],
    ...                        {'bits': [[2, 4], [2, 4]]}, {'bits': 6})
    >>> bound = lagrangian_bound(problem)
    >>> bound.choice, round(bound.least, 6), bound.prices.round(6)
    (array([1, 0]), 3.0, array([0.25]))
  """
  t = _tables.tables(problem)
  start = _good(t, _program.anchor(problem, t))
  dual = _dual.ascend(t, start)
  choice = _best(t, _polished(t, dual.choices, start))
  choice = _tables.exchange(t, choice, dual.prices)
  full = _tables.expand(problem, t, choice)
  # The tables are measured from each row's best.
  loss, _ = _tables.totals(t, choice[None])
  base = evaluate(problem, full)['sensitivity'] - loss[0]
  prices = np.zeros(len(problem.quantities))
  prices[t.quantities] = dual.prices
  return Bound(full, float(base + dual.bound), prices)


def lagrangian(problem: Problem) -> np.ndarray:
  """The choice of `lagrangian_bound`. i64[l]."""
  return lagrangian_bound(problem).choice


def _good(t, anchor) -> np.ndarray:
  """The better of the greedy choices from above and from below. i64[l]."""
  top = np.where(t.allowed, t.loss, np.inf).argmin(axis=1)
  return _best(t, _polished(t, top[None], anchor))


def _polished(t, choices, anchor) -> np.ndarray:
  """Choices moved into the budgets, and what is left spent. i64[n, l]."""
  fit = _tables.repair(t, np.concatenate([choices, anchor[None]]), anchor)
  return _tables.fill(t, np.unique(fit, axis=0))


def _best(t, choices) -> np.ndarray:
  return choices[_tables.totals(t, choices)[0].argmin()]
