"""GPUs and TPUs by the roofline of their data sheets."""

import jax
import numpy as np

from mq_jax._pytrees import pytree_dataclass, static
from mq_jax.hardware.accelerators import _base

_SHEET = 'data sheet, recalled'


@pytree_dataclass
class Roofline:
  """Peak rates; made by `gpu_roofline` or `tpu_roofline`.

  Attributes:
    clock_ghz: Cycles are of this clock.
    tops_16: Peak 10^12 operations a second at 16 bits (2 a MAC).
    tops_8: At 8 bits.
    tops_4: At 4 bits; equal to `tops_8` where there is no such mode.
    efficiency: Share of both peaks that is reached.
    launch_cycles: Floor of one kernel.
    decode_weights_per_cycle: Weights a cycle that can be widened for the
      multipliers, where stored weights are narrower than activations.
    power_w: Board power; energy is power times time, an upper bound.
    die_um2: Area of the die.
    memory: Only the DRAM bandwidth counts.
  """

  clock_ghz: jax.typing.ArrayLike
  tops_16: jax.typing.ArrayLike
  tops_8: jax.typing.ArrayLike
  tops_4: jax.typing.ArrayLike
  power_w: jax.typing.ArrayLike
  die_um2: jax.typing.ArrayLike
  decode_weights_per_cycle: jax.typing.ArrayLike
  memory: _base.Memory
  efficiency: jax.typing.ArrayLike = 0.8
  launch_cycles: jax.typing.ArrayLike = 3000.0
  decode_rows: jax.typing.ArrayLike = 64.0
  node_nm: int = static(7)

  def check(self, precision):
    for what in ('weight_bits', 'activation_bits'):
      bits = getattr(precision, what)
      _base.check_bits('roofline', what, bits, range(1, 33))

  def array(self, work, precision, rules):
    xp = rules.xp
    m, k, n = work.m, work.k, work.n
    macs = m * k * n
    wide = xp.maximum(precision.weight_bits, precision.activation_bits)
    # Mixed operands run at the wider one's rate.
    tops = xp.where(
      wide <= 4, self.tops_4, xp.where(wide <= 8, self.tops_8, self.tops_16)
    )
    peak = 500.0 * tops / self.clock_ghz  # MACs a cycle
    rate = peak * self.efficiency
    # Weights narrower than activations are widened again in each pass.
    widened = xp.where(
      precision.weight_bits < precision.activation_bits, 1.0, 0.0
    )
    passes = rules.tiles(m, self.decode_rows)
    decode = widened * passes * k * n / self.decode_weights_per_cycle
    compute = macs / rate
    return _base.ArrayCost(
      compute_cycles=rules.longest(compute, decode),
      fill_cycles=self.launch_cycles,
      row_tiles=1.0,
      column_tiles=1.0,
      rows=k,
      columns=n,
      macs_per_cycle=peak,
      # W / GHz = nJ a cycle.
      leakage_pj_per_cycle=1e3 * self.power_w / self.clock_ghz,
    )

  def area(self, rules):
    return _base.Area(array=self.die_um2, noc=0.0, control=0.0, sram=0.0)


# GHz, TOPS at 16, 8 and 4 bits, GB/s, W, mm2, widened weights a clock: SMs
# times 64 (two operations for two weights on 128 lanes, MARLIN's kernel).
GPUS = {
  'a100': (1.41, 312, 624, 1248, 2039, 400, 826, 108 * 64),
  'h100': (1.98, 990, 1979, 1979, 3350, 700, 814, 132 * 64),
  'h200': (1.98, 990, 1979, 1979, 4800, 700, 814, 132 * 64),
  'a10': (1.70, 125, 250, 500, 600, 150, 628, 72 * 64),
}
# A TPU v4 runs int8 at the rate of bf16; vector units widen the weights.
TPUS = {
  'v4': (1.05, 275, 275, 275, 1228, 192, 600, 2 * 2048),
  'v5e': (1.50, 197, 394, 394, 819, 200, 350, 4096),
}


def _roofline(kind, name, table, efficiency):
  if name not in table:
    raise ValueError(f'{kind}_roofline: {name!r} is not one of {list(table)}')
  ghz, t16, t8, t4, gb_per_s, watts, mm2, widened = table[name]
  if not isinstance(efficiency, jax.core.Tracer) and np.any(
    np.asarray(efficiency) > 1
  ):
    raise ValueError(f'{kind}_roofline: efficiency = {efficiency} is above 1')
  # No buffers are modelled: everything streams once.
  ample = 1e15
  made = Roofline(
    ghz,
    t16,
    t8,
    t4,
    watts,
    1e6 * mm2,
    widened,
    _base.Memory(
      dram_bytes_per_cycle=gb_per_s / ghz * efficiency,
      link_bytes_per_cycle=ample,
      l2_bytes=ample,
      weight_bytes=ample,
      input_bytes=ample,
      output_bytes=ample,
      dram_pj_per_bit=0.0,  # in the board's power
      sram_scale=0.0,
    ),
    efficiency=efficiency,
  )
  _base.check_positive(made)
  return made


def gpu_roofline(
  name: str = 'a100', *, efficiency: jax.typing.ArrayLike = 0.8
) -> Roofline:
  """A GPU by its data sheet.

  Time of a matmul is the longest of multiplying, widening of narrow weights
  (once for each pass of 64 rows, as MARLIN's kernel) and DRAM transfer, plus
  the launch of a kernel. Hopper has no 4-bit mode.

  Args:
    name: 'a100', 'h100', 'h200' or 'a10'.
    efficiency: Share of peak rates that is reached.

  Raises:
    ValueError: for an unknown name.

  Source:
    Data sheets, recalled; MARLIN, arXiv 2408.11743, for widening.
  """
  return _roofline('gpu', name, GPUS, efficiency)


def tpu_roofline(
  name: str = 'v5e', *, efficiency: jax.typing.ArrayLike = 0.8
) -> Roofline:
  """A TPU chip by its data sheet, as `gpu_roofline`.

  Args:
    name: 'v4' or 'v5e'. Power and area of a v5e are not published: guesses.
    efficiency: Share of peak rates that is reached.

  Raises:
    ValueError: for an unknown name.

  Source:
    Data sheets and Jouppi et al., ISCA 2023, recalled.
  """
  return _roofline('tpu', name, TPUS, efficiency)
