import itertools

import numpy as np
import pytest
from matplotlib import text as mpl_text

from mq_jax.report import figures, style


def record(recipe, family, ebw, bits_per_byte, model='plain'):
  return {
    'model': model,
    'recipe': recipe,
    'family': family,
    'ebw': ebw,
    'bits_per_byte': bits_per_byte,
  }


RECORDS = [
  record('none', 'none', 16.0, 1.8),
  record('rtn w4', 'rtn', 4.2, 1.83),
  record('gptq w4', 'gptq', 4.2, 1.82),
  record('awq w4', 'awq', 4.2, 1.825),
  record('rtn w2', 'rtn', 2.2, 9.5),
  record('gptq w2', 'gptq', 2.2, 2.6),
  {'model': 'plain', 'recipe': 'broken', 'family': 'x', 'status': 'failed'},
]


def texts(figure):
  found = [t.get_text() for t in figure.findobj(mpl_text.Text)]
  return [t for t in found if t]


def test_says_what_is_drawn():
  both = RECORDS + [{**r, 'model': 'planted'} for r in RECORDS]
  figure = figures.quality_over_bits(both, footnote='config x.gin, seed 7')
  found = texts(figure)
  assert len(figure.axes) == 2
  for words in ('plain', 'planted', 'config x.gin, seed 7', 'Pareto line'):
    assert words in found
  assert any('[bit/weight]' in t for t in found)
  assert any('[bit/byte]' in t for t in found)
  assert any('unquantized, 16 bits: 1.800' in t for t in found)
  assert found.count('gptq w4') == 2
  assert not any('broken' in t for t in found)


def test_what_is_beyond_the_axis_keeps_its_value():
  figure = figures.quality_over_bits(RECORDS)
  assert 'rtn w2 \N{UPWARDS ARROW} 9.50' in texts(figure)
  axes = figure.axes[0]
  assert axes.get_ylim()[1] < 4
  marks = [m for m in axes.lines if m.get_marker() not in ('None', '')]
  for mark in marks:
    assert axes.get_ylim()[0] < mark.get_ydata()[0] < axes.get_ylim()[1]


def test_labels_do_not_cover_each_other():
  figure = figures.quality_over_bits(RECORDS)
  renderer = figure.canvas.get_renderer()
  names = {r['recipe'] for r in RECORDS}
  boxes = [
    t.get_window_extent(renderer)
    for t in figure.axes[0].texts
    if t.get_text().split(' \N{UPWARDS ARROW}')[0] in names
  ]
  assert len(boxes) == 5
  for a, b in itertools.combinations(boxes, 2):
    assert not a.overlaps(b)


def test_families_differ_without_colour():
  markers = [m for m, _ in zip(style.MARKERS, range(10))]
  assert len(set(markers)) == 10


def test_pareto_line_is_a_staircase_through_the_best():
  figure = figures.quality_over_bits(RECORDS)
  lines = [
    line.get_xydata()
    for line in figure.axes[0].lines
    if line.get_drawstyle() == 'steps-post'
  ]
  np.testing.assert_allclose(lines[0][:2], [[2.2, 2.6], [4.2, 1.82]])


def test_one_model_without_reference_and_a_single_point():
  figure = figures.quality_over_bits([RECORDS[1]])
  assert 'rtn w4' in texts(figure)
  figure = figures.quality_over_bits([RECORDS[0]])
  assert any('unquantized' in t for t in texts(figure))


def test_nothing_to_draw():
  with pytest.raises(ValueError, match='no record has both'):
    figures.quality_over_bits([RECORDS[-1]])


def test_is_written_as_png(tmp_path):
  figures.quality_over_bits(RECORDS).savefig(tmp_path / 'f.png')
  assert (tmp_path / 'f.png').read_bytes()[:4] == b'\x89PNG'
