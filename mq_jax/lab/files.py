"""Files that survive a kill and a full disk, and a lock on their folder."""

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

# Who only looks whether a folder is in use holds its lock for an instant.
_PATIENCE_S = 0.3


class RunError(ValueError):
  """The run folder cannot be used; the message is one line for the user."""


def write_whole(path: pathlib.Path, text: str) -> None:
  """Write a file, whole or not at all."""
  part = path.with_name(f'.{path.name}.part')
  try:
    with open(part, 'w', encoding='utf-8') as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.replace(part, path)
  except OSError as error:
    with contextlib.suppress(OSError):
      part.unlink()
    raise _about(path, error) from error


def append(path: pathlib.Path, records: Sequence[Mapping[str, Any]]) -> None:
  """Add lines of JSON: all of them, or none where the disk is full.

  A kill tears at most the last of them; see `drop_torn`.
  """
  lines = ''.join(json.dumps(r, allow_nan=False) + '\n' for r in records)
  left = memoryview(lines.encode())
  try:
    with open(path, 'ab', buffering=0) as file:
      before = file.tell()
      try:
        while left:
          left = left[file.write(left) :]
        os.fsync(file.fileno())
      except OSError:
        with contextlib.suppress(OSError):
          file.truncate(before)
        raise
  except OSError as error:
    raise _about(path, error) from error


def _about(path: pathlib.Path, error: OSError) -> OSError:
  """The error with the name of the file; a failing write has none."""
  return OSError(error.errno, error.strerror, str(path))


def drop_torn(path: pathlib.Path) -> None:
  """Cut off a last line that was not written to its end."""
  if path.exists():
    content = path.read_bytes()
    whole = content.rfind(b'\n') + 1
    if whole != len(content):
      with open(path, 'r+b') as file:
        file.truncate(whole)


def read_lines(path: pathlib.Path, *, torn: bool = False) -> list[dict]:
  """Records of a file of lines; none if there is no file.

  Args:
    path: The file.
    torn: Leave out a last line that has no end: it is being written.

  Raises:
    RunError: for a line that is no record, with its number.
  """
  try:
    lines = path.read_bytes().split(b'\n')
  except FileNotFoundError:
    return []
  records = []
  for number, line in enumerate(lines, 1):
    if not line or (torn and number == len(lines)):
      continue
    try:
      record = json.loads(line.decode('utf-8'))
    except ValueError as error:
      raise _damaged(path, number, error) from None
    if not isinstance(record, dict):
      raise _damaged(path, number, 'not a record')
    records.append(record)
  return records


def _damaged(path: pathlib.Path, number: int, why: object) -> RunError:
  return RunError(
    f'{path}:{number}: damaged ({why}); nothing was changed; mend the line, or '
    'delete it and its row is done again'
  )


def check_writable(path: str | os.PathLike) -> None:
  """Refuse a folder that cannot be made or written, before any work.

  Raises:
    PermissionError: naming what is in the way.
  """
  place = pathlib.Path(path).absolute()
  while not os.path.lexists(place):
    place = place.parent
  effective = os.access in os.supports_effective_ids
  if place.is_dir() and not os.access(
    place, os.W_OK | os.X_OK, effective_ids=effective
  ):
    raise PermissionError(
      f'{path}: {place} cannot be written; choose another folder with --out'
    )


def check_new(
  path: pathlib.Path,
  what: str,
  early: Collection[str],
  inside: str | None = None,
) -> None:
  """Refuse a folder with files of something else; nothing is written.

  Args:
    path: Not there, empty, or begun by a process killed in its first instant.
    what: That is to be put there, 'a run'.
    early: Names that such a process leaves, beside the lock and parts of files.
    inside: One of them that is a folder, and holds no others.

  Raises:
    RunError: naming a file that is not of it.
  """
  if not os.path.lexists(path):
    return
  if not path.is_dir():
    raise RunError(f'{path}: is not a folder')
  names = {p.name for p in path.iterdir()}
  others = names - {*early, '.lock'} if '.lock' in names else names
  if inside is not None and (path / inside).is_dir():
    others |= {p.name for p in (path / inside).iterdir()}
  others = sorted(name for name in others if not name.endswith('.part'))
  if others:
    raise RunError(
      f'{path}: holds files that are not of {what} ({others[0]}, ...); nothing '
      'was written; choose another folder with --out'
    )


def check_same(
  path: pathlib.Path, there: Mapping[str, Any], now: Mapping[str, Any]
) -> None:
  """Refuse a folder that was begun with another setup.

  Args:
    path: The folder.
    there: The setup it was begun with, plain data.
    now: The setup it is to be continued with.

  Raises:
    RunError: naming what differs.
  """
  differences = differ(there, now)
  if differences:
    raise RunError(
      f'{path}: was begun with another setup: {"; ".join(differences)}; '
      'nothing was written; choose another folder with --out'
    )


def differ(there: Any, now: Any, name: str = '') -> list[str]:
  """What differs between two fingerprints, one phrase each.

  Examples:
    >>> differ({'seed': 0, 'texts': {'a': 1}}, {'seed': 1, 'texts': {'a': 1}})
    ['seed 0 (now 1)']
  """
  if isinstance(there, Mapping) and isinstance(now, Mapping):
    return [
      phrase
      for key in dict.fromkeys((*there, *now))
      for phrase in differ(
        there.get(key), now.get(key), f'{name}.{key}' if name else key
      )
    ]
  if there == now:
    return []
  short = lambda x: x if len(x) <= 40 else f'{x[:36]} ...'
  words = [
    short(x if isinstance(x, str) else json.dumps(x)) for x in (there, now)
  ]
  if words[0] == words[1]:  # they differ further on
    return [name]
  return [f'{name} {words[0]} (now {words[1]})']


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
  """Keep a second process out; the system frees the lock of a killed one."""
  try:
    import fcntl
  except ImportError:  # not on Windows, where nobody is kept out
    yield
    return
  with open(path / '.lock', 'w') as file:
    patient = time.monotonic() + _PATIENCE_S
    while True:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        break
      except OSError:
        if time.monotonic() > patient:
          raise RunError(f'{path}: another process is at this run') from None
      time.sleep(0.02)
    yield


def in_use(path: pathlib.Path) -> bool:
  """Whether a process holds the lock of a folder; nothing is written."""
  try:
    import fcntl

    with open(path / '.lock') as file:
      fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
  except (ImportError, FileNotFoundError):
    return False
  except OSError:
    return True
  return False
