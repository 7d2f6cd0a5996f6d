"""What the user sees while a run works, on standard error."""

import contextlib
from collections.abc import Callable, Iterator

from rich import console as rich_console
from rich import progress as rich_progress

from mq_jax.lab import journal as journal_lib


class Display:
  """A bar of rows, a bar of what the current row does, a line per result.

  On anything but a terminal only the lines appear, as a log.
  """

  def __init__(
    self,
    console: rich_console.Console,
    journal: journal_lib.Journal | None = None,
  ):
    self.console, self._journal = console, journal
    self._bars = rich_progress.Progress(
      rich_progress.TextColumn('{task.description}'),
      rich_progress.BarColumn(),
      rich_progress.MofNCompleteColumn(),
      rich_progress.TimeElapsedColumn(),
      rich_progress.TimeRemainingColumn(),
      console=console,
      transient=True,
      disable=not console.is_terminal,
    )

  @contextlib.contextmanager
  def rows(self, done: int, total: int, what: str = 'rows') -> Iterator[None]:
    """Shows bars while open, `done` rows of `total` finished before."""
    with self._bars:
      self._all = self._bars.add_task(what, total=total, completed=done)
      self._one = self._bars.add_task('', total=None, visible=False)
      yield

  def say(self, message: str, *, log: bool = True) -> None:
    """One line above the bars, and of the journal if it is to be kept."""
    if log and self._journal is not None:
      self._journal.note(message)
    self._bars.console.print(
      message, markup=False, highlight=False, soft_wrap=True
    )

  def row_done(self) -> None:
    self._bars.advance(self._all)
    self._bars.update(self._one, visible=False)

  def steps(self, what: str) -> Callable[..., None]:
    """A callback `(done, total, ...)` that moves the lower bar."""
    self._bars.reset(self._one, description=what, visible=True, total=None)

    def step(done: int, total: int | None = None, *_) -> None:
      if self._journal is not None:
        self._journal.flush()
      self._bars.update(self._one, completed=done, total=total)

    return step
