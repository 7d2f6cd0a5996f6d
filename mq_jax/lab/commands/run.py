"""`mq run`: a study, begun or continued."""

import argparse
import os
import pathlib
import sys


def add(commands) -> None:
  """Add the command to the parser of `mq`."""
  run = commands.add_parser(
    'run',
    help='run a study: recipes compared on models',
    description='Run a study, or continue it: finished rows are kept.',
  )
  run.add_argument('config', metavar='CONFIG.gin')
  run.add_argument(
    '--set',
    action='append',
    default=[],
    metavar='BINDING',
    help="override a binding, e.g. --set 'compare.seed = 1'; may be repeated",
  )
  run.add_argument(
    '--text',
    metavar='FILE',
    help='evaluate on this UTF-8 text (default: wikitext-2/test.txt in the '
    'folder MQ_DATA if that is set, else the docs corpus)',
  )
  run.add_argument(
    '--out', metavar='DIR', help='default: runs/CONFIG-<digest of the study>'
  )
  run.set_defaults(command=_run)


def _run(arguments: argparse.Namespace) -> int:
  from rich import console

  from mq_jax.lab import config

  bindings, default = list(arguments.set), None
  if arguments.text is not None:
    bindings.append(f'compare.text = {arguments.text!r}')
  elif os.environ.get('MQ_DATA'):
    default = os.path.join(os.environ['MQ_DATA'], 'wikitext-2', 'test.txt')
  study, operative = config.load(
    arguments.config, bindings, default_text=default
  )

  from mq_jax.lab import comparison, progress, runs
  from mq_jax.report import tables

  path = pathlib.Path(
    arguments.out or runs.default_folder(arguments.config, study)
  )
  records = comparison.run(
    study,
    path,
    operative=operative,
    name=os.path.basename(arguments.config),
    display=progress.Display(console.Console(stderr=True)),
  )
  out = console.Console()
  out.print(tables.rich_table(comparison.shown(records)))
  out.print(f'written to {path}', markup=False, highlight=False, soft_wrap=True)
  failures = sum(map(runs.failed, records))
  if failures:
    print(f'mq: {failures} of {len(records)} rows failed', file=sys.stderr)
  return 1 if failures else 0
