"""The `mq` command: run a study, quantize, evaluate, price, allocate bits.

Exit codes: 0 done, 1 a row of a run failed, 2 the input cannot be used (one
line on standard error says why), 130 interrupted.
"""

import argparse
import sys
from collections.abc import Sequence

from mq_jax.lab.commands import allocate, cost, evaluate, quantize, run

# In the order of `mq --help`.
_COMMANDS = (run, quantize, evaluate, cost, allocate)


def main(argv: Sequence[str] | None = None) -> int:
  """Run the command line; returns the exit code."""
  arguments = _parser().parse_args(argv)
  try:
    return arguments.command(arguments)
  except KeyboardInterrupt:
    print('\nmq: interrupted', file=sys.stderr)
    return 130
  except (ValueError, OSError) as error:
    # What the user gave is at fault, and the message says how; anything else
    # is a bug of ours and keeps its traceback.
    print(f'mq: {error}', file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='mq', description='Quantization research in JAX.'
  )
  commands = parser.add_subparsers(required=True, metavar='COMMAND')
  for module in _COMMANDS:
    module.add(commands)
  return parser


if __name__ == '__main__':
  sys.exit(main())
