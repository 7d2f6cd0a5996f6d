import io

import pytest
from matplotlib import text as mpl_text
from rich import console

from mq_jax.report import hardware


def record(name, scale=1.0, **more):
  parts = {part.field: scale * 1e6 for part in hardware.CYCLES[:4]}
  parts |= {part.field: scale * 2e9 for part in hardware.ENERGY}
  return {
    'site': name,
    'entry': name,
    **dict(m=8, k=16, n=32, count=2, recipe='rtn(bits=4)'),
    **dict(weight_bits=4, activation_bits=8, ebw=4.25, outlier_blocks=0.02),
    **parts,
    'stall_dram_cycles': 0.0,
    'total_cycles': scale * 4e6,
    'time_s': scale * 4e-3,
    'total_pj': scale * 1e10,
    'dram_bytes': scale * 3e6,
    **dict(utilization=0.5, conflict_rate=0.0, clock_ghz=1.0),
    **dict(array_um2=1e4, noc_um2=0.0, control_um2=100.0, sram_um2=1e6),
    'total_um2': 1.0101e6,
  } | more


RECORDS = [record('a/up/kernel'), record('a/down/kernel', 3.0)]


def drawn(table):
  out = console.Console(width=80, record=True, file=io.StringIO())
  out.print(table)
  return out.export_text()


def texts(figure):
  return [t.get_text() for t in figure.findobj(mpl_text.Text) if t.get_text()]


def test_tables_hold_parts_units_and_totals():
  total = record('total', 4.0)
  sizes = drawn(hardware.sizes_table(RECORDS, total))
  assert 'W4A8' in sizes and '4.250' in sizes and 'a/down ' in sizes
  cycles = drawn(hardware.cycles_table(RECORDS, total))
  assert 'cycles [Mcycles]' in cycles
  assert '16.0' in cycles.splitlines()[-2]
  energy = drawn(hardware.energy_table(RECORDS, total))
  assert 'energy [mJ]' in energy and '40.0' in energy.splitlines()[-2]
  assert 'DRAM\n' not in energy and '[MB]' in energy


def test_alternatives_are_compared_with_the_first():
  rows = [record('olive'), record('gobo', 2.5, clock_ghz=0.5)]
  shown = drawn(hardware.comparison_table(rows))
  gobo = next(line for line in shown.splitlines() if 'gobo' in line)
  assert gobo.split().count('2.50') == 2  # time and energy
  assert '0.5' in drawn(hardware.cycles_table(rows, label='entry'))


def test_a_sentence_says_it_all():
  found = hardware.sentence(record('total'))
  assert found == (
    '4.00 Mcycles = 4.00 ms at 1 GHz; 10.0 mJ; 3.00 MB of DRAM; used 50.0 %, '
    'conflicts 0 %; area 1.01 mm2 (array 10,000, control 100, SRAM 1,000,000 '
    'um2)'
  )


def test_every_line_fits_a_terminal():
  long = [
    record('layers/*/self_attn/some_long_projection/kernel' + 'x' * i)
    for i in range(2)
  ]
  for table in (hardware.cycles_table(long), hardware.energy_table(long)):
    assert max(map(len, drawn(table).splitlines())) <= 80


def test_bars_add_up_and_say_their_units():
  figure = hardware.where_it_goes(RECORDS, title='x on y', footnote='seed 7')
  found = texts(figure)
  for words in ('cycles [Mcycles]', 'energy [mJ]', 'x on y', 'seed 7', 'a/up'):
    assert words in found
  assert 'waits for network' in found
  assert 'waits for DRAM' not in found  # there is none
  left, right = figure.axes
  for axes, want in ((left, (4, 12)), (right, (10, 30))):
    ends = [0.0, 0.0]
    for bars in axes.containers:
      for i, bar in enumerate(bars):
        assert bar.get_x() == pytest.approx(ends[i])
        ends[i] += bar.get_width()
    assert ends == pytest.approx(want)


def test_time_where_clocks_differ():
  rows = [record('olive'), record('mixpe', clock_ghz=0.5)]
  figure = hardware.where_it_goes(rows, label='entry', in_time=True)
  assert 'time [ms]' in texts(figure)
  assert '8.00' in texts(figure) and '4.00' in texts(figure)


def test_neighbours_differ_in_grey():
  def grey(color):
    r, g, b = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return 0.299 * r + 0.587 * g + 0.114 * b

  for parts in (hardware.CYCLES, hardware.ENERGY):
    for a, b in zip(parts, parts[1:]):
      assert abs(grey(a.color) - grey(b.color)) > 40 or a.hatch != b.hatch


def test_no_records_no_figure():
  with pytest.raises(ValueError, match='no records'):
    hardware.where_it_goes([])
