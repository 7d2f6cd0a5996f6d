"""The allocation study: its sums by hand, and one run of it on a tiny model."""

import json
import pathlib

import gin
import matplotlib.pyplot as plt
import numpy as np
import pytest

from experiments import allocation

FOLDER = pathlib.Path(__file__).parents[2] / 'configs/allocation'


@pytest.fixture
def clean():
  with gin.unlock_config():
    gin.clear_config()
  yield
  with gin.unlock_config():
    gin.clear_config()


def _records():
  return [
    {
      'model': 'm',
      'seed': seed,
      'solver': solver,
      'budget': budget,
      'rise': factor * (1 + seed) / budget,
      'test_divergence': 2 * factor * (1 + seed) / budget,
    }
    for solver, factor in (('gradient', 1.0), ('greedy', 1.25))
    for budget in (2.5, 3.0)
    for seed in (0, 1)
  ]


def test_duels_are_paired_by_seed():
  rows = _records()
  found = allocation.duels(rows, 'rise')
  assert found == '4 of 4 against greedy (+20 % less)'
  rows[0]['rise'] = 9.0  # gradient at 2.5 bits, seed 0
  assert allocation.duels(rows, 'rise').startswith('3 of 4')


def test_table_has_means_ranges_and_the_best_in_bold():
  page = '\n'.join(allocation.tables(_records(), 'ebw'))
  assert '| 2.5 | **600.0 ± 200.0** | 750.0 ± 250.0 |' in page


def test_figure_shows_the_rise_over_that_of_the_gradient():
  plt.switch_backend('agg')
  figure = allocation.draw(_records(), 'ebw', 'bit/weight', 'footnote')
  (bar,) = figure.axes[0].containers
  np.testing.assert_allclose(bar.lines[0].get_ydata().astype(float), 25.0)
  plt.close(figure)


@pytest.mark.parametrize(
  'name', [p.name for p in sorted(FOLDER.glob('claim*.gin'))]
)
def test_configs_bind_what_there_is(clean, monkeypatch, name):
  monkeypatch.chdir(FOLDER.parents[1])
  gin.parse_config_file(str(FOLDER / name))
  assert gin.query_parameter('allocation.config') == name
  assert gin.query_parameter('allocation.seeds')


@pytest.mark.slow
def test_a_tiny_study(clean, tiny, tmp_path, monkeypatch):
  plt.switch_backend('agg')
  text = tmp_path / 'text.txt'
  lines = [f'The {i}th café had {i * i} guests.' for i in range(80)]
  text.write_text('\n'.join(lines), encoding='utf-8')
  other = tmp_path / 'other.txt'
  lines = [f'In {1900 + i} no rain fell, nor {3 * i} snow!' for i in range(60)]
  other.write_text('\n'.join(lines), encoding='utf-8')
  model = str(tiny)
  arguments = {
    'config': 'tiny.gin',
    'out': tmp_path / 'page',
    'runs': tmp_path / 'runs',
    'models': [model],
    'texts': [(model, (str(other), str(text)))],
    'budget': 'ebw=3.6',
    'front': [4.0],
    'candidates': [f'rtn:bits={b},group=16' for b in (2, 3, 4)],
    'solvers': ('gradient', 'integer_program', 'uniform'),
    'calibration_windows': 4,
    'search_windows': 4,
    'test_windows': 4,
    'steps': 4,
  }
  folder = allocation.allocation(**arguments)
  rows = json.loads((folder / 'results.json').read_text())
  assert {r['budget'] for r in rows} == {3.6, 4.0}
  assert all(r['achieved'] <= r['budget'] for r in rows)
  assert (
    '| ebw | gradient | integer_program | uniform |'
    in (folder / 'README.md').read_text()
  )
  # Finished runs are not done again.
  monkeypatch.setattr(allocation.allocating.running.setup, 'objective', None)
  allocation.allocation(**arguments)
  assert json.loads((folder / 'results.json').read_text()) == rows
