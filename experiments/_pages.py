"""Pages of studies that are scripts: README.md, records, config, figure."""

import json
import os
import pathlib
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gin
import jax
import matplotlib.pyplot as plt
from matplotlib import figure as mpl

from mq_jax.lab import runs

MEANING = '## What it means'


def machine() -> str:
  """Processor, cores and load of this machine, in words."""
  name = platform.processor() or platform.machine()
  info = pathlib.Path('/proc/cpuinfo')
  if info.exists():
    for line in info.read_text().splitlines():
      if line.startswith('model name'):
        name = line.split(':', 1)[1].strip()
        break
  cores = len(os.sched_getaffinity(0))
  device = jax.devices()[0].device_kind
  load = os.getloadavg()[0]
  return f'{cores} cores of {name}, load {load:.1f}, JAX on {device}'


def table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """A Markdown table; columns of numbers to the right."""
  line = lambda cells: '| ' + ' | '.join(map(str, cells)) + ' |'
  number = lambda i: not any(isinstance(row[i], str) for row in rows)
  right = [number(i) for i in range(len(headings))]
  shown = [[cell(x) for x in row] for row in rows]
  marks = ['---:' if r else '---' for r in right]
  return '\n'.join([line(headings), line(marks), *map(line, shown)]) + '\n'


def cell(value: Any) -> str:
  """Text as it is, whole numbers whole, others by four digits."""
  if value is None:
    return ''
  if isinstance(value, str):
    return value
  if float(value).is_integer() and abs(value) < 1e6:
    return str(int(value))
  if 1e4 <= abs(value) < 1e6:
    return f'{value:.0f}'
  return f'{value:.4g}' if abs(value) < 1e4 else f'{value:.3g}'


def meaning_of(page: pathlib.Path) -> str:
  """What an earlier page says under "What it means", to be kept."""
  before = page.read_text(encoding='utf-8') if page.exists() else ''
  return before.split(MEANING, 1)[1] if MEANING in before else '\n'


def write(
  folder: str | os.PathLike,
  *,
  title: str,
  command: str,
  lines: Sequence[str],
  records: Mapping[str, Any],
  config: str,
  figure: mpl.Figure,
  seed: int,
  seconds: float,
) -> pathlib.Path:
  """Write a folder of results; returns it.

  What an earlier README.md says under "What it means" is kept: it is written
  by hand, and to be read again when numbers change.

  Args:
    folder: For README.md, results.json, config.gin and figure.png.
    title: Of the page.
    command: That makes it.
    lines: Of the page, between command and figure.
    records: Everything behind table and figure; plain JSON data.
    config: Resolved gin configuration.
    figure: To be saved.
    seed: Of the run.
    seconds: That it took.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  page = folder / 'README.md'
  meaning = meaning_of(page)
  versions = runs.versions()
  libraries = ', '.join(
    f'{n} {versions[n]}' for n in ('python', 'jax', 'numpy')
  )
  git = runs.git_state(pathlib.Path(__file__).parents[1]) or {}
  commit = git.get('commit', 'unknown')[:10]
  if git.get('changed'):
    commit += ' with changes'
  head = [
    f'# {title}',
    '',
    f'    {command}',
    '',
    f'{seconds:.0f} s on {machine()}; {libraries}; commit {commit}; seed '
    f'{seed}; all settings in [config.gin](config.gin), all numbers in '
    '[results.json](results.json).',
    '',
  ]
  tail = ['', '![figure](figure.png)', '', MEANING]
  page.write_text('\n'.join([*head, *lines, *tail]) + meaning, encoding='utf-8')
  (folder / 'results.json').write_text(json.dumps(records, indent=1) + '\n')
  (folder / 'config.gin').write_text(config)
  figure.savefig(folder / 'figure.png')
  return folder


def main(doc: str, study: Callable[[], Any], argv: Sequence[str] | None) -> Any:
  """Run a gin-bound study with the config file named by the arguments."""
  arguments = sys.argv[1:] if argv is None else argv
  if len(arguments) != 1:
    sys.exit(doc)
  plt.switch_backend('agg')
  gin.parse_config_file(arguments[0])
  return study()
