"""Where trials are kept, who holds them, and whether he still lives.

Optuna stores; what it leaves open is settled by locks that the system frees
when their holder dies, however it dies: of files for the journal, of sessions
for PostgreSQL. So a trial of a killed process is known to be lost at once,
and one of a slow process is never taken from it.
"""

import contextlib
import hashlib
import importlib.util
import os
import pathlib
import uuid
from collections.abc import Iterator
from typing import Any, Protocol

import optuna

from mq_jax.lab import runs

JOURNAL, _CLAIMS, _WORKERS = 'journal.log', '.claims.lock', '.workers'


class Storage(Protocol):
  """What a sweep needs of its storage.

  Attributes:
    optuna: The storage as Optuna takes it.
    single: Whether it is of one study only.
    owner: Name of this process, which no other has.
    shown: What to call it, without passwords.
  """

  optuna: Any
  single: bool
  owner: str
  shown: str

  def exclusive(self) -> contextlib.AbstractContextManager[None]:
    """While open, no other process is in its own."""

  def alive(self, owner: str) -> bool:
    """Whether the process of that name still runs."""

  def close(self) -> None:
    """Give everything back."""


class _FileLock:
  """A lock of the system on a file; Optuna's own outlive their holder."""

  def __init__(self, path: pathlib.Path, heal: pathlib.Path | None = None):
    self._path, self._heal, self._file = path, heal, None

  def acquire(self) -> bool:
    self._file = _lock(self._path, wait=True)
    if self._heal is not None:
      _cut_torn(self._heal)
    return True

  def release(self) -> None:
    self._file.close()


def _lock(path: pathlib.Path, wait: bool):
  """An open file that holds the lock until it is closed, or None."""
  import fcntl

  file = open(path, 'a')
  try:
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
  except BlockingIOError:
    file.close()
    return None
  return file


def _cut_torn(path: pathlib.Path) -> None:
  """Cut off a last line that its writer was killed in."""
  with open(path, 'r+b') as file:
    end = file.seek(0, os.SEEK_END)
    at, tail = end, b''
    while at > 0 and b'\n' not in tail:
      at = max(0, at - 65536)
      file.seek(at)
      tail = file.read(end - at)
    whole = at + tail.rfind(b'\n') + 1
    if whole != end:
      file.truncate(whole)


class Journal:
  """Optuna's journal in the run folder, for processes of one machine."""

  single = True

  def __init__(self, folder: pathlib.Path):
    self.owner = uuid.uuid4().hex
    self._folder = folder
    path = folder / JOURNAL
    self.shown = str(path)
    self._workers = folder / _WORKERS
    self._workers.mkdir(exist_ok=True)
    self._mine = _lock(self._workers / self.owner, wait=False)
    path.touch()
    backend = optuna.storages.journal.JournalFileBackend(
      str(path), lock_obj=_FileLock(folder / '.journal.lock', heal=path)
    )
    try:
      self.optuna = optuna.storages.JournalStorage(backend)
    except (ValueError, KeyError, TypeError) as error:
      self.close()
      raise runs.RunError(f'{path}: not a journal: {error}') from error

  @contextlib.contextmanager
  def exclusive(self) -> Iterator[None]:
    lock = _FileLock(self._folder / _CLAIMS)
    lock.acquire()
    try:
      yield
    finally:
      lock.release()

  def alive(self, owner: str) -> bool:
    path = self._workers / owner
    if owner == self.owner:
      return True
    if not path.exists():
      return False
    lock = _lock(path, wait=False)
    if lock is None:
      return True
    path.unlink(missing_ok=True)
    lock.close()
    return False

  def close(self) -> None:
    (self._workers / self.owner).unlink(missing_ok=True)
    self._mine.close()


class Postgres:
  """A PostgreSQL database, for processes of many machines.

  Its locks are those of sessions: the server frees them when it loses the
  connection, of a machine that vanished after a minute of silence.
  """

  single = False

  def __init__(self, url: str):
    import sqlalchemy
    from sqlalchemy import exc

    self.owner = uuid.uuid4().hex
    try:
      parsed = sqlalchemy.make_url(url)
      self.shown = parsed.render_as_string(hide_password=True)
      if parsed.get_backend_name() != 'postgresql':
        raise ValueError('not a postgresql:// address')
      parsed = _with_driver(parsed)
      connect = {'connect_timeout': 10}
      self._engine = sqlalchemy.create_engine(
        parsed, connect_args=connect, isolation_level='AUTOCOMMIT'
      )
      self._session = self._engine.connect()
      for name, value in (('idle', '20'), ('interval', '10'), ('count', '4')):
        option = f'tcp_keepalives_{name}'
        self._ask('SELECT set_config(:o, :v, false)', o=option, v=value)
      self._ask('SELECT pg_advisory_lock(:k)', k=_key(self.owner))
      # Tables are made once, whoever is first.
      with self.exclusive():
        found = optuna.storages.RDBStorage(
          parsed.render_as_string(hide_password=False),
          engine_kwargs={'connect_args': connect},
        )
    except ModuleNotFoundError as error:
      raise runs.RunError(
        f"--storage: {error}; pip install 'mq_jax[postgresql]'"
      ) from error
    except exc.ArgumentError as error:
      raise runs.RunError(f'--storage: not an address: {error}') from error
    except ValueError as error:
      raise runs.RunError(
        f'--storage {self.shown}: {error}; leave it out for a journal in the '
        'run folder'
      ) from error
    except (exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as e:
      lines = str(getattr(e, 'orig', None) or e).strip().splitlines()
      raise runs.RunError(
        f'--storage {self.shown}: cannot be used: {lines[0]}'
      ) from e
    self.optuna = found

  def _ask(self, statement: str, **values: Any) -> Any:
    import sqlalchemy

    return self._session.execute(sqlalchemy.text(statement), values).scalar()

  @contextlib.contextmanager
  def exclusive(self) -> Iterator[None]:
    key = _key('mq sweep')
    self._ask('SELECT pg_advisory_lock(:k)', k=key)
    try:
      yield
    finally:
      self._ask('SELECT pg_advisory_unlock(:k)', k=key)

  def alive(self, owner: str) -> bool:
    key = _key(owner)
    if owner == self.owner:
      return True
    if not self._ask('SELECT pg_try_advisory_lock(:k)', k=key):
      return True
    self._ask('SELECT pg_advisory_unlock(:k)', k=key)
    return False

  def close(self) -> None:
    self._session.close()
    self._engine.dispose()
    self.optuna.remove_session()
    self.optuna.engine.dispose()


def _with_driver(parsed: Any) -> Any:
  """An address with the driver that is installed, where it names none."""
  if parsed.drivername != 'postgresql':
    return parsed
  known = ('psycopg', 'psycopg2')
  there = [name for name in known if importlib.util.find_spec(name)]
  driver = there[0] if there else known[-1]
  return parsed.set(drivername=f'postgresql+{driver}')


def _key(text: str) -> int:
  """A lock of PostgreSQL is named by a number of 64 bits."""
  digest = hashlib.sha256(text.encode()).digest()
  return int.from_bytes(digest[:8], 'big', signed=True)


def open_storage(url: str | None, folder: pathlib.Path) -> Storage:
  """A database by its address, or the journal of a folder for None.

  Raises:
    RunError: if it can't be reached or is none; in one line.
  """
  optuna.logging.set_verbosity(optuna.logging.ERROR)
  return Journal(folder) if url is None else Postgres(url)


def shown(url: str | None) -> str | None:
  """An address without its password; raises nothing, whatever it is."""
  if url is None:
    return None
  import sqlalchemy
  from sqlalchemy import exc

  try:
    return sqlalchemy.make_url(url).render_as_string(hide_password=True)
  except exc.ArgumentError:
    return url
