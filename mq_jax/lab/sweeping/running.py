"""Runs a sweep in a folder, by this process or by several of its own."""

import contextlib
import dataclasses
import datetime
import json
import multiprocessing
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich import console as rich_console

from mq_jax.lab import comparison, files, listing, measure, progress, runs
from mq_jax.lab.sweeping import ledger as ledger_lib
from mq_jax.lab.sweeping import output, spec, storage, trials

MARKER = listing.SWEEP

_POLL_S = 0.3  # between two looks at what others finished
_WRITE_S = 3.0  # least time between two writings of results


@dataclasses.dataclass(frozen=True)
class Asked:
  """What the user asked for; workers read it again.

  Attributes:
    config: The gin file.
    bindings: That override it.
    trials: In place of the file's.
    default_text: Evaluation text where neither binds one.
    url: Of the storage; None for a journal in the folder.
  """

  config: str
  bindings: tuple[str, ...] = ()
  trials: int | None = None
  default_text: str | None = None
  url: str | None = None

  def load(self) -> spec.Sweep:
    """The sweep, checked."""
    return spec.load(
      self.config,
      self.bindings,
      trials=self.trials,
      default_text=self.default_text,
    )


@dataclasses.dataclass(frozen=True)
class Result:
  """How a sweep stands.

  Attributes:
    records: Of finished trials, see `Ledger.records`.
    unfinished: Settings without a result.
    served: How many settings the compiled programs served, by process.
  """

  records: list[dict[str, Any]]
  unfinished: int
  served: list[dict[str, Any]]


def default_folder(path: str, sweep: spec.Sweep) -> pathlib.Path:
  """`runs/<config>-<digest>`: equal sweeps meet in one folder."""
  return pathlib.Path('runs') / f'{pathlib.Path(path).stem}-{sweep.digest}'


def run(
  asked: Asked,
  sweep: spec.Sweep,
  path: pathlib.Path,
  *,
  workers: int,
  display: progress.Display,
) -> Result:
  """Run a sweep in a folder, or what is missing of it.

  Args:
    asked: What `sweep` was loaded from.
    sweep: The sweep.
    path: The run folder.
    workers: Processes that share the trials; one is this process itself.
    display: Where progress is shown.

  Raises:
    RunError: if the folder or the storage is not this sweep's.
    ValueError, FileNotFoundError: if a model or text cannot be read. Errors
      of one trial are its status instead.
  """
  texts = _texts(sweep)
  name = f'{pathlib.Path(asked.config).stem}-{sweep.digest}'
  with _folder(path, asked, sweep, name, texts):
    with contextlib.closing(storage.open_storage(asked.url, path)) as store:
      book = ledger_lib.Ledger(sweep, store, name, _conditions(texts))
      done = sweep.trials - book.unfinished()
      if done == sweep.trials:
        display.say(f'{path}: this sweep is finished; its {done} trials:')
      elif done:
        display.say(f'{path}: {done} of {sweep.trials} trials are there')
      watch = _Watch(sweep, book, path, name, display)
      with display.rows(done, sweep.trials, 'trials'):
        if done < sweep.trials:
          if workers == 1:
            for _ in _work(sweep, book, display, 1):
              watch.look()
          else:
            _many(asked, sweep, path, name, workers, watch, texts)
        watch.look(last=True)
      return Result(book.records(), book.unfinished(), book.served())


def _texts(sweep: spec.Sweep) -> dict[str, str]:
  """Digests of all texts by source; raises if one, or a model, won't do."""
  found, seen = {}, set()
  for setting in sweep.corners:
    study = sweep.study(setting)
    key = (study.models, study.text, study.calibration_text)
    if key in seen:
      continue
    seen.add(key)
    text = measure.evaluation_text(study.text)
    calibration = measure.calibration_text(study.calibration_text)
    comparison.check(study, text, calibration)
    found |= {t.source: t.sha256 for t in (text, calibration)}
  return found


def _conditions(texts: Mapping[str, str]) -> dict[str, str]:
  """What results depend on beside the sweep."""
  import jax

  versions = runs.versions()
  return {
    **{name: versions[name] for name in runs.LIBRARIES},
    **{f'text {source}': digest for source, digest in texts.items()},
    'device': f'{jax.default_backend()}: {jax.devices()[0].device_kind}',
  }


@contextlib.contextmanager
def _folder(
  path: pathlib.Path,
  asked: Asked,
  sweep: spec.Sweep,
  name: str,
  texts: Mapping[str, str],
) -> Iterator[None]:
  """The folder, locked, made this sweep's or found to be so."""
  marker = path / MARKER
  if not marker.exists():
    files.check_new(path, 'a sweep', {'config.gin'})
  path.mkdir(parents=True, exist_ok=True)
  with runs.locked(path):
    begun = {
      'sweep': sweep.digest,
      'name': name,
      'storage': storage.shown(asked.url),
      'what': sweep.as_dict(),
      'trials': sweep.trials,
      'seed': sweep.seed,
      'texts': dict(texts),
      'versions': runs.versions(),
      'git': runs.git_state(pathlib.Path(__file__).parent),
      'begun': datetime.datetime.now(datetime.UTC).isoformat(
        timespec='seconds'
      ),
    }
    if marker.exists():
      there = _check_same(marker, begun)
      if there.get('trials') != sweep.trials:  # of an adaptive one there may
        there['trials'] = sweep.trials  # be more, the next time
        files.write_whole(marker, json.dumps(there, indent=1) + '\n')
    else:
      files.write_whole(path / 'config.gin', sweep.file.operative)
      files.write_whole(marker, json.dumps(begun, indent=1) + '\n')
    yield


def _check_same(
  marker: pathlib.Path, begun: Mapping[str, Any]
) -> dict[str, Any]:
  """What the folder was begun with; raises if that is another sweep."""
  try:
    there = json.loads(marker.read_text('utf-8'))
    what = there['what'] | {}
  except (ValueError, KeyError, TypeError) as error:
    raise runs.RunError(f'{marker}: not of a sweep: {error}') from None
  if there.get('sweep') != begun['sweep']:
    new = begun['what']
    names = sorted(
      k for k in what.keys() | new.keys() if what.get(k) != new.get(k)
    )
    raise runs.RunError(
      f'{marker.parent}: holds another sweep ({there.get("sweep")}, this one '
      f'is {begun["sweep"]}); they differ in {", ".join(names)}; nothing was '
      'written; choose another folder with --out'
    )
  if there.get('storage') != begun['storage']:
    shown = lambda s: s or 'the journal in the folder'
    raise runs.RunError(
      f'{marker.parent}: was begun with storage {shown(there.get("storage"))}, '
      f'not {shown(begun["storage"])}'
    )
  return there


def _work(
  sweep: spec.Sweep,
  book: ledger_lib.Ledger,
  display: progress.Display,
  workers: int,
) -> Iterator[int]:
  """Claim and do trials until all are finished; yields each index."""
  runner = None
  while True:
    claims = book.claim(sweep.at_once, workers)
    if not claims:
      if not book.unfinished():
        return
      time.sleep(_POLL_S)  # others are at the rest, and may die
      continue
    runner = runner or trials.Runner(sweep, display)
    for i, records in runner.run([claim.setting for claim in claims]):
      book.finish(claims[i], records)
      book.note(runner.served())
      yield claims[i].index


class _Watch:
  """Shows and writes what was finished, by whomever."""

  def __init__(
    self,
    sweep: spec.Sweep,
    book: ledger_lib.Ledger,
    path: pathlib.Path,
    name: str,
    display: progress.Display,
  ):
    self._sweep, self._book, self._path = sweep, book, path
    self._name, self._display = name, display
    self._what = sweep.as_dict()
    self._seen = set(book.finished())
    self._before = len(self._seen)
    self._start = time.monotonic()
    self._written = -_WRITE_S

  def look(self, last: bool = False) -> None:
    """Say what is new; write all results, from time to time."""
    finished = self._book.finished()
    for index in sorted(finished.keys() - self._seen):
      self._seen.add(index)
      self._display.row_done()
      records = ledger_lib.records_of(index, finished[index])
      line = output.line(index, self._sweep, records)
      self._display.say(f'{line}  ({self._left()})')
    now = time.monotonic()
    if self._seen and (last or now - self._written > _WRITE_S):
      self._written = now
      output.write(self._path, self._what, self._book.records(), self._name)

  def _left(self) -> str:
    """How many are done, and when the rest will be, at the pace so far."""
    done, total = len(self._seen), self._sweep.trials
    text = f'{done} of {total}'
    here = done - self._before
    if here < 1 or done >= total:
      return text
    seconds = (time.monotonic() - self._start) / here * (total - done)
    unit = f'{seconds / 60:.0f} min' if seconds > 90 else f'{seconds:.0f} s'
    return f'{text}, about {unit} left'


def _many(
  asked: Asked,
  sweep: spec.Sweep,
  path: pathlib.Path,
  name: str,
  workers: int,
  watch: _Watch,
  texts: Mapping[str, str],
) -> None:
  """Processes of this machine on one storage."""
  # Each would take most of an accelerator's memory for itself.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  context = multiprocessing.get_context('spawn')
  arguments = (asked, sweep.digest, str(path), name, workers, dict(texts))
  started = [
    context.Process(target=_worker, args=arguments, name=f'worker {i}')
    for i in range(workers)
  ]
  try:
    for process in started:
      process.start()
    while any(process.is_alive() for process in started):
      watch.look()
      time.sleep(_POLL_S)
  finally:
    for process in started:
      process.terminate()
      process.join()


def _worker(
  asked: Asked,
  digest: str,
  path: str,
  name: str,
  workers: int,
  texts: Mapping[str, str],
) -> None:
  """A process that does trials; ends with the one that started it."""
  parent = multiprocessing.parent_process()
  try:
    sweep = asked.load()
    if sweep.digest != digest:
      raise runs.RunError(f'{asked.config}: was changed while the sweep began')
    quiet = progress.Display(rich_console.Console(stderr=True, quiet=True))
    store = storage.open_storage(asked.url, pathlib.Path(path))
    with contextlib.closing(store), quiet.rows(0, sweep.trials):
      book = ledger_lib.Ledger(sweep, store, name, _conditions(texts))
      for _ in _work(sweep, book, quiet, workers):
        if not parent.is_alive():
          return
  except KeyboardInterrupt:
    sys.exit(130)
  except (ValueError, OSError) as error:
    this = multiprocessing.current_process().name
    print(f'mq: {this}: {error}', file=sys.stderr)
    sys.exit(1)
