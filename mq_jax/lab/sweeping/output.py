"""What a sweep writes and says: all of it drawn from its records."""

import contextlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box, table, text

from mq_jax.lab import files
from mq_jax.lab.sweeping import ledger, spec
from mq_jax.report import style, tables
from mq_jax.report import sweeps as report

RESULTS = 'results.jsonl'

Record = Mapping[str, Any]


def summaries(
  records: Sequence[Record], objectives: Sequence[str]
) -> list[dict[str, Any]]:
  """One a trial: its setting and objectives, see `report.sweeps`."""
  trials: dict[int, list[Record]] = {}
  for record in records:
    trials.setdefault(record['trial'], []).append(record)
  return [
    {
      'trial': index,
      'setting': rows[0]['setting'],
      'values': ledger.values_of(rows, objectives),
      'status': next((r['status'] for r in rows if r['status'] != 'ok'), 'ok'),
    }
    for index, rows in trials.items()
  ]


def line(index: int, sweep: spec.Sweep, records: Sequence[Record]) -> str:
  """A finished trial in one line of log."""
  setting = ', '.join(
    f'{name}={report.shown(value)}'
    for name, value in records[0]['setting'].items()
  )
  values = ledger.values_of(records, sweep.objectives)
  if values is None:
    bad = next(r['status'] for r in records if r['status'] != 'ok')
    return f'trial {index}  {setting}: {bad}'
  found = zip(sweep.objectives, values)
  said = ', '.join(f'{name} {value:.5g}' for name, value in found)
  return f'trial {index}  {setting}: {said}'


def write(
  folder: pathlib.Path,
  what: Mapping[str, Any],
  records: Sequence[Record],
  name: str,
) -> None:
  """Write results of the trials so far: JSONL, CSV, Markdown, figure.

  Each is whole at any moment, so it can be read while the sweep runs.

  Args:
    folder: Of the sweep.
    what: The sweep as plain data, `spec.Sweep.as_dict`.
    records: Of its finished trials.
    name: Of its config, for the figure.
  """
  objectives = what['objectives']
  lines = ''.join(json.dumps(r, allow_nan=False) + '\n' for r in records)
  files.write_whole(folder / RESULTS, lines)
  flat = [
    {'trial': r['trial'], **r['setting'], **_without(r, 'setting')}
    for r in records
  ]
  names = list(dict.fromkeys(k for r in flat for k in r))
  files.write_whole(folder / 'results.csv', tables.csv_text(flat, names))
  found = summaries(records, objectives)
  files.write_whole(folder / 'results.md', report.markdown(found, objectives))
  with contextlib.suppress(ValueError):  # every trial failed: nothing to draw
    drawn = report.figure(
      found,
      objectives,
      logarithmic(what),
      footnote=f'{name}, {what["sampler"]}, seed {what["seed"]}',
    )
    style.save(drawn, folder / 'figure.png')


def logarithmic(what: Mapping[str, Any]) -> list[str]:
  """Names that a sweep, as plain data, spreads by their logarithm."""
  return [n for a in what['space'] if a['kind'] == 'log' for n in a['names']]


def _without(record: Record, *names: str) -> dict[str, Any]:
  return {k: v for k, v in record.items() if k not in names}


def best_table(
  found: Sequence[Mapping[str, Any]], objectives: Sequence[str], most: int = 12
) -> table.Table:
  """The best trials, or those of the front, for `rich.print`."""
  chosen = report.front(found)
  title = f'front of {len(chosen)} among {len(found)} trials'
  if len(objectives) == 1:
    done = [s for s in found if s['values'] is not None]
    chosen = sorted(done, key=lambda s: s['values'])
    title = f'best of {len(found)} trials'
  out = table.Table(
    title=title, title_justify='left', box=box.SIMPLE_HEAD, pad_edge=False
  )
  names = list(dict.fromkeys(n for s in chosen for n in s['setting']))
  for heading in ('trial', *names, *objectives):
    out.add_column(text.Text(heading), justify='right', overflow='fold')
  for s in chosen[:most]:
    setting = [report.shown(s['setting'].get(n)) for n in names]
    cells = [str(s['trial']), *setting, *(f'{x:.5g}' for x in s['values'])]
    out.add_row(*map(text.Text, cells))
  if len(chosen) > most:
    out.caption = f'and {len(chosen) - most} more, see results.md'
  return out


def served_line(served: Sequence[Mapping[str, int]]) -> str:
  """How many settings the compiled programs served."""
  programs = sum(s['programs'] for s in served)
  settings = sum(s['settings'] for s in served)
  if not programs:
    return ''
  where = f' in {len(served)} processes' if len(served) > 1 else ''
  return (
    f'{settings} settings were quantized by {programs} compiled programs'
    f'{where}, one a shape of matrix'
  )
