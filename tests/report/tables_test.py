import csv
import io

import pytest
from rich import console

from mq_jax.report import tables

RECORDS = [
  {'model': 'm', 'recipe': 'none', 'bits': 16, 'ebw': 16.0, 'nll': 1 / 3},
  {'model': 'm', 'recipe': 'a|b', 'bits': 2, 'ebw': 2.25, 'status': 'ok'},
  {'model': 'n', 'recipe': 'c', 'status': 'failed: ValueError: [bold]no'},
]


def shown(records, width=80):
  out = io.StringIO()
  console.Console(file=out, width=width).print(tables.rich_table(records))
  return out.getvalue()


def test_csv_holds_every_field_in_full():
  records = [*RECORDS, {'model': 'n', 'recipe': 'd', 'extra': 'x, "y"'}]
  rows = list(csv.DictReader(io.StringIO(tables.csv_text(records))))
  assert len(rows) == 4
  assert float(rows[0]['nll']) == 1 / 3
  assert rows[2]['nll'] == ''
  assert rows[3]['extra'] == 'x, "y"'


def test_markdown_has_as_many_cells_in_every_line():
  lines = tables.markdown(RECORDS).splitlines()
  assert len(lines) == 2 + len(RECORDS)
  cells = [line.replace('\\|', '').count('|') for line in lines]
  assert set(cells) == {len(tables.COLUMNS) + 1}
  assert 'a\\|b' in lines[3]
  assert '2.250' in lines[3]


@pytest.mark.parametrize('width', [80, 120])
def test_terminal_table_shows_numbers_whole_and_statuses_below(width):
  text = shown(RECORDS, width)
  assert '16.000' in text and '0.3333' in text
  assert 'status' in text and 'failed' in text
  assert 'n, c: failed: ValueError: [bold]no' in text  # markup is not read
  assert max(map(len, text.splitlines())) <= width


def test_terminal_table_of_nothing():
  assert 'recipe' in shown([])


def test_pareto_keeps_what_nothing_beats():
  points = [(4, 1.0), (3, 2.0), (3.5, 2.5), (4.5, 1.0), (2, 9.0), (2, 8.0)]
  assert tables.pareto(points) == [(2, 8.0), (3, 2.0), (4, 1.0)]
  assert tables.pareto([]) == []


def test_csv_of_named_fields():
  text = tables.csv_text([{'a': 1}, {'a': 2, 'b': 0.1}], ['a', 'b'])
  assert text == 'a,b\n1,\n2,0.1\n'
