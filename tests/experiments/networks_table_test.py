import json
import pathlib

import numpy as np

from experiments import networks_table
from mq_jax.report import style


def record(model, recipe, family, ebw, **scores):
  task = 'noise' if 'dit' in model else 'classes'
  known = {'model': model, 'task': task, 'recipe': recipe, 'family': family}
  return known | ({} if ebw is None else {'ebw': ebw}) | scores


def records():
  found = []
  for model, what in (('resnet', 'nll'), ('dit', 'mse')):
    for end, worse in (('', 1.0), ('-planted', 2.0)):
      for recipe, family, ebw in (
        ('unquantized', 'unquantized', None),
        ('none', 'none', 16.0),
        ('rtn w2', 'rtn', 2.4),
        ('rtn w4', 'rtn', 4.4),
      ):
        scores = {what: worse / (ebw or 32), 'top1': 0.5, 'against': None}
        scores |= {'sqnr_db': None if ebw is None else 10 * ebw}
        found.append(record(model + end, recipe, family, ebw, **scores))
  return found


def test_table_has_plain_beside_planted():
  found = [r for r in records() if r['task'] == 'classes']
  lines = networks_table.table(found).splitlines()
  assert len(lines) == 2 + 4
  head, two = (
    [c.strip() for c in lines[i].strip('|').split('|')] for i in (0, 4)
  )
  row = dict(zip(head, two))
  assert row['recipe'] == 'rtn w2'
  assert row['ebw plain'] == row['ebw planted'] == '2.400'
  assert (row['nll plain'], row['nll planted']) == ('0.417', '0.833')
  assert row['top-1 plain'] == '50.0%'
  first = [c.strip() for c in lines[2].strip('|').split('|')]
  assert first[1] == '32' and first[4] == ''  # nothing is stored or differs


def test_figure_has_a_panel_for_each_network(tmp_path):
  fig = networks_table.draw(records(), 'table.gin, seed 0')
  panels = [a for a in fig.axes if a.get_title()]
  assert [a.get_title() for a in panels] == [
    'resnet', 'resnet-planted', 'dit', 'dit-planted'
  ]  # fmt: skip
  for axes, model in zip(panels, ('resnet', 'resnet-planted')):
    (line,) = [x for x in axes.lines if x.get_label() == 'rtn']
    np.testing.assert_array_equal(line.get_xdata(), [2.4, 4.4])
    wanted = [r['nll'] for r in records() if r['model'] == model]
    np.testing.assert_array_equal(line.get_ydata(), wanted[2:])
  style.save(fig, tmp_path / 'figure.png')
  assert (tmp_path / 'figure.png').stat().st_size


class Bench:
  """Counts what it is asked for."""

  def __init__(self, name):
    self.net = type('Net', (), {'name': name, 'task': 'classes', 'params': 0})
    self.asked = 0

  def scores(self, packed):
    self.asked += 1
    return {'nll': 1.0}


def test_rows_that_are_done_are_not_done_again(tmp_path):
  benches = [Bench('a'), Bench('b')]
  asked = [(None, {})]
  found = networks_table.rows_of(benches, asked, tmp_path)
  again = networks_table.rows_of(benches, asked, pathlib.Path(tmp_path))
  assert found == again and [r['model'] for r in found] == ['a', 'b']
  assert [b.asked for b in benches] == [1, 1]
  kept = (tmp_path / 'a.jsonl').read_text().splitlines()
  assert [json.loads(line) for line in kept] == found[:1]


def test_what_is_missing_can_be_left_out(tmp_path):
  asked = [(None, {}), ('rtn', {'bits': 2})]
  networks_table.rows_of([Bench('a')], asked[:1], tmp_path)
  of = lambda *names: networks_table.rows_of(
    [Bench(n) for n in names], asked, tmp_path, run=False
  )
  assert [r['recipe'] for r in of('a')] == ['unquantized']
  assert of('a', 'b') == []
