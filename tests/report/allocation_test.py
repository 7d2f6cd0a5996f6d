"""The figure and tables of an allocation, from a report made by hand."""

import io

import pytest
from rich import console

from mq_jax.report import allocation


def point(solver, ebw, test, asked=False):
  costs = {'ebw': ebw, 'cycles': 1e6 * ebw}
  return {'solver': solver, 'asked': asked, 'costs': costs, 'test': test}


def report(first='ebw', limit=2.5):
  budget = {'quantity': first, 'asked': '0.6x', 'limit': limit}
  site = {'label': 'rtn w2', 'ebw': 2.25, 'alone': 0.125}
  side = lambda name, loss, key, price: {
    name: 'rtn w3', f'{name}_loss': loss, f'{name}_{key}': price
  }  # fmt: skip
  return {
    'model': 'small',
    'solver': 'gradient',
    'seed': 3,
    'steps': 8,
    'budgets': [budget | {'achieved': 0.99 * limit, 'room': 0.01}],
    'achieved': {'ebw': 2.475, 'cycles': 2.475e6},
    'loss': {
      'search': 1.0,
      'test': 1.1,
      'unquantized_search': 0.9,
      'unquantized_test': 1.0,
    },  # fmt: skip
    'scores': {'perplexity': 3.0, 'bits_per_byte': 0.5},
    'front': [
      point('gradient', 2.475, 1.1, True),
      point('gradient', 3.0, 1.05),
      point('greedy', 2.4, 1.15, True),
      point('greedy', 3.0, None),
    ],
    'uniform': [
      {'candidate': 'rtn w2', **point('', 2.25, 9.5)},
      {'candidate': 'rtn w4', **point('', 4.25, 1.01)},
    ],
    'sites': [
      {'site': f'layers/{i}/up/kernel', **site}
      | side('cheaper', None, 'saves', None)
      | side('dearer', -0.0625, 'takes', 0.01 * limit)
      for i in range(3)
    ],
    'seconds': {'gradient': 12.0, 'table': 3.0},
    'setup': {
      'accelerator': {'name': 'systolic:os', 'phase': 'prefill'},
      'texts': {'search': {'windows': 8}, 'test': {'windows': 16}},
    },
    'notes': [],
  }


def drawn(table):
  out = console.Console(file=io.StringIO(), width=80)
  out.print(table)
  return out.file.getvalue()


def test_the_figure_has_units_names_and_a_strip_for_what_is_far_off():
  fig = allocation.pareto(report())
  (axes,) = fig.axes
  assert axes.get_xlabel() == 'effective bit width, ebw [bit/weight]'
  assert axes.get_ylabel() == 'loss on the test text [nat/token]'
  (legend,) = fig.legends
  words = [text.get_text() for text in legend.get_texts()]
  assert words == [
    *('gradient', 'greedy', 'one candidate everywhere', 'the plan'),
    *('budget: 0.6x', 'unquantized: 1.000'),
  ]
  lines = {line.get_label(): line for line in axes.lines}
  assert lines['greedy'].get_xydata().tolist() == [[2.4, 1.15]]
  assert lines['the plan'].get_xydata().tolist() == [[2.475, 1.1]]
  assert axes.get_ylim()[1] < 2  # 9.5 is in the strip
  assert any('9.50' in text.get_text() for text in axes.texts)
  note = fig.get_supxlabel()
  assert 'small, seed 3' in note and 'systolic:os' in note


def test_other_quantities_are_scaled():
  fig = allocation.pareto(report('cycles', 2.5e6))
  (axes,) = fig.axes
  assert axes.get_xlabel() == 'Mcycles'
  (plan,) = (x for x in axes.lines if x.get_label() == 'the plan')
  assert plan.get_xdata().tolist() == [2.475]


def test_tables_fit_a_terminal():
  found = report()
  sites = drawn(allocation.sites_table(found))
  assert '0/up' in sites and '-0.0625' in sites and '1.00' in sites
  solvers = drawn(allocation.solvers_table(found))
  assert '+0.0500' in solvers and '12.0' in solvers and 'all rtn w2' in solvers
  budgets = drawn(allocation.budgets_table(found))
  assert '2.4750' in budgets and 'Mcycles' in budgets
  assert '15 s in all' in allocation.sentence(found)


@pytest.mark.parametrize('name', ['front', 'uniform'])
def test_losses_that_are_not_finite_are_left_out(name):
  found = report()
  for one in found[name]:
    one['test'] = None
  found['loss']['test'] = None
  allocation.pareto(found)
  assert 'not finite' in drawn(allocation.solvers_table(found))
