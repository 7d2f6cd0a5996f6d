"""Plain systolic arrays, in the closed forms of the SCALE-Sim family."""

import jax

from mq_jax._pytrees import pytree_dataclass, static
from mq_jax.hardware import technology
from mq_jax.hardware.accelerators import _base

DATAFLOWS = ('ws', 'os', 'is')
DRAINS = ('overlapped', 'shifted')


@pytree_dataclass
class Systolic:
  """An array of multipliers; made by `systolic`."""

  rows: jax.typing.ArrayLike
  columns: jax.typing.ArrayLike
  memory: _base.Memory
  dataflow: str = static('ws')
  drain: str = static('overlapped')
  double_buffered: bool = static(False)
  scale_sim_index: bool = static(False)
  multiplier: tuple[int, int] | None = static(None)
  node_nm: int = static(7)

  def check(self, precision):
    if self.multiplier is None:
      return
    widest = lambda bits: range(1, bits + 1)
    for what, bits in zip(
      ('weight_bits', 'activation_bits'), self.multiplier, strict=True
    ):
      _base.check_bits('systolic', what, getattr(precision, what), widest(bits))

  def array(self, work, precision, rules):
    rows, columns = self.rows, self.columns
    down, across, stream = {
      'ws': (work.k, work.n, work.m),
      'os': (work.m, work.n, work.k),
      'is': (work.k, work.m, work.n),
    }[self.dataflow]
    folds = rules.tiles(down, self.rows) * rules.tiles(across, self.columns)
    stream = stream
    if self.double_buffered:
      cycles = folds * rules.longest(stream, rows) + 2 * rows + columns - 2
    else:
      # Skew of rows and columns; the stationary operand is shifted in, or
      # the outputs are shifted out, over as many cycles as there are rows.
      shifted = self.dataflow != 'os' or self.drain == 'shifted'
      cycles = folds * ((1 + shifted) * rows + columns + stream - 2)
    if self.scale_sim_index:
      cycles = cycles - 1
    macs = work.m * work.k * work.n
    bits = self.multiplier or (
      precision.weight_bits,
      precision.activation_bits,
    )
    # Buffers see tiles of weights whatever stays in the array.
    return _base.ArrayCost(
      compute_cycles=cycles,
      row_tiles=rules.tiles(work.k, self.rows),
      column_tiles=rules.tiles(work.n, self.columns),
      rows=rows,
      columns=columns,
      macs_per_cycle=rows * columns,
      array_pj=macs * technology.mac_pj(*bits, self.node_nm),
      leakage_pj_per_cycle=rows
      * columns
      * technology.leak_pj(*bits, self.node_nm),
    )

  def area(self, rules):
    bits = self.multiplier or (8, 8)
    cell = technology.mac_um2(*bits, self.node_nm)
    return _base.Area(
      array=self.rows * self.columns * cell,
      noc=0.0,
      control=0.0,
      sram=self.memory.area_um2(self.node_nm),
    )


def systolic(
  dataflow: str = 'ws',
  rows: jax.typing.ArrayLike = 128,
  cols: jax.typing.ArrayLike = 128,
  *,
  drain: str = 'overlapped',
  double_buffered: bool = False,
  scale_sim_index: bool = False,
  multiplier: tuple[int, int] | None = None,
  memory: _base.Memory | None = None,
  node_nm: int = 7,
) -> Systolic:
  """A systolic array of one multiply-accumulate a cycle and PE.

  With R rows, C columns and T the streamed dimension, a fold takes
  2R + C + T - 2 cycles ('ws', 'is'), or R + C + T - 2 ('os', overlapped
  drain). No two folds overlap, unless the array is double-buffered:
  R + folds max(T, R) + (R - 1) + (C - 1) in all, which for T < R counts R - T
  cycles more than `simulate.systolic`: the load behind the last tile.
  `Cost.compute_cycles` is that whole, fill and drain included.

  Args:
    dataflow: What stays in the array: 'ws' weights, 'os' outputs, 'is' inputs.
    rows: PEs along the reduction ('ws', 'is') or the tokens ('os').
    cols: PEs along the outputs ('ws', 'os') or the tokens ('is').
    drain: For 'os': 'overlapped' as SCALE-Sim's code counts, 'shifted' as its
      paper says (R more cycles a fold).
    double_buffered: A second weight register in each PE ('ws' only).
    scale_sim_index: Count as SCALE-Sim reports: the index of the last cycle,
      which is one less than the duration.
    multiplier: Widths (weight, activation) that the PEs are built for; None
      builds them for the precision that is asked for (8 x 8 for the area).
    memory: Buffers and bandwidths.
    node_nm: Technology node of energies and areas.

  Raises:
    ValueError: for an unknown dataflow or drain, or sizes not positive.

  Source:
    SCALE-Sim, ISPASS 2020 and arXiv 2504.15377; double buffering as in TPUs.
  """
  if dataflow not in DATAFLOWS:
    raise ValueError(
      f'systolic: dataflow {dataflow!r} is not one of {DATAFLOWS}'
    )
  if drain not in DRAINS:
    raise ValueError(f'systolic: drain {drain!r} is not one of {DRAINS}')
  if double_buffered and dataflow != 'ws':
    raise ValueError(
      f'systolic: double_buffered concerns weights; dataflow is {dataflow!r}'
    )
  made = Systolic(
    rows,
    cols,
    _base.buffers(rows) if memory is None else memory,
    dataflow,
    drain,
    double_buffered,
    scale_sim_index,
    multiplier,
    node_nm,
  )
  _base.check_positive(made)
  return made
