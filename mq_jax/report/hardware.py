"""Tables and figures of where cycles and energy go.

Drawn from records of `lab.costing`: of matmuls, or the totals of entries.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib import figure as mpl
from matplotlib.backends import backend_agg
from rich import box, table, text

Record = Mapping[str, Any]


class Part(NamedTuple):
  """A part of a whole: field, name, colour, hatch."""

  field: str
  name: str
  color: str
  hatch: str = ''


# Dark and light alternate, and hatches differ: the same in grey. Dots would be
# hundreds of outlines in a vector file.
CYCLES = (
  Part('compute_cycles', 'compute', '#1f4e79'),
  Part('fill_cycles', 'fill and launch', '#f2d16b'),
  Part('stall_noc_cycles', 'waits for network', '#c8553d', '////'),
  Part('stall_sram_cycles', 'waits for L2 link', '#bfe0ea', '---'),
  Part('stall_dram_cycles', 'waits for DRAM', '#7f7f7f', '\\\\\\'),
)
ENERGY = (
  Part('array_pj', 'array', '#1f4e79'),
  Part('noc_pj', 'network', '#f2d16b'),
  Part('sram_pj', 'SRAM', '#c8553d', '////'),
  Part('dram_pj', 'DRAM', '#bfe0ea', '---'),
  Part('leakage_pj', 'leakage or board power', '#7f7f7f', '\\\\\\'),
)

_PREFIXES = ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k'), (1.0, ''))
_SMALL = ((1e-3, 'm'), (1e-6, 'u'), (1e-9, 'n'), (1e-12, 'p'))


def scaled(value: float, unit: str, small: bool = False) -> tuple[float, str]:
  """What to divide by, and the unit's name, so that `value` reads well.

  Args:
    value: A number in `unit`.
    unit: Its name.
    small: Whether a thousandth of the unit means anything.

  Examples:
    >>> scaled(2.5e7, 'cycles')
    (1000000.0, 'Mcycles')
    >>> scaled(3e-5, 's', small=True)
    (1e-06, 'us')
  """
  for factor, prefix in _PREFIXES + (_SMALL if small else ()):
    if abs(value) >= factor:
      return factor, prefix + unit
  return 1.0, unit


def _common(values: Sequence[float], unit: str) -> tuple[float, str]:
  """As `scaled`, of the smallest value as long as the largest stays short."""
  largest = max(values)
  for value in sorted(values):
    factor, name = scaled(value, unit, small=True)
    if value > 0 and largest / factor < 1e5:
      return factor, name
  return scaled(largest, unit, small=True)


def digits(value: float) -> str:
  """Three or more digits, never an exponent.

  Examples:
    >>> digits(1234.5), digits(12.345), digits(0.01234), digits(1e-6)
    ('1234', '12.3', '0.012', '<.001')
  """
  size = abs(value)
  if size < 1e-12:  # a roofline's SRAM, which is in its board power
    return '0'
  if size < 5e-4:
    return '<.001'
  places = 0 if size >= 99.95 else 1 if size >= 9.995 else 2
  return f'{value:.{3 if size < 0.9995 else places}f}'


def short(names: Sequence[str]) -> list[str]:
  """Names of sites without the last part, where it is the same for all.

  Examples:
    >>> short(['mlp/up/kernel', 'mlp/down/kernel'])
    ['mlp/up', 'mlp/down']
    >>> short(['olive', 'gobo'])
    ['olive', 'gobo']
  """
  heads, _, tails = zip(*(name.rpartition('/') for name in names), strict=True)
  same = len(names) > 1 and len(set(tails)) == 1 and len(set(heads)) > 1
  return list(heads if same and all(heads) else names)


def _frame(title: str, first: str) -> table.Table:
  out = table.Table(
    title=text.Text(title),  # not markup: units stand in brackets
    title_justify='left',
    box=box.SIMPLE_HEAD,
    pad_edge=False,
    padding=0,
  )
  out.add_column(first, overflow='fold')
  return out


def _fill(out, records, label, columns, total=None):
  """Rows of a table; the total stands apart."""
  for heading, _ in columns:
    out.add_column(text.Text(heading), justify='right', no_wrap=True)
  names = short([str(r[label]) for r in records])
  for name, record in zip(names, records, strict=True):
    out.add_row(text.Text(name), *(show(record) for _, show in columns))
  if total is not None:
    out.add_section()
    out.add_row('total', *(show(total) for _, show in columns), style='bold')
  return out


def _largest(records, field):
  return max(record[field] for record in records)


def _percent(record: Record, field: str) -> str:
  value = record[field]
  return '0' if value == 0 else digits(100 * value)


def _blank(record: Record, field: str) -> str:
  value = record.get(field)
  if value is None:
    return ''
  return digits(value) if isinstance(value, float) else str(value)


def widths(record: Record) -> str:
  """'W4A8', or blanks where matmuls differ.

  Examples:
    >>> widths({'weight_bits': 4, 'activation_bits': None})
    'W*A*'
  """
  show = lambda x: '*' if x is None else format(x, 'g')
  pair = (record['weight_bits'], record['activation_bits'])
  return 'W{}A{}'.format(*map(show, (None, None) if None in pair else pair))


def sizes_table(
  records: Sequence[Record], total: Record, title: str = 'matmuls'
) -> table.Table:
  """What is multiplied: sizes, how often, and bits as stored."""
  columns = [
    *((x, lambda r, x=x: _blank(r, x)) for x in ('m', 'k', 'n')),
    ('times', lambda r: str(int(r['count']))),
    ('bits', widths),
    ('ebw', lambda r: f'{r["ebw"]:.3f}'),
    ('outlier\nblocks %', lambda r: _percent(r, 'outlier_blocks')),
  ]
  return _fill(_frame(title, 'site'), records, 'site', columns, total)


def cycles_table(
  records: Sequence[Record], total: Record | None = None, label: str = 'site'
) -> table.Table:
  """Cycles by part; parts add up to the total.

  Args:
    records: Of matmuls, or of entries.
    total: Of all of them; None where they are alternatives.
    label: Field that names a record.
  """
  factor, unit = _common([r['total_cycles'] for r in records], 'cycles')
  number = lambda field: lambda r: digits(r[field] / factor)
  columns = [
    ('compute', number('compute_cycles')),
    ('fill', number('fill_cycles')),
    ('wait\nnetwork', number('stall_noc_cycles')),
    ('wait\nL2', number('stall_sram_cycles')),
    ('wait\nDRAM', number('stall_dram_cycles')),
    ('total', number('total_cycles')),
    ('used\n%', lambda r: _percent(r, 'utilization')),
    ('conflict\n%', lambda r: _percent(r, 'conflict_rate')),
  ]
  if label == 'entry':
    columns.insert(0, ('GHz', lambda r: f'{r["clock_ghz"]:g}'))
  title = f'cycles [{unit}]'
  return _fill(_frame(title, label), records, label, columns, total)


def energy_table(
  records: Sequence[Record], total: Record | None = None, label: str = 'site'
) -> table.Table:
  """Energy by part, and DRAM traffic; as `cycles_table`."""
  factor, unit = _joules([r['total_pj'] for r in records])
  each, byte = _common([r['dram_bytes'] for r in records], 'B')
  number = lambda field: lambda r: digits(r[field] / factor)
  columns = [
    ('array', number('array_pj')),
    ('network', number('noc_pj')),
    ('SRAM', number('sram_pj')),
    ('DRAM', number('dram_pj')),
    ('leakage', number('leakage_pj')),
    ('total', number('total_pj')),
    (f'DRAM\n[{byte}]', lambda r: digits(r['dram_bytes'] / each)),
  ]
  title = f'energy [{unit}]'
  return _fill(_frame(title, label), records, label, columns, total)


def _joules(values_pj: Sequence[float]) -> tuple[float, str]:
  """Factor in pJ, and its unit."""
  factor, unit = _common([1e-12 * value for value in values_pj], 'J')
  return 1e12 * factor, unit


def comparison_table(totals: Sequence[Record]) -> table.Table:
  """Entries side by side: time, energy, traffic and area.

  Args:
    totals: With `entry` and `clock_ghz`; the first is what the others are
      compared with.
  """
  first = totals[0]
  second, time = _common([r['time_s'] for r in totals], 's')
  joule, energy = _joules([r['total_pj'] for r in totals])
  each, byte = _common([r['dram_bytes'] for r in totals], 'B')
  ratio = lambda r, field: digits(r[field] / first[field])
  columns = [
    ('bits', widths),
    ('ebw', lambda r: f'{r["ebw"]:.2f}'),
    (f'time\n[{time}]', lambda r: digits(r['time_s'] / second)),
    ('x 1st', lambda r: ratio(r, 'time_s')),
    (f'energy\n[{energy}]', lambda r: digits(r['total_pj'] / joule)),
    ('x 1st', lambda r: ratio(r, 'total_pj')),
    (f'DRAM\n[{byte}]', lambda r: digits(r['dram_bytes'] / each)),
    ('area\n[mm2]', lambda r: digits(1e-6 * r['total_um2'])),
    ('without\nSRAM', lambda r: digits(1e-6 * _logic(r))),
    ('used\n%', lambda r: _percent(r, 'utilization')),
  ]
  frame = _frame('side by side', 'entry')
  return _fill(frame, totals, 'entry', columns)


def _logic(record: Record) -> float:
  return record['total_um2'] - record['sram_um2']


def sentence(total: Record) -> str:
  """A total in words: time, energy, traffic, area by part."""
  second, time = scaled(total['time_s'], 's', small=True)
  cycles, unit = scaled(total['total_cycles'], 'cycles')
  joule, energy = _joules([total['total_pj']])
  each, byte = scaled(total['dram_bytes'], 'B')
  parts = ('array', 'noc', 'control', 'sram')
  shown = zip(('array', 'network', 'control', 'SRAM'), parts)
  area = ', '.join(
    f'{name} {total[f"{part}_um2"]:,.0f}'
    for name, part in shown
    if total[f'{part}_um2']
  )
  return (
    f'{digits(total["total_cycles"] / cycles)} {unit} = '
    f'{digits(total["time_s"] / second)} {time} at {total["clock_ghz"]:g} GHz; '
    f'{digits(total["total_pj"] / joule)} {energy}; '
    f'{digits(total["dram_bytes"] / each)} {byte} of DRAM; used '
    f'{_percent(total, "utilization")} %, conflicts '
    f'{_percent(total, "conflict_rate")} %; area '
    f'{digits(1e-6 * total["total_um2"])} mm2 ({area} um2)'
  )


def where_it_goes(
  records: Sequence[Record],
  *,
  label: str = 'site',
  in_time: bool = False,
  title: str | None = None,
  footnote: str = '',
) -> mpl.Figure:
  """Stacked bars of cycles (or time) and of energy, one bar a record.

  Args:
    records: Of matmuls or of entries, with `clock_ghz` for time.
    label: Field that names a record.
    in_time: Time instead of cycles, where clocks differ.
    title: Printed above.
    footnote: What was priced, printed below.

  Returns:
    The figure, which `savefig` writes.

  Raises:
    ValueError: without records.
  """
  if not records:
    raise ValueError('no figure: there are no records')
  fig = mpl.Figure(
    figsize=(11, 2.2 + 0.36 * len(records)), dpi=150, layout='constrained'
  )
  backend_agg.FigureCanvasAgg(fig)  # no pyplot, no display
  left, right = fig.subplots(1, 2, sharey=True)
  names = short([str(record[label]) for record in records])
  if in_time:
    clock = [1e9 * record['clock_ghz'] for record in records]
    longest = max(
      r['total_cycles'] / c for r, c in zip(records, clock, strict=True)
    )
    factor, unit = scaled(longest, 's', small=True)
    each, quantity = [factor * c for c in clock], 'time'
  else:
    factor, unit = scaled(_largest(records, 'total_cycles'), 'cycles')
    each, quantity = [factor] * len(records), 'cycles'
  joule, energy = _joules([_largest(records, 'total_pj')])
  _bars(left, names, records, CYCLES, each)
  _bars(right, names, records, ENERGY, [joule] * len(records))
  left.set_xlabel(unit if unit == quantity else f'{quantity} [{unit}]')
  right.set_xlabel(f'energy [{energy}]')
  left.set_ylim(len(records) - 0.4, -0.6)  # of both; the first on top
  if title:
    fig.suptitle(title, fontsize=10)
  if footnote:
    lines = [textwrap.fill(line, 180) for line in footnote.split('\n')]
    fig.supxlabel('\n'.join(lines), fontsize=7, color='0.3', ha='left', x=0.01)
  return fig


def _bars(axes, names, records, parts, factors) -> None:
  """One panel; parts that are nowhere are not in the legend."""
  heights = range(len(names))
  start = [0.0] * len(names)
  for part in parts:
    values = [
      record[part.field] / factor
      for record, factor in zip(records, factors, strict=True)
    ]
    # Thinner than a thousandth of the longest bar: nothing would be seen.
    if max(values) <= 1e-3 * _bar(records, parts, factors):
      continue
    axes.barh(
      heights,
      values,
      left=start,
      color=part.color,
      hatch=part.hatch,
      edgecolor='k',
      linewidth=0.4,
      label=part.name,
      height=0.7,
    )
    start = [a + b for a, b in zip(start, values, strict=True)]
  longest = _bar(records, parts, factors)
  for height, record, factor in zip(heights, records, factors, strict=True):
    whole = sum(record[part.field] for part in parts) / factor
    axes.annotate(
      digits(whole),
      (whole, height),
      xytext=(3, 0),
      textcoords='offset points',
      va='center',
      fontsize=7,
    )
  axes.set_xlim(0, 1.14 * longest)
  axes.set_yticks(list(heights), names, fontsize=8)
  axes.tick_params(axis='x', labelsize=8)
  axes.set_axisbelow(True)
  axes.grid(True, axis='x', color='0.9', lw=0.6)
  axes.legend(
    loc='lower center',
    bbox_to_anchor=(0.5, 1.0),
    ncols=5,
    fontsize=7,
    frameon=False,
    handlelength=1.8,
    handleheight=1.2,
    columnspacing=1.2,
  )


def _bar(records, parts, factors) -> float:
  """Length of the longest bar."""
  return max(
    sum(record[part.field] for part in parts) / factor
    for record, factor in zip(records, factors, strict=True)
  )
