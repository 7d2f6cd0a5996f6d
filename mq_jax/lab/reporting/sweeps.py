"""Folders of `mq sweep`."""

import pathlib

from mq_jax.lab import files, listing
from mq_jax.lab.reporting import checks
from mq_jax.report import sweeps as report
from mq_jax.report.sources import Source

_OTHER = '; is it a sweep of another version of mq_jax?'
_WHAT = {
  'study': dict,
  'space': [dict],
  'sampler': str,
  'objectives': [str],
  'seed': int,
}
_ROW = {'trial': int, 'setting': dict, 'model': str, 'recipe': str}


def is_one(path: pathlib.Path) -> bool:
  """Whether a folder says that it is of `mq sweep`."""
  return (path / listing.SWEEP).is_file()


def read(path: pathlib.Path) -> Source:
  """A sweep, finished or not; each trial's rows are named by its setting.

  Raises:
    RunError: for damage, and for folders of other versions.
  """
  marker = path / listing.SWEEP
  begun = checks.read_json(marker)
  fields = {'sweep': str, 'name': str, 'texts': dict, 'versions': dict}
  checks.need(begun, str(marker), fields | {'what': dict}, missing=_OTHER)
  what = begun['what']
  checks.need(what, f'{marker}: what', _WHAT, missing=_OTHER)
  records = files.read_lines(path / 'results.jsonl')
  for number, record in enumerate(records, 1):
    where = f'{path / "results.jsonl"}:{number}'
    checks.need(record, where, _ROW, missing=_OTHER)
  from mq_jax.lab.sweeping import output  # optuna with it

  summaries = output.summaries(records, what['objectives'])
  done = sum(s['values'] is not None for s in summaries)
  total = begun.get('trials')
  finished = done == total
  words = [
    'finished' if finished else f'{done} of {total or "some"} trials',
    'running' if not finished and files.in_use(path) else '',
  ]
  config = path / 'config.gin'
  study = {k: v for k, v in what['study'].items() if k != 'rows'}
  space = {f'space.{axis["key"]}': _axis(axis) for axis in what['space']}
  text = ', '.join(begun['texts'])
  return Source(
    kind='sweep',
    name=path.name,
    path=str(path),
    state=', '.join(filter(None, words)),
    finished=finished,
    config=checks.flat(
      study
      | {k: what[k] for k in ('sampler', 'objectives', 'seed')}
      | {'texts': begun['texts'], 'versions': begun['versions']}
      | space
    ),
    operative=config.read_text('utf-8') if config.is_file() else '',
    facts={
      'config': f'{begun["name"]}',
      'commit': str((begun.get('git') or {}).get('commit', ''))[:8],
      'begun': str(begun.get('begun', ''))[:16].replace('T', ' '),
    },
    rows=tuple(_row(record, text) for record in records),
    report={
      'summaries': summaries,
      'objectives': what['objectives'],
      'logarithmic': output.logarithmic(what),
      'sampler': what['sampler'],
      'seed': what['seed'],
    },
  )


def _axis(axis: dict) -> str:
  """The values of an axis in words."""
  if axis['kind'] == 'choice':
    return ', '.join(
      ' '.join(map(report.shown, values)) for values in axis['values']
    )
  return f'{axis["kind"]} {axis["low"]:g} to {axis["high"]:g}'


def _row(record: dict, text: str) -> dict:
  setting = ', '.join(
    f'{name}={report.shown(value)}' for name, value in record['setting'].items()
  )
  return record | {
    'recipe': f'{record["recipe"]}: {setting}',
    'family': str(record.get('family', record['recipe'])),
    'status': str(record.get('status', 'ok')),
    'text': f'{record.get("tokens")} tokens, texts {text}',
  }
