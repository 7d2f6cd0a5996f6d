"""Lock-step temporal arrays: how long the pulses of a step take.

A step multiplies one activation per row with the weights that the PEs hold.
A PE whose weight has the level v adds its activation once per pulse, so its
train is as long as v is large, and PEs in lock-step wait for the longest.
"""

import functools

import jax
import jax.numpy as jnp

from mq_jax.hardware._temporal import check_pulses


def train_cycles(levels: jax.Array, pulses: str = 'unary') -> jax.Array:
  """Cycles of each weight's pulse train, at least 1.

  Args:
    levels: Signed levels, any integer dtype and shape.
    pulses: 'unary': as many pulses as the magnitude. 'weighted': pulses
      of weight 2 and a last one of weight 1 where the magnitude is odd, as
      in tubGEMM; 1 for 0, 1 and 2, and 2 for 3.

  Returns:
    i32, the shape of `levels`. A level of 0 sends nothing, for a cycle.

  Raises:
    ValueError: for other pulses.

  Examples:
    >>> train_cycles(jnp.array([0, -1, 2, -3]), 'weighted')
    Array([1, 1, 1, 2], dtype=int32)
  """
  check_pulses('train_cycles', pulses)
  magnitude = jnp.abs(levels.astype(jnp.int32))
  if pulses == 'weighted':
    magnitude = (magnitude + 1) // 2
  return jnp.maximum(magnitude, 1)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _step_cycles(levels, rows, cols, group, pulses):
  k, n = levels.shape
  levels = jnp.pad(levels, ((0, -k % rows), (0, -n % cols)))
  trains = train_cycles(levels, pulses)
  tiles = trains.reshape(trains.shape[0] // rows, rows, -1, cols)
  return jnp.max(
    tiles.swapaxes(1, 2).reshape(
      tiles.shape[0], tiles.shape[2], rows * cols // group, group
    ),
    axis=-1,
  )


def step_cycles(
  levels: jax.Array,
  rows: int,
  cols: int,
  *,
  group: int | None = None,
  pulses: str = 'unary',
) -> jax.Array:
  """Cycles per step of every lock-step group of every tile; exact.

  A tile of weights stays in the array for a whole stream of vectors, so all
  its steps take the same time: m vectors take m times these cycles, of the
  slowest group where the groups share their activations.

  Args:
    levels: Signed levels of the weights, integers [k, n].
    rows: PEs along k.
    cols: PEs along n.
    group: PEs in lock-step, neighbours in row-major order: `cols` for one
      row, and by default the whole array, rows * cols.
    pulses: See `train_cycles`.

  Returns:
    i32[ceil(k/rows), ceil(n/cols), rows * cols / group]. PEs beyond the
    matrix hold 0 and never delay their group.

  Raises:
    ValueError: if `levels` is not an integer matrix, a size is below 1, or
      `group` does not divide the array.

  Examples:
    >>> levels = jnp.array([[0, 1, 2, 0], [1, 1, 0, 3]], jnp.int8)
    >>> step_cycles(levels, 2, 2)[0, :, 0]
    Array([1, 3], dtype=int32)
    >>> step_cycles(levels, 2, 2, group=2)[0, 1]
    Array([2, 3], dtype=int32)
  """
  check_pulses('step_cycles', pulses)
  if levels.ndim != 2 or not jnp.issubdtype(levels.dtype, jnp.integer):
    raise ValueError(
      'step_cycles: levels must be an integer matrix [k, n], got '
      f'{levels.dtype}{list(levels.shape)}'
    )
  if rows < 1 or cols < 1:
    raise ValueError(f'step_cycles: an array of {rows} x {cols} PEs')
  group = rows * cols if group is None else group
  if group < 1 or rows * cols % group:
    raise ValueError(
      f'step_cycles: group={group} does not divide {rows} x {cols} PEs; '
      f'use {cols} (a row) or {rows * cols} (the array)'
    )
  return _step_cycles(levels, rows, cols, group, pulses)


def layer_cycles(
  levels: jax.Array,
  m: int,
  rows: int,
  cols: int,
  *,
  group: int | None = None,
  pulses: str = 'unary',
) -> jax.Array:
  """Streaming cycles of a layer: tiles in turn, each at its slowest group.

  Filling and draining the array are not counted.

  Args:
    levels: Signed levels of the weights, integers [k, n].
    m: Vectors.
    rows: PEs along k.
    cols: PEs along n.
    group: See `step_cycles`.
    pulses: See `train_cycles`.

  Returns:
    i32.

  Raises:
    ValueError: as `step_cycles`.
  """
  cycles = step_cycles(levels, rows, cols, group=group, pulses=pulses)
  return m * jnp.sum(jnp.max(cycles, axis=-1))


def magnitude_fractions(levels: jax.Array) -> tuple[jax.Array, jax.Array]:
  """f_2 and f_3: shares of the weights whose magnitude is at least 2 and 3.

  Args:
    levels: Signed levels, any shape.

  Returns:
    Two f32 scalars.
  """
  magnitude = jnp.abs(levels.astype(jnp.int32))
  share = lambda least: jnp.mean((magnitude >= least).astype(jnp.float32))
  return share(2), share(3)
