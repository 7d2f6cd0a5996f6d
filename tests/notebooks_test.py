"""The notebooks run, and each is its script, executed."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / 'notebooks').glob('[0-9]*.py'))
QUICK = ('04_accelerator',)

# Nothing of the machine on which a notebook ran.
MACHINE = re.compile(
  r'/(home|work|root|tmp|Users|usr)/|site-packages|0x[0-9a-f]{6}'
)


def _cells(script):
  """(kind, text) of the cells of a percent script."""
  parts = re.split(r'^# %%(.*)\n', script.read_text(), flags=re.MULTILINE)
  for mark, text in zip(parts[1::2], parts[2::2]):
    text = text.strip('\n')
    if 'markdown' in mark:
      yield 'markdown', re.sub(r'^# ?', '', text, flags=re.MULTILINE)
    else:
      yield 'code', text


def test_there_are_six():
  assert [script.name[:2] for script in SCRIPTS] == [
    *('01', '02', '03', '04', '05', '06')
  ]


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda x: x.stem)
def test_notebook_is_its_script_executed(script):
  notebook = json.loads(script.with_suffix('.ipynb').read_text())
  cells = [
    (cell['cell_type'], ''.join(cell['source']).strip('\n'))
    for cell in notebook['cells']
  ]
  assert cells == [*_cells(script)]
  code = [cell for cell in notebook['cells'] if cell['cell_type'] == 'code']
  assert [cell['execution_count'] for cell in code] == [
    *range(1, len(code) + 1)
  ]
  outputs = [output for cell in code for output in cell['outputs']]
  kinds = [output['output_type'] for output in outputs]
  assert 'error' not in kinds
  texts = []
  for output in outputs:
    assert output.get('name') != 'stderr', output['text']
    data = output.get('data', {})
    texts += [output.get('text', ''), data.get('text/plain', '')]
  assert not MACHINE.findall(''.join(''.join(text) for text in texts))
  assert script.with_suffix('.ipynb').stat().st_size < 300_000


@pytest.mark.parametrize(
  'script',
  [
    pytest.param(x, marks=[] if x.stem in QUICK else [pytest.mark.slow])
    for x in SCRIPTS
  ],
  ids=lambda x: x.stem,
)
def test_runs(script):
  # A process of its own: notebooks run without the strictness of the tests.
  done = subprocess.run(
    [sys.executable, '-W', 'error::DeprecationWarning:__main__', script.name],
    cwd=script.parent,
    env=os.environ | {'MPLBACKEND': 'Agg', 'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout.strip()
