"""What all accelerators share: memories, and the shape of their answers."""

from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from mq_jax._pytrees import pytree_dataclass
from mq_jax.hardware import technology
from mq_jax.hardware._precision import Precision
from mq_jax.hardware._rules import Rules
from mq_jax.hardware.workload import Workload

Array = jax.typing.ArrayLike


class ArrayCost(NamedTuple):
  """What a processing array says of one matmul.

  Attributes:
    compute_cycles: While its multipliers are occupied.
    fill_cycles: Exposed before and after.
    noc_cycles: While the network that all rows share is occupied.
    conflict_rate: Share of the accesses to it that have to wait.
    row_tiles: Tiles along the reduction.
    column_tiles: Tiles along the outputs.
    rows: Inputs that one tile holds.
    columns: Outputs that one tile holds.
    macs_per_cycle: Of all multipliers together.
    array_pj: Energy of the multipliers, accumulators and registers.
    noc_pj: Energy of the network.
    leakage_pj_per_cycle: Of the whole array.
  """

  compute_cycles: Array
  row_tiles: Array
  column_tiles: Array
  rows: Array
  columns: Array
  macs_per_cycle: Array
  fill_cycles: Array = 0.0
  noc_cycles: Array = 0.0
  conflict_rate: Array = 0.0
  array_pj: Array = 0.0
  noc_pj: Array = 0.0
  leakage_pj_per_cycle: Array = 0.0


class Area(NamedTuple):
  """um2 by part."""

  array: Array
  noc: Array
  control: Array
  sram: Array

  @property
  def compute(self):
    """Without memories."""
    return self.array + self.noc + self.control

  @property
  def total(self):
    return self.compute + self.sram


class Traffic(NamedTuple):
  """Bytes moved for one matmul.

  Attributes:
    weights: DRAM bytes of weights, metadata included.
    inputs: DRAM bytes of activations.
    outputs: DRAM bytes of results.
    link: Bytes between L2 and the buffers.
    sram_pj: Energy of all accesses on chip.
  """

  weights: Array
  inputs: Array
  outputs: Array
  link: Array
  sram_pj: Array

  @property
  def dram(self):
    return self.weights + self.inputs + self.outputs


@pytree_dataclass
class Memory:
  """DRAM, a shared L2, and buffers for weights, inputs and outputs.

  Outputs are the outermost loop, then chunks of tokens as large as the output
  buffer holds sums of, then the reduction: sums never leave the buffer.

  Attributes:
    dram_bytes_per_cycle: Bandwidth of the DRAM.
    link_bytes_per_cycle: Bandwidth between L2 and the buffers.
    l2_bytes: Size of the L2.
    weight_bytes: Weight buffer that can be filled while the other half is in
      use; likewise the following two.
    input_bytes: Input buffer.
    output_bytes: Buffer of sums.
    sum_bits: Width of a sum.
    dram_pj_per_bit: Energy of the DRAM.
    sram_scale: Calibrates the energy of all memory on chip; one for all
      accelerators, so that they can be compared.
  """

  dram_bytes_per_cycle: Array = 256.0
  link_bytes_per_cycle: Array = 64.0
  l2_bytes: Array = 2 * 2**20
  weight_bytes: Array = 256 * 1024
  input_bytes: Array = 128 * 1024
  output_bytes: Array = 128 * 1024
  sum_bits: Array = 32
  dram_pj_per_bit: Array = technology.HBM2_PJ_PER_BIT.value
  sram_scale: Array = technology.SRAM_SCALE.value

  def traffic(
    self,
    work: Workload,
    precision: Precision,
    array: ArrayCost,
    rules: Rules,
    node_nm: int,
  ) -> Traffic:
    """Bytes and energy of one matmul's operands."""
    xp = rules.xp
    m, k, n = work.m, work.k, work.n
    room = self.output_bytes * 8 / (array.columns * self.sum_bits)
    # A buffer without room for one row is refused where values are known.
    room = xp.maximum(room if rules.relaxed else xp.floor(room), 1.0)
    chunks = rules.tiles(m, room)

    weights = k * n * precision.ebw / 8
    inputs = m * k * precision.activation_bits / 8
    outputs = m * n * precision.output_bits / 8
    panel = k * xp.minimum(array.columns, n) * precision.ebw / 8
    again = lambda need, have, times: (
      1.0 + rules.exceeds(need, have) * (times - 1.0)
    )
    link_weights = weights * again(panel, self.weight_bytes, chunks)
    link_inputs = inputs * again(inputs, self.input_bytes, array.column_tiles)
    dram_inputs = inputs * again(inputs, self.l2_bytes, array.column_tiles)
    link = link_weights + link_inputs + outputs

    # Each row and column of the array has a bank of its own.
    bit = lambda size, banks=1.0: technology.sram_pj_per_bit(
      size / banks, node_nm, xp
    )
    sram_pj = self.sram_scale * (
      8 * link * bit(self.l2_bytes)
      + 8 * weights * chunks * bit(self.weight_bytes, array.columns)
      + 8 * inputs * array.column_tiles * bit(self.input_bytes, array.rows)
      + (m * n * (2 * array.row_tiles - 1) * self.sum_bits)
      * bit(self.output_bytes, array.columns)
    )
    return Traffic(weights, dram_inputs, outputs, link, sram_pj)

  def area_um2(self, node_nm: int):
    """Of L2 and both halves of the buffers."""
    size = self.l2_bytes + 2 * (
      self.weight_bytes + self.input_bytes + self.output_bytes
    )
    bit = technology.SRAM_UM2_PER_BIT
    return 8 * size * bit.value * technology.area_factor(bit.node_nm, node_nm)

  def check(self, rows, columns, precision: Precision) -> None:
    """Refuse buffers that can't hold one tile.

    Raises:
      ValueError: naming the buffer, its size and what one tile needs.
    """
    rows, columns = np.broadcast_arrays(rows, columns)
    tile = {
      'weight_bytes': rows * columns * np.asarray(precision.ebw) / 8,
      'input_bytes': rows * np.asarray(precision.activation_bits) / 8,
      'output_bytes': columns * np.asarray(self.sum_bits) / 8,
    }
    for name, need in tile.items():
      have, need, height, width = np.broadcast_arrays(
        getattr(self, name), need, rows, columns
      )
      if (have < need).any():
        at = np.unravel_index(np.argmax(need - have), need.shape)
        raise ValueError(
          f'accelerator: memory.{name} = {have[at]} holds no tile of '
          f'{height[at]:g} x {width[at]:g} weights, which needs '
          f'{need[at]:.0f} bytes'
        )


def buffers(rows: Array, **replaced: Array) -> Memory:
  """The memories of MicroScopiQ's evaluation, for an array of so many rows.

  HBM2 of 256 GB/s, an L2 of 2 MB, 64 GB/s between it and the buffers, at 1
  GHz; buffers of 32 KB (weights), 16 KB (inputs) and 16 KB (outputs) at 8
  rows. That they grow in proportion to the rows is our choice ("scaled up
  progressively").

  Args:
    rows: Of the array.
    **replaced: Fields of `Memory` given otherwise.

  Source:
    MicroScopiQ, arXiv 2411.05282, evaluation.
  """
  eighth = 128 * rows  # bytes
  sizes = {
    'weight_bytes': 32 * eighth,
    'input_bytes': 16 * eighth,
    'output_bytes': 16 * eighth,
  }
  return Memory(**(sizes | replaced))


class Accelerator(Protocol):
  """A frozen pytree of numbers that can price a matmul on its array."""

  memory: Memory
  node_nm: int

  def check(self, precision: Precision) -> None:
    """Refuse precisions that the array has no mode for; by ValueError."""

  def array(
    self, work: Workload, precision: Precision, rules: Rules
  ) -> ArrayCost:
    """The array's part of the cost of one call of a matmul."""

  def area(self, rules: Rules) -> Area:
    """um2 by part."""


_MAY_BE_ZERO = ('sync', 'sram_scale', 'dram_pj_per_bit')


def check_positive(accelerator: Any) -> None:
  """Refuse numbers that are not positive, by field; some may be zero.

  Raises:
    ValueError: naming the field and the value.
  """
  flat, _ = jax.tree_util.tree_flatten_with_path(accelerator)
  for path, leaf in flat:
    if isinstance(leaf, jax.core.Tracer):
      continue
    value = np.asarray(leaf)
    name = jax.tree_util.keystr(path).lstrip('.')
    zero = (value == 0) & (name.split('.')[-1] in _MAY_BE_ZERO)
    bad = ~(np.isfinite(value) & (value > 0)) & ~zero
    if bad.any():
      raise ValueError(
        f'accelerator: {name} = {value[bad].flat[0]}; a positive number is '
        'needed'
      )


def check_bits(name: str, what: str, bits: Array, allowed) -> None:
  """Refuse widths outside `allowed`.

  Raises:
    ValueError: naming accelerator, operand, width and the possible ones.
  """
  if isinstance(bits, jax.core.Tracer):
    return
  bits = np.asarray(bits)
  bad = ~np.isin(bits, allowed)
  if bad.any():
    raise ValueError(
      f'{name}: {what} = {bits[bad].flat[0]} is not supported; possible are '
      f'{", ".join(map(str, allowed))}'
    )
