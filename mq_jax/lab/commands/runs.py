"""`mq runs`, `mq show` and `mq resume`: runs that are there already."""

import argparse
import contextlib
import json
import pathlib
import sys


def add(commands) -> None:
  """Add the commands to the parser of `mq`."""
  listed = commands.add_parser(
    'runs',
    help='list run folders, their state and best result',
    description='List the folders of runs, allocations and artifacts.',
  )
  listed.add_argument(
    'folder', nargs='?', default='runs', help='default: %(default)s'
  )
  listed.add_argument(
    '--json', action='store_true', help='print one JSON list and nothing else'
  )
  listed.set_defaults(command=_runs)

  show = commands.add_parser(
    'show',
    help='print the tables of a run again and redraw its figures',
    description='Print tables and redraw figures from the records of a run or '
    'an allocation, finished or not; no model is opened.',
  )
  show.add_argument('folder', metavar='DIR')
  show.set_defaults(command=_show)

  resume = commands.add_parser(
    'resume',
    help='continue a run from its folder alone',
    description='Continue a run or an allocation as it was begun: its config '
    'and its command are in its folder.',
  )
  resume.add_argument('folder', metavar='DIR')
  resume.set_defaults(command=_resume)


def _runs(arguments: argparse.Namespace) -> int:
  from mq_jax.lab import listing

  folder = pathlib.Path(arguments.folder)
  if arguments.folder == 'runs' and not folder.exists():
    entries = []  # nothing was run here yet
  else:
    entries = listing.find(folder)
  if arguments.json:
    print(json.dumps([entry.as_dict() for entry in entries]))
    return 0
  if not entries:
    print(f'{folder}: no runs')
    return 0
  from rich import box, console, table, text

  shown = table.Table(box=box.SIMPLE_HEAD, pad_edge=False)
  shown.add_column('run', overflow='fold')
  for name in ('kind', 'state', 'begun'):
    shown.add_column(name, no_wrap=True)
  shown.add_column('best')
  for entry in entries:
    name = entry.path
    if name != folder and name.is_relative_to(folder):
      name = name.relative_to(folder)
    when = entry.when[5:16].replace('T', ' ')
    cells = (name, entry.kind, _state(entry), when, entry.best)
    # Names may have brackets, which rich would read as styles.
    shown.add_row(*(text.Text(str(cell)) for cell in cells))
  console.Console().print(shown)
  return 0


def _state(entry) -> str:
  if entry.state == 'finished':
    return entry.state
  total = 'some' if entry.total is None else entry.total
  return f'{entry.state}, {entry.done} of {total}'


def _kind(folder: pathlib.Path) -> str:
  """The kind of a folder.

  Raises:
    ValueError: if it is not that of a run.
  """
  from mq_jax.lab import listing

  kind = listing.kind_of(folder)
  if kind is None:
    what = 'is no run' if folder.exists() else 'no such folder'
    raise ValueError(f'{folder}: {what}; `mq runs` lists them')
  return kind


def _show(arguments: argparse.Namespace) -> int:
  folder = pathlib.Path(arguments.folder)
  kind = _kind(folder)
  if kind == 'compare':
    return _show_comparison(folder)
  if kind == 'allocate':
    return _show_allocation(folder)
  if kind == 'sweep':
    return _show_sweep(folder)
  from mq_jax.lab import listing

  entry = listing.describe(folder)
  print(f'{folder}: {entry.kind} of {entry.what}, {entry.best}')
  return 0


@contextlib.contextmanager
def _unless_in_use(folder: pathlib.Path):
  """Locks a folder; yields whether nobody is at it."""
  from mq_jax.lab import files

  with contextlib.ExitStack() as stack:
    try:
      stack.enter_context(files.locked(folder))
      free = True
    except files.RunError:
      print(f'mq: {folder}: is being run; nothing is redrawn', file=sys.stderr)
      free = False
    yield free


def _show_comparison(folder: pathlib.Path) -> int:
  from rich import console

  from mq_jax.lab import comparison, runs
  from mq_jax.report import tables

  begun, run = runs.read(folder)
  records = run.records()
  total = len(run.study.models) * len(run.study.rows)
  out = console.Console()
  out.print(tables.rich_table(comparison.shown(records)))
  missing = total - len(records)
  if missing:
    print(f'{missing} of {total} rows are missing; mq resume {folder}')
  if records:
    with _unless_in_use(folder) as free:
      if free:
        comparison.report(run, records, begun.get('config') or folder.name)
        print(f'redrawn in {folder}')
  return 1 if any(map(runs.failed, records)) else 0


def _show_allocation(folder: pathlib.Path) -> int:
  from mq_jax.lab import listing
  from mq_jax.lab.allocating import checkpoints, output

  report = output.read(folder)
  if report is None:
    entry = listing.describe(folder)
    print(
      f'{folder}: {entry.done} of {entry.total} solvers are done; the tables '
      f'come at the end; mq resume {folder}'
    )
    return 0
  with _unless_in_use(folder) as free:
    if free:
      output.write(checkpoints.Folder(folder), report)
  output.show(report, folder)
  return 0


def _show_sweep(folder: pathlib.Path) -> int:
  from rich import console

  from mq_jax.lab import files, listing
  from mq_jax.lab.sweeping import output

  begun = json.loads((folder / listing.SWEEP).read_text('utf-8'))
  objectives = begun['what']['objectives']
  records = files.read_lines(folder / output.RESULTS)
  found = output.summaries(records, objectives)
  console.Console().print(output.best_table(found, objectives))
  if records:
    with _unless_in_use(folder) as free:
      if free:
        output.write(folder, begun['what'], records, begun['name'])
        print(f'redrawn in {folder}')
  return 0


def _resume(arguments: argparse.Namespace) -> int:
  folder = pathlib.Path(arguments.folder).absolute()
  kind = _kind(folder)
  if kind == 'compare':
    return _resume_comparison(folder, arguments)
  from mq_jax.lab import cli, journal, listing

  asked = journal.read_command(folder)
  if kind == 'artifact':
    print(f'{folder}: an artifact; it is finished')
    return 0
  if asked is None:
    entry = listing.describe(folder)
    if entry.state == 'finished':
      print(f'{folder}: this {kind} is finished; mq show {folder} draws it')
      return 0
    raise ValueError(
      f'{folder}: does not say by which command it was begun (no '
      f'{journal.COMMAND}); give that command again'
    )
  with _directory(asked['directory']):
    return cli.main(_moved(asked['command'], folder))


def _moved(argv: list[str], folder: pathlib.Path) -> list[str]:
  """A command with the folder that its run is in now."""
  kept, skip = [], False
  for word in argv:
    if skip or word.startswith('--out='):
      skip = False
    elif word == '--out':
      skip = True
    else:
      kept.append(word)
  return [*kept, '--out', str(folder)]


@contextlib.contextmanager
def _directory(path: str):
  """Names of files in a command are those of where it was given."""
  if not pathlib.Path(path).is_dir():
    raise ValueError(f'{path}: was the folder of the command; it is gone')
  with contextlib.chdir(path):
    yield


def _resume_comparison(
  folder: pathlib.Path, arguments: argparse.Namespace
) -> int:
  from mq_jax.lab import config, journal, runs
  from mq_jax.lab.commands import run

  begun, _ = runs.read(folder)
  study, operative = config.load(folder / 'config.gin')
  if study.digest != begun['run']:
    raise ValueError(
      f'{folder / "config.gin"}: is not the config that the run was begun '
      f'with ({study.digest}, not {begun["run"]})'
    )
  asked = journal.read_command(folder)
  with _directory(asked['directory'] if asked else '.'):
    return run.go(
      study,
      operative,
      folder,
      name=begun.get('config') or folder.name,
      argv=arguments.argv,
    )
