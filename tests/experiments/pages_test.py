"""Pages of studies that are scripts."""

import json

from matplotlib import figure as mpl

from experiments import _pages


def write(folder, lines):
  return _pages.write(
    folder, title='Title', command='python -m x', lines=lines,
    records={'a': 1}, config='x.y = 1\n', figure=mpl.Figure(), seed=3,
    seconds=1.5,
  )  # fmt: skip


def test_a_paragraph_by_hand_outlives_the_next_run(tmp_path):
  page = write(tmp_path, ['first', '']) / 'README.md'
  assert page.read_text().endswith('## What it means\n')
  page.write_text(page.read_text() + '\nMeasured.\n')
  write(tmp_path, ['second', ''])
  text = page.read_text()
  assert text.endswith('## What it means\n\nMeasured.\n')
  assert 'second' in text and 'first' not in text and 'seed 3' in text
  assert json.loads((tmp_path / 'results.json').read_text()) == {'a': 1}
  assert (tmp_path / 'figure.png').stat().st_size


def test_table():
  rows = [['a', 1, None, 0.12345], ['b', 2e7, 3, 4.0]]
  assert _pages.table(['x', 'n', 'm', 'v'], rows) == (
    '| x | n | m | v |\n| --- | ---: | ---: | ---: |\n'
    '| a | 1 |  | 0.1235 |\n| b | 2e+07 | 3 | 4 |\n'
  )
