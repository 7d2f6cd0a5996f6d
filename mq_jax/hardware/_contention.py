"""Closed forms for rows that share ReCoN units.

A tile is a line of `rows`. Of these, k hold outliers and send every vector
through one of U units; a vector of q requests in all (lanes of a packed PE
ask one by one) makes the units work q/U cycles. On average an outlier row is
g = (rows + 1) / (k + 1) rows behind the one before, so a vector comes from
one to the next in L + g h cycles: `latency` L of a unit and `hop` h of a row.

The forms hold for a row that can take a vector every cycle (enough places in
front of it), and an arbiter by turns. All arguments broadcast, may be soft,
and the module `xp` may be numpy or jax.numpy. `simulate.pipeline` is the
machine they describe; it knows none of them.
"""

from types import ModuleType
from typing import Any

import jax.numpy as jnp

Numbers = Any  # numbers or arrays, of numpy or of JAX; they broadcast


def _load(rows, outlier_rows, requests, units, xp):
  """Cycles a vector costs the units, rows that keep them busy, and g."""
  demand = xp.maximum(1.0, requests / units)
  # Without more requests than units all outlier rows work side by side.
  busy = xp.maximum(outlier_rows / demand, xp.minimum(outlier_rows, 1.0))
  spacing = (rows + 1.0) / (outlier_rows + 1.0)
  return demand, busy, spacing


def tile_cycles(
  m: Numbers,
  rows: Numbers,
  outlier_rows: Numbers,
  requests: Numbers,
  units: Numbers,
  hop: Numbers,
  latency: Numbers,
  *,
  xp: ModuleType = jnp,
) -> Numbers:
  """Cycles from the first vector's entry to the last one's exit of a tile.

  The longer of two paths. With d = max(1, q/U), and b = k/d (at least one)
  the rows which together keep all units busy:

    path of a vector:  m - 1 + h rows + k L + max(0, q/U - k)
    work of the units: d m - 1 + b L + h ((b + 1) g - 1)

  The first: nobody waits except lanes of a row for each other. The second:
  the units are busy all the time except at both ends. The g rows up to the
  first outlier row's end and the g - 1 behind the last one (on average) pass
  without the units. At first only one outlier row has vectors, then two,
  until b have: the units' idle share adds up to (b - 1) / 2 gaps of L + g h,
  and as much at the end, when the vectors run out; the last grant itself
  takes L. Where U >= q the two agree, so the form is continuous in all its
  arguments; it is exact without outliers, and with one outlier row in one
  lane.

  Differentiable except where the paths are equally long; there, `xp.maximum`
  decides. k below 1 (an expected number) is allowed.

  Args:
    m: Vectors, i.e. tokens, at least 1.
    rows: Rows of the tile.
    outlier_rows: Rows with outliers in any lane, k <= rows.
    requests: Requests of one vector, q; k <= q <= lanes k.
    units: Units that the rows share, U.
    hop: Cycles from row to row, h.
    latency: Cycles through a unit, L.
    xp: numpy or jax.numpy.

  Returns:
    Cycles; whole only where the formula is.

  Source:
    Ours. The digest of MicroScopiQ (arXiv 2411.05282) has max(m - 1 + h rows
    + k L, q m / U), without the ends of the busy time. Against
    `simulate.pipeline` the tests hold the mean error below 2 % and the worst
    below 25 %; experiments/recon_contention.py finds 1.8 and 17 %. Worst are
    few outlier rows with an unusual place.

  Examples:
    >>> import numpy
    >>> float(tile_cycles(10, 4, 1, 1, 1, 2, 8, xp=numpy))
    25.0
  """
  demand, busy, spacing = _load(rows, outlier_rows, requests, units, xp)
  together = xp.maximum(0.0, requests / units - outlier_rows)
  path = m - 1.0 + hop * rows + outlier_rows * latency + together
  work = demand * m - 1.0 + busy * latency
  work = work + hop * ((busy + 1.0) * spacing - 1.0)
  return xp.maximum(path, work)


def conflict_rate(
  m: Numbers,
  rows: Numbers,
  outlier_rows: Numbers,
  requests: Numbers,
  units: Numbers,
  hop: Numbers,
  latency: Numbers,
  *,
  xp: ModuleType = jnp,
) -> Numbers:
  """Share of requests that are not granted in the cycle they arise in.

  Vectors enter one a cycle, so m of them are spread over m cycles of way.
  Nobody meets while that is less than b rows take at least, b (L + h) (see
  `tile_cycles`); on average they take s = b h (g - 1) more, and beyond that
  most vectors meet others. Then 1 of d requests is served at once:

    e = max(0, m - b (L + h))
    rate = c + (1 - 1/d - c) e^2 / (e^2 + (s + 1/2)^2)

  where c = max(0, 1 - b) is the share that waits for the other lane of its
  own row, whatever m is. The squares are a choice: a smooth step with its
  middle at the average way. Gradients are finite; 0 for U >= q.

  Args:
    m: Vectors, i.e. tokens, at least 1.
    rows: Rows of the tile.
    outlier_rows: Rows with outliers in any lane, k <= rows.
    requests: Requests of one vector, q; k <= q <= lanes k.
    units: Units that the rows share, U.
    hop: Cycles from row to row, h.
    latency: Cycles through a unit, L.
    xp: numpy or jax.numpy.

  Returns:
    A share in [0, 1].

  Source:
    Ours; a rough form: 2.4 points off on average in
    experiments/recon_contention.py, and 60 near the threshold.
  """
  demand, busy, spacing = _load(rows, outlier_rows, requests, units, xp)
  # Rounding must not make the average way shorter than the shortest.
  slack = busy * hop * xp.maximum(spacing - 1.0, 0.0) + 0.5
  excess = xp.maximum(0.0, m - busy * (latency + hop))
  begun = excess**2 / (excess**2 + slack**2)
  own = xp.maximum(0.0, xp.minimum(outlier_rows, 1.0) - outlier_rows / demand)
  return own + (1.0 - 1.0 / demand - own) * begun
