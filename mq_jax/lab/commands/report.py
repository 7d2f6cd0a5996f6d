"""`mq report`: one page from any number of run folders."""

import argparse
import pathlib

_DETAILS = """\
Folders may be those of mq run, mq sweep, mq allocate and mq cost --out, mixed
as you like. Runs that differ in nothing but the seed become one row: mean,
least and most. Runs that are not finished are reported as far as they are.

The page needs no network and no other file: send it, or print it.

    mq report runs/quickstart-1a2b3c4d
    mq report runs/* --out all.html
    mq report /tmp/seed0 /tmp/seed1 plans/reference --markdown --latex
"""


def add(commands) -> None:
  """Add the command to the parser of `mq`."""
  report = commands.add_parser(
    'report',
    help='compare runs on one HTML page',
    description='Compare run folders on one page of HTML.',
    epilog=_DETAILS,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  report.add_argument('folders', metavar='DIR', nargs='+')
  report.add_argument(
    '--out',
    metavar='FILE',
    type=pathlib.Path,
    default=pathlib.Path('report.html'),
    help='the page (default: %(default)s)',
  )
  report.add_argument('--title', default='', metavar='TEXT')
  report.add_argument(
    '--markdown',
    action='store_true',
    help='write text and tables as Markdown too, beside the page (.md)',
  )
  report.add_argument(
    '--latex',
    action='store_true',
    help='write the tables for LaTeX with booktabs too, beside the page (.tex)',
  )
  report.set_defaults(command=_report)


def _report(arguments: argparse.Namespace) -> int:
  from mq_jax.lab import reporting
  from mq_jax.report import pages

  targets = reporting.targets(
    arguments.out, arguments.markdown, arguments.latex
  )
  for path, (mark, _) in targets.items():
    reporting.check_target(path, mark)
  found = reporting.read(arguments.folders)
  document = pages.make(found, arguments.title)
  for path, (_, render) in targets.items():
    reporting.write_whole(path, render(document))
  for source in found:
    if not source.finished:
      print(f'{source.path}: not finished: {source.state}')
  sizes = ', '.join(
    f'{path} ({path.stat().st_size / 1000:.0f} kB)' for path in targets
  )
  folders = f'{len(found)} folder{"s" if len(found) > 1 else ""}'
  print(f'{folders} reported in {sizes}')
  return 0
