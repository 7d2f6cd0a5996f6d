"""The folder of an allocation: what is done is on disk, and stays there.

    state/setup.json    the fingerprint: all that the result depends on
    state/solved.json   choices and losses found so far
    state/NAME-NUMBER/  arrays by Orbax: the table, the state of the search
    report.json         the finished result; plan.json and others beside it

Files and folders are written beside their place and renamed, and of arrays
the newest two are kept: a kill at any moment leaves a good state.
"""

import contextlib
import json
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mq_jax.lab import files, listing

REPORT = 'report.json'
_STATE = 'state'
_KEPT = 2


class Folder:
  """A folder opened by `open_folder`."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    self._orbax = None

  def write(self, name: str, text: str) -> None:
    """Write a file, whole or not at all."""
    files.write_whole(self.path / name, text)

  def write_json(self, name: str, data: Any) -> None:
    self.write(name, json.dumps(data, indent=1, allow_nan=False) + '\n')

  def read_json(self, name: str) -> Any:
    """A file of the folder; None if there is none."""
    return _read(self.path / name)

  def save_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Keep arrays under a name; older ones go once these are there.

    Args:
      name: Without a '-'.
      arrays: By plain keys.
    """
    newest = next(iter(self._steps(name)), None)
    step = 0 if newest is None else int(newest.name.rpartition('-')[2]) + 1
    target = self.path / _STATE / f'{name}-{step:08d}'
    checkpointer = self._checkpointer()
    checkpointer.save(target.absolute(), dict(arrays))
    checkpointer.wait_until_finished()
    for old in self._steps(name)[_KEPT:]:
      shutil.rmtree(old)

  def load_arrays(self, name: str) -> dict[str, np.ndarray] | None:
    """The newest arrays of a name that can be read; None if there are none."""
    for path in self._steps(name):
      # Whatever zarr, OCDBT or Orbax run into: the one before will do.
      with contextlib.suppress(Exception):
        return {
          key: np.asarray(value)
          for key, value in self._checkpointer()
          .restore(path.absolute())
          .items()
        }
      shutil.rmtree(path)
    return None

  def _steps(self, name: str) -> list[pathlib.Path]:
    """Folders of a name, newest first; numbered as they were saved."""
    found = (self.path / _STATE).glob(f'{name}-*')
    return sorted(
      (p for p in found if p.name.rpartition('-')[2].isdigit()), reverse=True
    )

  def _checkpointer(self):
    if self._orbax is None:
      import orbax.checkpoint as ocp  # late: a second of imports

      self._orbax = ocp.StandardCheckpointer()
    return self._orbax

  def close(self) -> None:
    if self._orbax is not None:
      self._orbax.close()
      self._orbax = None


def _read(path: pathlib.Path) -> Any:
  try:
    return json.loads(path.read_text('utf-8'))
  except FileNotFoundError:
    return None
  except ValueError as error:
    raise ValueError(f'{path}: not JSON: {error}') from None


def check(path: pathlib.Path, setup: Mapping[str, Any] | None = None) -> bool:
  """Refuse a folder that is not this allocation's; nothing is written.

  Args:
    path: The folder.
    setup: The fingerprint; None looks only whether it is an allocation's.

  Returns:
    Whether the allocation was begun there.

  Raises:
    ValueError: if it holds anything else, or another setup, with what
      differs.
  """
  there = _read(path / listing.ALLOCATION) if path.is_dir() else None
  if there is None:
    files.check_new(path, 'an allocation', {_STATE}, inside=_STATE)
    return False
  if setup is not None:
    files.check_same(path, there, setup)
  return True


@contextlib.contextmanager
def open_folder(
  path: pathlib.Path, setup: Mapping[str, Any]
) -> Iterator[Folder]:
  """Begin an allocation in a new folder, or continue the same one.

  Yields:
    The folder, locked against a second process.

  Raises:
    ValueError: as `check`, or if another process is at it.
  """
  check(path, setup)
  state = path / _STATE
  path.mkdir(parents=True, exist_ok=True)
  with files.locked(path):
    state.mkdir(exist_ok=True)
    folder = Folder(path)
    if not check(path, setup):
      folder.write_json(listing.ALLOCATION, dict(setup))
    for torn in state.glob('*orbax-checkpoint-tmp*'):
      shutil.rmtree(torn)
    try:
      yield folder
    finally:
      folder.close()
