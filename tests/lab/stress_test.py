"""kill -9 at random moments: runs come to the same bits, nothing is lost.

Each command is first run undisturbed. Then it is started and killed, again and
again, continued each time; a run that gets through is compared and begun anew.
Processes are forked from one that has imported everything, so that kills fall
into the work and not into imports.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time

import pytest

from mq_jax.lab import cli, files

pytestmark = pytest.mark.slow

KILLS = 18  # of each of three commands


@pytest.fixture(scope='module')
def start(tmp_path_factory):
  """Starts a command in a process of its own; all share a compile cache."""
  cache = tmp_path_factory.mktemp('cache')
  context = multiprocessing.get_context('forkserver')
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('JAX_COMPILATION_CACHE_DIR', str(cache))
    patch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
    context.set_forkserver_preload(
      ['mq_jax.lab.comparison', 'mq_jax.lab.allocating', 'orbax.checkpoint']
    )

    def start(arguments, log):
      process = context.Process(target=_command, args=(arguments, str(log)))
      process.start()
      return process

    yield start


def _command(arguments, log):
  with open(log, 'ab', buffering=0) as file:
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
  sys.exit(cli.main(arguments))


def _through(start, arguments, log):
  """Runs to the end; returns the seconds."""
  begun = time.monotonic()
  process = start(arguments, log)
  process.join()
  assert process.exitcode == 0, log.read_text()
  return time.monotonic() - begun


def _survive(start, arguments, out, result, folder, seed):
  """Kills a command KILLS times; its results are always the same."""
  log = folder / 'log'
  asked = [str(a) for a in arguments]
  whole = folder / 'whole'
  _through(start, [*asked, '--out', str(whole)], log)
  truth = result(whole)
  # Compiled programs are there now, as they are in the runs that are killed.
  again = folder / 'again'
  seconds = _through(start, [*asked, '--out', str(again)], log)
  assert result(again) == truth
  rng = random.Random(seed)
  killed, finished = 0, 0
  while killed < KILLS:
    process = start([*asked, '--out', str(out)], log)
    process.join(rng.uniform(0, seconds))
    if process.is_alive():
      os.kill(process.pid, signal.SIGKILL)
      process.join()
      killed += 1
      continue
    assert process.exitcode == 0, log.read_text()
    assert result(out) == truth
    finished += 1
    shutil.rmtree(out)
  _through(start, [*asked, '--out', str(out)], log)
  assert result(out) == truth
  print(f'{asked[0]}: {killed} kills, {finished + 1} results, all equal')


def _comparison(out):
  rows = files.read_lines(out / 'results.jsonl')
  for row in rows:
    del row['seconds'], row['eval_seconds']
  return (
    rows,
    (out / 'sites.jsonl').read_bytes(),
    (out / 'artifact' / 'packed.bin').read_bytes(),
    (out / 'config.gin').read_bytes(),
  )


def _artifact(out):
  return (out / 'manifest.json').read_bytes(), (out / 'packed.bin').read_bytes()


def _allocation(out):
  report = json.loads((out / 'report.json').read_text())
  report['seconds'] = None
  return (
    report,
    (out / 'plan.json').read_bytes(),
    (out / 'sites.csv').read_bytes(),
  )


def test_run(start, study, tmp_path):
  _survive(start, ['run', study], tmp_path / 'o', _comparison, tmp_path, 1)


def test_quantize(start, tiny, text, tmp_path):
  command = ['quantize', '--model', tiny, '--recipe', 'rtn', '--bits', 3]
  command += ['--set', 'group=16', '--calibration', text, '--windows', 8]
  _survive(start, command, tmp_path / 'o', _artifact, tmp_path, 2)


def test_allocate(start, tiny, text, tmp_path):
  other = tmp_path / 'other.txt'
  other.write_text(
    '\n'.join(f'In {i} no rain fell, {i * i}!' for i in range(80))
  )
  command = ['allocate', '--model', tiny, '--budget', 'ebw=3.6']
  for bits in (2, 3, 4):
    command += ['--candidate', f'rtn:bits={bits},group=16']
  command += ['--calibration', text, '--text', other, '--also', 'uniform']
  command += ['--steps', 4, '--front', 1, '--calibration-windows', 4]
  command += ['--search-windows', 4, '--test-windows', 4]
  _survive(start, command, tmp_path / 'o', _allocation, tmp_path, 3)
