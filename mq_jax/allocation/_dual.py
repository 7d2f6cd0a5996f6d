"""The Lagrangian dual of the allocation, by cutting planes."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.optimize

from mq_jax.allocation._tables import Tables, totals

_TOP = 1e9


class Dual(NamedTuple):
  """Outcome of `ascend`.

  Attributes:
    bound: No choice that fits has less loss.
    prices: Loss per cost at which the bound holds. f64[q].
    choices: All that were best at some prices, fitting or not. i64[n, l].
  """

  bound: float
  prices: np.ndarray
  choices: np.ndarray


def cheapest(t: Tables, priced: np.ndarray) -> tuple[float, np.ndarray]:
  """The least sum of priced losses f64[l, c], and its choice i64[l]."""
  choice = priced.argmin(axis=1)
  return float(priced[np.arange(len(choice)), choice].sum()), choice


def ascend(
  t: Tables,
  anchor: np.ndarray,
  inner: Callable = cheapest,
  *,
  iterations: int = 200,
) -> Dual:
  """Maximize the Lagrangian dual over prices, by Kelley's cutting planes.

  The dual is the least over choices of `loss + prices * (cost - budget)`: a
  concave function, of which each choice that was best somewhere is a tangent.
  The prices of the next round are the top of the tangents so far, which for
  one budget is bisection at the crossing of two lines. It ends at the top,
  which is the bound of the linear program.

  Args:
    t: Tables.
    anchor: A choice that fits, a good one: its loss is the unit of the
      linear programs. i[l].
    inner: Function of tables and priced losses f64[l, c] that returns the
      least sum, and the choice.
    iterations: Most rounds; the bound holds after any number of them.

  Returns:
    Bound, prices and choices.
  """
  q = len(t.budget)
  unit = float(totals(t, anchor[None])[0][0]) or 1.0
  cost = t.cost / t.scale[:, None, None]
  budget = t.budget / t.scale
  slopes, heights, choices = [], [], []
  best, best_prices = -np.inf, np.zeros(q)

  def look(prices):
    nonlocal best, best_prices
    priced = t.loss / unit + np.tensordot(prices, cost, axes=1)
    value, choice = inner(t, priced)
    value -= prices @ budget
    if value > best:
      best, best_prices = value, prices
    add(choice)

  def add(choice):
    loss, spent = totals(t, choice[None])
    slopes.append(spent[0] / t.scale - budget)
    heights.append(loss[0] / unit)
    choices.append(np.array(choice, np.int64))

  add(anchor)
  look(np.zeros(q))
  for _ in range(iterations if q else 0):
    # max z  s.t.  z <= height_k + slope_k * prices
    result = scipy.optimize.linprog(
      np.r_[np.zeros(q), -1.0],
      A_ub=np.c_[-np.stack(slopes), np.ones(len(slopes))],
      b_ub=np.array(heights),
      bounds=[(0.0, _TOP)] * q + [(None, None)],
    )
    if result.status != 0:
      break
    top = -result.fun
    if top - best <= 1e-9 * max(abs(top), 1e-3):
      break
    look(np.maximum(result.x[:q], 0.0))
  return Dual(best * unit, best_prices * unit / t.scale, np.stack(choices))
