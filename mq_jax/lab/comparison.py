"""Runs a study: every recipe on every model, one record a row."""

import contextlib
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from mq_jax import (
  activations,
  calibration,
  learn,
  plans,
  recipes,
  sites,
  streaming,
)
from mq_jax.lab import config, measure, opening, progress, runs
from mq_jax.models import decoder
from mq_jax.report import figures, style, tables

ARTIFACT = 'artifact'


def run(
  study: config.Study,
  path: pathlib.Path,
  *,
  operative: str,
  name: str,
  display: progress.Display,
) -> list[dict]:
  """Run a study in a folder, or what is missing of it.

  Args:
    study: What is compared.
    path: The run folder.
    operative: Config as gin text.
    name: Name of the config, for the figure.
    display: Where progress is shown.

  Returns:
    The records of all rows, in the study's order.

  Raises:
    RunError: if the folder is not this run's.
    ValueError, FileNotFoundError: if a model or text cannot be read. Errors
      of one row are its status instead.
  """
  text = measure.evaluation_text(study.text)
  calibration_text = measure.calibration_text(study.calibration_text)
  data = {
    'text': {'source': text.source, 'sha256': text.sha256},
    'calibration': {
      'source': calibration_text.source,
      'sha256': calibration_text.sha256,
    },
  }
  if not runs.is_run(path):
    check(study, text, calibration_text)
  with runs.open_run(
    path,
    study,
    operative=operative,
    data=data,
    device=f'{jax.default_backend()}: {jax.devices()[0].device_kind}',
    name=name,
  ) as folder:
    missing = folder.missing()
    total = len(study.models) * len(study.rows)
    if not missing:
      display.say(
        f'{path}: this run is finished; its {total} rows (--force does it '
        'again):',
        log=False,
      )
    elif len(missing) < total:
      display.say(f'{path}: {total - len(missing)} of {total} rows are there')
    with display.rows(total - len(missing), total):
      for model_name in study.models:
        rows = [row for m, row in missing if m == model_name]
        if rows:
          bench = Bench(model_name, study, text, calibration_text, display)
          for row in rows:
            keep = row.label == study.artifact and model_name == study.models[0]
            artifact = path / ARTIFACT if keep else None
            record, site_records = bench.row(row, artifact)
            folder.append(record, site_records)
            display.row_done()
            display.say(_line(record))
    records = folder.records()
    if missing:
      report(folder, records, name)
  return records


def check(
  study: config.Study, text: measure.Text, calibration_text: measure.Text
) -> None:
  """Raises if a model can't be opened or a text is too short for it.

  Reading a model twice costs little beside one row; a mistyped second name
  found after the first model's rows would cost them.
  """
  for name in study.models:
    model = opening.open_any(name, study.mesh)
    if has_packed(model.params):
      raise ValueError(f'{name}: is quantized already; compare plain models')
    for source in (text, calibration_text):
      measure.windows(model, source, 1)


def _line(record: dict[str, Any]) -> str:
  """A finished row in one line of log."""
  head = f'{record["model"]}  {record["recipe"]}'
  if runs.failed(record):
    return f'{head}: {record["status"]}'
  return (
    f'{head}: ebw {record["ebw"]:.3f}, bits_per_byte '
    f'{record["bits_per_byte"]:.4f}, {record["seconds"]:.1f} s + '
    f'{record["eval_seconds"]:.1f} s'
  )


def shown(records: list[dict]) -> list[dict]:
  """Records for people: folders of models by their last name, if that tells."""
  names = {r['model']: pathlib.Path(r['model']).name for r in records}
  if len(set(names.values())) < len(names):
    return records
  return [{**r, 'model': names[r['model']]} for r in records]


def report(folder: runs.RunFolder, records: list[dict], name: str) -> None:
  """Write tables and figure of records.

  Args:
    folder: Of the run.
    records: Its rows, not all of them perhaps.
    name: Of its config, for the figure.
  """
  study = folder.study
  footnote = f'{name} ({study.digest}), seed {study.seed}'
  folder.write('results.csv', tables.csv_text(records))
  records = shown(records)
  folder.write('results.md', tables.markdown(records))
  with contextlib.suppress(ValueError):  # every row failed: nothing to draw
    figure = figures.quality_over_bits(records, footnote=footnote)
    style.save(figure, folder.path / 'figure.png')


class Bench:
  """One model, ready for rows: its sites, statistics and windows."""

  def __init__(
    self,
    name: str,
    study: config.Study,
    text: measure.Text,
    calibration_text: measure.Text,
    display: progress.Display,
  ):
    self._study, self._display = study, display
    self.model = model = opening.open_any(name, study.mesh)
    self._name = name
    self._windows = measure.windows(model, text, study.windows)
    self.batches = batches = measure.calibration_batches(
      model,
      calibration_text,
      study.calibration_windows,
      study.batch,
      study.seed,
    )
    if study.generated_windows:
      display.say(f'{name}: writes {study.generated_windows} windows')
      batches += measure.generated_batches(
        model, study.generated_windows, batches[0], study.seed
      )
    self.sites = sites.find(model.apply, model.params, batches[0])
    start = time.perf_counter()
    self.statistics = calibration.calibrate(
      model.apply,
      model.params,
      batches,
      sites=self.sites,
      progress=display.steps(f'{name}: calibrating'),
    )
    jax.block_until_ready(self.statistics)
    seconds = time.perf_counter() - start
    tokens = sum(b.size for b in batches)
    display.say(f'{name}: calibrated on {tokens} tokens in {seconds:.1f} s')

  def row(
    self, row: config.Row, artifact: pathlib.Path | None
  ) -> tuple[dict[str, Any], list[dict]]:
    """The record of one row and those of its sites; never raises."""
    what = f'{self._name}: {row.label}'
    steps = self._display.steps

    def packed():
      recipe = recipes.make(row.name, **dict(row.options))
      return quantize(
        self.model,
        plans.uniform(self.sites, recipe),
        self.statistics,
        steps(what),
        self.batches,
      )

    return self.measured(row, packed, artifact)

  def measured(
    self,
    row: config.Row,
    quantized: Callable[[], tuple[dict, float]],
    artifact: pathlib.Path | None = None,
  ) -> tuple[dict[str, Any], list[dict]]:
    """The record of one row and those of its sites; never raises.

    Args:
      row: The row.
      quantized: Gives the packed parameters and the seconds they took; what
        it raises is the row's status.
      artifact: Where to keep them, if at all.
    """
    record: dict[str, Any] = {
      'model': self._name,
      'recipe': row.label,
      'family': row.name,
      'bits': dict(row.options).get('bits'),
      **dict.fromkeys(('ebw', 'ebw_paper', 'nll', 'perplexity')),
      **dict.fromkeys(('bits_per_byte', 'tokens', 'bytes')),
      **dict.fromkeys(('seconds', 'eval_seconds')),
      'options': dict(row.options),
      'status': 'ok',
    }
    site_records: list[dict] = []
    what = f'{self._name}: {row.label}'
    try:
      packed, seconds = quantized()
      record['seconds'] = round(seconds, 3)
      size = plans.size(packed)
      record['ebw'] = float(size.ebw)
      record['ebw_paper'] = float(size.ebw_paper)
      record |= _activation_bits(packed)
      if record['bits'] is None:
        # Neither none nor fineq has the option: the width of a slot.
        recipe = recipes.make(row.name, **dict(row.options))
        record['bits'] = getattr(recipe.rows, 'bits', int(size.ebw_paper))
      site_records = [_finite(r) for r in plans.records(packed)]
      start = time.perf_counter()
      record |= measure.scores(
        self.model,
        packed,
        self._windows,
        self._study.batch,
        self._display.steps(f'{what}: evaluating'),
      )
      record['eval_seconds'] = round(time.perf_counter() - start, 3)
      record['status'] = measure.status_of(site_records)
      if artifact is not None:
        # Before its row is: a row that is there has its artifact.
        opening.save_artifact(artifact, self.model, packed, overwrite=True)
    except Exception as error:  # the other rows are not to be lost
      lines = str(error).strip().splitlines() or ['']
      record['status'] = f'failed: {type(error).__name__}: {lines[0]}'[:300]
    return record, site_records


def _activation_bits(packed: Any) -> dict[str, float]:
  """Mean over inputs of all sites, scales counted; nothing where plain."""
  found = plans.matrices(packed).values()
  if all(matrix.inputs is None for matrix in found):
    return {}
  bits = lambda m, k: 16 if m.inputs is None else m.inputs.bits_per_element(k)
  sizes = [matrix.shape[-2] for matrix in found]
  total = sum(k * bits(matrix, k) for matrix, k in zip(found, sizes))
  return {'activation_bits': float(total) / sum(sizes)}


def _finite(record: dict[str, Any]) -> dict[str, Any]:
  """A record that JSON can hold: None for what is not a finite number."""
  lost = lambda x: isinstance(x, float) and not math.isfinite(x)
  return {k: None if lost(v) else v for k, v in record.items()}


def quantize(
  model: opening.LanguageModel,
  plan: plans.Plan,
  statistics: Any,
  step: Callable[..., None] | None = None,
  batches: Sequence[Any] = (),
  coverage: plans.Coverage = plans.COVERED,
  inputs: str = 'quantized',
) -> tuple[dict, float]:
  """Weights of the model by a plan; and the seconds it took.

  The time includes compilation, which rows of equal program share: the first
  of them pays it.

  Args:
    model: Not quantized yet.
    plan: Recipes of its sites, which may have activations.
    statistics: From `calibrate`; not looked at where recipes are learned.
    step: Called with the matrices done and their number.
    batches: What it was calibrated on, for recipes with activations.
    coverage: What becomes of matrices that calibration hardly reached.
    inputs: Of blocks that are learned, see `learn.reconstruct`.
  """
  start = time.perf_counter()
  if learn.options_of(plan) is not None:
    packed = _learned(model, plan, step, batches, coverage, inputs)
    return packed, time.perf_counter() - start
  params, chosen = model.params, None
  acting = [r.activations for _, r in plan.entries if r.activations is not None]
  if acting:
    if any(options.fold for options in acting):
      kinds = opening.channel_pairs(model)
      # Of keys both sides are outputs: no input is smoothed by them.
      pairs = [p for kind, ps in kinds.items() if kind != 'key' for p in ps]
      params, entries, statistics = activations.fold(
        params, pairs, plan.entries, statistics
      )
      plan = plans.Plan(entries)
    chosen, statistics = activations.prepare(
      model.apply, params, plan.entries, batches, statistics
    )
  packed = plans.compress(
    params,
    plan,
    statistics=statistics,
    inputs=chosen,
    coverage=coverage,
    progress=step,
  )
  jax.block_until_ready(jax.tree.leaves(packed))
  return packed, time.perf_counter() - start


def _learned(model, plan, step, batches, coverage, inputs) -> dict:
  """Weights that are learned, from the same calibration data."""
  f = model.apply
  if learn.options_of(plan).scope == 'block':
    if isinstance(model, opening.Network):
      raise ValueError(
        f'learning: a {model.architecture} is not learned by blocks; use scope '
        "'model' or 'site'"
      )
    f = decoder.parts(model.config)
    blocks = streaming.of_params(f, model.params)
    found = streaming.find_sites(blocks, batches[0])
    plan = plans.named({site.name: r for site, r in plan.entries}, found)
  for _, recipe in plan.entries:
    if recipe.activations is not None and recipe.activations.fold:
      raise ValueError(f'{recipe.label}: what is folded is not learned')
  as_tuple = lambda batch: batch if isinstance(batch, tuple) else (batch,)
  examples = tuple(map(np.concatenate, zip(*map(as_tuple, batches))))
  return learn.reconstruct(
    f,
    model.params,
    plan,
    examples,
    inputs=inputs,
    coverage=coverage,
    batch=len(examples[0]) // len(batches),
    progress=step,
  ).params


def has_packed(params: Any) -> bool:
  """Whether some of the parameters are packed matrices."""
  return bool(plans.records(params))
