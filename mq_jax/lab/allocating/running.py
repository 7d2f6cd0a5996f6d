"""From a command line to a plan: what `mq allocate` does, step by step."""

import contextlib
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mq_jax import allocation
from mq_jax.allocation import candidates as candidates_lib
from mq_jax.lab import measure, opening, progress
from mq_jax.lab.allocating import (
  budgets,
  checkpoints,
  costs,
  output,
  setup,
  solving,
)

ARTIFACT = 'artifact'
_SOLVED = 'state/solved.json'


class _Clock:
  """Seconds by stage; a stage done before keeps those it took then."""

  def __init__(self, seconds: dict[str, float]):
    self.seconds = seconds

  @contextlib.contextmanager
  def time(self, what: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    took = time.perf_counter() - start
    self.seconds[what] = round(self.seconds.get(what, 0.0) + took, 3)


def run(
  ask: setup.Ask,
  path: str | os.PathLike,
  display: progress.Display,
  *,
  artifact: bool = False,
) -> dict[str, Any]:
  """Find a plan and write it, or continue, or draw again what is finished.

  Args:
    ask: What to do.
    path: The folder; see `checkpoints` and `output` for what it holds.
    display: Where progress is shown.
    artifact: Whether to write the packed model too.

  Returns:
    The report, as in report.json.

  Raises:
    ValueError: for whatever can't be used, in one line: what can be told
      without work is told first, infeasible budgets as soon as candidates
      are packed. A loss that is not finite: what was good before is saved.
    FileNotFoundError: if a file is missing.
  """
  path = pathlib.Path(path)
  checkpoints.check(path)
  bench = setup.open_bench(ask)
  identity = setup.fingerprint(bench)
  report = None
  if checkpoints.check(path, identity):
    with checkpoints.open_folder(path, identity):
      report = output.read(path)  # another process at it is told of now
  if report is not None:
    display.say(f'{path}: this allocation is finished; drawn again:')
    if not artifact or (path / ARTIFACT).exists():
      with checkpoints.open_folder(path, identity) as folder:
        output.write(folder, report)
      return report
  clock = _Clock({})
  with display.rows(0, 3 + len(ask.solvers), 'stages'):
    with clock.time('candidates'):
      made = setup.make_candidates(
        bench, display.steps('calibrating'), display.steps('quantizing')
      )
    taken = costs.costs_of(bench, made)
    asked = _budgets(bench, made, taken)
    display.row_done()
    what = 'sites' if ask.blocks is None else 'blocks of sites'
    display.say(
      f'{bench.model.name}: {len(made.candidates.names)} {what}, '
      f'{len(ask.candidates)} candidates, packed in '
      f'{clock.seconds["candidates"]:.1f} s'
    )
    with checkpoints.open_folder(path, identity) as folder:
      solved = _begin(folder, setup.digest_of(made))
      if report is None:
        report = _search(
          bench, made, taken, asked, folder, solved, clock, display
        )
        report['setup'] = identity
      packed = candidates_lib.assemble(
        made, bench.model.params, report['choice']
      )
      if artifact and not (path / ARTIFACT).exists():
        # Before the report is: a finished folder has its artifact.
        opening.save_artifact(path / ARTIFACT, bench.model, packed)
      output.write(folder, report)
  return report


def _budgets(
  bench: setup.Bench,
  made: candidates_lib.Made,
  taken: Mapping[str, np.ndarray],
) -> list[dict[str, float]]:
  """The budgets asked for, then others along the first of them.

  Raises:
    InfeasibleError: if nothing meets those that were asked for.
  """
  problem = costs.make_problem(bench, made, taken)
  asked = budgets.resolve(bench.ask.budgets, taken, bench.allowed)
  # Each budget alone, and then all of them together.
  allocation.greedy(problem.with_budget(**asked))
  first = bench.ask.budgets[0].quantity
  low, high = budgets.span(taken[first], bench.allowed)
  found = []
  for value in budgets.front(low, high, asked[first], bench.ask.front):
    one = asked | {first: value}
    with contextlib.suppress(allocation.InfeasibleError):
      allocation.greedy(problem.with_budget(**one))
      found.append(one)
  return found


def _begin(folder: checkpoints.Folder, digest: str) -> dict[str, Any]:
  """What was solved before.

  Raises:
    ValueError: if the candidates came out otherwise than then.
  """
  solved = folder.read_json(_SOLVED)
  if solved is None:
    return {
      'candidates': digest,
      'solvers': {},
      'searched': {},
      'tested': {},
      'seconds': {},
    }
  if solved['candidates'] != digest:
    raise ValueError(
      f'{folder.path}: the candidates differ from those that the search began '
      'with, though its setup is the same (another program or machine?); '
      'choose another folder with --out'
    )
  return solved


def _search(bench, made, taken, asked, folder, solved, clock, display):
  """Table, solvers, losses on the test text: the report."""
  ask = bench.ask
  before = solved['seconds']
  clock.seconds = before | clock.seconds
  loss, batches = setup.objective(bench)
  parts = (bench.model.params, made.candidates)
  searched = solving.Losses(loss, *parts, batches)
  judge, exams = setup.exam(bench)
  tested = solving.Losses(judge, *parts, exams)
  searched.remember(solved['searched'])
  tested.remember(solved['tested'])

  def keep():
    solved['searched'], solved['tested'] = searched.known(), tested.known()
    solved['seconds'] = clock.seconds
    folder.write_json(_SOLVED, solved)

  with clock.time('table'):
    table = solving.one_site_table(
      (loss, *parts, batches),
      folder,
      display.steps('one site at a time'),
    )
  keep()
  display.row_done()
  display.say(f'one-site table in {clock.seconds["table"]:.1f} s')
  problem = costs.make_problem(bench, made, taken, table)
  for name in ask.solvers:
    if name not in solved['solvers']:
      task = solving.Task(
        bench,
        made,
        loss,
        batches,
        problem,
        asked,
        searched,
        folder,
        display.steps(name),
      )
      with clock.time(name):
        choices, note = solving.solve(name, task, name == ask.solvers[0])
      plain = [None if c is None else [int(x) for x in c] for c in choices]
      solved['solvers'][name] = {'choices': plain, 'note': note}
      keep()
      display.say(f'{name} in {clock.seconds[name]:.1f} s')
    display.row_done()

  count = len(problem.sites)
  own = np.full(count, -1)
  uniform = [
    np.full(count, j) for j in np.flatnonzero(bench.allowed.all(axis=0))
  ]
  drawn = [
    np.array(choice)
    for entry in solved['solvers'].values()
    for choice in entry['choices']
    if choice is not None
  ]
  with clock.time('testing'):
    tested([own, *uniform, *drawn], display.steps('testing'))
    chosen = np.array(solved['solvers'][ask.solvers[0]]['choices'][0])
    searched([own, *uniform, *drawn])
    packed = candidates_lib.assemble(made, bench.model.params, chosen)
    scores, note = None, ''
    try:
      scores = measure.scores(
        bench.model, packed, bench.windows.scored, ask.batch
      )
    except ValueError as error:  # a plan, if a bad one, is not to be lost
      note = str(error)
  keep()
  display.row_done()
  return output.make_report(
    output.Result(
      bench,
      made,
      taken,
      table,
      asked,
      chosen,
      costs.achieved(bench, made, chosen, packed),
      {name: e['choices'] for name, e in solved['solvers'].items()},
      uniform,
      searched,
      tested,
      scores,
      clock.seconds,
      [note, *(e['note'] for e in solved['solvers'].values())],
    )
  )
