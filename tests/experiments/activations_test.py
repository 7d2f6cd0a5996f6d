"""The page of activations: every row in its place, and nothing else."""

import itertools

from experiments import activations_table
from mq_jax.lab import config


def records(values):
  mx = lambda bits, **more: {'format': 'mx_int', 'bits': bits, **more}
  kinds = [None, mx(8), mx(4), mx(4, smooth=0.7), mx(4, rotate=True)]
  found = [('none', {}, None)]
  for family, kind in itertools.product(['gptq', 'rtn'], kinds):
    found.append((family, {'bits': 4, 'group': 64}, kind))
  # None of these is a setting of the table.
  found.append(('gptq', {'bits': 4}, mx(4, smooth='search')))
  found.append(('gptq', {'bits': 4}, mx(4, smooth=0.7, fold=True)))
  found.append(('gptq', {'bits': 4}, {'format': 'token', 'bits': 4}))
  found.append(('gptq', {'bits': 4, 'clip': 'search'}, None))
  for family, options, kind in found:
    given = options if kind is None else options | {'activations': kind}
    yield {
      'model': 'tiny',
      'family': family,
      'recipe': config.label_of(family, given),
      'options': given,
      'bits_per_byte': next(values),
    }


def test_rows_are_placed_by_setting_and_transform():
  rows = list(records(itertools.count(1.0, 0.125)))
  text = activations_table.summary(rows)
  assert 'tiny, 1.0000 unquantized' in text
  assert '| weights | inputs | W4A16 | W4A8 | W4A4 |' in text
  assert '| gptq | as they come | 1.125 | 1.25 | 1.375 |' in text
  assert '| gptq | smooth |  |  | 1.5 |' in text
  assert '| rtn | rotate |  |  | 2.25 |' in text
  assert '2.375' not in text and '2.75' not in text
  figure = activations_table.draw(rows, footnote='test')
  points = [
    (x, y)
    for line in figure.axes[0].get_lines()
    if line.get_marker() in 'os^'
    for x, y in zip(line.get_xdata(), line.get_ydata())
  ]
  assert sorted(y for _, y in points) == [1.125 + 0.125 * i for i in range(10)]
  assert len({round(x, 3) for x, _ in points}) == 10  # none hides another
