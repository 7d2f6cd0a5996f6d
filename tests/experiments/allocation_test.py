"""The page of the allocation study, from records made by hand."""

import pathlib

import gin
import matplotlib.pyplot as plt

from experiments import allocation

CONFIG = pathlib.Path(__file__).parents[2] / 'configs/allocation/claim.gin'


def _records():
  return [
    {'method': method, 'budget': budget, 'nll': 1.0 + level / budget + seed}
    for method, level in (('integer program', 1.0), ('gradient', 0.5))
    for budget in (2.5, 3.0)
    for seed in (0.0, 0.1)
  ]


def test_means_by_budget():
  found = allocation._means(_records(), 'gradient')
  assert found[2.5].tolist() == [1.2, 1.3]


def test_figure_shows_the_difference_to_the_integer_program():
  plt.switch_backend('agg')
  figure = allocation.draw(_records(), [2.5, 3.0], 'footnote')
  lines = {
    bar.get_label(): bar.lines[0].get_ydata()
    for bar in figure.axes[0].containers
  }
  assert abs(lines['integer program']).max() == 0
  assert abs(lines['gradient'][0] + 0.2) < 1e-9
  plt.close(figure)


def test_config_binds_what_there_is():
  with gin.unlock_config():
    gin.clear_config()
    gin.parse_config_file(str(CONFIG))
    assert gin.query_parameter('allocation.model') == 'reference'
    gin.clear_config()
