"""Many processes at one command: all compute alike, the first one writes."""

import contextlib
import hashlib
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator

import jax

from mq_jax import sharding

_FORM = '--distributed {!r}: needs HOST:PORT,PROCESS,PROCESSES or auto'


def join(text: str) -> None:
  """Join the other processes of a command; before anything is computed.

  Args:
    text: `HOST:PORT,PROCESS,PROCESSES`, the address of the first process, the
      number of this one from 0, and how many there are; or `auto` where JAX
      knows them itself (TPU pods, Slurm, Open MPI).

  Raises:
    ValueError: for a text of another form, or if they can't be joined.
  """
  if text == 'auto':
    arguments = ()
  else:
    address, *numbers = text.split(',')
    if len(numbers) != 2 or not all(n.isdecimal() for n in numbers):
      raise ValueError(_FORM.format(text))
    index, count = map(int, numbers)
    if not address.rpartition(':')[2].isdecimal() or index >= count:
      raise ValueError(_FORM.format(text))
    arguments = (address, count, index)
  try:
    jax.distributed.initialize(*arguments)
  except (ValueError, RuntimeError) as error:
    raise ValueError(f'--distributed {text!r}: {error}') from error
  if not sharding.is_first():  # one table is enough
    sys.stdout = open(os.devnull, 'w')


@contextlib.contextmanager
def folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """The folder that this process writes to.

  For the first process it is `path`. Each other one gets a copy of what is in
  it now, so that all of them go on from the same state, and throws it away.

  Raises:
    ValueError: if the processes see different files there.
  """
  path = pathlib.Path(path)
  if jax.process_count() == 1:
    yield path
    return
  with tempfile.TemporaryDirectory(prefix='mq-process-') as temporary:
    mine = path
    if not sharding.is_first():
      mine = pathlib.Path(temporary) / (path.name or 'out')
      if path.exists():
        shutil.copytree(path, mine, ignore=shutil.ignore_patterns('.lock'))
    # All must have said what they see before the first may write.
    seen = _digest(path)
    if sharding.agreed(seen) != seen:
      raise ValueError(
        f'{path}: process {jax.process_index()} sees other files there than '
        'the first; all processes need one file system for --out'
      )
    yield mine


def _digest(path: pathlib.Path) -> int:
  """Of names and sizes; 31 bits of it."""
  found = hashlib.sha256()
  for file in sorted(path.rglob('*')):
    if file.name != '.lock' and file.is_file():
      found.update(f'{file.relative_to(path)} {file.stat().st_size}\n'.encode())
  return int.from_bytes(found.digest()[:4], 'big') >> 1
