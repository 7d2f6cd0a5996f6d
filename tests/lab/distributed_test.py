"""Several processes at one command."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from mq_jax.lab import cli, distributed

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
  'text', ['', 'host', 'host:1', 'host:x,0,2', 'host:1,2,2', 'host:1,a,2']
)
def test_what_is_no_address_is_refused(text, capsys):
  command = ['runs', '/nowhere', '--distributed', text]
  assert cli.main(command) == 2
  assert 'needs HOST:PORT,PROCESS,PROCESSES or auto' in capsys.readouterr().err


def test_one_process_writes_to_its_folder(tmp_path):
  with distributed.folder(tmp_path / 'out') as folder:
    assert folder == tmp_path / 'out'


def test_a_mesh_needs_its_devices(study, tmp_path, capsys):
  bindings = ['--set', "compare.mesh = 'data=64'"]
  out = tmp_path / 'out'
  assert cli.main(['run', str(study), *bindings, '--out', str(out)]) == 2
  assert 'data=64 times model=1 needs 64 devices' in capsys.readouterr().err
  assert not (out / 'results.jsonl').exists()
  bindings = ['--set', "compare.mesh = 'rows=2'"]
  assert cli.main(['run', str(study), *bindings]) == 2
  assert 'needs the form data=4,model=2' in capsys.readouterr().err


def _rows(folder):
  lines = (folder / 'results.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_two_processes_at_one_study(study, tmp_path):
  """One folder, the rows of one process but for rounding; and it resumes."""
  alone, both = tmp_path / 'alone', tmp_path / 'both'
  assert cli.main(['run', str(study), '--out', str(alone)]) == 0

  def run():
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      where = f'127.0.0.1:{free.getsockname()[1]}'
    started = []
    for i in range(2):
      environment = {
        **os.environ,
        'XLA_FLAGS': '--xla_force_host_platform_device_count=1',
        'PYTHONPATH': str(ROOT),
        'TMPDIR': str(tmp_path),
      }
      started.append(
        subprocess.Popen(
          [sys.executable, '-m', 'mq_jax.lab.cli', 'run', str(study)]
          + ['--set', "compare.mesh = 'data=2'", '--out', str(both)]
          + ['--distributed', f'{where},{i},2'],
          env=environment,
          stdout=subprocess.PIPE,
          stderr=subprocess.PIPE,
          text=True,
        )
      )
    said = [process.communicate(timeout=900) for process in started]
    assert [p.returncode for p in started] == [0, 0], said
    return said

  (first, _), (second, _) = run()
  # Gloo, which joins CPUs, has lines of its own.
  assert 'written to' in first and 'written to' not in second
  want = {row['recipe']: row for row in _rows(alone)}
  found = {row['recipe']: row for row in _rows(both)}
  assert found.keys() == want.keys() and len(_rows(both)) == len(want)
  for name, row in want.items():
    np.testing.assert_allclose(found[name]['nll'], row['nll'], rtol=1e-4)
    assert found[name]['ebw'] == row['ebw']
  # The rows but the last, as after a kill: all processes know what is missing.
  lines = (both / 'results.jsonl').read_text().splitlines(keepends=True)
  (both / 'results.jsonl').write_text(''.join(lines[:-1]))
  run()
  again = _rows(both)
  assert [r['nll'] for r in again] == [json.loads(x)['nll'] for x in lines]
