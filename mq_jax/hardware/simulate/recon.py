"""ReCoN, the butterfly that joins the halves of outliers, switch by switch.

n columns have log2(n) + 1 stages of n switches. Switch r of stage t has two
inputs and two outputs, left and right; between stages t and t + 1 the rows a
(bit t clear) and b = a + 2^t exchange: a gets the left outputs of both, b the
right ones, each time a's on its left. Of a row's two outputs one therefore
stays in the row (*straight*), the other changes bit t (*cross*). The second
inputs of stage 0 and the right outputs of the last stage are not connected.

A link carries one packet {Res, iAcc}. Every column sends its running sum iAcc
straight through its own row. Res travels with it, and the output port adds
what is left of it: that is what a plain column needs. The lower half of an
outlier parts from its column's sum at the lowest bit in which its slot and
the upper one's differ, crosses wherever a further bit differs, and is merged
with {Res, iAcc} of the upper half as soon as it is in that row.

Packets that enter together are a *wave*. With links that hold two values, two
waves share a pass; with links that hold one, each wave is a pass of its own.

Source:
  MicroScopiQ, arXiv 2411.05282, section 5; wiring and 3-bit commands follow
  the released RTL, the codes of the one-sided commands are our order. Which
  of the inputs of a merge is the upper half is known from the wiring here
  (the one from the switch's own row), where the RTL expects it on the left:
  there half of all pairs could not be merged. That a column may wait and send
  its sum in a later wave is our choice; without, some lists need three.
"""

import enum
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Command(enum.IntEnum):
  """What a switch does with its inputs; 3 bits.

  `x_to_y`: Res of input x leaves at y, and iAcc of x (zero, if it came
  without) at the other output; the other input is dropped.
  """

  pass_ = 0
  swap = 1
  merge_left = 2
  merge_right = 3
  left_to_left = 4
  left_to_right = 5
  right_to_left = 6
  right_to_right = 7


# What a switch does in terms of its row, from which its command follows.
_KEEP, _TURN, _LEAVE, _MERGE = range(4)


class Route(NamedTuple):
  """Commands for lists of pairs, and when each column sends what it has.

  Attributes:
    moves: Switches in terms of rows: keep (straight stays, visitor goes on
      crossing), turn, leave (Res crosses, iAcc stays), merge; `commands`
      translates. u8[..., wave, stage, n].
    sum_wave: Wave in which a column's iAcc travels. u8[..., n].
    res_wave: Wave in which its Res does. u8[..., n].
    waves: Waves that a list needs. i32[...].
    passes: Passes that it needs, waves over values of a link. i32[...].
  """

  moves: np.ndarray
  sum_wave: np.ndarray
  res_wave: np.ndarray
  waves: np.ndarray
  passes: np.ndarray

  @property
  def commands(self) -> np.ndarray:
    """Commands of a network of its own. u8[..., wave, log2(n) + 1, n]."""
    return np.asarray(encode(jnp.asarray(self.moves)))


def stages(n: int) -> int:
  """Stages of a network of n columns, log2(n) + 1.

  Raises:
    ValueError: if n is not a power of two.

  Examples:
    >>> stages(8), stages(64)
    (4, 7)
  """
  if n < 1 or n & (n - 1):
    raise ValueError(f'ReCoN: {n} columns; a power of two is needed')
  return n.bit_length()


def _check(upper, lower, n):
  """Lists of pairs as int32; refuse slots that do not exist or serve twice."""
  upper, lower = (np.asarray(x).astype(np.int32) for x in (upper, lower))
  if upper.shape != lower.shape or upper.ndim < 1:
    raise ValueError(
      f'ReCoN: upper {upper.shape} and lower {lower.shape} must be lists of '
      'pairs of one shape [..., pairs]'
    )
  used = upper != lower
  both = np.concatenate([upper, lower], axis=-1)
  if both.size and (both.min() < 0 or both.max() >= n):
    raise ValueError(
      f'ReCoN: slots {both.min()}..{both.max()}; {n} columns have 0..{n - 1}'
    )
  # Unused pairs get slots of their own, so that any repetition is an error.
  spare = n + np.arange(both.shape[-1])
  slots = np.sort(np.where(np.concatenate([used, used], -1), both, spare))
  twice = np.argwhere(slots[..., 1:] == slots[..., :-1])
  if twice.size:
    *where, at = (int(i) for i in twice[0])
    raise ValueError(
      f'ReCoN: list {tuple(where)} uses slot {slots[tuple(where)][at]} twice: '
      f'upper {upper[tuple(where)]}, lower {lower[tuple(where)]}'
    )
  return upper, lower, used


class _Paths(NamedTuple):
  """Lower halves on their way, at stage t: [t, lists, pairs]."""

  row: np.ndarray  # where it is
  moving: np.ndarray  # it has left its column's sum, or does so here
  cross: np.ndarray  # it takes the cross link
  waiting: np.ndarray  # it has not left yet


def _paths(upper, lower, used, n) -> _Paths:
  t = np.arange(stages(n) - 1)[:, None, None]
  differ = (upper ^ lower)[None]
  below = differ & ((1 << t) - 1)
  return _Paths(
    row=lower[None] ^ below,
    moving=used[None] & ((differ & ((2 << t) - 1)) > 0) & (differ >> t > 0),
    cross=(differ >> t) & 1 > 0,
    waiting=used[None] & ((differ & ((2 << t) - 1)) == 0),
  )


def _conflicts(paths, upper, lower):
  """Pairs that can't share a wave. bool[lists, pairs, pairs]."""
  lists, pairs = upper.shape
  clash = np.zeros((lists, pairs, pairs), bool)
  for row, moving, cross, waiting in zip(*paths):
    both = moving[:, :, None] & moving[:, None]
    same = row[:, :, None] == row[:, None]
    clash |= both & same & (cross[:, :, None] == cross[:, None])
    # The straight link of an upper's row has its sum on it, that of a lower's
    # row its Res as long as it waits.
    straight = (moving & ~cross)[:, :, None]
    above = row[:, :, None] == upper[:, None]
    below = (row[:, :, None] == lower[:, None]) & waiting[:, None]
    meet = straight & (above | below)
    clash |= meet | np.swapaxes(meet, 1, 2)
  clash[:, np.arange(pairs), np.arange(pairs)] = False
  return clash


def _first_fit(clash):
  """The lowest wave for each pair in which it meets no conflict."""
  lists, pairs, _ = clash.shape
  wave = np.zeros((lists, pairs), np.int32)
  for i in range(1, pairs):
    taken = np.zeros((lists, pairs), bool)
    at, j = np.nonzero(clash[:, i, :i])
    taken[at, wave[at, j]] = True
    wave[:, i] = np.argmin(taken, axis=1)
  return wave


def route(
  upper: np.ndarray, lower: np.ndarray, n: int, *, link_values: int = 1
) -> Route:
  """Find the commands that join the halves of outliers.

  All pairs go in one wave if no link is asked for twice. Otherwise pairs go
  one after the other to the first wave in which they meet no conflict, and a
  column whose straight link is taken by a visitor sends its sum in another
  wave. For lists of micro-blocks of 4 and 8 that is the least number of waves
  possible, and never more than two (tests enumerate them all).

  Args:
    upper: Column of each outlier's upper half. Any integer [..., pairs].
    lower: Column of its lower half; equal to `upper` where a pair is unused.
    n: Columns of the network, a power of two. Micro-blocks do not interfere:
      route them alone, and `widen` puts them side by side.
    link_values: Values that a link holds, 1 or 2.

  Returns:
    The route; its waves are the most that any of the lists needs, at least 1.

  Raises:
    ValueError: for an n that is no power of two, other `link_values`, or
      slots that are out of range or used twice.

  Source:
    MicroScopiQ, section 5; conflicts between routes are not in the paper.

  Examples:
    >>> r = route(np.array([0]), np.array([3]), 4)
    >>> int(r.passes), [Command(c).name for c in r.commands[0, :, 3]]
    (1, ['left_to_left', 'pass_', 'swap'])
    >>> int(route(np.array([0]), np.array([5]), 8).passes)
    2
    >>> int(route(np.array([0]), np.array([5]), 8, link_values=2).passes)
    1
  """
  if link_values not in (1, 2):
    raise ValueError(f'ReCoN: link_values={link_values!r} is not 1 or 2')
  depth = stages(n)
  upper, lower, used = _check(upper, lower, n)
  batch, pairs = upper.shape[:-1], upper.shape[-1]
  lists = math.prod(batch)
  flat = lambda x: x.reshape(lists, pairs)
  upper, lower, used = flat(upper), flat(lower), flat(used)

  paths = _paths(upper, lower, used, n)
  wave = _first_fit(_conflicts(paths, upper, lower))
  # Rows whose straight link is taken by visitors, by wave.
  taken = np.zeros((lists, pairs + 1, n), bool)
  t, i, p = np.nonzero(paths.moving & ~paths.cross)
  taken[i, wave[i, p], paths.row[t, i, p]] = True
  sum_wave = np.argmin(taken, axis=1)  # one more wave than pairs: never full
  res_wave = sum_wave.copy()
  i, p = np.nonzero(used)
  sum_wave[i, upper[i, p]] = wave[i, p]
  res_wave[i, upper[i, p]] = wave[i, p]
  res_wave[i, lower[i, p]] = wave[i, p]
  waves = 1 + np.maximum(sum_wave, res_wave).max(axis=1, initial=0)

  most = int(waves.max(initial=1))
  moves = np.full((lists, most, depth, n), _KEEP, np.uint8)
  from_cross = np.zeros((lists, pairs), bool)  # how it reached its row
  before = np.zeros((lists, pairs), bool)
  for t in range(depth - 1):
    i, p = np.nonzero(paths.moving[t])
    row, crosses = paths.row[t, i, p], paths.cross[t, i, p]
    leaves = ~before[i, p] & (sum_wave[i, row] == wave[i, p])
    # Keeping is own row to own row, or visitor to the next: turning, else.
    move = np.where(from_cross[i, p] == crosses, _KEEP, _TURN)
    moves[i, wave[i, p], t, row] = np.where(leaves, _LEAVE, move)
    before, from_cross = paths.moving[t], paths.cross[t]
    i, p = np.nonzero(paths.moving[t] & (upper ^ lower < 2 << t))
    moves[i, wave[i, p], t + 1, upper[i, p]] = _MERGE
  narrow = lambda x: x.astype(np.uint8).reshape(*batch, n)
  return Route(
    moves.reshape(*batch, most, depth, n),
    narrow(sum_wave),
    narrow(res_wave),
    waves.astype(np.int32).reshape(batch),
    (-(-waves // link_values)).astype(np.int32).reshape(batch),
  )


def widen(moves: jax.Array, columns: int) -> jax.Array:
  """Moves of micro-blocks side by side, in one network.

  What a micro-block of b columns does takes the first log2(b) + 1 stages;
  behind them everything is in its own row and stays there.

  Args:
    moves: Moves of each micro-block. u8[..., columns / b, wave, stage, b].
    columns: Columns of the network, a power of two.

  Returns:
    u8[..., wave, log2(columns) + 1, columns].
  """
  *batch, blocks, waves, depth, b = moves.shape
  if blocks * b != columns:
    raise ValueError(
      f'ReCoN: {blocks} micro-blocks of {b} do not fill {columns} columns'
    )
  moves = jnp.moveaxis(moves, -4, -2)
  moves = moves.reshape(*batch, waves, depth, columns)
  extra = stages(columns) - depth
  widths = [(0, 0)] * (moves.ndim - 2) + [(0, extra), (0, 0)]
  return jnp.pad(moves, widths, constant_values=_KEEP)


def _sides(stage: int, n: int) -> tuple[np.ndarray, np.ndarray]:
  """Sides of a switch's own row: where it comes in, where it goes out.

  False = left. bool[n] each.
  """
  rows = np.arange(n)
  own = (rows >> (stage - 1)) & 1 if stage else np.zeros(n, int)
  last = stage == stages(n) - 1
  straight = np.zeros(n, int) if last else (rows >> stage) & 1
  return own > 0, straight > 0


def encode(moves: jax.Array) -> jax.Array:
  """3-bit commands of moves, both u8[..., stage, n]; see `Command`."""
  n = moves.shape[-1]
  rows = []
  for stage in range(moves.shape[-2]):
    own, straight = _sides(stage, n)
    keep = np.where(own == straight, Command.pass_, Command.swap)
    turn = np.where(own == straight, Command.swap, Command.pass_)
    leave = Command.left_to_left + 2 * own + ~straight
    merge = np.where(straight, Command.merge_right, Command.merge_left)
    move = moves[..., stage, :]
    command = jnp.broadcast_to(jnp.asarray(keep, jnp.uint8), move.shape)
    for code, row in ((_TURN, turn), (_LEAVE, leave), (_MERGE, merge)):
      row = jnp.broadcast_to(jnp.asarray(row, jnp.uint8), move.shape)
      command = jnp.where(move == code, row, command)
    rows.append(command)
  return jnp.stack(rows, axis=-2)


class _Packet(NamedTuple):
  res: jax.Array
  acc: jax.Array


def shift(x: jax.Array, by: jax.Array) -> jax.Array:
  """Shift left, or right (arithmetic) where `by` is negative."""
  zero = jnp.zeros((), by.dtype)
  left = jnp.left_shift(x, jnp.maximum(by, zero).astype(x.dtype))
  return jnp.right_shift(left, jnp.maximum(-by, zero).astype(x.dtype))


def _switch(command, left, right, own, merge):
  """One stage: what leaves its switches on the left and on the right."""
  has = lambda *codes: functools.reduce(
    jnp.logical_or, [command == jnp.uint8(code) for code in codes]
  )
  either = lambda a, x, b, y: jnp.where(
    a, x, jnp.where(b, y, jnp.zeros((), x.dtype))
  )
  C = Command
  side = jnp.broadcast_to(jnp.asarray(own), left.res.shape)
  upper = _Packet(*(jnp.where(side, b, a) for a, b in zip(left, right)))
  lower = jnp.where(side, left.res, right.res)
  merged = merge(upper.acc, upper.res, lower)
  out_left = _Packet(
    either(
      has(C.pass_, C.left_to_left),
      left.res,
      has(C.swap, C.right_to_left),
      right.res,
    ),
    jnp.where(
      has(C.merge_left),
      merged,
      either(
        has(C.pass_, C.left_to_right),
        left.acc,
        has(C.swap, C.right_to_right),
        right.acc,
      ),
    ),
  )
  out_right = _Packet(
    either(
      has(C.pass_, C.right_to_right),
      right.res,
      has(C.swap, C.left_to_right),
      left.res,
    ),
    jnp.where(
      has(C.merge_right),
      merged,
      either(
        has(C.pass_, C.right_to_left),
        right.acc,
        has(C.swap, C.left_to_left),
        left.acc,
      ),
    ),
  )
  return out_left, out_right


def _exchange(left, right, stage):
  """Inputs of the next stage: rows that differ in bit `stage` exchange."""
  step = 1 << stage

  def half(i):
    def gather(l, r):
      pairs = lambda x: x.reshape(*x.shape[:-2], -1, 2, step, x.shape[-1])
      joined = jnp.stack([pairs(l)[..., i, :, :], pairs(r)[..., i, :, :]], -3)
      return joined.reshape(l.shape)

    return _Packet(*(gather(l, r) for l, r in zip(left, right)))

  return half(0), half(1)


def execute(
  commands: jax.Array,
  res: jax.Array,
  acc: jax.Array,
  hidden: jax.Array,
  merge_shift: jax.Array,
  half: int,
) -> jax.Array:
  """Send one wave through the network.

  A merge makes iAcc + [(U << half) + L + (hidden << 2 half)] << merge_shift
  of the upper half's {U, iAcc} and the lower half's L. With sums in units of
  2^-mb, mb = 2 half (and so inliers' activations shifted left by mb) and
  merge_shift = -mb that is the paper's

    out 2^mb = iAcc 2^mb + (U << mb/2) + L + sign iAct 2^mb

  and no bit is lost, since a right shift meets only zeros.

  Args:
    commands: Commands of `encode`. u8[..., stage, n].
    res: Products of m row vectors; zero where a column's Res is not in this
      wave. Signed integers [..., n, m].
    acc: Running sums; zero where the sum is not in this wave. [..., n, m].
    hidden: Activation with the sign of the column's weight. [..., n, m].
    merge_shift: Left shift of a merged outlier, negative for right. Signed
      integers [..., n].
    half: Bits of half a mantissa.

  Returns:
    Sums that leave the network, zero in columns that did not send theirs.
    [..., n, m].

  Source:
    MicroScopiQ, section 5, Merge; signs and fractional bits are corrected.

  Examples:
    >>> r = route(np.array([0]), np.array([1]), 2)  # the weight 1.10b = 1.5
    >>> quarters = lambda *x: 4 * jnp.array(x, jnp.int32)[:, None]
    >>> out = execute(jnp.asarray(r.commands[0]), quarters(32, 0),
    ...   quarters(8, 5), quarters(32, 32), jnp.array([-2, -2]), half=1)
    >>> (out[:, 0] / 4).tolist()
    [56.0, 5.0]
  """
  n = acc.shape[-2]
  bits = jnp.asarray(half, acc.dtype)

  def merge(acc, upper, lower):
    value = jnp.left_shift(upper, bits) + lower
    value = value + jnp.left_shift(hidden, bits + bits)
    return acc + shift(value, merge_shift[..., None])

  nothing = _Packet(jnp.zeros_like(res), jnp.zeros_like(acc))
  left, right = _Packet(res, acc), nothing
  depth = stages(n)
  for stage in range(depth):
    command = commands[..., stage, :, None]
    own = _sides(stage, n)[0][:, None]
    left, right = _switch(command, left, right, own, merge)
    # Stages have registers: fused, two stages would compute the first twice.
    left, right = jax.lax.optimization_barrier((left, right))
    if stage < depth - 1:
      left, right = _exchange(left, right, stage)
  return left.acc + left.res
