"""Reports of prices: JSON, tables, figure."""

import itertools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from mq_jax.lab.costing.models import Model
from mq_jax.lab.costing.pricing import Priced, grouped, notes
from mq_jax.report import hardware as hardware_report
from mq_jax.report import style, tables


def as_json(
  model: Model, results: Sequence[Priced], phase: str, batch: int
) -> dict[str, Any]:
  """Everything as plain data, from which tables and figures are drawn."""
  entries = []
  for result in results:
    common = {'entry': result.label, 'clock_ghz': result.clock_ghz}
    entries.append(
      common
      | {
        'accelerator': result.accelerator,
        'activation_bits': result.activation_bits,
        'total': common | result.total,
        'sites': [common | record for record in result.sites],
      }
    )
  return {
    'model': model.name,
    'phase': phase,
    'batch': batch,
    'context': model.context,
    'notes': notes(model, results),
    'entries': entries,
  }


def _subject(report: Mapping[str, Any]) -> str:
  """What was priced, in words."""
  words = [report['model'], report['phase'], f'batch {report["batch"]}']
  if report['context'] is None:  # images
    del words[1]
  elif report['phase'] == 'prefill':
    words[-1] += f' x {report["context"]} tokens'
  return ', '.join(words)


_FILES = ('cost.json', 'cost.csv', 'cost.png')


def check_target(folder: str | os.PathLike) -> None:
  """Refuse a folder that can't be written, or one of another's files.

  Raises:
    ValueError: if it is a file, or holds anything but an earlier cost.
  """
  path = pathlib.Path(folder)
  if path.exists() and not path.is_dir():
    raise ValueError(f'{path}: is a file; --out needs a folder')
  others = [
    p.name
    for p in (path.iterdir() if path.is_dir() else ())
    if p.name not in _FILES
  ]
  if others:
    raise ValueError(
      f'{path}: holds other files ({", ".join(sorted(others)[:3])}); --out '
      'needs a new folder, or one of an earlier mq cost'
    )


def figure(report: Mapping[str, Any]) -> Any:
  """Where it goes: bars of sites, or of entries where there are several."""
  entries = report['entries']
  if len(entries) > 1:
    return hardware_report.where_it_goes(
      [entry['total'] for entry in entries],
      label='entry',
      in_time=True,
      title=_subject(report),
      footnote='\n'.join(report['notes']),
    )
  (entry,) = entries
  return hardware_report.where_it_goes(
    grouped(entry['sites']),
    title=f'{_subject(report)}, on {entry["entry"]}',
    footnote='\n'.join(
      [hardware_report.sentence(entry['total']), *report['notes']]
    ),
  )


def write(folder: str | os.PathLike, report: Mapping[str, Any]) -> None:
  """Write cost.json, cost.csv (sites and totals) and cost.png."""
  path = pathlib.Path(folder)
  path.mkdir(parents=True, exist_ok=True)
  text = json.dumps(report, indent=1, allow_nan=False)
  (path / 'cost.json').write_text(text + '\n')
  rows = []
  for entry in report['entries']:
    rows += [*entry['sites'], {**entry['total'], 'site': 'total'}]
  names = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
  (path / 'cost.csv').write_text(tables.csv_text(rows, names))
  style.save(figure(report), path / 'cost.png')


def show(
  report: Mapping[str, Any], folder: str | os.PathLike | None = None
) -> None:
  """Print tables, totals and notes."""
  from rich import console

  out = console.Console()
  say = lambda text: out.print(text, markup=False, highlight=False)
  say(_subject(report))
  entries = report['entries']
  if len(entries) == 1:
    total = entries[0]['total']
    rows = grouped(entries[0]['sites'])
    say(f'{entries[0]["entry"]}, {total["recipe"] or "several recipes"}')
    out.print(hardware_report.sizes_table(rows, total))
    out.print(hardware_report.cycles_table(rows, total))
    out.print(hardware_report.energy_table(rows, total))
    say(hardware_report.sentence(total))
  else:
    totals = [entry['total'] for entry in entries]
    out.print(hardware_report.comparison_table(totals))
    out.print(hardware_report.cycles_table(totals, label='entry'))
    out.print(hardware_report.energy_table(totals, label='entry'))
  for note in report['notes']:
    say(f'- {note}')
  if folder is not None:
    out.print(
      f'written to {folder}', markup=False, highlight=False, soft_wrap=True
    )
