"""The best plan on the best of accelerators, without solving for each."""

from typing import NamedTuple

import numpy as np

from mq_jax.allocation import exact
from mq_jax.allocation._designs import AREA, Numbers, Tables, Task, tables
from mq_jax.allocation.problem import InfeasibleError, evaluate

_CHUNK = 1024  # accelerators whose plans are bounded at once, for memory


class Found(NamedTuple):
  """An accelerator and its plan.

  Attributes:
    numbers: Of the accelerator, by name; of least excess where none fits.
    choice: Candidate of each site, i64[l]; None where none fits.
    loss: Of the choice.
    totals: Budgeted quantities, exact, by name.
    evaluations: Of the hardware model, relaxed ones included.
    plans: Accelerators whose plan took a solver, not only a bound.
    excess: Least factor by which a budget was missed; 1 where all are kept.
  """

  numbers: dict[str, float]
  choice: np.ndarray | None
  loss: float
  totals: dict[str, float]
  evaluations: int
  plans: int
  excess: float


def _dual(sensitivity, cost, index, prices, budget):
  """No plan on accelerators [d] loses less, at any prices f64[q]. f64[d]."""
  found = np.empty(cost.shape[1])
  # Sites alike in everything are looked at once.
  rows = np.concatenate([index[:, None], sensitivity], axis=1)
  rows, times = np.unique(rows, axis=0, return_counts=True)
  index, sensitivity = rows[:, 0].astype(int), rows[:, 1:]
  for i in range(0, len(found), _CHUNK):
    priced = np.tensordot(prices, cost[:, i : i + _CHUNK], axes=1)
    total = sensitivity + priced[:, index]
    found[i : i + _CHUNK] = total.min(-1) @ times
  return found - prices @ budget


def best(
  task: Task,
  designs: Numbers,
  *,
  than: float = np.inf,
  gap: float = 1e-4,
  priced: Tables | None = None,
) -> Found:
  """The best plan on the best of accelerators.

  All are priced exactly. Integer programs are solved where needed only: an
  accelerator is passed over once its Lagrangian bound, at the prices found
  on others, reaches the best plan so far, or once another that was solved
  costs no more for any candidate of any site. So the answer is that of
  solving all.

  Args:
    task: The task; its table decides, not its `loss`.
    designs: Numbers [d] by name.
    than: A loss that is known already.
    gap: Relative: plans better by less may be passed over.
    priced: The accelerators' tables, where they are known.

  Returns:
    The best found; its choice is None where no plan keeps the budgets, or
    none is better than `than`.
  """
  priced = tables(task, designs) if priced is None else priced
  budget = np.array([task.budget[name] for name in task.quantities])
  f = task.sensitivity
  # Of each quantity alone, what the cheapest plan needs of its budget.
  free = np.where(np.isfinite(f), 0.0, np.inf)
  fits = np.flatnonzero(np.isfinite(priced.area_um2))
  least = np.full((len(budget) + 1, len(priced.area_um2)), np.inf)
  least[0] = priced.area_um2 / task.area
  for q, limit in enumerate(budget):
    cost = priced.cost[q : q + 1, fits]
    one, none = np.ones(1), np.zeros(1)
    least[q + 1, fits] = _dual(free, cost, task.index, one, none) / limit
  excess = np.maximum(least.max(0), 1.0)
  fits = np.flatnonzero(excess <= 1)
  cost, room = priced.cost[:, fits], least[1:, fits].sum(0)
  bound = np.full(len(fits), f.min(1).sum())
  plans, loss, choice, at = 0, than, None, int(excess.argmin())
  while True:
    enough = loss - gap * abs(loss) if np.isfinite(loss) else np.inf
    left = np.flatnonzero(bound < enough)
    if not len(left):
      break
    # Of equal bounds, that with most room.
    pick = left[np.lexsort((room[left], bound[left]))[0]]
    plans += 1
    value = np.inf
    try:
      problem = task.problem(cost[:, pick], f)
      dual = exact.lagrangian_bound(problem)
    except InfeasibleError:
      pass  # each budget can be kept, but not all of them
    else:
      least_here = _dual(f, cost[:, left], task.index, dual.prices, budget)
      bound[left] = np.maximum(bound[left], least_here)
      found = dual.choice
      value = evaluate(problem, found)['sensitivity']
      if dual.least < min(value, loss) * (1 - gap):
        found = exact.integer_program(problem)
        value = evaluate(problem, found)['sensitivity']
    if value < loss:
      loss, choice, at = value, found, int(fits[pick])
    no_better = (cost[:, left] >= cost[:, pick, None]).all((0, 2, 3))
    bound[left[no_better]] = np.inf  # itself, too
  totals = {AREA: float(priced.area_um2[at])}
  if choice is not None:
    problem = task.problem(priced.cost[:, at], f)
    totals |= evaluate(problem, choice)
    totals.pop('sensitivity')
  return Found(
    {name: float(x[at]) for name, x in designs.items()},
    choice, loss, totals, len(priced.area_um2), plans, float(excess[at]),
  )  # fmt: skip
