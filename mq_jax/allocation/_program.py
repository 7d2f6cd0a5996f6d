"""The allocation as an integer program, solved by HiGHS."""

import dataclasses
import time
from collections.abc import Sequence

import numpy as np
import scipy.optimize
import scipy.sparse

from mq_jax.allocation import _tables
from mq_jax.allocation._tables import Tables
from mq_jax.allocation.problem import InfeasibleError, Problem, collapse

# HiGHS stops at an absolute gap of 1e-6 and lets a row exceed its limit by
# 1e-6, so objective and rows are scaled to numbers of this size.
_SIZE = 1e4
_CUTS = 500


def anchor(problem: Problem, t: Tables) -> np.ndarray:
  """A choice that fits all budgets: i64[l] of the rows of `t`.

  Raises:
    InfeasibleError: if there is none; each budget alone can be met, as the
      problem was checked.
  """
  weights = np.eye(len(t.budget) + 1, len(t.budget))
  weights[-1] = 1.0
  for weight in weights:  # each quantity's cheapest choice, then of the sum
    total = np.tensordot(weight / t.scale, t.cost, axes=1)
    # Of equally cheap ones the best.
    order = np.lexsort((t.loss, np.where(t.allowed, total, np.inf)))
    choice = order[:, 0]
    if _tables.fits(t, choice[None])[0]:
      return choice
  choice = solve(t, np.zeros_like(t.loss))
  if choice is None:
    raise InfeasibleError(_explain(problem))
  return choice


def _explain(problem: Problem) -> str:
  """Why budgets that can be met one by one cannot be met together."""
  reduced, _ = collapse(problem)
  names = [
    f'{name} = {limit:.15g}'
    for name, limit in zip(problem.quantities, problem.budget, strict=True)
    if np.isfinite(limit)
  ]
  lines = [
    f'allocation: budgets {", ".join(names)} can be met one by one, not '
    'together'
  ]
  rows = np.arange(len(reduced.sites))
  for q, name in enumerate(reduced.quantities):
    if not np.isfinite(problem.budget[q]):
      continue
    budget = reduced.budget.copy()
    budget[q] = np.inf
    least = np.where(reduced.allowed, reduced.cost[q], np.inf)
    t = _tables.tables(dataclasses.replace(reduced, budget=budget))
    excess = least - least.min(axis=1, keepdims=True)
    choice = solve(t, excess)
    if choice is not None:
      cost = reduced.cost[q][rows, choice]
      worst = int(cost.argmax())
      lines.append(
        f'with the others held, the smallest feasible {name} is '
        f'{cost.sum():.15g}, of which {reduced.sites[worst]} takes '
        f'{cost[worst]:.15g}'
      )
  return '; '.join(lines)


def solve(
  t: Tables,
  loss: np.ndarray,
  *,
  forbidden: Sequence[np.ndarray] = (),
  upper: float | None = None,
  time_limit: float | None = None,
) -> np.ndarray | None:
  """Least loss within the budgets, by branch and bound without a gap.

  Args:
    t: Tables, for costs, budgets and what is allowed.
    loss: What to minimize, least of a site 0. f64[l, c].
    forbidden: Choices not to return, each i[l].
    upper: Loss of a choice that fits and is not forbidden, if one is known.
    time_limit: Seconds.

  Returns:
    i64[l], or None if nothing fits.

  Raises:
    TimeoutError: at the time limit.
  """
  start = time.monotonic()
  kept = t.allowed
  if upper is not None:
    # A candidate that loses more than a whole known choice is in no optimum.
    # The largest loss left also sets the scale of the gap.
    kept = kept & (loss <= upper * (1 + 1e-9))
  site, candidate = np.nonzero(kept)
  number = np.full(kept.shape, -1)
  number[site, candidate] = np.arange(len(site))
  objective = loss[site, candidate]
  objective = objective * (_SIZE / (objective.max() or 1.0))
  one_each = scipy.sparse.csr_array(
    (np.ones(len(site)), (site, np.arange(len(site))))
  )
  rows, most = [], []
  for cost, budget in zip(t.cost, t.budget, strict=True):
    row, limit = _row(cost[site, candidate], budget)
    rows.append(row)
    most.append(limit)
  for choice in forbidden:
    at = number[np.arange(len(choice)), choice]
    if (at >= 0).all():
      rows.append(np.bincount(at, minlength=len(site)).astype(float))
      most.append(len(choice) - 1.0)

  for _ in range(_CUTS):
    constraints = [scipy.optimize.LinearConstraint(one_each, 1.0, 1.0)]
    if rows:
      table = scipy.sparse.csr_array(np.stack(rows))
      constraints.append(
        scipy.optimize.LinearConstraint(table, -np.inf, np.array(most))
      )
    options = {'mip_rel_gap': 0.0}
    if time_limit is not None:
      # HiGHS takes 0 for a limit that was already reached.
      left = max(time_limit - (time.monotonic() - start), 0.0)
      options['time_limit'] = left
    result = scipy.optimize.milp(
      objective,
      integrality=np.ones(len(site)),
      bounds=scipy.optimize.Bounds(0.0, 1.0),
      constraints=constraints,
      options=options,
    )
    if result.status == 1:
      found = 'no choice' if result.x is None else 'a choice'
      raise TimeoutError(
        f'allocation: HiGHS was at its limit of {time_limit:g} s with '
        f'{found}, not proved to be the best; give it longer, or use '
        '`lagrangian` or `greedy`'
      )
    if result.status == 2:
      return None
    if result.status != 0:
      raise RuntimeError(f'allocation: HiGHS: {result.message}')
    value = np.zeros(kept.shape)
    value[site, candidate] = result.x
    choice = value.argmax(axis=1)
    over = _tables.totals(t, choice[None])[1][0] > t.budget
    if not over.any():
      return choice
    # Within the tolerance of HiGHS, not within ours. Whoever spends at least
    # as much at every site exceeds the budget too.
    for cost in t.cost[over]:
      spent = cost[np.arange(len(choice)), choice]
      rows.append((cost[site, candidate] >= spent[site]).astype(float))
      most.append(len(choice) - 1.0)
  raise RuntimeError(
    f'allocation: HiGHS found {_CUTS} choices that exceed a budget by less '
    'than its tolerance; round the costs or use `dynamic_program`'
  )


def _row(cost, budget) -> tuple[np.ndarray, float]:
  """A budget as a row of numbers that HiGHS can tell apart."""
  whole = cost.astype(np.int64)
  if cost.max() < 2**53 and (whole == cost).all():
    divisor = max(int(np.gcd.reduce(whole)), 1)
    cost, budget = cost / divisor, np.floor(budget / divisor)
    if cost.max() <= _SIZE:
      return cost, budget
  factor = _SIZE / (cost.max() or 1.0)
  return cost * factor, budget * factor
