"""The `mq` command: studies, runs, reports, and single steps of them.

Exit codes: 0 done, 1 a row of a run failed (or two configs differ), 2 the
input cannot be used (one line on standard error says why), 130 interrupted.
"""

import argparse
import sys
import traceback
from collections.abc import Sequence

from mq_jax.lab import process
from mq_jax.lab.commands import (
  allocate,
  config,
  cost,
  evaluate,
  export,
  generate,
  quantize,
  report,
  run,
  runs,
  sweep,
)

# In the order of `mq --help`.
_COMMANDS = (
  run,
  runs,
  sweep,
  report,
  config,
  quantize,
  evaluate,
  export,
  generate,
  cost,
  allocate,
)

_HELP = """\
Every command has a help of its own: mq COMMAND --help. Compiled programs are
kept in ~/.cache/mq_jax/jax; MQ_COMPILE_CACHE=DIR keeps them elsewhere, =off
nowhere. Exit codes: 0 done, 1 a row of a run failed, 2 the input cannot be
used, 130 interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
  """Run the command line; returns the exit code."""
  argv = sys.argv[1:] if argv is None else list(argv)
  arguments = _parser().parse_args(argv)
  arguments.argv = argv  # runs write it down
  process.use_compile_cache()
  try:
    if hasattr(arguments, 'distributed'):
      from mq_jax.lab import distributed  # late: most commands run alone

      distributed.join(arguments.distributed)
    with process.watched(
      getattr(arguments, 'debug_nans', False), getattr(arguments, 'trace', None)
    ):
      return arguments.command(arguments)
  except KeyboardInterrupt:
    print('\nmq: interrupted', file=sys.stderr)
    return 130
  except (ValueError, OSError) as error:
    # What the user gave is at fault, and the message says how; anything else
    # is a bug of ours and keeps its traceback.
    if getattr(arguments, 'traceback', False):
      traceback.print_exc()
    print(f'mq: {_said(error)}', file=sys.stderr)
    return 2


def _said(error: Exception) -> str:
  """The message; of the system's errors first the file, then what is wrong."""
  if isinstance(error, OSError) and error.filename and error.strerror:
    return f'{error.filename}: {error.strerror}'
  return str(error)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='mq',
    description='Quantization research in JAX.',
    epilog=_HELP,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = parser.add_subparsers(required=True, metavar='COMMAND')
  for module in _COMMANDS:
    module.add(commands)
  _add_global(parser)
  return parser


def _add_global(parser: argparse.ArgumentParser) -> None:
  """Options that stand before the command or behind it."""
  group = parser.add_argument_group('options of every command')
  # Suppressed: what a subparser did not see must not undo what was given.
  add = lambda *names, **more: group.add_argument(
    *names, default=argparse.SUPPRESS, **more
  )
  add(
    '--traceback',
    action='store_true',
    help='show where in the code an error of the input was found',
  )
  add(
    '--debug-nans',
    action='store_true',
    help='stop where a NaN comes up (slower)',
  )
  add(
    '--trace',
    metavar='DIR',
    help="write a trace of JAX's profiler there, for TensorBoard or Perfetto",
  )
  add(
    '--distributed',
    metavar='HOST:PORT,PROCESS,PROCESSES|auto',
    help='this is one of several processes that share the devices of --mesh; '
    'the first (0) listens at the address, and writes',
  )
  for action in parser._actions:  # argparse names no public way to subparsers
    if isinstance(action, argparse._SubParsersAction):
      for subparser in set(action.choices.values()):
        _add_global(subparser)


if __name__ == '__main__':
  sys.exit(main())
