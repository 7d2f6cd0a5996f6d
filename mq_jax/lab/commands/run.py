"""`mq run`: a study, begun or continued."""

import argparse
import os
import pathlib
import sys
import tempfile
from collections.abc import Sequence

from mq_jax.lab.commands import shared


def add(commands) -> None:
  """Add the command to the parser of `mq`."""
  run = commands.add_parser(
    'run',
    help='run a study: recipes compared on models',
    description='Run a study, or continue it: finished rows are kept. A '
    'finished one says so.',
  )
  shared.add_bindings(run, 'compare.seed = 1')
  run.add_argument(
    '--text',
    metavar='FILE',
    help='evaluate on this UTF-8 text (default: wikitext-2/test.txt in the '
    'folder MQ_DATA if that is set, else the docs corpus)',
  )
  run.add_argument(
    '--out', metavar='DIR', help='default: runs/CONFIG-<digest of the study>'
  )
  run.add_argument(
    '--force',
    action='store_true',
    help='do it again from the beginning; what is there is kept beside it, as '
    'DIR.before-1 and so on',
  )
  run.add_argument(
    '--smoke',
    action='store_true',
    help='only see whether it runs: one model (the reference model if it is '
    'not there), two windows, a row of each kind; kept only with --out',
  )
  run.set_defaults(command=_run)


def _run(arguments: argparse.Namespace) -> int:
  from mq_jax.lab import config

  bindings, default = list(arguments.set), None
  if arguments.text is not None:
    bindings.append(f'compare.text = {arguments.text!r}')
  elif not arguments.smoke:
    default = shared.default_text()
  study, operative = config.load(
    arguments.config, bindings, default_text=default
  )

  from mq_jax.lab import runs

  name = os.path.basename(arguments.config)
  if arguments.smoke:
    return _smoke(study, arguments, name)
  path = pathlib.Path(
    arguments.out or runs.default_folder(arguments.config, study)
  )
  more = {'name': name, 'argv': arguments.argv, 'force': arguments.force}
  return go(study, operative, path, **more)


def _smoke(study, arguments: argparse.Namespace, name: str) -> int:
  from mq_jax.lab import smoke

  small, said = smoke.tiny(study)
  for line in said:
    print(f'mq: smoke: {line}', file=sys.stderr)
  more = {'name': f'{name} --smoke', 'argv': arguments.argv}
  written = smoke.operative(small)
  if arguments.out is not None:
    return go(small, written, pathlib.Path(arguments.out), **more)
  with tempfile.TemporaryDirectory(prefix='mq-smoke-') as folder:
    return go(small, written, pathlib.Path(folder), kept=False, **more)


def go(
  study,
  operative: str,
  path: pathlib.Path,
  *,
  name: str,
  argv: Sequence[str],
  force: bool = False,
  kept: bool = True,
) -> int:
  """Run a study in a folder and show what came out; returns the exit code.

  Args:
    study: A `config.Study`.
    operative: As gin text.
    path: The run folder.
    name: Of the config.
    argv: The command.
    force: Move a run of this study that is there aside.
    kept: Whether the folder stays.
  """
  from rich import console

  from mq_jax.lab import (
    comparison,
    distributed,
    files,
    journal,
    progress,
    runs,
  )
  from mq_jax.report import tables

  with distributed.folder(path) as folder:
    files.check_writable(folder)
    # Another run is not moved; it is refused below.
    if (
      force
      and runs.is_run(folder)
      and runs.read(folder)[0]['run'] == study.digest
    ):
      print(
        f'mq: what was there is in {runs.set_aside(folder)}', file=sys.stderr
      )
    with journal.Journal(folder, runs.MARKER, argv) as log:
      records = comparison.run(
        study,
        folder,
        operative=operative,
        name=name,
        display=progress.Display(console.Console(stderr=True), log),
      )
  out = console.Console()
  out.print(tables.rich_table(comparison.shown(records)))
  if kept:
    out.print(
      f'written to {path}', markup=False, highlight=False, soft_wrap=True
    )
  failures = sum(map(runs.failed, records))
  if failures:
    print(f'mq: {failures} of {len(records)} rows failed', file=sys.stderr)
  return 1 if failures else 0
