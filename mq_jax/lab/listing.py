"""What run folders there are, what state they are in, what came out.

Only files are read, no model is opened, and nothing is written: a folder may
be in use.
"""

import dataclasses
import datetime
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from mq_jax.lab import files, journal, runs

# Runs lie in a folder, those of a sweep in one of its folders.
_DEPTH = 3

# Make a folder an allocation's, a sweep's, an artifact to be, an artifact.
ALLOCATION, SWEEP = 'state/setup.json', 'sweep.json'
STREAM = 'stream.json'
_ARTIFACT = 'manifest.json'


@dataclasses.dataclass(frozen=True)
class Entry:
  """One run folder.

  Attributes:
    path: The folder.
    kind: compare, allocate, sweep, artifact or quantize (one to be).
    state: finished, running, interrupted, failed, damaged; idle where it is
      not known how much there is to do.
    done: Rows, solvers or trials that are there.
    total: As many as there will be; None if that is not known.
    when: When it was begun, as ISO 8601; of an artifact, when it was written.
    what: The config, or the model.
    best: The best result in words.
  """

  path: pathlib.Path
  kind: str
  state: str
  done: int
  total: int | None
  when: str
  what: str
  best: str

  def as_dict(self) -> dict[str, Any]:
    return {**dataclasses.asdict(self), 'path': str(self.path)}


def find(folder: pathlib.Path) -> list[Entry]:
  """Run folders in a folder, or itself if it is one; oldest first.

  Raises:
    FileNotFoundError, NotADirectoryError: if there is no such folder.
  """
  if not folder.exists():
    raise FileNotFoundError(f'{folder}: no such folder')
  if not folder.is_dir():
    raise NotADirectoryError(f'{folder}: is not a folder')
  return sorted(_find(folder, _DEPTH), key=lambda e: (e.when, str(e.path)))


def _find(folder: pathlib.Path, depth: int) -> Iterator[Entry]:
  entry = describe(folder)
  if entry is not None:
    yield entry
  elif depth:
    with os.scandir(folder) as inside:
      names = sorted(e.name for e in inside if e.is_dir())
    for name in names:
      if not name.startswith('.'):
        yield from _find(folder / name, depth - 1)


def kind_of(folder: pathlib.Path) -> str | None:
  """compare, allocate, sweep, ...; None if it is no run folder."""
  if (folder / SWEEP).is_file():
    return 'sweep'
  if (folder / ALLOCATION).is_file():
    return 'allocate'
  for name, kind in (
    (runs.MARKER, 'compare'),
    (_ARTIFACT, 'artifact'),
    (STREAM, 'quantize'),
  ):
    if (folder / name).is_file():
      return kind
  return None


def describe(folder: pathlib.Path) -> Entry | None:
  """A folder's entry; None if it is no run folder."""
  kind = kind_of(folder)
  if kind is None:
    return None
  describers: dict[str, Callable[[pathlib.Path], Entry]] = {
    'compare': _compare,
    'allocate': _allocate,
    'sweep': _sweep,
    'artifact': _artifact,
    'quantize': _quantize,
  }
  try:
    return describers[kind](folder)
  except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
    lines = str(error).splitlines() or ['']
    return Entry(folder, kind, 'damaged', 0, None, '', '', lines[0])


def _state(folder: pathlib.Path, finished: bool, failures: int = 0) -> str:
  if files.in_use(folder):
    return 'running'
  if not finished:
    return 'interrupted'
  return 'failed' if failures else 'finished'


def _read(path: pathlib.Path) -> Any:
  return json.loads(path.read_text('utf-8'))


def _written(path: pathlib.Path) -> str:
  """When a file was last written, as ISO 8601."""
  time = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC)
  return time.isoformat(timespec='seconds')


def _compare(folder: pathlib.Path) -> Entry:
  begun, run = runs.read(folder)
  records = run.records()
  failures = sum(map(runs.failed, records))
  total = len(run.study.models) * len(run.study.rows)
  finished = len(records) == total
  good = [
    r for r in records if r['bits_per_byte'] is not None and r['ebw'] < 16
  ]
  best = ''
  if good:
    row = min(good, key=lambda r: (r['bits_per_byte'], r['ebw']))
    best = (
      f'{row["bits_per_byte"]:.4f} bits/byte, ebw {row["ebw"]:.2f}: '
      f'{row["recipe"]}'
    )
  return Entry(
    folder,
    'compare',
    _state(folder, finished, failures),
    len(records) - failures,
    total,
    begun['begun'],
    begun.get('config') or ', '.join(run.study.models),
    best,
  )


def _allocate(folder: pathlib.Path) -> Entry:
  setup = _read(folder / ALLOCATION)
  report, best = None, ''
  if (folder / 'report.json').exists():
    report = _read(folder / 'report.json')
    budget, loss = report['budgets'][0], report['loss']
    rise = loss['test'] - loss['unquantized_test']
    best = (
      f'test loss {rise:+.4f} at {budget["quantity"]} '
      f'{budget["achieved"]:.4g}: {setup["model"]} {report["solver"]}'
    )
  solved = folder / 'state' / 'solved.json'
  done = _read(solved)['solvers'] if solved.exists() else {}
  asked = journal.read_command(folder)
  return Entry(
    folder,
    'allocate',
    _state(folder, report is not None),
    len(done),
    len(setup['solvers']),
    asked['begun'] if asked else _written(folder / ALLOCATION),
    setup['model'],
    best,
  )


def _artifact(folder: pathlib.Path) -> Entry:
  manifest = _read(folder / _ARTIFACT)
  totals = manifest['totals']
  recipes = sorted({entry['recipe'] for entry in manifest['packed']})
  return Entry(
    folder,
    'artifact',
    'finished',
    len(manifest['packed']),
    len(manifest['packed']),
    _written(folder / _ARTIFACT),
    str(manifest['model'].get('name') or '-'),
    f'{totals["nbytes"]} bytes, ebw {totals["ebw"]:.3f}: {", ".join(recipes)}',
  )


def _quantize(folder: pathlib.Path) -> Entry:
  setup = _read(folder / STREAM)
  done = files.read_lines(folder / 'blocks.jsonl', torn=True)
  return Entry(
    folder,
    'quantize',
    _state(folder, False),
    len(done),
    setup['blocks'],
    _written(folder / STREAM),
    setup['model'],
    '',
  )


def _sweep(folder: pathlib.Path) -> Entry:
  begun = _read(folder / SWEEP)
  records = files.read_lines(folder / 'results.jsonl')
  good = {r['trial'] for r in records} - {
    r['trial'] for r in records if runs.failed(r)
  }
  total = begun.get('trials')
  objective, best = begun['what']['objectives'][0], ''
  rows = [r for r in records if r['trial'] in good and r.get(objective)]
  if rows:
    row = min(rows, key=lambda r: r[objective])
    setting = ', '.join(
      f'{k}={v:.4g}' if isinstance(v, float) else f'{k}={v}'
      for k, v in row['setting'].items()
    )
    best = f'{objective} {row[objective]:.4f}: {setting}'
  state = _state(folder, len(good) == total)
  if total is None and state == 'interrupted':
    state = 'idle'
  return Entry(
    folder,
    'sweep',
    state,
    len(good),
    total,
    begun['begun'],
    begun['name'],
    best,
  )
