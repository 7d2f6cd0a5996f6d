"""OliVe and GOBO: arrays which decode outliers beside the multipliers.

The same weight-stationary, double-buffered array as MicroScopiQ's, with the
areas that its paper gives for them; neither shares a network.
"""

import jax

from mq_jax._pytrees import pytree_dataclass, static
from mq_jax.hardware import technology
from mq_jax.hardware.accelerators import _base


def _array(accelerator, work, rules, side, mac_pj, leak_pj):
  """With `side` multipliers along each side of a PE."""
  rows, columns = accelerator.rows * side, accelerator.columns * side
  row_tiles = rules.tiles(work.k, rows)
  column_tiles = rules.tiles(work.n, columns)
  m = work.m
  compute = row_tiles * column_tiles * rules.longest(m, rows)
  return _base.ArrayCost(
    compute_cycles=compute,
    fill_cycles=2 * rows + columns,
    row_tiles=row_tiles,
    column_tiles=column_tiles,
    rows=rows,
    columns=columns,
    macs_per_cycle=rows * columns,
    array_pj=m * work.k * work.n * mac_pj,
    leakage_pj_per_cycle=accelerator.rows * accelerator.columns * leak_pj,
  )


@pytree_dataclass
class Olive:
  """OliVe's array; made by `olive`."""

  rows: jax.typing.ArrayLike
  columns: jax.typing.ArrayLike
  memory: _base.Memory
  node_nm: int = static(7)

  def check(self, precision):
    _base.check_bits('olive', 'weight_bits', precision.weight_bits, (4, 8))
    _base.check_bits(
      'olive', 'activation_bits', precision.activation_bits, (4, 8)
    )

  def array(self, work, precision, rules):
    # Two by two PEs of 4 bits make one of 8.
    wide = rules.xp.maximum(precision.weight_bits, precision.activation_bits)
    bits = (precision.weight_bits, precision.activation_bits)
    return _array(
      self,
      work,
      rules,
      side=4.0 / wide,
      mac_pj=technology.mac_pj(*bits, self.node_nm),
      leak_pj=technology.leak_pj(4, 4, self.node_nm),
    )

  def area(self, rules):
    rows, columns = self.rows, self.columns
    t = technology
    # Table 5: at 64 x 64, 128 and 64 decoders and a quarter of the PEs.
    um2 = (
      2 * rows * t.OLIVE_DECODER_4_UM2.value
      + rows * t.OLIVE_DECODER_8_UM2.value
      + rows * columns * t.OLIVE_PE_UM2.value
      + rows * columns / 4 * t.OLIVE_MULTI_PRECISION_UM2.value
    )
    scale = t.area_factor(7, self.node_nm)
    return _base.Area(
      array=scale * um2,
      noc=0.0,
      control=scale * t.OLIVE_CONTROL_UM2.value,
      sram=self.memory.area_um2(self.node_nm),
    )


@pytree_dataclass
class Gobo:
  """GOBO's array; made by `gobo`."""

  rows: jax.typing.ArrayLike
  columns: jax.typing.ArrayLike
  memory: _base.Memory
  node_nm: int = static(7)

  def check(self, precision):
    _base.check_bits('gobo', 'weight_bits', precision.weight_bits, range(2, 9))

  def array(self, work, precision, rules):
    # A group PE accumulates floating-point activations of each centroid.
    return _array(
      self,
      work,
      rules,
      side=1.0,
      mac_pj=technology.mac_pj(16, 16, self.node_nm),
      leak_pj=technology.leak_pj(16, 16, self.node_nm),
    )

  def area(self, rules):
    rows, columns = self.rows, self.columns
    t = technology
    um2 = rows * columns * t.GOBO_GROUP_PE_UM2.value
    um2 = um2 + columns * t.GOBO_OUTLIER_PE_UM2.value
    scale = t.area_factor(7, self.node_nm)
    return _base.Area(
      array=scale * um2,
      noc=0.0,
      control=scale * t.GOBO_CONTROL_UM2.value,
      sram=self.memory.area_um2(self.node_nm),
    )


def olive(
  rows: jax.typing.ArrayLike = 64,
  cols: jax.typing.ArrayLike = 64,
  *,
  memory: _base.Memory | None = None,
  node_nm: int = 7,
) -> Olive:
  """OliVe: 4-bit PEs behind decoders of outlier-victim pairs.

  8-bit operands take four PEs.

  Args:
    rows: PEs along the reduction.
    cols: PEs along the outputs.
    memory: Buffers and bandwidths.
    node_nm: Technology node.

  Raises:
    ValueError: for numbers that are not positive.

  Source:
    Areas: MicroScopiQ, arXiv 2411.05282, table 5.
  """
  made = Olive(rows, cols, memory or _base.buffers(rows), node_nm)
  _base.check_positive(made)
  return made


def gobo(
  rows: jax.typing.ArrayLike = 64,
  cols: jax.typing.ArrayLike = 64,
  *,
  memory: _base.Memory | None = None,
  node_nm: int = 7,
) -> Gobo:
  """GOBO: dictionary weights on floating-point activations.

  Args:
    rows: PEs along the reduction.
    cols: PEs along the outputs; one outlier PE each.
    memory: Buffers and bandwidths.
    node_nm: Technology node.

  Raises:
    ValueError: for numbers that are not positive.

  Source:
    Areas: MicroScopiQ, arXiv 2411.05282, table 5, whose components add up to
    0.156 mm2 where it says 0.216. The energy of a PE is that of a 16 x 16
    multiplier, our choice.
  """
  made = Gobo(rows, cols, memory or _base.buffers(rows), node_nm)
  _base.check_positive(made)
  return made
