"""Systolic arrays that move their operands register by register.

Two machines, of R x C PEs each. Nothing here knows how long a fold takes:
the machines run until the last result has left, and count.

*Stationary weights* (`_stationary`). Operands enter a row at the left edge, a
cycle later than the row above, and move right; partial sums move down and
leave at the bottom. A PE has the register it multiplies with and one that is
being loaded. Weights enter a column at the top edge, a cycle later than the
column before, with the number of hops they have to go; each stays where none
is left. The first vector of a tile carries a flag: the PE that sees it takes
over its loaded weight. Interlocks: the flag enters when the whole first
column's weights are sent, and a tile's weights enter when the flag of the
tile before has, so a loaded weight is never overwritten before its use.

*Stationary outputs* (`_accumulating`). Both operands move, right and down,
and every PE adds up its own result.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

DATAFLOWS = ('ws', 'os', 'is')
DRAINS = ('overlapped', 'shifted')


class SystolicRun(NamedTuple):
  """A matrix product, and the cycles that it took.

  Attributes:
    product: i32[m, n].
    cycles: i32, until the last result has left; all folds.
    fold_cycles: i32[folds], each from its first weight or operand to its last
      result; with double buffering, where folds overlap, i32[0].
  """

  product: jax.Array
  cycles: jax.Array
  fold_cycles: jax.Array


class _Stationary(NamedTuple):
  """Registers; r rows, c columns, and memory for results."""

  cycle: jax.Array  # i32
  vectors: jax.Array  # i32: vectors sent to row 0
  packets: jax.Array  # i32: rows of weights sent to column 0
  row_lag: jax.Array  # i32[r]: vector that enters each row, -1 for none
  column_lag: jax.Array  # i32[c]: weights that enter each column, or -1
  x: jax.Array  # i32[r, c]: operand that a PE passes on to the right
  first: jax.Array  # bool[r, c]: it is the first of its tile
  valid: jax.Array  # bool[r, c]
  total: jax.Array  # i32[r, c]: partial sum that a PE passes on downwards
  weight: jax.Array  # i32[r, c]: what it multiplies with
  loaded: jax.Array  # i32[r, c]: what was or is being loaded
  hops: jax.Array  # i32[r, c]: rows that `loaded` has to go on
  results: jax.Array  # i32[vectors, c]
  count: jax.Array  # i32[c]: results that left each column


def _from_left(edge, register):
  """What PEs see: their left neighbour's register, or the edge's."""
  return jnp.concatenate([edge[:, None], register[:, :-1]], axis=1)


def _from_above(edge, register):
  """What PEs see: the register above them, or the edge's."""
  return jnp.concatenate([edge[None], register[:-1]])


def _lagged(lag, newest):
  """The edge's skew: what entered line i enters line i + 1 now."""
  return jnp.concatenate([newest[None], lag[:-1]])


def _stationary(x, w):
  """Run tiles one after the other, the next one's weights behind the last's.

  Args:
    x: i32[tiles, vectors, r].
    w: i32[tiles, r, c].

  Returns:
    Results i32[tiles, vectors, c] and cycles i32.
  """
  tiles, m, _ = x.shape
  rows, columns = w.shape[1:]
  x = x.reshape(tiles * m, rows)
  # The bottom row's weight goes first.
  w = w[:, ::-1].reshape(tiles * rows, columns)
  row, column = jnp.arange(rows), jnp.arange(columns)

  def one_cycle(s):
    # A tile's first vector waits for its weights, which wait for the first
    # vector of the tile before.
    tile = s.vectors // m
    send = (s.vectors < tiles * m) & (
      (s.vectors % m > 0) | (s.packets >= (tile + 1) * rows)
    )
    row_lag = _lagged(s.row_lag, jnp.where(send, s.vectors, -1))
    vectors = s.vectors + send.astype(jnp.int32)
    tile = s.packets // rows
    load = (s.packets < tiles * rows) & (
      (s.packets % rows > 0) | (vectors > (tile - 1) * m)
    )
    column_lag = _lagged(s.column_lag, jnp.where(load, s.packets, -1))
    packets = s.packets + load.astype(jnp.int32)

    valid = _from_left(row_lag >= 0, s.valid)
    operand = _from_left(x[row_lag, row], s.x)
    first = _from_left(row_lag % m == 0, s.first)
    weight = jnp.where(valid & first, s.loaded, s.weight)
    above = _from_above(jnp.zeros((columns,), jnp.int32), s.total)
    total = above + operand * weight

    # A packet moves on while it has hops to go; what comes replaces it.
    entering = column_lag >= 0
    comes = _from_above(entering, s.hops > 0)
    to_go = _from_above(rows - 1 - column_lag % rows, s.hops - 1)
    value = _from_above(w[column_lag, column], s.loaded)

    leaves = valid[-1]
    place = jnp.where(leaves, s.count, tiles * m)  # beyond the end: dropped
    return _Stationary(
      cycle=s.cycle + 1,
      vectors=vectors,
      packets=packets,
      row_lag=row_lag,
      column_lag=column_lag,
      x=operand,
      first=first,
      valid=valid,
      total=total,
      weight=weight,
      loaded=jnp.where(comes, value, s.loaded),
      hops=jnp.where(comes, to_go, s.hops),
      results=s.results.at[place, column].set(total[-1], mode='drop'),
      count=s.count + leaves.astype(jnp.int32),
    )

  grid = jnp.zeros((rows, columns), jnp.int32)
  zero = jnp.int32(0)
  state = _Stationary(
    cycle=zero,
    vectors=zero,
    packets=zero,
    row_lag=jnp.full((rows,), -1, jnp.int32),
    column_lag=jnp.full((columns,), -1, jnp.int32),
    x=grid,
    first=grid > 0,
    valid=grid > 0,
    total=grid,
    weight=grid,
    loaded=grid,
    hops=grid,
    results=jnp.zeros((tiles * m, columns), jnp.int32),
    count=jnp.zeros((columns,), jnp.int32),
  )
  state = jax.lax.while_loop(
    lambda s: jnp.min(s.count) < tiles * m, one_cycle, state
  )
  return state.results.reshape(tiles, m, columns), state.cycle


class _Accumulating(NamedTuple):
  """Registers; r rows, c columns, and memory for results."""

  cycle: jax.Array  # i32
  sent: jax.Array  # i32: steps sent to row 0 and column 0
  row_lag: jax.Array  # i32[r]: step that enters each row, -1 for none
  column_lag: jax.Array  # i32[c]
  x: jax.Array  # i32[r, c]: operand that a PE passes on to the right
  w: jax.Array  # i32[r, c]: operand that a PE passes on downwards
  valid: jax.Array  # bool[r, c]: both have arrived
  total: jax.Array  # i32[r, c]: the PE's result so far
  added: jax.Array  # i32[r, c]: products in it
  results: jax.Array  # i32[r, c]
  left: jax.Array  # i32[c]: results that left each column


def _accumulating(x, w, drain):
  """Run one tile.

  Args:
    x: i32[r, k].
    w: i32[k, c].
    drain: See `matmul`.

  Returns:
    Results i32[r, c] and cycles i32.
  """
  rows, k = x.shape
  columns = w.shape[1]
  row, column = jnp.arange(rows), jnp.arange(columns)

  def one_cycle(s):
    step = jnp.where(s.sent < k, s.sent, -1)
    row_lag = _lagged(s.row_lag, step)
    column_lag = _lagged(s.column_lag, step)
    valid = _from_left(row_lag >= 0, s.valid)
    a = _from_left(x[row, row_lag], s.x)
    b = _from_above(w[column_lag, column], s.w)
    total = s.total + jnp.where(valid, a * b, 0)
    added = s.added + valid.astype(jnp.int32)
    done = added == k
    if drain == 'overlapped':
      # Every PE has a way out of its own, used as it adds its last product.
      results = jnp.where(done & valid, total, s.results)
      left = jnp.sum(done, axis=0, dtype=jnp.int32)
    else:
      # A column that was done before this cycle moves down by a row: its
      # bottom result leaves.
      moves = jnp.all(s.added == k, axis=0) & (s.left < rows)
      place = jnp.where(moves, rows - 1 - s.left, rows)
      results = s.results.at[place, column].set(s.total[-1], mode='drop')
      down = _from_above(jnp.zeros((columns,), jnp.int32), s.total)
      total = jnp.where(moves[None], down, total)
      left = s.left + moves.astype(jnp.int32)
    return _Accumulating(
      cycle=s.cycle + 1,
      sent=s.sent + 1,
      row_lag=row_lag,
      column_lag=column_lag,
      x=a,
      w=b,
      valid=valid,
      total=total,
      added=added,
      results=results,
      left=left,
    )

  grid = jnp.zeros((rows, columns), jnp.int32)
  zero = jnp.int32(0)
  state = _Accumulating(
    cycle=zero,
    sent=zero,
    row_lag=jnp.full((rows,), -1, jnp.int32),
    column_lag=jnp.full((columns,), -1, jnp.int32),
    x=grid,
    w=grid,
    valid=grid > 0,
    total=grid,
    added=grid,
    results=grid,
    left=jnp.zeros((columns,), jnp.int32),
  )
  state = jax.lax.while_loop(lambda s: jnp.min(s.left) < rows, one_cycle, state)
  return state.results, state.cycle


def _cut(array, size, axis):
  """Tiles along an axis, zeros beyond its end: a leading axis more."""
  array = jnp.moveaxis(array, axis, 0)
  array = jnp.pad(
    array, ((0, -array.shape[0] % size), *((0, 0),) * (array.ndim - 1))
  )
  array = array.reshape(-1, size, *array.shape[1:])
  return jnp.moveaxis(array, 1, axis + 1)


def _pairs(a, b):
  """Every tile of a [p, ...] with every one of b [q, ...]: p x q, q fastest."""
  first = jnp.repeat(a, b.shape[0], axis=0)
  second = jnp.tile(b, (a.shape[0], *(1,) * (b.ndim - 1)))
  return first, second


# Folds that run side by side: bounds the memory, not the result.
_FOLDS_AT_ONCE = 16


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _run_stationary(x, w, rows, cols, double_buffered):
  m, n = x.shape[0], w.shape[1]
  x_tiles = _cut(x, rows, 1)  # [k tiles, m, r]
  w_tiles = _cut(_cut(w, rows, 0), cols, 2)  # [n tiles, k tiles, r, c]
  # Output tile by output tile, the reduction innermost.
  column_tiles, k_tiles = w_tiles.shape[:2]
  w_tiles = w_tiles.reshape(-1, rows, cols)
  x_tiles = jnp.tile(x_tiles, (column_tiles, 1, 1))
  if double_buffered:
    results, cycles = _stationary(x_tiles, w_tiles)
    fold_cycles = jnp.zeros((0,), jnp.int32)
  else:
    alone = lambda xw: _stationary(xw[0][None], xw[1][None])
    results, fold_cycles = jax.lax.map(
      alone, (x_tiles, w_tiles), batch_size=_FOLDS_AT_ONCE
    )
    cycles = jnp.sum(fold_cycles)
  # The adders behind the array sum the tiles of the reduction.
  results = results.reshape(column_tiles, k_tiles, m, cols).sum(axis=1)
  product = results.swapaxes(0, 1).reshape(m, -1)[:, :n]
  return SystolicRun(product, cycles, fold_cycles)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _run_accumulating(x, w, rows, cols, drain):
  m, n = x.shape[0], w.shape[1]
  row_tiles, column_tiles = -(-m // rows), -(-n // cols)
  pairs = _pairs(_cut(x, rows, 0), _cut(w, cols, 1))
  results, fold_cycles = jax.lax.map(
    lambda xw: _accumulating(*xw, drain), pairs, batch_size=_FOLDS_AT_ONCE
  )
  results = results.reshape(row_tiles, column_tiles, rows, cols)
  product = results.swapaxes(1, 2).reshape(row_tiles * rows, -1)
  return SystolicRun(product[:m, :n], jnp.sum(fold_cycles), fold_cycles)


def matmul(
  x: jax.Array,
  w: jax.Array,
  rows: int,
  cols: int,
  *,
  dataflow: str = 'ws',
  drain: str = 'overlapped',
  double_buffered: bool = False,
) -> SystolicRun:
  """Multiply on a systolic array of rows x cols PEs, and count the cycles.

  Dataflows: 'ws' holds a tile of `w` (rows carry k, columns n) and streams
  the m vectors; 'is' holds a tile of `x` (rows carry k, columns m) and
  streams the n columns of `w` - the same machine on the transposed product;
  'os' holds a tile of results (rows carry m, columns n) and streams k.
  Folds follow each other without overlap, and a fold on a partly empty array
  costs as much as one on a full array.

  What the machines turn out to take (T is the streamed dimension):

    ws, is            2R + C + T - 2 a fold
    os, 'overlapped'   R + C + T - 2 a fold
    os, 'shifted'     2R + C + T - 2 a fold
    double-buffered    R + (folds - 1) max(T, R) + T + R + C - 2 in all

  Args:
    x: Integers [m, k]; i8 to i32, products are i32.
    w: Integers [k, n].
    rows: PEs in a column, R.
    cols: PEs in a row, C.
    dataflow: 'ws', 'os' or 'is'.
    drain: How results leave an 'os' array; without effect on the others,
      whose results leave at the bottom edge anyway. 'overlapped': each in
      the cycle of its last product, over a way of its own (an output bus
      per PE, or a second accumulator that the next fold's operands push
      out), which is what SCALE-Sim's code counts. 'shifted': over the links
      to the neighbours below, column by column, R cycles from the cycle
      after the column's last product: the form of SCALE-Sim's paper.
    double_buffered: For 'ws' and 'is': a second weight register is loaded
      with the next tile while one is streamed; folds follow each other
      without a gap. Where T >= R that is the usual R + folds T + R + C - 2;
      for T < R the usual form with max(T, R) for every fold counts R - T
      cycles more: the time of a load behind the last tile, which nobody
      waits for.

  Returns:
    The product and cycles, a `SystolicRun`.

  Raises:
    ValueError: for operands that are not integer matrices of matching k, an
      unknown dataflow or drain, sizes below 1, or double-buffered outputs.

  Source:
    SCALE-Sim v2 and v3: mapping of the dimensions and folds; its report
    subtracts 1, the index of the last cycle. Double buffering as in
    MicroScopiQ's ping-pong registers; interlocks are ours.

  Examples:
    >>> x = jnp.arange(6, dtype=jnp.int8).reshape(3, 2)
    >>> run = matmul(x, jnp.eye(2, dtype=jnp.int8), 2, 2)
    >>> run.product.tolist(), int(run.cycles)
    ([[0, 1], [2, 3], [4, 5]], 7)
  """
  for name, value, known in (
    ('dataflow', dataflow, DATAFLOWS),
    ('drain', drain, DRAINS),
  ):
    if value not in known:
      raise ValueError(f'matmul: {name}={value!r} is none of {known}')
  shapes = f'x {x.dtype}{list(x.shape)}, w {w.dtype}{list(w.shape)}'
  if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[0]:
    raise ValueError(f'matmul: needs x [m, k] and w [k, n], got {shapes}')
  if not all(jnp.issubdtype(a.dtype, jnp.integer) for a in (x, w)):
    raise ValueError(f'matmul: operands must be integers, got {shapes}')
  if min(rows, cols, *x.shape, *w.shape) < 1:
    raise ValueError(
      f'matmul: nothing to do for {shapes} on {rows} x {cols} PEs; every '
      'size must be at least 1'
    )
  x, w = x.astype(jnp.int32), w.astype(jnp.int32)
  if dataflow == 'os':
    if double_buffered:
      raise ValueError(
        "matmul: double_buffered is for weights ('ws') or inputs ('is') that "
        "stay; for 'os' choose drain='overlapped'"
      )
    return _run_accumulating(x, w, rows, cols, drain)
  if dataflow == 'is':
    run = _run_stationary(w.T, x.T, rows, cols, double_buffered)
    return run._replace(product=run.product.T)
  return _run_stationary(x, w, rows, cols, double_buffered)
