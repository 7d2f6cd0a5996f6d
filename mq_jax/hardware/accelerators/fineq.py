"""FineQ: a temporal-coding array without multipliers."""

import jax

from mq_jax._pytrees import pytree_dataclass, static
from mq_jax.hardware import _temporal, technology
from mq_jax.hardware.accelerators import _base

# Counter and gate of a PE in one cycle: so that the array of 64 x 64 spends
# 1 / 1.79 of the energy of multipliers of 3 x 8 bits, leakage included, at a
# mean magnitude of 0.65 and full frames of 3 cycles.
CONTROL_FJ = technology.Constant(
  6.06, 'fJ/cycle', 45, 'calibrated to the published energy ratio'
)


@pytree_dataclass
class FineQ:
  """Weight-stationary temporal array; made by `fineq`."""

  rows: jax.typing.ArrayLike
  columns: jax.typing.ArrayLike
  group: jax.typing.ArrayLike
  memory: _base.Memory
  pulse: str = static('unary')
  node_nm: int = static(7)

  def check(self, precision):
    _base.check_bits('fineq', 'weight_bits', precision.weight_bits, (2, 3))

  def frame(self, precision, rules):
    """Mean cycles of a step: the longest pulse train of a lock-step group."""
    del rules
    return _temporal.expected_step_cycles(
      precision.two, precision.three, self.group, self.pulse
    )

  def array(self, work, precision, rules):
    rows, columns = self.rows, self.columns
    row_tiles = rules.tiles(work.k, self.rows)
    column_tiles = rules.tiles(work.n, self.columns)
    frame = self.frame(precision, rules)
    compute = row_tiles * column_tiles * rules.longest(work.m * frame, rows)
    macs = work.m * work.k * work.n
    scale = 1e-3 * technology.energy_factor(45, self.node_nm)
    add = 1e3 * technology.ADD_32_PJ.value * precision.mean_magnitude
    return _base.ArrayCost(
      compute_cycles=compute,
      fill_cycles=(rows + columns) * frame,
      row_tiles=row_tiles,
      column_tiles=column_tiles,
      rows=rows,
      columns=columns,
      macs_per_cycle=rows * columns,
      array_pj=macs * scale * (add + CONTROL_FJ.value * frame),
      # Leakage goes with area.
      leakage_pj_per_cycle=rows
      * columns
      * technology.FINEQ_ARRAY_AREA_RATIO.value
      * technology.leak_pj(3, 8, self.node_nm),
    )

  def area(self, rules):
    multiplier = technology.mac_um2(3, 8, self.node_nm)
    cell = technology.FINEQ_ARRAY_AREA_RATIO.value * multiplier
    return _base.Area(
      array=self.rows * self.columns * cell,
      noc=0.0,
      control=0.0,
      sram=self.memory.area_um2(self.node_nm),
    )


def fineq(
  rows: jax.typing.ArrayLike = 64,
  cols: jax.typing.ArrayLike = 64,
  *,
  pulse: str = 'unary',
  group: jax.typing.ArrayLike | None = None,
  memory: _base.Memory | None = None,
  node_nm: int = 7,
) -> FineQ:
  """The FineQ array: weights of -3 to 3 as trains of pulses.

  PEs of a group advance together, so a step takes as long as the longest
  train in the group: with `group` as large as the array, almost always a
  full frame. With data-driven completion in small groups it is shorter.

  Args:
    rows: PEs along the reduction.
    cols: PEs along the outputs.
    pulse: 'unary', magnitude 3 takes 3 cycles; 'weighted', pulses that stand
      for 2, so 3 takes 2 cycles and 2 takes one.
    group: PEs in lock-step; the whole array by default.
    memory: Buffers and bandwidths.
    node_nm: Technology node.

  Raises:
    ValueError: for an unknown pulse or numbers that are not positive.

  Source:
    FineQ, arXiv 2504.19746: temporal coding, the ratios of area and energy.
    Array size, dataflow and lock-step are our choice.
  """
  _temporal.check_pulses('fineq', pulse)
  made = FineQ(
    rows,
    cols,
    rows * cols if group is None else group,
    _base.buffers(rows) if memory is None else memory,
    pulse,
    node_nm,
  )
  _base.check_positive(made)
  return made
