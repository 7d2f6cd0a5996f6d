"""What was asked of a run and what was said, in the run's own folder.

command.json   the command, the folder it was given in, the code's state
log.txt        every line that was shown, with times
"""

import contextlib
import datetime
import json
import os
import pathlib
import socket
import time
from collections.abc import Sequence
from typing import Any

from mq_jax.lab import files, runs

COMMAND, _LOG = 'command.json', 'log.txt'


class Journal:
  """Writes both, from when the folder is a run's: before it may be refused.

  Times are those of the clock, which may be set back, and seconds since the
  process began, which never fall.
  """

  def __init__(self, folder: pathlib.Path, marker: str, argv: Sequence[str]):
    """
    Args:
      folder: Of the run.
      marker: A file in it that makes it a run's.
      argv: The command.
    """
    self._folder, self._marker, self._argv = folder, marker, list(argv)
    self._start = time.perf_counter()
    self._begun = _now()
    self._waiting = [self._line(f'mq {json.dumps(self._argv)}')]
    self._said = False

  def note(self, message: str) -> None:
    """Add a line."""
    self._said = True
    self._waiting.append(self._line(message))
    self.flush()

  def flush(self) -> None:
    """Write what waits, once something was said and the folder is there."""
    if not (self._said and self._waiting):
      return
    if not (self._folder / self._marker).exists():
      return
    if not (self._folder / COMMAND).exists():
      asked = {
        'command': self._argv,
        'directory': os.getcwd(),
        'begun': self._begun,
        'host': socket.gethostname(),
        'git': runs.git_state(pathlib.Path(__file__).parent),
      }
      files.write_whole(
        self._folder / COMMAND, json.dumps(asked, indent=1) + '\n'
      )
    # Results are not given up for the log: where the disk is full, they say so.
    with contextlib.suppress(OSError):
      with open(self._folder / _LOG, 'a', encoding='utf-8') as file:
        file.write(''.join(self._waiting))
    self._waiting = []

  def __enter__(self) -> 'Journal':
    return self

  def __exit__(self, kind, error, traceback) -> None:
    if error is not None and self._said:
      self.note(f'stopped by {kind.__name__}: {error}')

  def _line(self, message: str) -> str:
    seconds = time.perf_counter() - self._start
    return f'{_now()} +{seconds:.1f}s  {message}\n'


def _now() -> str:
  return datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')


def read_command(folder: pathlib.Path) -> dict[str, Any] | None:
  """What `command.json` of a folder holds; None if there is none.

  Raises:
    RunError: if it can't be read.
  """
  path = folder / COMMAND
  try:
    found = json.loads(path.read_text('utf-8'))
    found['command'][0], found['directory'] + ''  # noqa: B018
  except FileNotFoundError:
    return None
  except (ValueError, KeyError, IndexError, TypeError) as error:
    raise files.RunError(f'{path}: not of a run: {error}') from None
  return found
