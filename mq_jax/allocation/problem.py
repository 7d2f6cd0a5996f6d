"""The allocation problem: which candidate for which site, under budgets."""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence

import numpy as np

# A budget given as a sum of the same numbers may differ by rounding.
_SLACK = 1e-12


class InfeasibleError(ValueError):
  """No choice meets the budgets; the message names the smallest feasible."""


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
  """Choose one candidate for each site so that budgets hold and loss is least.

  Tables are of plain numbers: sensitivities and costs add up over sites. Make
  one by `make_problem`, which checks it.

  Attributes:
    sensitivity: Loss by site and candidate, lower is better; infinite where a
      site lacks the candidate. f64[l, c].
    cost: Costs, in units of `budget`. f64[q, l, c].
    budget: Most of each quantity; infinite where it does not matter. f64[q].
    sites: Names, l of them.
    candidates: Labels, c of them.
    quantities: Names of the budgeted quantities, q of them.
    groups: Sites of one number choose the same candidate. i64[l].
  """

  sensitivity: np.ndarray
  cost: np.ndarray
  budget: np.ndarray
  sites: tuple[str, ...]
  candidates: tuple[str, ...]
  quantities: tuple[str, ...]
  groups: np.ndarray

  @property
  def allowed(self) -> np.ndarray:
    """Which candidates a site has. bool[l, c]."""
    return np.isfinite(self.sensitivity)

  def with_budget(self, **budget: float) -> 'Problem':
    """The same problem under other budgets, by quantity.

    Raises:
      ValueError: for unknown quantities or budgets that are not numbers.
      InfeasibleError: if no choice meets one of them.
    """
    values = dict(zip(self.quantities, self.budget, strict=True))
    _check_names('budget', budget, self.quantities)
    new = np.array(list((values | budget).values()), np.float64)
    return check(dataclasses.replace(self, budget=new))


def make_problem(
  sensitivity: np.ndarray,
  cost: Mapping[str, np.ndarray],
  budget: Mapping[str, float],
  *,
  sites: Sequence[str] | None = None,
  candidates: Sequence[str] | None = None,
  ties: Sequence[Sequence[str | int]] = (),
) -> Problem:
  """Check tables and make a problem of them.

  Args:
    sensitivity: f[l, c]; infinite where a site lacks a candidate.
    cost: By quantity ('bits', 'cycles', ...), each f[l, c] and not negative.
    budget: By quantity; those of `cost` that are left out don't matter.
    sites: Names of the l sites.
    candidates: Labels of the c candidates.
    ties: Groups of sites, by name or index, that must choose alike.

  Returns:
    The problem.

  Raises:
    ValueError: for shapes that don't fit, NaN, a site without a candidate,
      unknown names, ties that contradict each other.
    InfeasibleError: if even the cheapest choice exceeds a budget.

  Examples:
    >>> problem = make_problem([[4.0, 1.0], [2.0, 1.5]],
    ...                        {'bits': [[2, 4], [2, 4]]}, {'bits': 6})
    >>> evaluate(problem, [1, 0])
    {'sensitivity': 3.0, 'bits': 6.0}
  """
  sensitivity = np.asarray(sensitivity, np.float64)
  if sensitivity.ndim != 2 or 0 in sensitivity.shape:
    raise ValueError(
      f'allocation: sensitivity has shape {sensitivity.shape}; needed is '
      '[sites, candidates], at least one of each'
    )
  l, c = sensitivity.shape
  sites = tuple(sites) if sites is not None else tuple(map(str, range(l)))
  candidates = (
    tuple(candidates) if candidates is not None else tuple(map(str, range(c)))
  )
  for what, names, count in (
    ('sites', sites, l),
    ('candidates', candidates, c),
  ):
    if len(names) != count or len(set(names)) != count:
      raise ValueError(
        f'allocation: {len(names)} names of {what} ({len(set(names))} of them '
        f'different) for a table of {count}'
      )
  bad = np.isnan(sensitivity) | (sensitivity == -np.inf)
  if bad.any():
    i, j = np.argwhere(bad)[0]
    raise ValueError(
      f'allocation: sensitivity of {sites[i]} with {candidates[j]} is '
      f'{sensitivity[i, j]}'
    )
  if not cost:
    raise ValueError('allocation: there is no cost to budget')
  tables = []
  for name, table in cost.items():
    table = np.asarray(table, np.float64)
    if table.shape != (l, c):
      raise ValueError(
        f'allocation: cost {name!r} has shape {table.shape}, the sensitivity '
        f'{(l, c)}'
      )
    wrong = np.isfinite(sensitivity) & ~(np.isfinite(table) & (table >= 0))
    if wrong.any():
      i, j = np.argwhere(wrong)[0]
      raise ValueError(
        f'allocation: cost {name!r} of {sites[i]} with {candidates[j]} is '
        f'{table[i, j]}; a number >= 0 is needed'
      )
    # Of candidates that a site lacks, the cost is never looked at.
    tables.append(np.where(np.isfinite(sensitivity), table, 0.0))
  _check_names('budget', budget, cost)
  limits = np.array([float(budget.get(q, np.inf)) for q in cost])
  problem = Problem(
    sensitivity,
    np.stack(tables),
    limits,
    sites,
    candidates,
    tuple(cost),
    _groups(sites, ties),
  )
  return check(problem)


def _check_names(what, given, known) -> None:
  for name in given:
    if name not in known:
      near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.0)
      raise ValueError(
        f'allocation: {what} of unknown quantity {name!r}; there is '
        f'{", ".join(near)}'
      )


def _groups(sites, ties) -> np.ndarray:
  groups = np.arange(len(sites))
  index = {name: i for i, name in enumerate(sites)}
  for tie in ties:
    members = []
    for member in tie:
      if isinstance(member, str) and member not in index:
        near = difflib.get_close_matches(member, sites, n=3, cutoff=0.0)
        raise ValueError(
          f'allocation: tie names unknown site {member!r}; nearest are {near}'
        )
      at = index[member] if isinstance(member, str) else int(member)
      if not 0 <= at < len(sites):
        raise ValueError(f'allocation: tie names site {at} of {len(sites)}')
      members.append(at)
    joined = np.isin(groups, groups[members])
    groups[joined] = groups[joined].min(initial=len(sites))
  return groups


def check(problem: Problem) -> Problem:
  """The problem itself, if it can be solved.

  Raises:
    ValueError: for a site without candidates, or a budget that is NaN.
    InfeasibleError: if no choice meets one of the budgets alone.
  """
  if np.isnan(problem.budget).any():
    name = problem.quantities[int(np.argmax(np.isnan(problem.budget)))]
    raise ValueError(f'allocation: budget of {name!r} is not a number')
  reduced, _ = collapse(problem)
  empty = ~reduced.allowed.any(axis=1)
  if empty.any():
    name = reduced.sites[int(np.argmax(empty))]
    alone = problem.allowed.any(axis=1).all()
    raise ValueError(
      f'allocation: {name} has no candidate'
      + (' in common with the sites that it is tied to' if alone else '')
    )
  least = np.where(reduced.allowed, reduced.cost, np.inf).min(axis=2)
  total = least.sum(axis=1)
  for q, name in enumerate(problem.quantities):
    if total[q] > limits(problem)[q]:
      worst = int(np.argmax(least[q]))
      # All digits of the smallest one: it should do as the next budget.
      raise InfeasibleError(
        f'allocation: budget {name} = {problem.budget[q]:.15g} cannot be met; '
        f'the smallest feasible is {total[q]:.15g}, of which '
        f'{reduced.sites[worst]} takes {least[q][worst]:.15g}'
      )
  return problem


def collapse(problem: Problem) -> tuple[Problem, np.ndarray]:
  """A problem without ties: tied sites become one, their tables added up.

  Returns:
    The problem, named by the first site of each group, and for each of the
    original sites the index of its group in it, i64[l]: `choice[index]`
    expands a choice.
  """
  numbers, index = np.unique(problem.groups, return_inverse=True)
  if len(numbers) == len(problem.sites):
    return problem, index
  count = len(numbers)
  sensitivity = np.zeros((count, len(problem.candidates)))
  np.add.at(sensitivity, index, problem.sensitivity)
  cost = np.zeros((len(problem.quantities), *sensitivity.shape))
  np.add.at(cost, (slice(None), index), problem.cost)
  return (
    dataclasses.replace(
      problem,
      sensitivity=sensitivity,
      cost=cost,
      sites=tuple(problem.sites[i] for i in numbers),
      groups=np.arange(count),
    ),
    index,
  )


def evaluate(problem: Problem, choice: Sequence[int]) -> dict[str, float]:
  """Totals of a choice by name: 'sensitivity' and each quantity.

  Args:
    problem: The problem.
    choice: Candidate of each site. i[l].

  Raises:
    ValueError: for a choice of another length or of unknown candidates.
  """
  choice = _check_choice(problem, choice)
  rows = np.arange(len(choice))
  totals = {'sensitivity': float(problem.sensitivity[rows, choice].sum())}
  for name, table in zip(problem.quantities, problem.cost, strict=True):
    totals[name] = float(table[rows, choice].sum())
  return totals


def feasible(problem: Problem, choice: Sequence[int]) -> bool:
  """Whether a choice has only candidates that exist, keeps ties and budgets."""
  choice = _check_choice(problem, choice)
  rows = np.arange(len(choice))
  if not problem.allowed[rows, choice].all():
    return False
  for group in np.unique(problem.groups):
    if len(set(choice[problem.groups == group].tolist())) > 1:
      return False
  totals = problem.cost[:, rows, choice].sum(axis=1)
  return bool((totals <= limits(problem)).all())


def limits(problem: Problem) -> np.ndarray:
  """The budgets as they are enforced: with room for rounding. f64[q]."""
  return problem.budget * (1 + _SLACK)


def _check_choice(problem, choice) -> np.ndarray:
  choice = np.asarray(choice)
  if choice.shape != (len(problem.sites),) or not np.issubdtype(
    choice.dtype, np.integer
  ):
    raise ValueError(
      f'allocation: a choice of shape {choice.shape}, {choice.dtype}; needed '
      f'are {len(problem.sites)} whole numbers'
    )
  if ((choice < 0) | (choice >= len(problem.candidates))).any():
    raise ValueError(
      f'allocation: candidates {choice.min()} to {choice.max()} chosen of '
      f'{len(problem.candidates)}'
    )
  return choice
