"""Run folders: what a run has finished is on disk, once, and stays there.

A folder belongs to one run, named by the digest of its study; every finished
row is a line of `results.jsonl`, written before the next one begins. The same
run started again adds the rows that are missing. A folder that holds anything
else is refused, never overwritten.
"""

import contextlib
import datetime
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

from mq_jax.lab import config, files

# What rows depend on: a run continues only where these are as they were.
LIBRARIES = ('mq_jax', 'jax', 'jaxlib', 'flax', 'numpy', 'tokenizers')
_ALSO = ('optax', 'orbax-checkpoint', 'scipy', 'gin-config', 'safetensors')

# Makes a folder a run's.
MARKER = 'versions.json'
_RESULTS, _SITES = 'results.jsonl', 'sites.jsonl'


RunError, locked = files.RunError, files.locked


def versions() -> dict[str, str]:
  """Versions of Python and of the libraries that a result depends on."""
  found = {'python': platform.python_version()}
  for name in (*LIBRARIES, *_ALSO):
    try:
      found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      found[name] = 'not installed'
  return found


def git_state(folder: pathlib.Path) -> dict[str, Any] | None:
  """Commit of the checkout that `folder` is in, and whether it was changed."""
  command = ['git', '-C', str(folder)]
  run = lambda *arguments: subprocess.run(
    [*command, *arguments], capture_output=True, text=True, timeout=10
  )
  try:
    head = run('rev-parse', 'HEAD')
    changed = run('status', '--porcelain')
  except (OSError, subprocess.TimeoutExpired):
    return None
  if head.returncode or changed.returncode:
    return None
  return {'commit': head.stdout.strip(), 'changed': bool(changed.stdout)}


def default_folder(
  path: str | pathlib.Path, study: config.Study
) -> pathlib.Path:
  """`runs/<config>-<digest>`: equal studies meet in one folder."""
  return pathlib.Path('runs') / f'{pathlib.Path(path).stem}-{study.digest}'


class RunFolder:
  """The folder of one run, opened by `open_run`."""

  def __init__(self, path: pathlib.Path, study: config.Study):
    self.path, self.study = path, study

  def records(self) -> list[dict]:
    """Finished rows in the study's order, the last try of each."""
    found = {
      _key(r): r for r in files.read_lines(self.path / _RESULTS, torn=True)
    }
    return [found[key] for key in _keys(self.study) if key in found]

  def missing(self) -> list[tuple[str, config.Row]]:
    """Rows to do: those without a record and those that failed."""
    done = {_key(r) for r in self.records() if not failed(r)}
    return [
      (model, row)
      for model in self.study.models
      for row in self.study.rows
      if (model, row.label) not in done
    ]

  def append(self, record: Mapping[str, Any], sites: Sequence[Mapping]) -> None:
    """Add a finished row; its sites first, so that no row lacks them."""
    tag = {'model': record['model'], 'recipe': record['recipe']}
    files.append(self.path / _SITES, [{**tag, **site, **tag} for site in sites])
    files.append(self.path / _RESULTS, [record])

  def write(self, name: str, text: str) -> None:
    """Write a file of the run, whole or not at all."""
    files.write_whole(self.path / name, text)


def is_run(path: pathlib.Path) -> bool:
  """Whether a folder claims to be that of a run."""
  return (path / MARKER).exists()


def read(path: pathlib.Path) -> tuple[dict[str, Any], RunFolder]:
  """How a run was begun, and its folder as it is; nothing is written.

  Raises:
    RunError: if it is no run, or can't be read.
  """
  begun = _read_begun(path)
  try:
    data = begun['study']
    rows = tuple(
      config.Row(r['label'], r['name'], tuple((k, v) for k, v in r['options']))
      for r in data['rows']
    )
    study = config.Study(
      **{**data, 'models': tuple(data['models']), 'rows': rows}
    )
  except (ValueError, KeyError, TypeError) as error:
    raise RunError(f'{path / MARKER}: not of a run: {error}') from None
  return begun, RunFolder(path, study)


def set_aside(path: pathlib.Path) -> pathlib.Path:
  """Give a run's folder another name; its own is free then.

  Returns:
    The new name: that of the folder with `.before-1`, or the next free number.

  Raises:
    RunError: if a process is at it.
  """
  with locked(path):
    number = 1
    while os.path.lexists(path.with_name(f'{path.name}.before-{number}')):
      number += 1
    return path.rename(path.with_name(f'{path.name}.before-{number}'))


def failed(record: Mapping[str, Any]) -> bool:
  """Whether a row ended without a result."""
  return str(record.get('status', '')).startswith('failed')


@contextlib.contextmanager
def open_run(
  path: pathlib.Path,
  study: config.Study,
  *,
  operative: str,
  data: Mapping[str, Any],
  device: str,
  name: str | None = None,
) -> Iterator[RunFolder]:
  """Begin a run in an empty or new folder, or continue the same run.

  Args:
    path: The folder.
    study: What is run.
    operative: The operative config as gin text, kept beside the results.
    data: What identifies the texts (digests, versions).
    device: What computes, by name.
    name: Of the config, for figures drawn again.

  Yields:
    The folder, locked against a second process.

  Raises:
    RunError: if the folder holds another run or anything else, is in use, or
      the same run was begun with other libraries, data or device and is not
      finished.
  """
  begun = {
    'run': study.digest,
    'config': name,
    'study': study.as_dict(),
    'versions': versions(),
    'device': device,
    'seed': study.seed,
    'git': git_state(pathlib.Path(__file__).parent),
    'data': dict(data),
    'begun': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
  }
  if not is_run(path):
    files.check_new(path, 'a run', {'config.gin'})
  path.mkdir(parents=True, exist_ok=True)
  with locked(path):
    folder = RunFolder(path, study)
    if (path / MARKER).exists():
      _check_same(path, begun, conditions=False)
      files.drop_torn(path / _RESULTS)
      if folder.missing():
        _check_same(path, begun, conditions=True)
        _keep_sites(folder)
    else:
      folder.write('config.gin', operative)
      # Last of the two: it makes the folder a run.
      folder.write(MARKER, json.dumps(begun, indent=1) + '\n')
    yield folder


def _key(record: Mapping[str, Any]) -> tuple[str, str]:
  return str(record.get('model')), str(record.get('recipe'))


def _keys(study: config.Study) -> list[tuple[str, str]]:
  return [(model, row.label) for model in study.models for row in study.rows]


def _check_same(
  path: pathlib.Path, begun: Mapping[str, Any], *, conditions: bool
) -> None:
  """Refuses another study; if rows are still to be added, other conditions."""
  there = _read_begun(path)
  if there.get('run') != begun['run']:
    names = _differences(there['study'], begun['study'])
    raise RunError(
      f'{path}: holds another run ({there.get("run")}, this one is '
      f'{begun["run"]}); they differ in {", ".join(names)}; nothing was '
      'written; choose another folder with --out'
    )
  if not conditions:
    return
  differences = [
    f'{name} {there["versions"].get(name)} (now {begun["versions"][name]})'
    for name in LIBRARIES
    if there['versions'].get(name) != begun['versions'][name]
  ]
  if there['data'] != begun['data']:
    differences.append(
      'other texts: ' + ', '.join(_differences(there['data'], begun['data']))
    )
  if there['device'] != begun['device']:
    differences.append(f'{there["device"]} (now {begun["device"]})')
  if differences:
    raise RunError(
      f'{path}: this run was begun with {"; ".join(differences)}; rows would '
      'not compare; choose another folder with --out'
    )


def _read_begun(path: pathlib.Path) -> dict[str, Any]:
  try:
    there = json.loads((path / MARKER).read_text('utf-8'))
    there['study'], there['versions'], there['data'], there['device']  # noqa: B018
  except FileNotFoundError:
    raise RunError(f'{path}: is not the folder of a run') from None
  except (ValueError, KeyError, TypeError) as error:
    raise RunError(f'{path / MARKER}: not of a run: {error}') from None
  return there


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
  return sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))


def _keep_sites(folder: RunFolder) -> None:
  """Drop site records of rows that will be done again."""
  path = folder.path / _SITES
  files.drop_torn(path)
  done = {_key(r) for r in folder.records() if not failed(r)}
  kept = [r for r in files.read_lines(path) if _key(r) in done]
  if path.exists():
    folder.write(_SITES, ''.join(json.dumps(r) + '\n' for r in kept))
