"""`mq config`: config files looked at, not run."""

import argparse
import sys


def add(commands) -> None:
  """Add the command to the parser of `mq`."""
  config = commands.add_parser(
    'config',
    help='show, compare and check config files',
    description='Look at config files of mq run, mq sweep and of experiments.',
  )
  actions = config.add_subparsers(required=True, metavar='ACTION')
  show = actions.add_parser(
    'show',
    help='all values of a config, defaults too, as gin',
    description='Print all values of a config or run folder, defaults too.',
  )
  show.add_argument('file', metavar='FILE|DIR')
  show.set_defaults(command=_show)
  diff = actions.add_parser(
    'diff',
    help='values in which two configs or run folders differ',
    description='Print the values in which two configs or run folders differ. '
    'Exit code 0 if there are none, 1 if there are.',
  )
  diff.add_argument('left', metavar='FILE|DIR')
  diff.add_argument('right', metavar='FILE|DIR')
  diff.set_defaults(command=_diff)
  validate = actions.add_parser(
    'validate',
    help='all errors of config files',
    description='Print all errors of config files, by file and line. Exit '
    'code 2 if there are any.',
  )
  validate.add_argument('files', metavar='FILE', nargs='+')
  validate.set_defaults(command=_validate)


def _show(arguments: argparse.Namespace) -> int:
  from mq_jax.lab import checking

  print(checking.as_gin(checking.values(arguments.file)), end='')
  return 0


def _diff(arguments: argparse.Namespace) -> int:
  from rich import box, console, table, text

  from mq_jax.lab import checking

  paths = (arguments.left, arguments.right)
  found = checking.differences(*map(checking.values, paths))
  if not found:
    print('no differences')
    return 0
  shown = table.Table(box=box.SIMPLE_HEAD, pad_edge=False)
  for name in ('', *paths):
    shown.add_column(text.Text(name), overflow='fold')
  for each in found:
    cells = (each.name, each.left, each.right)
    shown.add_row(*map(text.Text, cells))
  console.Console().print(shown)
  return 1


def _validate(arguments: argparse.Namespace) -> int:
  from mq_jax.lab import checking

  count = 0
  for path in arguments.files:
    for line in checking.errors(path):
      count += 1
      print(f'mq: {line}', file=sys.stderr)
  if count:
    return 2
  files = 'file' if len(arguments.files) == 1 else 'files'
  print(f'{len(arguments.files)} {files}, no errors')
  return 0
