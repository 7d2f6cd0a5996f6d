"""What the solvers share: a problem in normal form, and moves in it."""

from typing import NamedTuple

import numpy as np

from mq_jax.allocation.problem import (
  Problem,
  collapse,
  feasible,
  limits,
)

# Moves of which `exchange` tries all pairs.
_MOVES = 768


class Tables(NamedTuple):
  """A problem without ties, measured from the best loss and least cost.

  Of each site the least loss and, by quantity, the least cost are taken off,
  and off the budget too. Quantities that cannot exceed their budget are left
  out. Loss is infinite, and cost 0, where a site lacks the candidate.

  Attributes:
    loss: f64[l, c], least of a site 0.
    cost: f64[q, l, c], least of a site 0; whole numbers stay whole.
    budget: What is left for `cost`, not negative. f64[q].
    scale: Cost of the dearest choice, to compare quantities. f64[q].
    allowed: bool[l, c].
    index: Row of each original site. i64[sites].
    quantities: Numbers of the q quantities in the problem. i64[q].
  """

  loss: np.ndarray
  cost: np.ndarray
  budget: np.ndarray
  scale: np.ndarray
  allowed: np.ndarray
  index: np.ndarray
  quantities: np.ndarray


def tables(problem: Problem) -> Tables:
  """The normal form of a problem."""
  reduced, index = collapse(problem)
  allowed = reduced.allowed
  loss = reduced.sensitivity - reduced.sensitivity.min(axis=1, keepdims=True)
  least = np.where(allowed, reduced.cost, np.inf).min(axis=2)
  cost = np.where(allowed, reduced.cost - least[..., None], 0.0)
  # The problem was checked: below 0 is only rounding.
  budget = np.maximum(limits(problem) - least.sum(axis=1), 0.0)
  scale = cost.max(axis=2).sum(axis=1)
  binds = np.flatnonzero(scale > budget)
  return Tables(
    loss, cost[binds], budget[binds], scale[binds], allowed, index, binds
  )


def expand(problem: Problem, t: Tables, choice: np.ndarray) -> np.ndarray:
  """The choice of all sites from one of the rows of `t`. i64[sites]."""
  full = np.asarray(choice, np.int64)[..., t.index]
  if full.ndim == 1:
    assert feasible(problem, full), 'a solver left the budget'
  return full


def totals(t: Tables, choice: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Loss f64[p] and costs f64[p, q] of choices i[p, l]."""
  rows = np.arange(t.loss.shape[0])
  loss = t.loss[rows, choice].sum(axis=-1)
  return loss, t.cost[:, rows, choice].sum(axis=-1).T


def fits(t: Tables, choice: np.ndarray) -> np.ndarray:
  """Which choices i[p, l] are allowed and keep every budget. bool[p]."""
  rows = np.arange(t.loss.shape[0])
  _, cost = totals(t, choice)
  return t.allowed[rows, choice].all(axis=-1) & (cost <= t.budget).all(axis=-1)


def violation(t: Tables, cost: np.ndarray) -> np.ndarray:
  """By how much costs f64[..., q] exceed the budgets, summed. f64[...]."""
  return (np.maximum(cost - t.budget, 0.0) / t.scale).sum(axis=-1)


def _after(t, choice):
  """Costs after each one-site move from choices i[p, l]. f64[p, l, c, q]."""
  rows = np.arange(t.loss.shape[0])
  _, cost = totals(t, choice)
  now = t.cost[:, rows, choice]  # [q, p, l]
  step = t.cost[:, None] - now[..., None]  # [q, p, l, c]
  return cost[:, None, None, :] + np.moveaxis(step, 0, -1)


def _rise(t, choice):
  """Rise of the loss by each one-site move. f64[p, l, c]."""
  rows = np.arange(t.loss.shape[0])
  return t.loss - t.loss[rows, choice][..., None]


def _pick(score, possible):
  """Possible move of the least score: p pairs of site and candidate."""
  score = np.where(possible, score, np.inf).reshape(len(possible), -1)
  return np.unravel_index(score.argmin(axis=1), possible.shape[1:])


def repair(t: Tables, choice: np.ndarray, anchor: np.ndarray) -> np.ndarray:
  """Move choices into the budgets, one site at a time.

  Each move is the one of the least rise of loss per violation saved. Where
  none saves, which takes several budgets, sites turn to the anchor, one after
  the other.

  Args:
    t: Tables.
    choice: Allowed ones. i[p, l].
    anchor: A choice that fits. i[l].

  Returns:
    i64[p, l], all of which fit.
  """
  choice = np.array(choice, np.int64)
  stuck = np.zeros(len(choice), bool)
  while True:
    bad = np.flatnonzero(~fits(t, choice) & ~stuck)
    if not len(bad):
      break
    now = choice[bad]
    before = violation(t, totals(t, now)[1])[:, None, None]
    saved = before - violation(t, _after(t, now))
    # Rounding must not count as progress, or this may not end.
    possible = t.allowed & (saved > 1e-12 * before)
    score = _rise(t, now) / np.where(possible, saved, 1.0)
    site, to = _pick(score, possible)
    moves = possible.any(axis=(1, 2))
    choice[bad[moves], site[moves]] = to[moves]
    stuck[bad[~moves]] = True
  rows = np.arange(t.loss.shape[0])
  for p in np.flatnonzero(stuck):
    rise = t.loss[rows, anchor] - t.loss[rows, choice[p]]
    for site in np.argsort(rise, kind='stable'):
      choice[p, site] = anchor[site]
      if fits(t, choice[p : p + 1])[0]:
        break
  return choice


def fill(t: Tables, choice: np.ndarray) -> np.ndarray:
  """Spend what the budgets leave, one site at a time, while loss falls.

  Each move is the one of most loss saved per cost that still fits, each cost
  in units of what is left of it.

  Args:
    t: Tables.
    choice: Ones that fit. i[p, l].

  Returns:
    i64[p, l], all of which fit.
  """
  choice = np.array(choice, np.int64)
  active = np.arange(len(choice))
  while len(active):
    now = choice[active]
    after, rise = _after(t, now), _rise(t, now)
    possible = t.allowed & (rise < 0) & (after <= t.budget).all(axis=-1)
    before = totals(t, now)[1][:, None, None, :]
    extra = _extra(t, before, after)
    score = np.where(possible, rise, 0.0) / extra
    site, to = _pick(score, possible)
    moves = possible.any(axis=(1, 2))
    choice[active[moves], site[moves]] = to[moves]
    # A later sum may round over a budget that this one kept.
    over = moves & ~fits(t, choice[active])
    choice[active[over]] = now[over]
    active = active[moves & ~over]
  return choice


def _extra(t, before, after):
  """What moves spend of what is left, summed over quantities, above 0."""
  left = np.maximum(t.budget - before, 1e-9 * t.scale)
  return np.maximum(((after - before) / left).sum(axis=-1), 1e-100)


def settle(
  t: Tables,
  choice: np.ndarray,
  anchor: np.ndarray,
  rng: np.random.Generator,
) -> np.ndarray:
  """As `repair` and `fill`, site by site at random instead of the best first.

  Each choice visits its sites in an order of its own: once to come into the
  budgets, and once to spend what is left. At a site the best move is taken.

  Args:
    t: Tables.
    choice: Allowed ones. i[p, l].
    anchor: A choice that fits. i[l].
    rng: For the orders.

  Returns:
    i64[p, l], all of which fit.
  """
  choice = _visit(t, np.array(choice, np.int64), rng, down=True)
  choice = repair(t, choice, anchor)
  up = _visit(t, choice.copy(), rng, down=False)
  return np.where(fits(t, up)[:, None], up, choice)


def _visit(t, choice, rng, down):
  p, l = choice.shape
  every = np.arange(p)
  order = rng.permuted(np.tile(np.arange(l), (p, 1)), axis=1)
  _, cost = totals(t, choice)
  for site in order.T:  # one site of each choice, [p]
    before = cost[:, None, :]
    step = t.cost[:, site] - t.cost[:, site, choice[every, site]][..., None]
    after = before + np.moveaxis(step, 0, -1)  # [p, c, q]
    rise = t.loss[site] - t.loss[site, choice[every, site]][:, None]
    if down:
      excess = violation(t, before)
      if not excess.any():
        break
      gain = excess - violation(t, after)
      possible = t.allowed[site] & (gain > 1e-12 * excess)
      score = rise / np.where(possible, gain, 1.0)
    else:
      fit = (after <= t.budget).all(axis=-1)
      possible = t.allowed[site] & (rise < 0) & fit
      score = np.where(possible, rise, 0.0) / _extra(t, before, after)
    to = np.where(possible, score, np.inf).argmin(axis=1)
    moves = possible.any(axis=1)
    choice[every[moves], site[moves]] = to[moves]
    cost[moves] = after[every, to][moves]
  return choice


def exchange(t: Tables, choice: np.ndarray, prices: np.ndarray) -> np.ndarray:
  """Improve a choice by the best pair of moves, as long as there is one.

  Args:
    t: Tables.
    choice: One that fits. i[l].
    prices: Loss per cost. Moves are tried that lose least at them. f64[q].

  Returns:
    i64[l] that fits, and loses no more.
  """
  rows = np.arange(len(choice))
  priced = t.loss + np.tensordot(prices, t.cost, axes=1)
  while True:
    site, to = np.nonzero(t.allowed)
    order = np.argsort((priced - priced[rows, choice][:, None])[site, to])
    site, to = site[order[:_MOVES]], to[order[:_MOVES]]
    rise = t.loss[site, to] - t.loss[site, choice[site]]
    step = t.cost[:, site, to] - t.cost[:, site, choice[site]]
    left = t.budget - totals(t, choice[None])[1][0]
    # Staying is among the moves of each site, so single ones are, too.
    ok = site[:, None] != site[None, :]
    for q in range(len(left)):
      ok &= step[q, :, None] + step[q, None, :] <= left[q]
    both = np.where(ok, rise[:, None] + rise[None, :], np.inf)
    first, second = np.unravel_index(both.argmin(), both.shape)
    new = choice.copy()
    new[site[[first, second]]] = to[[first, second]]
    before, after = totals(t, np.stack([choice, new]))[0]
    if not (after < before * (1 - 1e-12) and fits(t, new[None])[0]):
      return choice
    choice = new
