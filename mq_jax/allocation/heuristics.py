"""Rules of the papers, greedy descent, and controls."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from mq_jax.allocation import _dual, _program, _states, _tables
from mq_jax.allocation.problem import (
  InfeasibleError,
  Problem,
  evaluate,
  feasible,
)

# States of a first search that only looks for a good choice, as a bound.
_BEAM = 1000


def levels(problem: Problem) -> np.ndarray:
  """Candidates from the cheapest to the dearest, over all sites. i64[c].

  The costs of each quantity are averaged over the sites that have the
  candidate, in units of the mean over all candidates, and added up.
  """
  allowed = problem.allowed
  count = np.maximum(allowed.sum(axis=0), 1)
  mean = np.where(allowed, problem.cost, 0.0).sum(axis=1) / count
  unit = np.maximum(mean.mean(axis=1, keepdims=True), 1e-300)
  return np.argsort((mean / unit).sum(axis=0), kind='stable')


def monotone_pareto(
  problem: Problem,
  importance: Sequence[float],
  *,
  order: Sequence[int] | None = None,
  max_states: int = 100_000,
) -> np.ndarray:
  """Best of the choices that give an important site no less than others.

  HAWQ-V2 sorts sites by the mean trace of their Hessian and looks only at
  choices whose bits do not fall along that order: C(l + c - 1, c - 1) of
  them instead of c^l. They are searched, not listed, so many sites are no
  difficulty.

  Args:
    problem: The problem; its sensitivities decide among monotone choices.
    importance: A number for each site, more for what needs more bits; of
      tied sites the mean counts. f[l].
    order: Candidates from the fewest bits to the most; `levels(problem)` if
      left out. i[c].
    max_states: Most states of the search.

  Returns:
    The best monotone choice that keeps the budgets. i64[l].

  Raises:
    ValueError: if `importance` or `order` don't fit the problem, or there are
      more states.
    InfeasibleError: if no monotone choice meets the budgets.

  Source:
    HAWQ-V2, arXiv 1911.03852, as in NNCF's `traces_order`.

  Examples:
    >>> from mq_jax.allocation import make_problem
    >>> problem = make_problem([[4.0, 1.0], [2.0, 1.5]],
    ...                        {'bits': [[2, 4], [2, 4]]}, {'bits': 6})
    >>> monotone_pareto(problem, [2.0, 1.0])
    array([1, 0])
  """
  t = _tables.tables(problem)
  rank = np.argsort(_by_row(problem, t, importance), kind='stable')
  order = _check_order(problem, order)
  # Rows in order of importance, candidates in order of bits.
  s = t._replace(
    loss=t.loss[rank][:, order],
    cost=t.cost[:, rank][:, :, order],
    allowed=t.allowed[rank][:, order],
  )
  cheap = np.tensordot(1 / s.scale, s.cost, axes=1)
  least, start = _states.monotone(s, np.where(s.allowed, cheap, np.inf))
  if not np.isfinite(least):
    raise InfeasibleError(_no_monotone(problem, order))
  dual = _dual.ascend(s, start, _states.monotone)
  found, upper = None, np.inf
  for width, beam in ((_BEAM, True), (max_states, False)):
    better = _states.search(
      s,
      upper=upper,
      prices=dual.prices,
      max_states=width,
      ordered=True,
      beam=beam,
    )
    if better is not None:
      found = better
      upper = float(_tables.totals(s, found[None])[0][0])
  if found is None:
    raise InfeasibleError(_no_monotone(problem, order))
  choice = np.zeros(len(rank), np.int64)
  choice[rank] = order[found]
  return _tables.expand(problem, t, choice)


def _no_monotone(problem, order) -> str:
  names = ', '.join(problem.candidates[j] for j in order)
  return (
    'allocation: no choice that is monotone in the importance, of candidates '
    f'in the order {names}, meets the budgets; use `integer_program`, or leave '
    'out sites that lack candidates'
  )


def _by_row(problem, t, values) -> np.ndarray:
  """Mean of values f[sites] over the sites of each row of `t`. f64[l]."""
  values = np.asarray(values, np.float64)
  if values.shape != (len(problem.sites),) or not np.isfinite(values).all():
    raise ValueError(
      f'allocation: importance of shape {values.shape}, needed are '
      f'{len(problem.sites)} finite numbers'
    )
  return np.bincount(t.index, values) / np.bincount(t.index)


def _check_order(problem, order) -> np.ndarray:
  if order is None:
    return levels(problem)
  order = np.asarray(order)
  if sorted(order.tolist()) != list(range(len(problem.candidates))):
    raise ValueError(
      f'allocation: order {order.tolist()} is no order of the '
      f'{len(problem.candidates)} candidates'
    )
  return order.astype(np.int64)


def greedy(problem: Problem, *, start: str = 'best') -> np.ndarray:
  """One site at a time, by loss per cost.

  From the best candidate of each site steps go down, each the one of least
  loss per excess cost saved, until the budgets hold; or from the cheapest
  choice up, each step the one of most loss saved per cost. What is left over
  in the end is spent in either case.

  Args:
    problem: The problem.
    start: 'best' or 'cheapest'.

  Returns:
    A choice that keeps the budgets. i64[l].

  Raises:
    ValueError: for another start.
    InfeasibleError: if no choice meets all budgets.

  Source:
    MPTQ-ViT, arXiv 2401.14895 (greedy from above).

  Examples:
    >>> from mq_jax.allocation import make_problem
    >>> problem = make_problem([[4.0, 1.0], [2.0, 1.5]],
    ...                        {'bits': [[2, 4], [2, 4]]}, {'bits': 6})
    >>> greedy(problem)
    array([1, 0])
  """
  t = _tables.tables(problem)
  anchor = _program.anchor(problem, t)
  if start == 'best':
    top = np.lexsort((t.cost.sum(axis=0), t.loss))[:, :1].T
    choice = _tables.repair(t, top, anchor)
  elif start == 'cheapest':
    choice = anchor[None]
  else:
    raise ValueError(f"allocation: start={start!r}; it is 'best' or 'cheapest'")
  return _tables.expand(problem, t, _tables.fill(t, choice)[0])


def bisection(
  problem: Problem,
  sites: Sequence[int],
  accuracy: Callable[[np.ndarray], float],
  threshold: float,
  *,
  order: Sequence[int] | None = None,
) -> np.ndarray:
  """Fewest bits that a measured accuracy bears, by bisecting prefixes.

  All sites begin with their dearest candidate. For each cheaper one, the
  longest prefix of `sites` that bears it is found by bisection, on the
  assumption that accuracy falls with its length: ceil(log2(l + 1)) calls a
  candidate, and one for the beginning if nothing was borne.

  Args:
    problem: The problem. Its budgets are checked in the end only.
    sites: All sites, least sensitive first; tied sites go with the last of
      them. i[l].
    accuracy: Function of a choice i64[l]; higher is better.
    threshold: Least accuracy.
    order: Candidates from the fewest bits to the most; `levels(problem)` if
      left out. i[c].

  Returns:
    The cheapest choice met of at least that accuracy. i64[l].

  Raises:
    ValueError: if `sites` or `order` don't fit the problem, accuracy is NaN,
      or even the dearest candidates don't reach the threshold.
    InfeasibleError: if the choice exceeds a budget.

  Source:
    Augmenting Hessians with inter-layer dependencies, arXiv 2306.04879; the
    loop over candidates is ours.
  """
  t = _tables.tables(problem)
  rows = _row_order(problem, t, sites)
  order = _check_order(problem, order)[::-1]
  choice = _dearest(t, order)

  def bears(trial) -> bool:
    value = float(accuracy(trial[t.index]))
    if math.isnan(value):
      raise ValueError(f'allocation: accuracy of {trial[t.index]} is NaN')
    return value >= threshold

  accepted = False
  for level, candidate in enumerate(order):
    able = _able(t, rows, order, choice, level)
    low, high = 0, len(able)
    while low < high:
      middle = (low + high + 1) // 2
      trial = choice.copy()
      trial[able[:middle]] = candidate
      if bears(trial):
        low, accepted = middle, True
      else:
        high = middle - 1
    choice[able[:low]] = candidate
  if not accepted and not bears(choice):
    raise ValueError(
      f'allocation: accuracy with the dearest candidates is below {threshold}'
    )
  full = choice[t.index].astype(np.int64)
  if not feasible(problem, full):
    got = evaluate(problem, full)
    over = ', '.join(
      f'{name} = {got[name]:.6g} of {limit:.6g}'
      for name, limit in zip(problem.quantities, problem.budget, strict=True)
      if got[name] > limit
    )
    raise InfeasibleError(
      f'allocation: at accuracy {threshold:g} bisection ends at {over}; lower '
      'the threshold or raise the budget'
    )
  return full


def _row_order(problem, t, sites) -> np.ndarray:
  """Rows of `t` in the order in which the last of their sites comes."""
  sites = np.asarray(sites)
  if sorted(sites.tolist()) != list(range(len(problem.sites))):
    raise ValueError(
      f'allocation: {len(sites)} sites in order; needed is each of the '
      f'{len(problem.sites)} once, by number'
    )
  place = np.zeros(len(t.loss), np.int64)
  place[t.index[sites]] = np.arange(len(sites))
  return np.argsort(place)


def _dearest(t, order) -> np.ndarray:
  """The first candidate in `order` that each row has. i64[l]."""
  return order[t.allowed[:, order].argmax(axis=1)]


def _able(t, rows, order, choice, level) -> np.ndarray:
  """Rows, in order, that can go down to a level of `order`."""
  place = np.argsort(order)[choice]
  able = t.allowed[:, order[level]] & (place < level)
  return rows[able[rows]]


def in_order(
  problem: Problem,
  sites: Sequence[int],
  *,
  order: Sequence[int] | None = None,
) -> np.ndarray:
  """Lower sites in a given order, as few as meet the budgets.

  All sites begin with their dearest candidate. They go down to the next one
  in order, then to the one after it, until the budgets hold. Only the order
  matters, so it shows what an order is worth.

  Args:
    problem: The problem.
    sites: All sites, least sensitive first; tied sites go with the last of
      them. i[l].
    order: Candidates from the fewest bits to the most; `levels(problem)` if
      left out. i[c].

  Returns:
    A choice that keeps the budgets. i64[l].

  Raises:
    ValueError: if `sites` or `order` don't fit the problem.
    InfeasibleError: if no choice meets all budgets.
  """
  t = _tables.tables(problem)
  anchor = _program.anchor(problem, t)
  rows = _row_order(problem, t, sites)
  order = _check_order(problem, order)[::-1]
  choice = _dearest(t, order)
  for level, candidate in enumerate(order):
    for row in _able(t, rows, order, choice, level):
      if _tables.fits(t, choice[None])[0]:
        return _tables.expand(problem, t, choice)
      choice[row] = candidate
  # The fewest bits of every site may not be its least of every cost.
  choice = _tables.repair(t, choice[None], anchor)[0]
  return _tables.expand(problem, t, choice)


def inverse_order(
  problem: Problem,
  importance: Sequence[float],
  *,
  order: Sequence[int] | None = None,
) -> np.ndarray:
  """Control: the most important sites are lowered first.

  Args:
    problem: The problem.
    importance: A number for each site, more for what needs more bits. f[l].
    order: As of `in_order`.

  Returns:
    A choice that keeps the budgets, and that an order worth anything beats.
    i64[l].

  Raises:
    ValueError: if an argument doesn't fit the problem.
    InfeasibleError: if no choice meets all budgets.
  """
  _by_row(problem, _tables.tables(problem), importance)
  sites = np.argsort(-np.asarray(importance, np.float64), kind='stable')
  return in_order(problem, sites, order=order)


def random_choice(
  problem: Problem, *, seed: int | np.random.Generator
) -> np.ndarray:
  """Control: a choice at random among those that keep the budgets. i64[l].

  See `random_choices`.
  """
  return random_choices(problem, 1, seed=seed)[0]


def random_choices(
  problem: Problem,
  count: int,
  *,
  seed: int | np.random.Generator,
  sweeps: int = 20,
) -> np.ndarray:
  """Choices at random among those that keep the budgets.

  Uniform ones are drawn and those kept that fit. Where few fit, the rest come
  from chains that change one or two sites at random and stay within the
  budgets: uniform in the limit of many sweeps, on all choices that such
  steps connect.

  Args:
    problem: The problem.
    count: How many.
    seed: Number or generator.
    sweeps: Steps of a chain by site.

  Returns:
    i64[count, l].

  Raises:
    InfeasibleError: if no choice meets all budgets.
  """
  t = _tables.tables(problem)
  rng = np.random.default_rng(seed)
  anchor = _program.anchor(problem, t)
  options = np.argsort(~t.allowed, axis=1, kind='stable')
  sizes = t.allowed.sum(axis=1)
  rows = np.arange(len(sizes))

  def draw(n):
    return options[rows, (rng.random((n, len(rows))) * sizes).astype(int)]

  kept = np.zeros((0, len(rows)), np.int64)
  for _ in range(4):
    if len(kept) < count:
      trial = draw(max(256, 4 * count))
      kept = np.concatenate([kept, trial[_tables.fits(t, trial)]])
  kept = kept[:count]
  if len(kept) == count:
    return _tables.expand(problem, t, kept)
  chains = np.repeat(anchor[None], count - len(kept), axis=0)
  all_chains = np.arange(len(chains))
  for _ in range(sweeps * len(rows)):
    site = rng.integers(len(rows), size=(2, len(chains)))
    single = rng.random(len(chains)) < 0.5
    site[1, single] = site[0, single]
    trial = chains.copy()
    for s in site:
      pick = (rng.random(len(chains)) * sizes[s]).astype(int)
      trial[all_chains, s] = options[s, pick]
    ok = _tables.fits(t, trial)
    chains[ok] = trial[ok]
  return _tables.expand(problem, t, np.concatenate([kept, chains]))
