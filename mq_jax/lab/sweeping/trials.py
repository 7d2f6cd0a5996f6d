"""Carries out settings: those that differ in numbers together, in a program."""

import collections
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mq_jax import plans, recipes
from mq_jax.lab import comparison, config, measure, progress
from mq_jax.lab.sweeping import space as space_lib
from mq_jax.lab.sweeping import spec, stacking

# Models with their statistics that are kept open, for spaces that calibrate
# anew.
_BENCHES = 2

# Results of rows that the space does not change, kept for the next setting.
_KEPT = 64


@dataclasses.dataclass
class _Job:
  """A row of one model, wanted by one setting or more."""

  row: config.Row
  recipe: recipes.Recipe | None
  wanted: list[tuple[int, int]]  # (setting, place among its records)


class Runner:
  """Carries out settings of a sweep; keeps models, programs and counts."""

  def __init__(self, sweep: spec.Sweep, display: progress.Display):
    self._sweep, self._display = sweep, display
    self._benches: collections.OrderedDict[Any, comparison.Bench] = (
      collections.OrderedDict()
    )
    self._kept: collections.OrderedDict[Any, dict] = collections.OrderedDict()
    self._programs = stacking.programs()
    self._settings = 0
    known = [*(sweep.design or ()), *sweep.corners]
    made = {_key(row): row for s in known for row in sweep.study(s).rows}
    self._vary = stacking.varying([_make(row) for row in made.values()])
    self._members = collections.Counter(
      stacking.structure(_make(row)) for row in made.values()
    )

  def served(self) -> dict[str, int]:
    """Programs compiled for stacked settings, and settings they served."""
    return {
      'programs': stacking.programs() - self._programs,
      'settings': self._settings,
    }

  def run(
    self, settings: Sequence[space_lib.Setting]
  ) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Records of settings, each as soon as it has all of them.

    Args:
      settings: Any of the sweep's.

    Yields:
      The number of a setting and its records, one a model and row.
    """
    studies = [self._sweep.study(setting) for setting in settings]
    records: list[dict[int, dict]] = [{} for _ in studies]
    whole = [len(s.models) * len(s.rows) for s in studies]
    benches: dict[Any, list[int]] = {}
    for i, study in enumerate(studies):
      benches.setdefault(_bench_key(study), []).append(i)
    for members in benches.values():
      for m, model in enumerate(studies[members[0]].models):
        jobs = self._jobs(studies, members, m)
        for job, record in self._do(studies[members[0]], model, jobs):
          for i, place in job.wanted:
            records[i][place] = record
            if len(records[i]) == whole[i]:
              yield i, [records[i][p] for p in sorted(records[i])]

  def _jobs(
    self, studies: Sequence[config.Study], members: Sequence[int], m: int
  ) -> list[_Job]:
    """Rows of some settings, equal ones once."""
    jobs: dict[str, _Job] = {}
    for i in members:
      rows = studies[i].rows
      for r, row in enumerate(rows):
        job = jobs.setdefault(_key(row), _Job(row, _make(row), []))
        job.wanted.append((i, m * len(rows) + r))
    return list(jobs.values())

  def _do(
    self, study: config.Study, model: str, jobs: Sequence[_Job]
  ) -> Iterator[tuple[_Job, dict[str, Any]]]:
    """Records of rows of one model, one after the other."""
    where = _bench_key(study)
    groups: dict[Any, list[_Job]] = {}
    for job in jobs:
      kept = self._kept.get((where, model, _key(job.row)))
      if kept is not None:
        yield job, kept
      else:
        groups.setdefault(stacking.structure(job.recipe), []).append(job)
    for structure, members in groups.items():
      bench = self._bench(study, model)
      vary = self._vary.get(structure, frozenset())
      size = self._size(bench, members[0].recipe)
      for start in range(0, len(members), size):
        chunk = members[start : start + size]
        for job, record in self._chunk(bench, model, chunk, vary, size):
          self._keep((where, model, _key(job.row)), record)
          yield job, record

  def _size(self, bench: comparison.Bench, recipe: recipes.Recipe) -> int:
    """Settings that a program is made for, whatever is done together."""
    if not stacking.stackable(recipe):
      return 1
    most = self._sweep.at_once
    if self._sweep.design is not None:
      most = min(most, self._members[stacking.structure(recipe)])
    return stacking.most_at_once(bench.model.params, bench.sites, recipe, most)

  def _chunk(
    self,
    bench: comparison.Bench,
    model: str,
    chunk: Sequence[_Job],
    vary: frozenset[int],
    size: int,
  ) -> Iterator[tuple[_Job, dict[str, Any]]]:
    what = f'{model}: {chunk[0].row.name}'
    if len(chunk) > 1:
      what += f', {len(chunk)} settings'
    start, failure, packed = time.perf_counter(), None, []
    step = self._display.steps(what)
    given = [job.recipe for job in chunk]
    try:
      if stacking.stackable(given[0]):
        packed = stacking.compress_stacked(
          bench.model.params,
          bench.sites,
          given,
          statistics=bench.statistics,
          vary=vary,
          size=size,
          progress=step,
        )
        self._settings += len(chunk)
      else:
        packed = [
          comparison.quantize(
            bench.model,
            plans.uniform(bench.sites, given[0]),
            bench.statistics,
            step,
            bench.batches,
          )[0]
        ]
    except Exception as error:  # the other settings are not to be lost
      failure = error
    seconds = (time.perf_counter() - start) / len(chunk)
    for i, job in enumerate(chunk):

      def quantized(i=i):
        if failure is not None:
          raise failure
        return packed[i], seconds

      record, sites = bench.measured(job.row, quantized)
      for name in ('weight_mse', 'output_error'):
        found = [s[name] for s in sites if s.get(name) is not None]
        record[name] = sum(found) / len(found) if found else None
      record['stacked'] = len(chunk)
      if packed:
        packed[i] = None  # codes that are measured make room
      yield job, record

  def _bench(self, study: config.Study, model: str) -> comparison.Bench:
    key = (_bench_key(study), model)
    if key in self._benches:
      self._benches.move_to_end(key)
    else:
      if len(self._benches) >= _BENCHES:
        self._benches.popitem(last=False)
      self._benches[key] = comparison.Bench(
        model,
        study,
        measure.evaluation_text(study.text),
        measure.calibration_text(study.calibration_text),
        self._display,
      )
    return self._benches[key]

  def _keep(self, key: Any, record: dict[str, Any]) -> None:
    self._kept[key] = record
    if len(self._kept) > _KEPT:
      self._kept.popitem(last=False)


def _make(row: config.Row) -> recipes.Recipe:
  return recipes.make(row.name, **dict(row.options))


def _key(row: config.Row) -> str:
  """What tells rows apart, options that are lists too."""
  return json.dumps([row.label, row.name, row.options])


def _bench_key(study: config.Study) -> str:
  """What studies on the same models, texts and windows have in common."""
  data: Mapping[str, Any] = study.as_dict()
  return json.dumps(
    {k: v for k, v in data.items() if k not in ('rows', 'artifact')},
    sort_keys=True,
  )
