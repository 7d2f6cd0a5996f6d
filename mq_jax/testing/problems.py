"""Small random allocation problems."""

import numpy as np

from mq_jax import allocation


def random_problem(
  rng: np.random.Generator,
  sites: int,
  candidates: int,
  quantities: int = 1,
  *,
  whole: bool = False,
  room: float | None = None,
) -> allocation.Problem:
  """A problem, perhaps with a tie, missing candidates and equal numbers.

  Each budget can be met alone; two of them may be impossible together.

  Args:
    rng: Where everything is drawn from.
    sites: How many.
    candidates: How many.
    quantities: Budgeted quantities, 'q0', 'q1' ...
    whole: Small whole numbers, among which many are equal.
    room: How far each budget is from the least cost (0) to the most (1); None
      draws it.

  Examples:
    >>> problem = random_problem(np.random.default_rng(0), 5, 3)
    >>> allocation.feasible(problem, allocation.brute_force(problem))
    True
  """
  l, c, q = sites, candidates, quantities
  if whole:
    sensitivity = rng.integers(0, 5, (l, c)).astype(float)
    cost = rng.integers(0, 9, (q, l, c)).astype(float)
  else:
    sensitivity, cost = rng.gamma(1.0, 1.0, (l, c)), rng.random((q, l, c))
  missing = rng.random((l, c)) < 0.15
  missing[np.arange(l), rng.integers(c, size=l)] = False
  sensitivity[missing] = np.inf
  ties = []
  if l > 2 and rng.random() < 0.5:
    pair = rng.permutation(l)[:2]
    if not missing[pair].any(axis=0).all():
      ties.append(pair.tolist())
  names = [f'q{k}' for k in range(q)]
  problem = allocation.make_problem(
    sensitivity, dict(zip(names, cost)), {}, ties=ties
  )
  reduced, _ = allocation.collapse(problem)
  least = np.where(reduced.allowed, reduced.cost, np.inf).min(axis=2)
  most = np.where(reduced.allowed, reduced.cost, -np.inf).max(axis=2)
  least, most = least.sum(axis=1), most.sum(axis=1)
  share = rng.uniform(0.0, 0.9, q) if room is None else np.full(q, room)
  return problem.with_budget(**dict(zip(names, least + share * (most - least))))
