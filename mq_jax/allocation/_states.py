"""Dynamic programming over nondominated states of real-valued cost."""

import numpy as np

from mq_jax.allocation._tables import Tables

# With several budgets, the most states that all others are compared to. To
# keep a dominated state costs time, never the optimum, and with a bound few
# are dominated.
_PIVOTS = 64


def monotone(t: Tables, priced: np.ndarray) -> tuple[float, np.ndarray]:
  """As `_dual.cheapest`, of choices that do not decrease along the sites."""
  follows = np.triu(np.ones((priced.shape[1],) * 2, bool))
  ahead = _ahead(priced, follows)
  l = len(priced)
  choice = np.zeros(l, np.int64)
  # Before the first site stands the lowest candidate, which all may follow.
  last = 0
  for i in range(l):
    cost = np.where(follows[last], priced[i] + ahead[i + 1], np.inf)
    last = choice[i] = int(cost.argmin())
  return float(ahead[0, 0]), choice


def _ahead(table, follows):
  """Least sum over the sites still ahead, by the last candidate.

  Args:
    table: f[l, c].
    follows: Whether candidate k may follow j. bool[c, c].

  Returns:
    f64[l + 1, c]: sum over sites i..l-1 if site i - 1 has candidate j.
  """
  l, c = table.shape
  ahead = np.zeros((l + 1, c))
  for i in range(l - 1, -1, -1):
    onward = table[i] + ahead[i + 1]
    ahead[i] = np.where(follows, onward, np.inf).min(axis=1)
  return ahead


def search(
  t: Tables,
  *,
  upper: float,
  prices: np.ndarray,
  max_states: int,
  ordered: bool = False,
  beam: bool = False,
) -> np.ndarray | None:
  """The choice of least loss within the budgets, site by site.

  A state is the loss and costs of a choice for the sites so far. It is
  dropped if another one costs no more of anything and loses no more, if the
  sites ahead cannot be paid for, or if by the Lagrangian bound no completion
  is as good as `upper`.

  Args:
    t: Tables.
    upper: Loss of a choice that fits, infinite if none is known.
    prices: Of a Lagrangian bound, any not negative. f64[q].
    max_states: Most states kept after a site.
    ordered: Whether candidates may not decrease along the sites.
    beam: Whether to go on with the states of least bound if there are too
      many. The choice then need not be the best.

  Returns:
    i64[l], or None if nothing was found.

  Raises:
    ValueError: if there are more states, and no beam.

  Source:
    Morin and Marsten, Branch-and-bound strategies for dynamic programming,
    Operations Research 24 (1976).
  """
  l, c = t.loss.shape
  q = len(t.budget)
  follows = np.ones((c, c), bool)
  priced = t.loss + np.tensordot(prices, t.cost, axes=1)
  visit = np.arange(l)
  if ordered:
    follows = np.triu(follows)
  elif c > 1:
    # Sites with a clear winner first: they don't multiply the states. On
    # 224 sites and two budgets this order takes 1 % of the time.
    best, second = np.partition(priced, 1, axis=1)[:, :2].T
    visit = np.argsort(best - second, kind='stable')
  t = t._replace(
    loss=t.loss[visit], cost=t.cost[:, visit], allowed=t.allowed[visit]
  )
  priced = priced[visit]
  bound = _ahead(priced, follows) - prices @ t.budget
  least = np.stack(
    [np.zeros((l + 1, c))]
    + [_ahead(np.where(t.allowed, cost, np.inf), follows) for cost in t.cost]
  )[1:]
  # Bound and loss round differently.
  room = upper + 1e-9 * abs(upper) if np.isfinite(upper) else np.inf

  loss, cost = np.zeros(1), np.zeros((q, 1))
  last = np.zeros(1, np.int64)
  parents, picks = [], []
  for i in range(l):
    new = []
    for j in np.flatnonzero(t.allowed[i]):
      parent = np.flatnonzero(follows[last, j])
      loss_j = loss[parent] + t.loss[i, j]
      cost_j = cost[:, parent] + t.cost[:, i, j, None]
      total = cost_j + least[:, i + 1, j, None]
      keep = (total <= t.budget[:, None] * (1 + 1e-15)).all(axis=0)
      keep &= loss_j + prices @ cost_j + bound[i + 1, j] <= room
      new.append(
        (loss_j[keep], cost_j[:, keep], parent[keep], np.full(keep.sum(), j))
      )
    if ordered:
      # A state of another last candidate has other ways to go on.
      new = [_undominated(*states) for states in new]
    loss, cost, parent, pick = (np.concatenate(x, axis=-1) for x in zip(*new))
    if not ordered:
      loss, cost, parent, pick = _undominated(loss, cost, parent, pick)
    if len(loss) > max_states and beam:
      score = loss + prices @ cost + bound[i + 1, pick]
      kept = np.argpartition(score, max_states)[:max_states]
      loss, cost, parent, pick = (
        x[..., kept] for x in (loss, cost, parent, pick)
      )
    if len(loss) > max_states:
      raise ValueError(
        f'allocation: {len(loss)} states after {i + 1} of {l} sites, more '
        f'than max_states={max_states}; use `integer_program`, or round the '
        'costs so that more of them are equal'
      )
    if not len(loss):
      return None
    parents.append(parent.astype(np.int32))
    picks.append(pick.astype(np.int16))
    last = pick
  fit = (cost <= t.budget[:, None]).all(axis=0)
  if not fit.any():
    return None
  at = int(np.where(fit, loss, np.inf).argmin())
  choice = np.zeros(l, np.int64)
  for i in range(l - 1, -1, -1):
    choice[visit[i]] = picks[i][at]
    at = parents[i][at]
  return choice


def _undominated(loss, cost, *rest, pivots=_PIVOTS):
  """The states f64[n], f64[q, n] that no other equals or betters in all."""
  order = np.lexsort((*cost[::-1], loss))  # by loss, then costs
  loss, cost = loss[order], cost[:, order]
  n = len(loss)
  if len(cost) == 1:
    # Whatever comes later must cost less than all before.
    before = np.r_[np.inf, np.minimum.accumulate(cost[0])[:-1]]
    keep = cost[0] < before
  elif len(cost) == 0:
    keep = np.arange(n) < 1
  else:
    keep = np.ones(n, bool)
    # Only earlier ones can dominate; of equal ones the first stays.
    for p in range(n - 1):
      if keep[p]:
        later = np.flatnonzero(keep[p + 1 :]) + p + 1
        keep[later[(cost[:, later] >= cost[:, p, None]).all(axis=0)]] = False
        pivots -= 1
        if not pivots:
          break
  return loss[keep], cost[:, keep], *(x[order][keep] for x in rest)
