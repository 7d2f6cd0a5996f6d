"""Heat maps of sites: bits, errors, losses of one site alone."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mq_jax.report import maps, results
from mq_jax.report.documents import Block, Figure, Text
from mq_jax.report.sources import Bench, Group, Record


class _Column(NamedTuple):
  """A recipe or a plan: its sites' numbers, and its row of results."""

  values: dict[str, float]
  row: Record
  front: bool

  @property
  def mean(self) -> float:
    return math.fsum(self.values.values()) / len(self.values)


def bits(runs: Sequence[Group], benches: Sequence[Bench]) -> Iterator[Block]:
  """Effective bits of each site, a map for each model."""
  yield from _maps(
    runs, benches, 'ebw', 'effective bit width, ebw [bit/weight]'
  )


def errors(runs: Sequence[Group], benches: Sequence[Bench]) -> Iterator[Block]:
  """Errors of outputs; and of plans, losses of one site alone."""
  yield from _maps(
    runs,
    benches,
    'output_error',
    'squared error of the output, as share of its square',
    logarithmic=True,
  )
  yield from _maps(
    runs,
    benches,
    'alone',
    'loss if a site alone takes its recipe [nat/token]',
  )


def _maps(runs, benches, field, label, logarithmic=False) -> Iterator[Block]:
  models = dict.fromkeys(
    model for g in runs for s in g.sources for model, _ in s.sites
  )
  drawn = 0
  for model in models:
    if drawn == results.MOST_FIGURES:
      yield Text(
        f'Of {len(models)} models the first {drawn} with such numbers.'
      )
      return
    columns = _columns(runs, benches, model, field, logarithmic)
    if not columns:
      continue
    drawn += 1
    left = ''
    if len(columns) > maps.MOST_COLUMNS:
      left = (
        f' {maps.MOST_COLUMNS} of {len(columns)} columns, those of the front '
        'before others.'
      )
      columns.sort(key=lambda column: not column.front)
      columns = columns[: maps.MOST_COLUMNS]
    columns.sort(key=lambda column: column.mean)
    note = results.footnote([column.row for column in columns])
    name = model.rpartition('/')[2]
    yield Figure(
      maps.heat_map(
        dict(zip(_labels(columns), (column.values for column in columns))),
        label=label,
        title=name,
        footnote=note,
        logarithmic=logarithmic,
      ),
      f'{name}: {label}, by site. {note}.{left}',
    )


def _columns(runs, benches, model, field, positive) -> list[_Column]:
  """What is known of a model's sites: of quantized rows, means over seeds."""
  found, by_name = [], {group.name: group for group in runs}
  for bench in benches:
    if bench.model != model:
      continue
    front = {id(row) for row in results.front_of(bench.quantized)}
    for row in bench.quantized:
      group = by_name[row['runs']]
      values: dict[str, list[float]] = {}
      for source in group.sources:
        sites = source.sites.get((model, row['recipe']), {})
        for site, record in sites.items():
          value = record.get(field)
          if value is not None and (value > 0 or not positive):
            values.setdefault(site, []).append(value)
      if values:
        means = {s: math.fsum(v) / len(v) for s, v in values.items()}
        found.append(_Column(means, row, id(row) in front))
  return found


def _labels(columns: Sequence[_Column]) -> list[str]:
  """Recipes; of one recipe in several runs, each is named."""
  names = [column.row['recipe'] for column in columns]
  return [
    f'{name}, {column.row["runs"]}' if names.count(name) > 1 else name
    for name, column in zip(names, columns, strict=True)
  ]
