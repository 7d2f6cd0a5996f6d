"""Folders of `mq run`."""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from mq_jax.lab import files, runs
from mq_jax.lab.reporting import checks
from mq_jax.report.sources import Source

_NUMBERS = dict.fromkeys(
  ('ebw', 'ebw_paper', 'nll', 'perplexity', 'bits_per_byte', 'tokens')
  + ('seconds',),
  checks.MAYBE,
)
_SITE = {'site': str, 'ebw': checks.MAYBE, 'output_error': checks.MAYBE}
_OTHER = '; is it a run of another version of mq_jax?'

Key = tuple[str, str]  # model, label of the recipe


def is_one(path: pathlib.Path) -> bool:
  """Whether a folder says that it is of `mq run`."""
  return (path / runs.MARKER).is_file()


def read(path: pathlib.Path) -> Source:
  """A run, finished or not.

  Raises:
    RunError: for damage, and for records that are not of this run.
  """
  begun = _begun(path / runs.MARKER)
  study = begun['study']
  keys = [(m, row['label']) for m in study['models'] for row in study['rows']]
  rows = _rows(path / 'results.jsonl', dict.fromkeys(keys))
  failed = sum(row['status'].startswith('failed') for row in rows.values())
  config = path / 'config.gin'
  missing = len(keys) - len(rows)
  words = [
    'finished' if not missing else f'{len(rows)} of {len(keys)} rows',
    'running' if missing and files.in_use(path) else '',
    f'{failed} failed' if failed else '',
  ]
  text = _text_of(begun, rows)
  git = begun.get('git') or {}
  return Source(
    kind='run',
    name=path.name,
    path=str(path),
    state=', '.join(filter(None, words)),
    finished=not missing,
    config=_config(begun),
    operative=config.read_text('utf-8') if config.is_file() else '',
    facts={
      'config': ' '.join(filter(None, (begun.get('config'), begun['run']))),
      'commit': str(git.get('commit', ''))[:8]
      + (' changed' if git.get('changed') else ''),
      'begun': str(begun.get('begun', ''))[:16].replace('T', ' '),
    },
    # In the study's order, as the run itself shows them.
    rows=tuple(rows[key] | {'text': text(key)} for key in keys if key in rows),
    sites=_sites(path / 'sites.jsonl', rows, keys),
  )


def _begun(path: pathlib.Path) -> dict[str, Any]:
  begun = checks.read_json(path)
  fields = {'run': str, 'study': dict, 'versions': dict, 'device': str}
  checks.need(begun, str(path), fields | {'data': dict}, missing=_OTHER)
  checks.need(
    begun['study'],
    f'{path}: study',
    {'models': list, 'rows': list, 'windows': int, 'seed': int},
    missing=_OTHER,
  )
  for row in begun['study']['rows']:
    where = f'{path}: study.rows'
    checks.need(row, where, {'label': str, 'name': str}, missing=_OTHER)
  return begun


def _config(begun: Mapping[str, Any]) -> dict[str, Any]:
  study = dict(begun['study'])
  recipes = [
    ' '.join([row['label'], *_unsaid(row)]) for row in study.pop('rows')
  ]
  texts = {'text': 'text', 'calibration_text': 'calibration'}
  return checks.flat(
    study
    | {
      name: checks.text_name(begun['data'].get(x)) for name, x in texts.items()
    }
    | {'recipes': recipes}
    | {name: begun[name] for name in ('versions', 'device')}
  )


def _unsaid(row: Mapping[str, Any]) -> list[str]:
  """Options of a row, in brackets if its label does not begin as its recipe.

  Two runs may give one label to different recipes.
  """
  if row['label'].startswith(row['name']):
    return []
  options = ', '.join(f'{k}={v}' for k, v in row.get('options', ()))
  return [f'({row["name"]}: {options})']


def _lines(path: pathlib.Path) -> Iterator[tuple[str, dict]]:
  """Records, each with its 'file:line'; not what is still being written."""
  for number, record in enumerate(files.read_lines(path, torn=True), 1):
    yield f'{path}:{number}', record


def _rows(path: pathlib.Path, known: Mapping[Key, Any]) -> dict[Key, dict]:
  """The last try of each row."""
  found = {}
  for where, record in _lines(path):
    key = _key(where, record, known)
    status = {'status': str(record.get('status', 'ok'))}
    checks.need(record, where, _NUMBERS)
    family = str(record.get('family', record['recipe']))
    found[key] = record | status | {'family': family}
  return found


def _key(where: str, record: dict, known: Mapping[Key, Any]) -> Key:
  checks.need(record, where, {'model': str, 'recipe': str})
  key = record['model'], record['recipe']
  if key not in known:
    raise files.RunError(
      f'{where}: a record of {key[0]}, {key[1]}, which this run does not '
      f'have ({runs.MARKER} lists what it has); are records of two runs mixed?'
    )
  return key


def _text_of(begun: Mapping[str, Any], rows: Mapping[Key, dict]):
  """What the loss of a row was measured on, in words."""
  text = checks.text_name(begun['data'].get('text'))
  tokens = {key[0]: row['tokens'] for key, row in rows.items() if row['tokens']}

  def words(key: Key) -> str:
    count = tokens.get(key[0])
    much = (
      f'{count} tokens' if count else f'{begun["study"]["windows"]} windows'
    )
    return f'{much} of {text}'

  return words


def _sites(path, rows, keys) -> dict[Key, dict[str, dict]]:
  """Sites of finished rows, by row; of a row done twice the last."""
  known, found = dict.fromkeys(keys), {}
  for where, record in _lines(path):
    key = _key(where, record, known)
    checks.need({'output_error': None} | record, where, _SITE)
    if key in rows:
      # Only what is drawn: of hundreds of runs there are many.
      found.setdefault(key, {})[record['site']] = {
        'ebw': record['ebw'],
        'output_error': record.get('output_error'),
      }
  return found
