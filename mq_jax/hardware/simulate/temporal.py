"""FineQ's temporal array: weights as trains of pulses, PEs that only add.

Weight stationary. A PE holds a sign and a 2-bit magnitude, loaded into a down
counter when a frame begins. In each cycle in which the counter is not empty a
pulse gates the activation to the adder, which adds or subtracts it, and the
counter goes down. After the frame the product is exact.

  unary      pulses of weight 1: magnitude 3 takes three cycles
  weighted   pulses of weight 2 while they fit, then 1 (2s-unary): a magnitude
             of 2 is one pulse, 3 is two; a frame has two cycles

PEs of a lock-step group go on together, as soon as the longest train among
them is over; a group of zeros still takes one cycle.

Source:
  FineQ, arXiv 2504.19746: temporal coding instead of multipliers. Dataflow,
  frames and groups follow `fineq.md`; weighted pulses are tubGEMM's, arXiv
  2412.17955.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FRAMES = {'unary': 3, 'weighted': 2}  # cycles for a magnitude of 3


class Product(NamedTuple):
  """What the array hands out, and what it took.

  Attributes:
    accumulator: activations @ levels. i32[m, n].
    adds: Additions, all pulses of all tokens.
    cycles: Cycles that a lock-step group needs for a token. i32[k / rows,
      n / columns of a group], rounded up.
  """

  accumulator: np.ndarray
  adds: int
  cycles: np.ndarray


@functools.partial(jax.jit, static_argnames=('pulse', 'group'))
def _run(levels, activations, *, pulse: str, group: tuple[int, int]):
  """Sums i32[m, n], ones i32[k], cycles of the groups."""
  m, n = activations.shape[0], levels.shape[1]
  rows, columns = group
  ragged = (-levels.shape[0] % rows, -n % columns)

  def row(acc, at):
    level, activation = at  # i32[n], i32[m]
    minus = level < 0
    each = activation[:, None]

    def cycle(state, _):
      acc, count, ones = state
      bit = count > 0
      heavy = (count > 1) & (pulse == 'weighted')
      # The AND gate; the weight of a pulse is a choice between two wires.
      gated = jnp.where(heavy[None], jnp.left_shift(each, 1), each)
      gated = jnp.where(bit[None], gated, jnp.int32(0))
      acc = jnp.where(minus[None], acc - gated, acc + gated)
      left = count - jnp.where(heavy, jnp.int32(2), jnp.int32(1))
      ones = ones + jnp.sum(bit, dtype=jnp.int32)
      return (acc, jnp.where(bit, left, count), ones), bit

    start = (acc, jnp.abs(level), jnp.int32(0))
    (acc, _, ones), busy = jax.lax.scan(
      cycle, start, length=FRAMES[pulse], unroll=True
    )
    return acc, (ones, busy)

  start = jnp.zeros((m, n), jnp.int32)
  acc, (ones, busy) = jax.lax.scan(row, start, (levels, activations.T))
  # A group is busy while any of its PEs is. [k, cycle, n]
  busy = jnp.pad(busy, ((0, ragged[0]), (0, 0), (0, ragged[1])))
  k, frame, width = busy.shape
  busy = busy.reshape(k // rows, rows, frame, width // columns, columns)
  busy = busy.any(axis=(1, 4))  # [group, cycle, group]
  cycles = jnp.sum(busy, axis=1, dtype=jnp.int32)
  return acc, ones, jnp.maximum(cycles, 1)


def matmul(
  levels: np.ndarray,
  activations: np.ndarray,
  pulse: str = 'unary',
  *,
  group: tuple[int, int] = (64, 64),
) -> Product:
  """Multiply integers by levels without a multiplier, cycle by cycle.

  Args:
    levels: Weights -3..3, e.g. `codes['level'][:k]` of a FineQ layout.
      Integers [k, n].
    activations: Any integers whose sums fit in i32. [m, k].
    pulse: 'unary' or 'weighted'.
    group: Rows (inputs) and columns (outputs) of PEs in lock-step.

  Returns:
    Sums, additions, and cycles by group.

  Raises:
    TypeError: for arrays that are not integers.
    ValueError: for shapes or levels that don't fit, an unknown `pulse`, an
      empty group, or sums that could leave i32.

  Source:
    FineQ, arXiv 2504.19746; see the module.

  Examples:
    >>> levels = np.array([[3, -1], [0, 2]], np.int8)
    >>> product = matmul(levels, np.array([[5, -7]]), group=(1, 2))
    >>> product.accumulator, product.adds, product.cycles.ravel()
    (array([[ 15, -19]], dtype=int32), 6, array([3, 2], dtype=int32))
    >>> product = matmul(levels, np.array([[5, -7]]), 'weighted', group=(1, 2))
    >>> product.accumulator, product.adds, product.cycles.ravel()
    (array([[ 15, -19]], dtype=int32), 4, array([2, 1], dtype=int32))
  """
  if pulse not in FRAMES:
    raise ValueError(
      f'simulate.temporal: pulse={pulse!r} is not one of {list(FRAMES)}'
    )
  levels, activations = np.asarray(levels), np.asarray(activations)
  for name, array in (('levels', levels), ('activations', activations)):
    if not np.issubdtype(array.dtype, np.integer):
      raise TypeError(
        f'simulate.temporal: {name} are {array.dtype}; integers are needed'
      )
    if array.ndim != 2 or 0 in array.shape:
      raise ValueError(
        f'simulate.temporal: {name} have shape {array.shape}; a matrix that '
        'is not empty is needed'
      )
  if activations.shape[1] != levels.shape[0]:
    raise ValueError(
      f'simulate.temporal: activations {activations.shape} and levels '
      f'{levels.shape} do not fit; [m, k] and [k, n] are needed'
    )
  rows, columns = group
  if rows < 1 or columns < 1:
    raise ValueError(f'simulate.temporal: group={group} holds no PE')
  if levels.min() < -3 or levels.max() > 3:
    raise ValueError(
      f'simulate.temporal: levels {levels.min()}..{levels.max()}; a PE holds '
      '-3..3'
    )
  # In floats, which don't wrap; exact where it matters.
  largest = np.abs(activations.astype(np.float64)).max(axis=0)
  bound = max(largest.max(), (largest @ np.abs(levels)).max())
  if bound >= 2**31:
    raise ValueError(
      f'simulate.temporal: sums of up to {bound:.0f} do not fit in 32 bits; '
      'use smaller activations'
    )
  acc, ones, cycles = _run(
    jnp.asarray(levels.astype(np.int32)),
    jnp.asarray(activations.astype(np.int32)),
    pulse=pulse,
    group=(rows, columns),
  )
  adds = activations.shape[0] * int(np.asarray(ones).astype(np.int64).sum())
  return Product(np.asarray(acc), adds, np.asarray(cycles))
