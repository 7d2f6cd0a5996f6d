"""Arrays whose PEs fuse or split by precision: BitFusion, MixPE."""

import jax

from mq_jax._pytrees import pytree_dataclass, static
from mq_jax.hardware import technology
from mq_jax.hardware.accelerators import _base

FLOWS = ('os', 'ws')


@pytree_dataclass
class Fused:
  """PEs of `high` bits that split down to `low`; see `bitfusion`, `mixpe`."""

  rows: jax.typing.ArrayLike
  columns: jax.typing.ArrayLike
  high: jax.typing.ArrayLike
  low: jax.typing.ArrayLike
  memory: _base.Memory
  pe_pj_per_cycle: jax.typing.ArrayLike
  pe_um2: jax.typing.ArrayLike
  as_published: bool = static(False)
  dataflow: str = static('os')
  node_nm: int = static(28)
  name: str = static('mixpe')

  def check(self, precision):
    allowed = range(1, int(self.high) + 1)
    _base.check_bits(self.name, 'weight_bits', precision.weight_bits, allowed)
    if not self.as_published:
      _base.check_bits(
        self.name, 'activation_bits', precision.activation_bits, allowed
      )

  def _split(self, bits, rules):
    """PEs that one PE becomes along its side, at a width."""
    wide = rules.xp.maximum(bits, self.low)
    parts = self.high / wide
    return parts if rules.relaxed else rules.xp.floor(parts)

  def array(self, work, precision, rules):
    rows, columns = self.rows, self.columns
    if self.as_published:
      across = down = self._split(precision.weight_bits, rules)
    else:
      down = self._split(precision.activation_bits, rules)
      across = self._split(precision.weight_bits, rules)
    m, k, n = work.m, work.k, work.n
    over_n = rules.tiles(n, columns * across)
    if self.dataflow == 'os':
      compute = rules.tiles(m, rows * down) * over_n * k
    else:
      compute = m * over_n * rules.tiles(k, rows * down)
    return _base.ArrayCost(
      compute_cycles=compute,
      row_tiles=rules.tiles(k, rows * down),
      column_tiles=over_n,
      rows=rows * down,
      columns=columns * across,
      macs_per_cycle=rows * columns * down * across,
      array_pj=compute * rows * columns * self.pe_pj_per_cycle,
    )

  def area(self, rules):
    return _base.Area(
      array=self.rows * self.columns * self.pe_um2,
      noc=0.0,
      control=0.0,
      sram=self.memory.area_um2(self.node_nm),
    )


# 128, 256 and 128 KB for weights, inputs and outputs, 1024 bits a cycle.
_MIXPE_MEMORY = dict(
  dram_bytes_per_cycle=128.0,
  link_bytes_per_cycle=128.0,
  weight_bytes=128 * 1024,
  input_bytes=256 * 1024,
  output_bytes=128 * 1024,
)
# Of equal area (the simulator's configurations): rows, columns, high, low.
DESIGNS = {
  'w4a8': (64, 64, 8, 4),
  'w4a16': (32, 32, 16, 8),
  'int8': (32, 32, 8, 4),
  'bitfusion': (32, 40, 8, 4),
  'ant': (32, 32, 8, 4),
  'fp16': (32, 28, 16, 16),
}
_POWER = {'w4a16': (16, 8), 'fp16': (16, 16)}


def mixpe(
  design: str = 'w4a8',
  *,
  as_published: bool = False,
  dataflow: str = 'os',
  memory: _base.Memory | None = None,
) -> Fused:
  """MixPE's shift-add array, or one of its baselines of equal area.

  Args:
    design: 'w4a8' and 'w4a16' are MixPE's; 'int8', 'bitfusion', 'ant' and
      'fp16' its baselines.
    as_published: Both operands at the width of the weights, as the released
      simulator does; otherwise each at its own.
    dataflow: 'os' or 'ws', with the simulator's cycle counts.
    memory: Buffers and bandwidths.

  Raises:
    ValueError: for an unknown design or dataflow.

  Source:
    MixPE, arXiv 2411.16158: configurations, cycles and power of its released
    simulator (28 nm, 500 MHz). It charges the same PE for MixPE, INT8,
    BitFusion and ANT. Area: the fused PE of `technology`, our choice.
  """
  if design not in DESIGNS:
    raise ValueError(f'mixpe: design {design!r} is not one of {list(DESIGNS)}')
  if dataflow not in FLOWS:
    raise ValueError(f'mixpe: dataflow {dataflow!r} is not one of {FLOWS}')
  rows, columns, high, low = DESIGNS[design]
  power = technology.MIXPE_PE_NW[_POWER.get(design, (8, 4))]
  return Fused(
    rows,
    columns,
    high,
    low,
    _base.Memory(**_MIXPE_MEMORY) if memory is None else memory,
    # nW at 500 MHz: 1e-9 W / 5e8 Hz = 2e-6 pJ a cycle.
    pe_pj_per_cycle=2e-6 * power.value,
    pe_um2=technology.mac_um2(high, high, 28),
    as_published=as_published,
    dataflow=dataflow,
  )


# Of 2-bit bricks, 8 bits wide: the synthesis table at 45 nm, 500 MHz.
BITFUSION_PE_FJ = technology.Constant(
  559.9, 'fJ/cycle', 45, 'BitFusion synthesis table, 500 MHz'
)
BITFUSION_PE_UM2 = technology.Constant(
  1733.1, 'um2', 45, 'BitFusion synthesis table, 500 MHz'
)


def bitfusion(
  rows: jax.typing.ArrayLike = 32,
  cols: jax.typing.ArrayLike = 32,
  *,
  memory: _base.Memory | None = None,
) -> Fused:
  """BitFusion: an 8-bit PE of 16 bricks of 2 bits.

  Throughput is (8 / weight_bits) (8 / activation_bits) of that at 8 bits.

  Args:
    rows: PEs along the tokens.
    cols: PEs along the outputs.
    memory: Buffers and bandwidths.

  Raises:
    ValueError: for numbers that are not positive.

  Source:
    Sharma et al., ISCA 2018, and its simulator's synthesis table (45 nm).
  """
  made = Fused(
    rows,
    cols,
    8,
    2,
    _base.Memory() if memory is None else memory,
    pe_pj_per_cycle=1e-3 * BITFUSION_PE_FJ.value,
    pe_um2=BITFUSION_PE_UM2.value,
    node_nm=45,
    name='bitfusion',
  )
  _base.check_positive(made)
  return made
