"""MicroScopiQ: packed PEs and shared networks that merge split outliers."""

import jax

from mq_jax._pytrees import pytree_dataclass, static
from mq_jax.hardware import _contention, technology
from mq_jax.hardware.accelerators import _base

HOP_CYCLES = 2  # of a row: input and output registers (released RTL)


@pytree_dataclass
class MicroScopiQ:
  """Weight-stationary array with ReCoN units; made by `microscopiq`."""

  rows: jax.typing.ArrayLike
  columns: jax.typing.ArrayLike
  recon_units: jax.typing.ArrayLike
  memory: _base.Memory
  micro_block: jax.typing.ArrayLike = 8
  sync: jax.typing.ArrayLike = 1.0
  area_scale: jax.typing.ArrayLike = 1.0
  switch_pj: jax.typing.ArrayLike = technology.RECON_SWITCH_PJ.value
  node_nm: int = static(7)

  def check(self, precision):
    _base.check_bits(
      'microscopiq', 'weight_bits', precision.weight_bits, (2, 4)
    )
    _base.check_bits(
      'microscopiq', 'activation_bits', precision.activation_bits, range(1, 9)
    )

  def _latency(self, rules):
    """Cycles from a row through arbiter and network to the next row."""
    columns = self.columns
    stages = rules.xp.log2(columns) + 1
    return stages + 1 + self.sync * (columns - 1)

  def array(self, work, precision, rules):
    xp = rules.xp
    rows, columns = self.rows, self.columns
    m, k, n = work.m, work.k, work.n
    lanes = 4.0 / precision.weight_bits
    row_tiles = rules.tiles(work.k, self.rows)
    column_tiles = rules.tiles(n, columns * lanes)
    tiles = row_tiles * column_tiles

    # Of a tile, on average: rows in use, and outputs of a row in one lane.
    used = xp.minimum(k / row_tiles, rows)
    width = xp.minimum(n / (column_tiles * lanes), columns)
    share = 1.0 - precision.outlier_blocks
    rho = 1.0 - share ** (width / self.micro_block)
    requests = used * rho * lanes
    asking = used * (1.0 - (1.0 - rho) ** lanes)  # in any lane

    compute = tiles * rules.longest(m, rows)
    noc = tiles * m * requests / self.recon_units
    contention = (m, used, asking, requests, self.recon_units)
    contention += (HOP_CYCLES, self._latency(rules))
    # Tiles follow each other without a gap: exposed are the last one's way
    # to the end, as far as it outlasts the period of a tile, and the skew.
    one = _contention.tile_cycles(*contention, xp=xp)
    period = rules.longest(m, rows, m * requests / self.recon_units)
    fill = xp.maximum(one - period, 0.0) + columns
    vectors = tiles * requests * m
    macs = m * k * n
    bits = (precision.weight_bits, precision.activation_bits)
    stages = xp.log2(columns) + 1
    return _base.ArrayCost(
      compute_cycles=compute,
      fill_cycles=fill,
      noc_cycles=noc,
      conflict_rate=_contention.conflict_rate(*contention, xp=xp),
      row_tiles=row_tiles,
      column_tiles=column_tiles,
      rows=rows,
      columns=columns * lanes,
      macs_per_cycle=rows * columns * lanes,
      array_pj=macs * technology.mac_pj(*bits, self.node_nm),
      noc_pj=vectors * columns * stages * self.switch_pj,
      leakage_pj_per_cycle=rows
      * columns
      * technology.leak_pj(4, 8, self.node_nm),
    )

  def area(self, rules):
    rows, columns = self.rows, self.columns
    scale = self.area_scale * technology.area_factor(7, self.node_nm)
    cell = technology.MICROSCOPIQ_PE_UM2.value
    cell += technology.MICROSCOPIQ_MULTI_PRECISION_UM2.value
    # 64 columns have 64 (log2 64 + 1) = 448 switches.
    switch = technology.MICROSCOPIQ_RECON_64_UM2.value / 448
    network = switch * columns * (rules.xp.log2(columns) + 1)
    # Delays of 0 to C - 1 cycles: registers grow with the square.
    sync = technology.MICROSCOPIQ_SYNC_64_UM2.value * (columns / 64) ** 2
    return _base.Area(
      array=scale * rows * columns * cell,
      noc=scale * self.recon_units * (network + sync),
      control=scale * technology.MICROSCOPIQ_CONTROL_UM2.value,
      sram=self.memory.area_um2(self.node_nm),
    )


def microscopiq(
  rows: jax.typing.ArrayLike = 64,
  cols: jax.typing.ArrayLike = 64,
  recon_units: jax.typing.ArrayLike = 1,
  *,
  micro_block: jax.typing.ArrayLike = 8,
  sync: jax.typing.ArrayLike = 1.0,
  area_scale: jax.typing.ArrayLike = 1.0,
  memory: _base.Memory | None = None,
  node_nm: int = 7,
) -> MicroScopiQ:
  """The MicroScopiQ accelerator.

  A PE holds one 4-bit weight or two 2-bit weights of one input. A row whose
  tile holds an outlier sends each vector through a ReCoN unit, one vector a
  cycle and unit; the lanes of 2-bit weights ask separately. Weights are
  double-buffered, so tiles follow each other without a gap.

  Args:
    rows: PEs along the reduction.
    cols: PEs along the outputs; a power of two in hardware, not refused
      otherwise, so that designs may be explored in between.
    recon_units: Networks shared by all rows.
    micro_block: Outputs of a micro-block.
    sync: Share of the columns' skew that a vector waits for before ReCoN.
    area_scale: 1.0 the paper's own synthesis; 10.8 PLENA's re-implementation.
    memory: Buffers and bandwidths; `buffers(rows)` by default.
    node_nm: Technology node.

  Raises:
    ValueError: for numbers that are not positive.

  Source:
    MicroScopiQ, arXiv 2411.05282, section 5 and table 5; the term of
    contention is ours, checked against `simulate.pipeline`.
  """
  made = MicroScopiQ(
    rows,
    cols,
    recon_units,
    _base.buffers(rows) if memory is None else memory,
    micro_block,
    sync,
    area_scale,
    node_nm=node_nm,
  )
  _base.check_positive(made)
  return made
