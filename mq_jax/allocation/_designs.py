"""Accelerators to choose from, and what sites cost on them."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mq_jax import hardware
from mq_jax.allocation.problem import Problem, make_problem

# By name: a number, or numbers [d] of as many accelerators.
Numbers = Mapping[str, Any]

AREA = 'area_um2'
# What can be budgeted besides the area: all add up over sites.
QUANTITIES = {
  'cycles': lambda cost: cost.total_cycles,
  'energy_pj': lambda cost: cost.energy_pj.total,
  'dram_bytes': lambda cost: cost.dram_bytes,
}
_CHUNK = 4096  # accelerators at once, for memory


@dataclasses.dataclass(frozen=True, eq=False)
class Space:
  """Accelerators to choose from.

  Attributes:
    make: Of numbers by name, the accelerator; of arrays too, traced or not.
    values: Values that can be built, ascending, by name.
    split: Names of the parts that share `units` whole units, at least one
      each (a memory of that many banks).
    units: Of the split.
    needs: Shares by name, from numbers, that must not exceed 1 (a tile in
      its buffer). They may grow in each number of `values`, never fall.
  """

  make: Callable[[Numbers], hardware.accelerators.Accelerator]
  values: Mapping[str, tuple[float, ...]]
  split: tuple[str, ...] = ()
  units: int = 0
  needs: Callable[[Numbers], Mapping[str, Any]] = lambda numbers: {}

  def __post_init__(self):
    for name, values in self.values.items():
      rising = all(0 < a < b for a, b in itertools.pairwise((*values, np.inf)))
      if not values or not rising:
        raise ValueError(
          f'codesign: values of {name} are {tuple(values)}; needed are '
          'positive ones, ascending'
        )
    if self.units < len(self.split):
      raise ValueError(
        f'codesign: {self.units} units for the parts {self.split}; at least '
        'one each is needed'
      )

  @property
  def names(self) -> tuple[str, ...]:
    return (*self.values, *self.split)

  def parts(self) -> np.ndarray:
    """All ways to deal the units. i64[s, parts]."""
    if not self.split:
      return np.zeros((1, 0), np.int64)
    cuts = itertools.combinations(range(1, self.units), len(self.split) - 1)
    ends = np.array([(0, *cut, self.units) for cut in cuts])
    return np.diff(ends, axis=1)

  def grid(self) -> dict[str, np.ndarray]:
    """Every accelerator of the space, whether tiles fit or not. [d] each."""
    parts = self.parts()
    axes = (*self.values.values(), range(len(parts)))
    *columns, at = (x.ravel() for x in np.meshgrid(*axes, indexing='ij'))
    return dict(zip(self.names, (*columns, *parts[at].T)))


def microscopiq(
  values: Mapping[str, Sequence[float]],
  candidates: hardware.Precision,
  *,
  sram_bytes: float,
  banks: int = 16,
  bandwidth: Mapping[str, float] | None = None,
  **options: float,
) -> Space:
  """MicroScopiQ accelerators with a fixed memory on chip.

  Args:
    values: Of 'rows', 'cols' and 'recon_units'.
    candidates: Precisions whose tiles must fit the buffers.
    sram_bytes: Of L2 and both halves of all buffers together.
    banks: Equal parts of it, dealt to the weight, input and output buffer
      and the L2.
    bandwidth: Other fields of `hardware.accelerators.Memory`.
    **options: Of `hardware.accelerators.microscopiq`.

  Raises:
    ValueError: for names other than the three.
  """
  wanted = ('rows', 'cols', 'recon_units')
  if sorted(values) != sorted(wanted):
    raise ValueError(f'codesign: numbers {sorted(values)}; needed are {wanted}')
  bank, lanes = sram_bytes / banks, 4 / np.asarray(candidates.weight_bits)
  weight = float(np.max(lanes * np.asarray(candidates.ebw) / 8))
  inputs = float(np.max(candidates.activation_bits)) / 8

  def memory(numbers):
    half = {
      f'{name}_bytes': 0.5 * bank * numbers[name]
      for name in ('weight', 'input', 'output')
    }
    return hardware.accelerators.Memory(
      l2_bytes=bank * numbers['l2'], **half, **(bandwidth or {})
    )

  def make(numbers):
    return hardware.accelerators.microscopiq(
      *(numbers[name] for name in wanted), memory=memory(numbers), **options
    )

  def needs(numbers):  # the rule of `hardware.cost`, which only raises
    rows, cols = numbers['rows'], numbers['cols']
    have = memory(numbers)
    return {
      'weight_bytes': rows * cols * weight / have.weight_bytes,
      'input_bytes': rows * inputs / have.input_bytes,
      'output_bytes': (
        cols * (float(np.max(lanes)) * have.sum_bits / 8) / have.output_bytes
      ),
    }

  split = ('weight', 'input', 'output', 'l2')
  ordered = {name: tuple(values[name]) for name in wanted}
  return Space(make, ordered, split, banks, needs)


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
  """What is to be chosen, made by `make_task`.

  Attributes:
    space: Accelerators.
    sensitivity: Loss by site and candidate, infinite where it lacks one; or
      zeros, where there is another loss. f64[l, c].
    work: The different matmuls. [u, 1].
    candidates: Their precisions. [u, c].
    index: Which of them a site is. i64[l].
    budget: By quantity, the area among them.
    loss: Differentiable in the probabilities f32[l, c]; None for the table.
  """

  space: Space
  sensitivity: np.ndarray
  work: hardware.Workload
  candidates: hardware.Precision
  index: np.ndarray
  budget: Mapping[str, float]
  loss: Callable[[jax.Array], jax.Array] | None = None

  @property
  def quantities(self) -> tuple[str, ...]:
    return tuple(name for name in self.budget if name != AREA)

  @property
  def area(self) -> float:
    return self.budget.get(AREA, math.inf)

  def problem(self, tables: np.ndarray, sensitivity: np.ndarray) -> Problem:
    """The allocation on one accelerator, of its tables f64[q, u, c]."""
    cost = dict(zip(self.quantities, tables[:, self.index]))
    return make_problem(
      sensitivity, cost, {name: self.budget[name] for name in cost}
    )


def make_task(
  space: Space,
  sensitivity: np.ndarray,
  work: hardware.Workload,
  candidates: hardware.Precision,
  budget: Mapping[str, float],
  *,
  loss: Callable[[jax.Array], jax.Array] | None = None,
) -> Task:
  """Check a task; sites of equal sizes and candidates are priced once.

  Args:
    space: Accelerators.
    sensitivity: f[l, c].
    work: Sites [l].
    candidates: [c], or [l, c] where sites differ.
    budget: Of 'area_um2', and at least one of `QUANTITIES` or 'bits' (stored
      ones of all weights).
    loss: Of the probabilities, where it is not the sensitivities' sum.

  Raises:
    ValueError: for unknown quantities, shapes that don't fit, and what
      `make_problem` refuses.
  """
  sensitivity = np.asarray(sensitivity, np.float64)
  known = (*QUANTITIES, 'bits', AREA)
  unknown = sorted(set(budget) - set(known))
  if unknown or not set(budget) - {AREA}:
    raise ValueError(
      f'codesign: budget of {unknown or list(budget)}; there is '
      f'{", ".join(known)}, of which one but the area is needed'
    )
  bad = [name for name, value in budget.items() if not value > 0]
  if bad:
    raise ValueError(f'codesign: budget {bad[0]} = {budget[bad[0]]}; not > 0')
  sizes = [np.ravel(getattr(work, x)) for x in ('m', 'k', 'n', 'count')]
  l = max(map(len, sizes))
  if sensitivity.shape[:1] != (l,) or sensitivity.ndim != 2:
    raise ValueError(
      f'codesign: sensitivity has shape {sensitivity.shape}; needed is '
      f'[{l}, candidates], as the workload has {l} sites'
    )
  fields, tree = jax.tree.flatten(candidates)
  try:
    wide = [np.broadcast_to(x, sensitivity.shape) for x in fields]
  except ValueError:
    raise ValueError(
      f'codesign: candidates of shapes {[np.shape(x) for x in fields]} for a '
      f'sensitivity of {sensitivity.shape}'
    ) from None
  make_problem(sensitivity, {'none': np.zeros_like(sensitivity)}, {})
  rows = [np.broadcast_to(x, l)[:, None] for x in sizes]
  _, first, index = np.unique(
    np.concatenate([*rows, *wide], axis=1),
    axis=0, return_index=True, return_inverse=True,
  )  # fmt: skip
  return Task(
    space,
    sensitivity,
    hardware.Workload(*(x[first] for x in rows)),
    jax.tree.unflatten(tree, [x[first] for x in wide]),
    index.reshape(-1),
    dict(budget),
    loss,
  )


def costs(task: Task, accelerator: Any, cost: Callable) -> tuple[list, Any]:
  """Tables of the quantities, [..., u, c] each, and the area."""
  found = cost(accelerator, task.work, task.candidates)
  stored = task.work.k * task.work.n * task.work.count * task.candidates.ebw
  tables = [
    stored if name == 'bits' else QUANTITIES[name](found)
    for name in task.quantities
  ]
  return tables, found.area_um2.total[..., 0, 0]


class Tables(NamedTuple):
  """Exact costs of accelerators [d]; infinite where a tile does not fit.

  Attributes:
    cost: f64[q, d, u, c].
    area_um2: f64[d].
  """

  cost: np.ndarray
  area_um2: np.ndarray


def tables(task: Task, designs: Numbers) -> Tables:
  """`hardware.cost` of each accelerator, all different sites and candidates.

  Args:
    task: The task.
    designs: Numbers [d] by name.
  """
  designs = {name: np.asarray(x, np.float64) for name, x in designs.items()}
  if set(designs) != set(task.space.names):
    raise ValueError(
      f'codesign: numbers {sorted(designs)}; needed are '
      f'{sorted(task.space.names)}'
    )
  count = len(next(iter(designs.values())))
  fits = np.ones(count, bool)
  for share in task.space.needs(designs).values():
    fits &= share <= 1
  shape = (len(task.quantities), count, *task.candidates.ebw.shape)
  found = Tables(np.full(shape, np.inf), np.full(count, np.inf))
  possible = np.flatnonzero(fits)
  for at in np.split(possible, range(_CHUNK, len(possible), _CHUNK)):
    some = {name: x[at, None, None] for name, x in designs.items()}
    cost, area = costs(task, task.space.make(some), hardware.cost)
    for q, table in enumerate(cost):
      found.cost[q, at] = table
    found.area_um2[at] = area
  return found
