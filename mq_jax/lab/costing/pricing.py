"""Costs of a model on a design, as records by site, and their totals."""

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mq_jax import hardware, plans
from mq_jax.lab.costing.entries import (
  Design,
  Named,
  Request,
  design,
  make_recipe,
  width_of,
)
from mq_jax.lab.costing.models import Model, assign, open_model
from mq_jax.quantize import QuantizedMatrix
from mq_jax.recipes import Recipe


def _bf16() -> hardware.Precision:
  return hardware.precision(16, 16, output_bits=16, ebw=16.0)


def _supports(made: Design, precision: hardware.Precision) -> str:
  """'' if an accelerator has a mode for a precision, else why not."""
  try:
    made.accelerator.check(precision)
  except ValueError as error:
    return str(error)
  return ''


def check(
  made: Design,
  model: Model,
  chosen: Sequence[Recipe | None],
  activation_bits: int,
) -> None:
  """Refuse what an accelerator can't price, before any weight is quantized.

  Raises:
    ValueError: naming site, width and what is possible.
  """
  wanted = []
  for site, recipe in zip(model.workload.names, chosen, strict=True):
    if recipe is not None:
      width = width_of(recipe)
      wanted.append(hardware.precision(width, activation_bits, output_bits=16))
      why = _supports(made, wanted[-1])
      if why:
        raise ValueError(f'{site}: {recipe.label} does not run: {why}')
      continue
    wanted.append(_bf16())
    why = _supports(made, wanted[-1])
    if why:
      missing = sum(r is None for r in chosen)
      raise ValueError(
        f'{site}: has no recipe ({missing} such sites), and {made.name} does '
        f'not run bf16: {why}; give these sites a recipe, or take an '
        'accelerator that does (gpu_roofline, tpu_roofline, systolic)'
      )
  # Whatever else it refuses; of this only the stored bits are estimates.
  hardware.cost(made.accelerator, model.workload, hardware.stack(wanted))


class Measured(NamedTuple):
  """Precision of each matmul, [l], with the recipe it came from."""

  precisions: tuple[hardware.Precision, ...]
  recipes: tuple[str, ...]
  notes: tuple[str, ...]


class Precisions:
  """Measures precisions, each recipe once for all accelerators."""

  def __init__(self, model: Model):
    self._model = model
    self._gaussian: dict[str, Any] = {}
    self._matrices: dict[tuple[str, str], QuantizedMatrix] = {}

  def of(
    self, chosen: Sequence[Recipe | None], activation_bits: int
  ) -> Measured:
    """Precisions of recipes.

    Exact on the model's weights; of shapes, on a Gaussian matrix.

    Args:
      chosen: A recipe for each matmul, None for bf16. Of a packed model they
        are not asked for.
      activation_bits: Width of the activations.
    """
    if self._model.kind == 'shapes':
      found, notes = self._of_shapes(chosen, activation_bits)
    else:
      found, notes = self._of_weights(chosen, activation_bits)
    left = sum(recipe is None for recipe in chosen)
    if left:
      notes.append(f'{left} sites without a recipe: bf16, activations too')
    labels = [recipe.label if recipe else 'bf16' for recipe in chosen]
    return Measured(tuple(found), tuple(labels), tuple(notes))

  def _of_shapes(self, chosen, activation_bits):
    found = []
    for recipe in chosen:
      if recipe is None:
        found.append(_bf16())
        continue
      key = recipe.label
      if key not in self._gaussian:
        # The widths do not change what is measured.
        self._gaussian[key] = hardware.of_recipe(recipe)
      found.append(_with_widths(self._gaussian[key], activation_bits))
    notes = ['bits and outliers as measured on a Gaussian matrix 512 x 512']
    return found, notes if any(chosen) else []

  def _of_weights(self, chosen, activation_bits):
    model = self._model
    pairs = [(s, r) for s, r in zip(model.sites, chosen, strict=True) if r]
    new = [(s, r) for s, r in pairs if (s.name, r.label) not in self._matrices]
    if new:
      # Only the sites that are asked for: nothing else is copied. Weights
      # alone: what is done to inputs asks for calibration.
      bare = {'activations': None, 'learning': None}
      alone = [(s, dataclasses.replace(r, **bare)) for s, r in new]
      packed = plans.compress(
        model.language_model.params, plans.Plan(tuple(alone))
      )
      matrices = plans.matrices(packed)
      for site, recipe in new:
        self._matrices[site.name, recipe.label] = matrices[site.name]
    found = [
      _bf16()
      if recipe is None
      else hardware.of_matrix(
        self._matrices[site.name, recipe.label], activation_bits
      )
      for site, recipe in zip(model.sites, chosen, strict=True)
    ]
    plain = any(r.calibrated for _, r in pairs)
    notes = ['bits and outliers as measured on the quantized weights']
    if plain:
      notes[0] += ', rounded without calibration or compensation for speed'
    return found, notes if pairs else []

  def packed(self, activation_bits: int) -> Measured:
    """Precisions of an artifact's own matrices; the others are bf16."""
    matrices = plans.matrices(self._model.language_model.params)
    found, labels = [], []
    for site in self._model.sites:
      matrix = matrices.get(site.name)
      if matrix is None:
        found.append(_bf16())
        labels.append('bf16')
      else:
        found.append(hardware.of_matrix(matrix, activation_bits))
        labels.append(matrix.recipe or 'packed')
    notes = ['bits and outliers as measured on the packed weights']
    plain = labels.count('bf16')
    if plain:
      notes.append(f'{plain} sites are not packed: bf16, activations too')
    return Measured(tuple(found), tuple(labels), tuple(notes))


def _with_widths(precision, activation_bits):
  return dataclasses.replace(precision, activation_bits=activation_bits)


_CYCLES = (
  'compute_cycles',
  'fill_cycles',
  'stall_noc_cycles',
  'stall_sram_cycles',
  'stall_dram_cycles',
)
_BUSY = ('noc_cycles', 'sram_cycles', 'dram_cycles')
_ENERGY = tuple(f'{part}_pj' for part in hardware.Energy._fields)


def price(
  made: Design, model: Model, measured: Measured
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
  """Records of a model's matmuls on an accelerator, and their total.

  Stalls are charged to the slowest of network, on-chip link and DRAM.

  Args:
    made: The accelerator.
    model: Its workload has [l] matmuls.
    measured: Their precisions.

  Returns:
    One record a matmul, of all its calls, and the total, with areas.

  Raises:
    ValueError: for what `hardware.cost` refuses.
  """
  work = model.workload
  stacked = hardware.stack(measured.precisions)
  cost = hardware.cost(made.accelerator, work, stacked)
  busy = np.stack([getattr(cost, name) for name in _BUSY])  # [3, l]
  slowest = np.arange(3)[:, None] == busy.argmax(axis=0)[None]
  stalls = np.where(slowest, cost.stall_cycles[None], 0.0)
  columns = {
    'm': work.m,
    'k': work.k,
    'n': work.n,
    'count': work.count,
    'weight_bits': stacked.weight_bits,
    'activation_bits': stacked.activation_bits,
    'ebw': stacked.ebw,
    'outlier_blocks': stacked.outlier_blocks,
    'macs': cost.macs,
    'compute_cycles': cost.compute_cycles,
    'fill_cycles': cost.fill_cycles,
    **dict(zip(_CYCLES[2:], stalls, strict=True)),
    'total_cycles': cost.total_cycles,
    **dict(zip(_BUSY, busy, strict=True)),
    'time_s': 1e-9 * cost.total_cycles / made.clock_ghz,
    **{f'{n}_pj': x for n, x in cost.energy_pj._asdict().items()},
    'total_pj': cost.energy_pj.total,
    'dram_bytes': cost.dram_bytes,
    'utilization': cost.utilization,
    'conflict_rate': cost.conflict_rate,
  }
  columns = {
    name: np.broadcast_to(x, np.shape(work.k)).tolist()
    for name, x in columns.items()
  }
  records = []
  for i, site in enumerate(work.names):
    numbers = {name: values[i] for name, values in columns.items()}
    records.append({'site': site, 'recipe': measured.recipes[i], **numbers})
  total = add(records)
  area = {
    f'{n}_um2': float(np.max(x))
    for n, x in zip(
      hardware.accelerators.Area._fields, cost.area_um2, strict=True
    )
  }
  return records, total | area | {'total_um2': sum(area.values())}


_SUMS = (
  'count',
  'macs',
  *_CYCLES,
  'total_cycles',
  *_BUSY,
  'time_s',
  *_ENERGY,
  'total_pj',
  'dram_bytes',
)
_SAME = ('m', 'k', 'n', 'recipe', 'weight_bits', 'activation_bits')


def add(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Records as one: sums, and rates weighted by what they are rates of.

  Utilization and conflicts weigh by cycles, `ebw` and outliers by weights.
  Widths and sizes are kept where all are equal.
  """
  out: dict[str, Any] = {}
  for name in _SAME:
    values = {record[name] for record in records}
    out[name] = values.pop() if len(values) == 1 else None
  weights = [r['k'] * r['n'] * r['count'] for r in records]
  cycles = [r['total_cycles'] for r in records]
  for name, by in (
    ('ebw', weights),
    ('outlier_blocks', weights),
    ('utilization', cycles),
    ('conflict_rate', cycles),
  ):
    pairs = zip(records, by, strict=True)
    out[name] = sum(r[name] * w for r, w in pairs) / sum(by)
  return out | {name: sum(r[name] for r in records) for name in _SUMS}


def grouped(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Matmuls that differ in numbers of their names only, as one record each.

  Examples:
    >>> import re
    >>> re.sub(r'(?<![^/])[0-9]+(?![^/])', '*', 'layers/3/mlp/up')
    'layers/*/mlp/up'
  """
  groups = collections.defaultdict(list)
  for record in records:
    pattern = re.sub(r'(?<![^/])\d+(?![^/])', '*', record['site'])
    groups[(pattern, *(record[name] for name in _SAME))].append(record)
  return [
    {'site': members[0]['site'] if len(members) == 1 else key[0]} | add(members)
    for key, members in groups.items()
  ]


class Priced(NamedTuple):
  """What one entry comes to."""

  label: str
  accelerator: str
  clock_ghz: float
  activation_bits: int
  sites: list[dict[str, Any]]
  total: dict[str, Any]
  defaults: tuple[str, ...]  # what was not said, e.g. ('rtn(bits=4)', 'A8')
  notes: tuple[str, ...]


def run(
  asked: Sequence[Request],
  model_name: str,
  *,
  options: Mapping[str, Any] | None = None,
  plan: Mapping[str, Recipe] | None = None,
  phase: str = 'prefill',
  batch: int = 1,
  context: int | None = None,
  activation_bits: int | None = None,
) -> tuple[Model, list[Priced]]:
  """Price a model by every entry.

  An entry's own recipe counts first, then the plan, then an artifact's own
  precision, then the recipe that the accelerator is made for.

  Args:
    asked: Entries, from `requests`.
    model_name: See `open_model`.
    options: Of all accelerators, as from `--set`.
    plan: Recipes by site.
    phase: 'prefill' or 'decode'.
    batch: Sequences or images.
    context: Tokens of a sequence.
    activation_bits: None takes that of each accelerator's `Default`.

  Returns:
    The model, and a result for each entry.

  Raises:
    ValueError, FileNotFoundError: for whatever can't be used, before any
      weight is quantized.
  """
  made = [design(request.accelerator, options) for request in asked]
  own = [r.recipe and make_recipe(r.recipe) for r in asked]
  if activation_bits is not None and activation_bits < 1:
    raise ValueError(f'--activation-bits {activation_bits}: needs at least 1')
  model = open_model(
    model_name,
    phase,
    batch=batch,
    context=context,
    named=plan or (),
  )
  if model.kind == 'packed':
    if plan or any(own):
      raise ValueError(
        f'{model_name}: is quantized already; its own precision is priced, '
        'leave out plan and recipe'
      )
  jobs = []
  planned = plan and assign(model, plan)
  for request, built, recipe in zip(asked, made, own, strict=True):
    width = activation_bits or built.default.activation_bits
    defaults = []
    if model.kind == 'packed':
      chosen = None
    elif recipe is not None:
      chosen = [recipe] * len(model.workload.names)
    elif plan:
      chosen = planned
    else:
      recipe = make_recipe(Named(built.default.recipe, built.default.options))
      chosen = [recipe] * len(model.workload.names)
      defaults.append(recipe.label)
    if activation_bits is None:
      defaults.append(f'A{width}')
    if chosen is not None:
      check(built, model, chosen, width)
    jobs.append((request, built, chosen, width, defaults))

  precisions = Precisions(model)
  results = []
  for request, built, chosen, width, defaults in jobs:
    if chosen is None:
      measured = precisions.packed(width)
    else:
      measured = precisions.of(chosen, width)
    try:
      records, total = price(built, model, measured)
    except ValueError as error:
      raise ValueError(f'{request.label}: {error}') from error
    results.append(
      Priced(
        request.label,
        built.name,
        built.clock_ghz,
        width,
        records,
        total,
        tuple(defaults),
        measured.notes,
      )
    )
  return model, results


def notes(model: Model, results: Sequence[Priced]) -> list[str]:
  """What a reader must know, each said once."""
  out = list(model.notes)
  if model.left_out:
    out.append(f'not priced: {", ".join(model.left_out)}')
  words = [f'{r.label}: {", ".join(r.defaults)}' for r in results if r.defaults]
  if words:
    out.append(f'by default: {"; ".join(words)}')
  seen: dict[str, list[str]] = {}
  for result in results:
    for note in result.notes:
      seen.setdefault(note, []).append(result.label)
  for note, labels in seen.items():
    everywhere = len(labels) == len(results)
    out.append(note if everywhere else f'{", ".join(labels)}: {note}')
  return out
