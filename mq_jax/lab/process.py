"""What holds for the whole process of a command: compile cache, NaNs, trace."""

import contextlib
import os
import pathlib
import sys
import warnings
from collections.abc import Iterator

# Of all compiled programs; some hundred studies.
_CACHE_BYTES = 4 * 2**30


def use_compile_cache() -> None:
  """Keep compiled programs for later processes, by MQ_COMPILE_CACHE.

  `off` keeps none, a folder is used as it is; by default they lie in
  `mq_jax/jax` of the user's cache folder. A folder that cannot be used only
  costs the time to compile. JAX is told by its environment, so this comes
  before it is imported and holds for processes that this one starts; one that
  has JAX already (a notebook, a test) keeps its own setting.
  """
  asked = os.environ.get('MQ_COMPILE_CACHE', '')
  if 'jax' in sys.modules or 'JAX_COMPILATION_CACHE_DIR' in os.environ:
    return
  if asked == 'off':
    return
  folder = pathlib.Path(asked or _default_cache()).expanduser().absolute()
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
      raise PermissionError('cannot be written')
    _make_room(folder)
  except OSError as error:
    if asked:
      print(
        f'mq: MQ_COMPILE_CACHE={asked}: {error.strerror or error}; compiled '
        'programs are not kept',
        file=sys.stderr,
      )
    return
  os.environ['JAX_COMPILATION_CACHE_DIR'] = str(folder)
  # By default only what took a second to compile; of such there are few here.
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')
  # An entry torn by a kill, a disk that is full: the program is compiled.
  warnings.filterwarnings(
    'ignore', message='Error (reading|writing) persistent compilation cache'
  )


def _default_cache() -> str:
  base = os.environ.get('XDG_CACHE_HOME') or os.path.join('~', '.cache')
  return os.path.join(base, 'mq_jax', 'jax')


def _make_room(folder: pathlib.Path) -> None:
  """Remove the oldest programs once there are too many."""
  found = []
  for entry in os.scandir(folder):
    with contextlib.suppress(FileNotFoundError):  # another process tidies too
      if entry.is_file():
        status = entry.stat()
        found.append((status.st_mtime, status.st_size, entry.path))
  total = sum(size for _, size, _ in found)
  for _, size, path in sorted(found):
    if total <= _CACHE_BYTES:
      break
    total -= size
    with contextlib.suppress(FileNotFoundError):
      os.unlink(path)


@contextlib.contextmanager
def watched(debug_nans: bool, trace: str | None) -> Iterator[None]:
  """What --debug-nans and --trace ask for, while a command runs.

  Args:
    debug_nans: Stop where a NaN comes up.
    trace: Folder for a trace of JAX's profiler.
  """
  with contextlib.ExitStack() as stack:
    if debug_nans or trace is not None:
      import jax  # late: most commands are not watched

      if debug_nans:
        stack.enter_context(jax.debug_nans(True))
      if trace is not None:
        pathlib.Path(trace).mkdir(parents=True, exist_ok=True)
        stack.enter_context(jax.profiler.trace(trace))
    yield
