"""Time and memory of quantizing a model a block at a time.

    python -m experiments.benchmarks.streaming_rate --model DIR [--json]
        [--recipe microscopiq --bits 2] [--windows 8] [--out DIR]

Runs `mq quantize --stream` in a process of its own and watches what it keeps
resident: memory of its own, and pages of the checkpoint that the system lets
it keep for as long as nobody needs them. Folders of real shapes are written by
`python -m experiments.random_checkpoint`.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from typing import Any

from rich import box, console, table

# What issue 6 asks for: 1.1 B parameters on two cores.
AT_MOST = {'own_bytes': 6 * 2**30, 'seconds': 3600.0}
_POLL_S = 0.05


def _resident(pid: int) -> dict[str, int]:
  """Bytes that a process keeps in memory: its own, and of files."""
  found = {}
  with open(f'/proc/{pid}/status') as file:
    for line in file:
      name, _, value = line.partition(':')
      if name in ('RssAnon', 'RssFile'):
        found[name] = 1024 * int(value.split()[0])
  return found


def measure(arguments: argparse.Namespace, out: pathlib.Path) -> dict[str, Any]:
  """Run the command; its times, weights and peaks of memory."""
  command = [
    *(sys.executable, '-m', 'mq_jax.lab.cli', 'quantize', '--stream'),
    *('--model', arguments.model, '--recipe', arguments.recipe),
    *('--bits', str(arguments.bits), '--batch', '1', '--out', str(out)),
    *('--windows', str(arguments.windows)),
  ]
  peak = {'RssAnon': 0, 'RssFile': 0}
  start = time.perf_counter()
  process = subprocess.Popen(command)
  while process.poll() is None:
    try:
      now = _resident(process.pid)
    except OSError:  # it has just ended
      break
    peak = {name: max(peak[name], now.get(name, 0)) for name in peak}
    time.sleep(_POLL_S)
  if process.wait():
    raise SystemExit(process.returncode)
  seconds = time.perf_counter() - start
  manifest = json.loads((out / 'manifest.json').read_text())
  parts = _parts((out / 'log.txt').read_text())
  weights = manifest['totals']['elements']
  return {
    'model': manifest['model']['name'],
    'recipe': f'{arguments.recipe} w{arguments.bits}',
    'blocks': manifest['model']['config']['num_hidden_layers'],
    'weights': weights,
    'ebw': manifest['totals']['ebw'],
    'seconds': seconds,
    'weights_per_s': weights / seconds,
    'own_bytes': peak['RssAnon'],
    'file_bytes': peak['RssFile'],
    'parts_s': parts,
    'windows': arguments.windows,
    'cores': os.cpu_count(),
    'load': os.getloadavg()[0],
  }


def _parts(log: str) -> dict[str, float]:
  """Seconds of each part of the work, over the blocks that the log tells of."""
  total: dict[str, float] = {}
  for line in log.splitlines():
    if ' of ' in line and 'read ' in line and 'block ' in line:
      for name, seconds in re.findall(r'(\w+) ([\d.]+) s\b', line):
        total[name] = total.get(name, 0.0) + float(seconds)
  return total


def shown(result: dict[str, Any]) -> table.Table:
  """The result as a table."""
  out = table.Table(box=box.SIMPLE_HEAD, pad_edge=False)
  out.add_column(f'{result["model"]}, {result["recipe"]}')
  out.add_column('', justify='right')
  out.add_column('asked', justify='right')
  gib = lambda n: f'{n / 2**30:.2f} GiB'
  rows = [
    ('weights', f'{result["weights"] / 1e6:.0f} million', ''),
    ('blocks', str(result['blocks']), ''),
    ('ebw', f'{result["ebw"]:.3f} bit/weight', ''),
    ('time', f'{result["seconds"]:.0f} s', f'<= {AT_MOST["seconds"]:.0f} s'),
    ('weights a second', f'{result["weights_per_s"] / 1e6:.2f} million', ''),
    *((f'  {n}', f'{s:.0f} s', '') for n, s in result['parts_s'].items()),
    ('memory', gib(result['own_bytes']), f'<= {gib(AT_MOST["own_bytes"])}'),
    ('  of files', gib(result['file_bytes']), ''),
  ]
  for row in rows:
    out.add_row(*row)
  return out


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--model', required=True)
  parser.add_argument('--recipe', default='microscopiq')
  parser.add_argument('--bits', type=int, default=2)
  parser.add_argument('--windows', type=int, default=8)
  parser.add_argument('--out', help='keep the artifact there')
  parser.add_argument('--json', action='store_true')
  arguments = parser.parse_args(argv)
  with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(arguments.out or f'{folder}/artifact')
    result = measure(arguments, out)
  if arguments.json:
    print(json.dumps(result))
  else:
    console.Console().print(shown(result))
  return 0


if __name__ == '__main__':
  sys.exit(main())
