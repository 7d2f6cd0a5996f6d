"""The cost of matmuls on an accelerator: exact, relaxed, and expected."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax.hardware import accelerators as accelerators_lib
from mq_jax.hardware._precision import Precision
from mq_jax.hardware._rules import Rules, as_floats, module_of
from mq_jax.hardware.accelerators._base import check_positive
from mq_jax.hardware.workload import Workload


class Energy(NamedTuple):
  """pJ by part.

  Attributes:
    array: Multipliers, accumulators and registers.
    noc: Network on chip.
    sram: Buffers and L2.
    dram: Off chip.
    leakage: Of the array, over the total time.
  """

  array: jax.Array
  noc: jax.Array
  sram: jax.Array
  dram: jax.Array
  leakage: jax.Array

  @property
  def total(self):
    return sum(self)


class Cost(NamedTuple):
  """What matmuls cost; of all `count` calls of each. All [l], or [d, l].

  Attributes:
    compute_cycles: The multipliers are occupied.
    fill_cycles: Exposed filling and draining, launches.
    noc_cycles: The shared network is occupied.
    sram_cycles: The link between L2 and buffers is occupied.
    dram_cycles: The DRAM is occupied.
    stall_cycles: The multipliers wait for the slowest of the three.
    total_cycles: compute + fill + stall.
    energy_pj: By part.
    area_um2: By part; of the accelerator, so not of each site.
    dram_bytes: Moved off chip.
    traffic: Bytes by operand.
    utilization: Multiply-accumulates done over those possible in the total.
    conflict_rate: Share of accesses to the network that wait, in a tile on its
      own; where tiles follow each other, `noc_cycles` says how busy it is.
    macs: Multiply-accumulates.
  """

  compute_cycles: jax.Array
  fill_cycles: jax.Array
  noc_cycles: jax.Array
  sram_cycles: jax.Array
  dram_cycles: jax.Array
  stall_cycles: jax.Array
  total_cycles: jax.Array
  energy_pj: Energy
  area_um2: accelerators_lib.Area
  dram_bytes: jax.Array
  traffic: accelerators_lib.Traffic
  utilization: jax.Array
  conflict_rate: jax.Array
  macs: jax.Array

  def sum(self, axis: int = -1) -> 'Cost':
    """All sites together: rates weighted by cycles, the area once."""
    whole = lambda x: x.sum(axis)
    first = lambda x: x.max(axis)  # equal along the axis
    total = whole(self.total_cycles)
    mean = lambda x: whole(x * self.total_cycles) / total
    rates = {
      n: mean(getattr(self, n)) for n in ('utilization', 'conflict_rate')
    }
    summed = jax.tree.map(whole, self)
    return summed._replace(area_um2=jax.tree.map(first, self.area_um2), **rates)


def _evaluate(accelerator, workload, precision, rules) -> Cost:
  array = accelerator.array(workload, precision, rules)
  memory = accelerator.memory
  moved = memory.traffic(workload, precision, array, rules, accelerator.node_nm)
  dram = moved.dram / memory.dram_bytes_per_cycle
  link = moved.link / memory.link_bytes_per_cycle
  busy = rules.longest(array.compute_cycles, array.noc_cycles, link, dram)
  stall = busy - array.compute_cycles
  total = array.compute_cycles + array.fill_cycles + stall
  macs = workload.m * workload.k * workload.n
  energy = Energy(
    array=array.array_pj,
    noc=array.noc_pj,
    sram=moved.sram_pj,
    dram=8 * moved.dram * memory.dram_pj_per_bit,
    leakage=array.leakage_pj_per_cycle * total,
  )
  times = workload.count
  area = accelerator.area(rules)
  parts = Cost(
    compute_cycles=times * array.compute_cycles,
    fill_cycles=times * array.fill_cycles,
    noc_cycles=times * array.noc_cycles,
    sram_cycles=times * link,
    dram_cycles=times * dram,
    stall_cycles=times * stall,
    total_cycles=times * total,
    energy_pj=jax.tree.map(lambda x: times * x, energy),
    area_um2=area,
    dram_bytes=times * moved.dram,
    traffic=jax.tree.map(lambda x: times * x, moved),
    utilization=macs / (total * array.macs_per_cycle),
    conflict_rate=array.conflict_rate,
    macs=times * macs,
  )
  shape = np.broadcast_shapes(*(np.shape(x) for x in jax.tree.leaves(parts)))
  return jax.tree.map(lambda x: rules.xp.broadcast_to(x, shape), parts)


def _check(accelerator, workload, precision) -> None:
  check_positive(accelerator)
  accelerator.check(precision)
  for name in ('m', 'k', 'n', 'count'):
    value = np.asarray(getattr(workload, name))
    bad = ~((value >= 1) & (value == np.floor(value)))
    if bad.any():
      raise ValueError(
        f'workload: {name} = {value[bad].flat[0]}; a whole number >= 1 is '
        'needed in the exact form'
      )
  array = accelerator.array(workload, precision, Rules())
  accelerator.memory.check(array.rows, array.columns, precision)


def cost(
  accelerator: accelerators_lib.Accelerator,
  workload: Workload,
  precision: Precision,
) -> Cost:
  """What matmuls cost on an accelerator: whole tiles, hard maxima.

  Fields of the three arguments broadcast: sites [l] against designs [d, 1].
  Plain numbers are computed by NumPy in float64, where whole numbers are
  exact up to 2^53. Traced values (in `jit`, `vmap`, `grad`) are computed in
  JAX's default floating point: in float32 tiles are counted exactly and
  products of them are rounded beyond 2^24.

  Nearly flat in sizes of the array, whose gradient is zero almost everywhere;
  exact and smooth in the bits' costs (`ebw`, `outlier_blocks`, magnitudes),
  bandwidths (where they bind) and energies.

  Args:
    accelerator: From `accelerators`.
    workload: From `workload`.
    precision: From `precision`, `of_matrix` or `of_recipe`.

  Returns:
    Named parts; all broadcast to one shape.

  Raises:
    ValueError: for sizes that are not whole numbers >= 1, precisions that the
      accelerator does not support, numbers that are not positive, buffers
      that hold no tile. Traced values are not checked.

  Examples:
    >>> from mq_jax.hardware import accelerators, precision, workload
    >>> found = cost(accelerators.systolic('ws', rows=8, cols=8),
    ...              workload.gemm(16, 16, 16), precision(8, 8))
    >>> int(found.compute_cycles)  # 4 folds of 2 x 8 + 8 + 16 - 2
    152
  """
  xp = module_of(accelerator, workload, precision)
  if xp is np:
    _check(accelerator, workload, precision)
  return _evaluate(*as_floats(xp, accelerator, workload, precision), Rules(xp))


def relaxed_cost(
  accelerator: accelerators_lib.Accelerator,
  workload: Workload,
  precision: Precision,
  *,
  tail: jax.typing.ArrayLike = 1.0,
  temperature: jax.typing.ArrayLike = 0.02,
) -> Cost:
  """`cost` that can be differentiated in every number of its arguments.

  The last tile counts min(1, filling / tail) and maxima are log-sum-exps: of
  n parts, at most `temperature` log(n) above the largest, relatively. With
  both at zero it is `cost`. Sizes may be fractions.

  Args:
    accelerator: As for `cost`; its numbers are what design searches move.
    workload: As for `cost`.
    precision: As for `cost`; widths may be fractions here, but widths are
      better chosen by `expected_cost`.
    tail: 1 counts fractions of tiles, 0 whole ones. In between the gradient
      with respect to array sizes is zero where the last tile is fuller.
    temperature: Relative to the longest part.

  Returns:
    Named parts, differentiable almost everywhere, in JAX's default floating
    point.
  """
  rules = Rules(jnp, tail, temperature, relaxed=True)
  return _evaluate(*as_floats(jnp, accelerator, workload, precision), rules)


def expected_cost(
  accelerator: accelerators_lib.Accelerator,
  workload: Workload,
  candidates: Precision,
  probabilities: jax.Array,
  *,
  cost: Callable[..., Cost] = cost,
) -> Cost:
  """Mean cost of sites whose precision is chosen with some probability.

  sum_c p_c cost_c, never the cost of a mean width: a fraction of a bit has
  no place in a ceiling. At one-hot probabilities it is the chosen cost.

  Args:
    accelerator: As for `cost`.
    workload: Sites [l].
    candidates: Of every site, arrays [l, c] or [c].
    probabilities: Of the candidates, which add up to 1. f32[l, c].
    cost: `cost`, or a partial `relaxed_cost`.

  Returns:
    Costs [l]; differentiable in `probabilities`.
  """
  spread = lambda x: x[..., None] if np.ndim(x) else x
  each = cost(accelerator, jax.tree.map(spread, workload), candidates)
  return jax.tree.map(lambda x: (x * probabilities).sum(-1), each)
