"""Folders of `mq allocate`."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

from mq_jax.lab import files
from mq_jax.lab.reporting import checks
from mq_jax.report import allocation
from mq_jax.report.sources import Source

_REPORT, _SETUP = 'report.json', 'state/setup.json'
_OTHER = (
  '; it was made by another version of mq allocate: make it again, in another '
  'folder'
)


def is_one(path: pathlib.Path) -> bool:
  """Whether a folder says that it is of `mq allocate`."""
  return (path / _REPORT).is_file() or (path / _SETUP).is_file()


def read(path: pathlib.Path) -> Source:
  """An allocation, finished or not.

  Raises:
    RunError: for damage, and for folders of other versions.
  """
  if (path / _REPORT).is_file():
    report = _report(path / _REPORT)
    setup = report['setup']
  else:
    report, setup = None, checks.read_json(path / _SETUP)
    checks.need(setup, str(path / _SETUP), {'model': str}, missing=_OTHER)
  rows, sites = ((), {}) if report is None else _results(report)
  return Source(
    kind='allocate',
    name=path.name,
    path=str(path),
    state='finished' if report else _state(path),
    finished=report is not None,
    config=_config(setup),
    rows=rows,
    sites=sites,
    report=report,
  )


def _state(path: pathlib.Path) -> str:
  return 'searching' if files.in_use(path) else 'stopped while searching'


def _config(setup: Mapping[str, Any]) -> dict[str, Any]:
  """Without the windows that the seed chose."""
  texts = {
    name: f'{checks.text_name(text)}, {text.get("windows")} windows'
    for name, text in (setup.get('texts') or {}).items()
  }
  return checks.flat(setup | {'texts': texts})


_POINT = {'costs': dict, 'test': checks.MAYBE}
_FIELDS = {
  **{'model': str, 'solver': str, 'seed': int, 'steps': int},
  'budgets': [
    {'quantity': str, 'asked': str, 'limit': float, 'achieved': float}
    | {'room': float}
  ],
  'achieved': dict,
  'loss': dict.fromkeys(
    ('search', 'test', 'unquantized_search', 'unquantized_test'), checks.MAYBE
  ),
  'sites': [
    {'site': str, 'label': str, 'ebw': float}
    | dict.fromkeys(
      ('alone', 'cheaper_loss', 'cheaper_saves', 'dearer_loss', 'dearer_takes'),
      checks.MAYBE,
    )
  ],
  'front': [_POINT | {'solver': str, 'asked': bool}],
  'uniform': [_POINT | {'candidate': str}],
  'seconds': dict,
  'setup': {'texts': {'search': {'windows': int}, 'test': {'windows': int}}},
  'notes': [str],
}
_SCORES = {
  **dict.fromkeys(('nll', 'perplexity', 'bits_per_byte'), float),
  **{'tokens': int, 'bytes': int},
}


def _report(path: pathlib.Path) -> dict[str, Any]:
  """What tables and figures ask for, checked."""
  report = checks.read_json(path)
  checks.need(report, str(path), _FIELDS, missing=_OTHER)
  if report.get('scores') is not None:
    checks.need(report, str(path), {'scores': _SCORES}, missing=_OTHER)
  known = set(allocation.LOOKS)
  quantities = {b['quantity'] for b in report['budgets']}
  for point in report['front']:
    if point['solver'] not in known:
      raise files.RunError(
        f'{path}: front: no solver {point["solver"]!r}{_OTHER}'
      )
  for point in (*report['front'], *report['uniform']):
    numbers = dict.fromkeys(sorted(quantities | {'ebw'}), float)
    checks.need(point['costs'], f'{path}: costs', numbers, missing=_OTHER)
  if not report['budgets'] or not report['sites']:
    raise files.RunError(f'{path}: has no budgets or no sites{_OTHER}')
  return report


def _results(report: Mapping[str, Any]) -> tuple[tuple, dict]:
  """Rows and sites: the plan, uniform candidates, the model as it is."""
  scores, model = report['scores'], report['model']
  test = report['setup']['texts']['test']
  much = (
    f'{scores["tokens"]} tokens' if scores else f'{test["windows"]} windows'
  )
  where = {
    'model': model,
    'text': f'{much} of {checks.text_name(test)}',
  }
  asked = ', '.join(
    f'{b["quantity"]} <= {b["asked"]}' for b in report['budgets']
  )
  plan = f'plan, {asked}'
  rows = [
    where
    | _row(
      'unquantized', 'none', None, report['loss']['unquantized_test'], scores
    ),
    where
    | _row(plan, 'plan', report['achieved'].get('ebw'), None, scores)
    | {'seconds': sum(report['seconds'].values())}
    | (scores or {'status': 'failed: its loss is not finite'}),
  ]
  for point in report['uniform']:
    name, loss = point['candidate'], point['test']
    row = _row(name, name.split()[0], point['costs']['ebw'], loss, scores)
    rows.append(where | row)
  sites = {
    (model, plan): {
      r['site']: {'ebw': r['ebw'], 'alone': r['alone']} for r in report['sites']
    }
  }
  return tuple(rows), sites


def _row(recipe, family, ebw, nll, scores) -> dict[str, Any]:
  """A row as `mq run` has it; bits per byte follow from the loss."""
  row = dict.fromkeys(('bits', 'ebw_paper', 'perplexity', 'bits_per_byte'))
  row |= dict(recipe=recipe, family=family, ebw=ebw, nll=nll, seconds=None)
  row['status'] = 'ok'
  if nll is not None:
    row['perplexity'] = math.exp(min(nll, 700.0))
    if scores:
      per_byte = scores['tokens'] / scores['bytes']
      row['bits_per_byte'] = nll * per_byte / math.log(2)
  return row
