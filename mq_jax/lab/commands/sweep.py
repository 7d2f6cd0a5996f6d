"""`mq sweep`: a study over a space of settings, begun or continued."""

import argparse
import pathlib
import sys

from mq_jax.lab.commands import shared

_FILE = """\
A sweep file is a study, as of mq run, whose values use macros, and a space:

    compare.models = ['reference']
    compare.recipes = [{'recipe': 'microscopiq', 'sigma': %sigma, 'bits': %b}]
    sigma = 3.0
    b = 2
    sweep.space = {
      'sigma': ('linear', 2.0, 4.0, 5),   # also 'log', 'int'; points for grids
      'b': [2, 4],                        # these values
    }
    sweep.sampler = 'grid'                # 'sobol', 'random', 'tpe', 'nsga2'
    sweep.objectives = ('bits_per_byte', 'ebw')    # made small
    sweep.trials = 32                     # a grid has its own number

'sigma, b': [(2.5, 2), (3.0, 4)] takes names together; 'compare.seed' and other
parameters of the study are names too. Settings that differ in numbers of
recipes only are quantized side by side by one compiled program.

The same command continues a sweep; more --trials add to it. Trials of killed
processes are done again. With --storage, this command may run on many
machines, each with a folder of its own.

    mq sweep configs/sweeps/microscopiq_leaves.gin --workers 2
    mq sweep X.gin --storage postgresql://user@host/base --trials 200
"""


def add(commands) -> None:
  """Add the command to the parser of `mq`."""
  sweep = commands.add_parser(
    'sweep',
    help='run a study over a space of settings',
    description='Run a study over a space of settings, or continue it.',
    epilog=_FILE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  shared.add_bindings(sweep, 'compare.windows = 8')
  sweep.add_argument(
    '--workers',
    type=int,
    default=1,
    metavar='N',
    help='processes of this machine that share the trials (default: '
    '%(default)s)',
  )
  sweep.add_argument(
    '--storage',
    metavar='URL',
    help='a PostgreSQL database, postgresql://... (default: a journal file in '
    'the run folder)',
  )
  sweep.add_argument(
    '--trials', type=int, metavar='N', help='in place of sweep.trials'
  )
  sweep.add_argument(
    '--out', metavar='DIR', help='default: runs/CONFIG-<digest of the sweep>'
  )
  sweep.set_defaults(command=_sweep)


def _sweep(arguments: argparse.Namespace) -> int:
  shared.positive(arguments, 'workers', 'trials')
  from mq_jax.lab.sweeping import running

  asked = running.Asked(
    config=arguments.config,
    bindings=tuple(arguments.set),
    trials=arguments.trials,
    default_text=shared.default_text(),
    url=arguments.storage,
  )
  sweep = asked.load()

  from rich import console

  from mq_jax.lab import files, journal, progress
  from mq_jax.lab.sweeping import output

  path = pathlib.Path(
    arguments.out or running.default_folder(arguments.config, sweep)
  )
  files.check_writable(path)
  with journal.Journal(path, running.MARKER, arguments.argv) as log:
    result = running.run(
      asked,
      sweep,
      path,
      workers=arguments.workers,
      display=progress.Display(console.Console(stderr=True), log),
    )
  out = console.Console()
  found = output.summaries(result.records, sweep.objectives)
  out.print(output.best_table(found, sweep.objectives))
  say = lambda message: out.print(
    message, markup=False, highlight=False, soft_wrap=True
  )
  served = output.served_line(result.served)
  if served:
    say(served)
  say(f'written to {path}')
  failures = sum(s['values'] is None for s in found)
  if failures:
    print(f'mq: {failures} of {len(found)} trials failed', file=sys.stderr)
  if result.unfinished:
    print(
      f'mq: {result.unfinished} of {sweep.trials} trials are missing, since '
      'workers ended early; the same command continues',
      file=sys.stderr,
    )
  return 1 if failures or result.unfinished else 0
