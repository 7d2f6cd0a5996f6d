"""Budgets in words: `ebw=2.5`, `cycles=0.6x`, and what they come to.

NAME=VALUE    at most VALUE, in the quantity's unit
NAME=0.6x     at most 0.6 times what the costliest uniform candidate takes:
              of the candidates that every site may have, each given to all
              sites, the one that takes most of this quantity
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mq_jax.lab.costing.entries import unknown


class Quantity(NamedTuple):
  """What can be budgeted: its unit, and whether an accelerator decides it."""

  unit: str
  on_hardware: bool


# Each is a sum over sites: of their share of the model's weights, or of a
# field of `hardware.cost`.
QUANTITIES = {
  'ebw': Quantity('bit/weight', False),
  'bytes': Quantity('B', False),
  'cycles': Quantity('cycles', True),
  'compute_cycles': Quantity('cycles', True),
  'time_s': Quantity('s', True),
  'energy_pj': Quantity('pJ', True),
  'dram_bytes': Quantity('B', True),
}


class Budget(NamedTuple):
  """Most of a quantity: a value in its unit, or a share where `relative`."""

  quantity: str
  value: float
  relative: bool

  @property
  def asked(self) -> str:
    """The value as it was written: '2.5' or '0.6x'."""
    return f'{self.value:.15g}{"x" if self.relative else ""}'


def parse(texts: Sequence[str], accelerator: bool) -> tuple[Budget, ...]:
  """Read budgets.

  Args:
    texts: See the top of this file.
    accelerator: Whether there is one.

  Raises:
    ValueError: for texts of another form, unknown or repeated quantities,
      and those of hardware without an accelerator.

  Examples:
    >>> parse(['ebw=2.5'], False)
    (Budget(quantity='ebw', value=2.5, relative=False),)
  """
  if not texts:
    raise ValueError('needs a budget, e.g. --budget ebw=2.5')
  known = [n for n, q in QUANTITIES.items() if accelerator or not q.on_hardware]
  found: dict[str, Budget] = {}
  for text in texts:
    name, equals, value = (part.strip() for part in text.partition('='))
    if not equals or not name or not value:
      raise ValueError(
        f'--budget {text!r}: needs the form NAME=VALUE or NAME=0.6x'
      )
    if name in QUANTITIES and name not in known:
      raise ValueError(
        f'--budget {text}: {name} depends on the hardware; add --accelerator'
      )
    if name not in known:
      raise unknown(f'--budget {text}: no quantity', name, known)
    if name in found:
      raise ValueError(f'--budget {text}: {name} has a budget already')
    relative = value.endswith(('x', 'X'))
    try:
      number = float(value[:-1] if relative else value)
    except ValueError:
      number = math.nan
    if not 0 < number < math.inf:
      raise ValueError(
        f'--budget {text}: {value!r} is not a positive number, or one with an '
        'x behind it'
      )
    found[name] = Budget(name, number, relative)
  return tuple(found.values())


def uniform_totals(table: np.ndarray, allowed: np.ndarray) -> np.ndarray:
  """Costs f64[c] of one candidate for all sites; infinite if one lacks it.

  Args:
    table: f64[l, c].
    allowed: Candidates that a site has. bool[l, c].
  """
  return np.where(allowed.all(axis=0), table.sum(axis=0), np.inf)


def span(table: np.ndarray, allowed: np.ndarray) -> tuple[float, float]:
  """Costs of the cheapest and the costliest uniform candidate.

  Where no candidate is every site's, the sums of each site's cheapest and
  costliest.
  """
  totals = uniform_totals(table, allowed)
  totals = totals[np.isfinite(totals)]
  if len(totals):
    return float(totals.min()), float(totals.max())
  low = np.where(allowed, table, np.inf).min(axis=1).sum()
  return float(low), float(np.where(allowed, table, 0.0).max(axis=1).sum())


def resolve(
  budgets: Sequence[Budget],
  costs: Mapping[str, np.ndarray],
  allowed: np.ndarray,
) -> dict[str, float]:
  """Budgets in units, by quantity.

  Args:
    budgets: From `parse`.
    costs: By quantity, each f64[l, c].
    allowed: Candidates that a site has. bool[l, c].
  """
  return {
    b.quantity: b.value * span(costs[b.quantity], allowed)[1]
    if b.relative
    else b.value
    for b in budgets
  }


def front(
  low: float, high: float, asked: float, count: int | Sequence[float]
) -> list[float]:
  """The budget asked for, then count - 1 evenly between low and high.

  Or, instead of a count, the others themselves.

  The ends are left out: there only one choice is left, and it is drawn as a
  uniform candidate anyway.

  Examples:
    >>> front(2.0, 6.0, 2.5, 4)
    [2.5, 3.0, 4.0, 5.0]
  """
  others = count
  if isinstance(count, int):
    others = [low + (high - low) * i / count for i in range(1, count)]
  return [asked, *(x for x in others if x != asked)]
