"""Tables and figure of an allocation, drawn from the report of `mq allocate`.

A report is plain data: `budgets`, `sites`, `front`, `uniform`, `loss`; see
`lab.allocating.output.make_report`.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import figure as mpl
from matplotlib.backends import backend_agg
from rich import box, table, text

from mq_jax.report import figures, hardware

Report = Mapping[str, Any]

# Shape and line tell solvers apart, so the figure reads the same in grey.
LOOKS = {
  'gradient': ('o', '-', '#0072b2'),
  'integer_program': ('s', '--', '#d55e00'),
  'dynamic_program': ('D', '--', '#8c564b'),
  'lagrangian': ('d', ':', '#7a3e9d'),
  'hawq_v2': ('h', '-.', '#009e73'),
  'greedy': ('^', '-.', '#e69f00'),
  'evolution': ('P', ':', '#56b4e9'),
  'policy_gradient': ('X', ':', '#444444'),
  'uniform': ('_', 'none', '#1b1b1b'),
  'random': ('v', ':', '#999999'),
  'inverse_order': ('x', ':', '#bbbbbb'),
}
_MOST_SITES = 100

# Of each quantity: words for an axis, and how to scale it.
_AXES = {
  'ebw': ('effective bit width, ebw', ''),
  'bytes': ('packed weights', 'B'),
  'cycles': ('cycles', 'cycles'),
  'compute_cycles': ('compute cycles', 'cycles'),
  'time_s': ('time', 's'),
  'energy_pj': ('energy', 'J'),
  'dram_bytes': ('DRAM traffic', 'B'),
}


def unit_of(quantity: str, value: float) -> tuple[float, str]:
  """What to divide a quantity by so that `value` reads well, and the unit."""
  _, base = _AXES[quantity]
  if not base:
    return 1.0, 'bit/weight'
  if base == 'J':
    factor, unit = hardware.scaled(1e-12 * value, 'J', small=True)
    return 1e12 * factor, unit
  return hardware.scaled(value, base, small=base == 's')


def _frame(title: str) -> table.Table:
  return table.Table(
    title=text.Text(title),  # not markup: units stand in brackets
    title_justify='left',
    box=box.SIMPLE_HEAD,
    pad_edge=False,
    padding=0,
  )


def _columns(out: table.Table, first: str, others: Sequence[str]) -> None:
  out.add_column(first, overflow='fold')
  for heading in others:
    out.add_column(text.Text(heading), justify='right', no_wrap=True)


def budgets_table(report: Report) -> table.Table:
  """Asked against achieved, as measured on the packed weights."""
  out = _frame('budgets')
  _columns(out, 'quantity', ('asked', 'at most', 'achieved', 'room %', 'unit'))
  for budget in report['budgets']:
    factor, unit = unit_of(budget['quantity'], budget['limit'])
    out.add_row(
      budget['quantity'],
      budget['asked'],
      f'{budget["limit"] / factor:.4f}',
      f'{budget["achieved"] / factor:.4f}',
      f'{100 * budget["room"]:.2f}',
      unit,
    )
  asked = {budget['quantity'] for budget in report['budgets']}
  for quantity, value in report['achieved'].items():
    if quantity not in asked:
      factor, unit = unit_of(quantity, value)
      out.add_row(quantity, '', '', f'{value / factor:.4f}', '', unit)
  return out


def _signed(value: float | None) -> str:
  return '' if value is None else f'{value:+.4f}'


def short(names: Sequence[str]) -> list[str]:
  """Names without the first and last parts that all of them have.

  Examples:
    >>> short(['layers/0/up/kernel', 'layers/1/up/kernel'])
    ['0/up', '1/up']
  """
  names = hardware.short(names)
  heads = [name.split('/')[:-1] for name in names]
  same = os.path.commonprefix(heads)  # of lists it compares whole parts
  return ['/'.join(name.split('/')[len(same) :]) for name in names]


def sites_table(report: Report) -> table.Table:
  """What each site got, and what its next cheaper and dearer would change."""
  records = report['sites']
  first = report['budgets'][0]['quantity']
  # As shares of the budget: of small parts of large numbers these are short.
  limit = report['budgets'][0]['limit']
  out = _frame(
    'sites: loss [nat/token] if one alone takes its recipe, or the next by '
    f'{first};\nwhat that saves or takes, in % of the budget'
  )
  price = lambda x: '' if x is None else f'{100 * x / limit:.2f}'
  _columns(
    out,
    'site',
    (
      'recipe',
      'ebw',
      'alone',
      'next\ncheaper',
      'saves\n%',
      'next\ndearer',
      'takes\n%',
    ),
  )
  shown = records[:_MOST_SITES]
  names = short([r['site'] for r in records])
  for name, r in zip(names, shown, strict=False):
    out.add_row(
      text.Text(name),
      text.Text(r['label']),
      f'{r["ebw"]:.3f}',
      _signed(r['alone']),
      _signed(r['cheaper_loss']),
      price(r['cheaper_saves']),
      _signed(r['dearer_loss']),
      price(r['dearer_takes']),
    )
  if len(records) > len(shown):
    out.caption = f'{len(records) - len(shown)} more in sites.csv'
  return out


def solvers_table(report: Report) -> table.Table:
  """Solvers under the budgets that were asked for, and uniform candidates."""
  first = report['budgets'][0]['quantity']
  best = report['loss']['test']
  factor, unit = unit_of(first, report['budgets'][0]['limit'])
  out = _frame('solvers under these budgets, and uniform candidates')
  heading = first if unit == first else f'{first}\n[{unit}]'
  _columns(
    out,
    '',
    (heading, 'test loss\n[nat/token]', 'above\nthe plan', 'time\n[s]'),
  )

  def add(name, point, seconds=''):
    test = point['test']
    above = None if test is None or best is None else test - best
    out.add_row(
      text.Text(name),
      f'{point["costs"][first] / factor:.4f}',
      'not finite' if test is None else f'{test:.4f}',
      _signed(above),
      seconds,
    )

  for point in report['front']:
    if point['asked']:
      seconds = report['seconds'].get(point['solver'])
      add(point['solver'], point, '' if seconds is None else f'{seconds:.1f}')
  out.add_section()
  for point in report['uniform']:
    add(f'all {point["candidate"]}', point)
  own = report['loss']['unquantized_test']
  if own is not None:
    out.add_section()
    out.add_row(
      'unquantized',
      '',
      f'{own:.4f}',
      _signed(None if best is None else own - best),
    )
  return out


def sentence(report: Report) -> str:
  """Losses and time in words."""
  loss = report['loss']
  number = lambda x: 'not finite' if x is None else f'{x:.4f}'
  words = [
    f'loss {number(loss["test"])} nat/token on the test text (unquantized '
    f'{number(loss["unquantized_test"])}), {number(loss["search"])} on the '
    f'text of the search (unquantized {number(loss["unquantized_search"])})'
  ]
  if report['scores']:
    scores = report['scores']
    words.append(
      f'perplexity {scores["perplexity"]:.3f}, '
      f'{scores["bits_per_byte"]:.4f} bits per byte of the packed model'
    )
  words.append(f'{sum(report["seconds"].values()):.0f} s in all')
  return '; '.join(words)


def pareto(report: Report) -> mpl.Figure:
  """Test loss against the first budgeted quantity, one line a solver.

  Squares are candidates given to all sites, the plan is a star. Losses far
  above the others stand in a grey strip at the top, in no order.

  Args:
    report: The report; points without a finite loss are left out.

  Returns:
    The figure, which `savefig` writes.
  """
  first = report['budgets'][0]['quantity']
  limit = report['budgets'][0]['limit']
  factor, unit = unit_of(first, limit)
  place = lambda point: point['costs'][first] / factor
  good = lambda points: [p for p in points if p['test'] is not None]
  points, uniform = good(report['front']), good(report['uniform'])
  floor = report['loss']['unquantized_test']
  fig = mpl.Figure(figsize=(8.2, 5.4), dpi=150, layout='constrained')
  backend_agg.FigureCanvasAgg(fig)  # measures text; no pyplot, no display
  axes = fig.subplots()

  every = [floor] * (floor is not None)
  every += [p['test'] for p in (*points, *uniform)] or [0.0]
  low, top = min(every), _top(every)
  edge = top + 0.07 * (top - low) * any(y > top for y in every)
  high = lambda value: value if value <= top else 0.5 * (top + edge)
  axes.set_ylim(low - 0.06 * (top - low), edge + 0.02 * (top - low))
  if edge > top:
    axes.axhspan(top, axes.get_ylim()[1], color='0.93', zorder=0)
  widths = [limit / factor, *map(place, (*points, *uniform))]
  margin = 0.06 * (max(widths) - min(widths)) or 0.5
  axes.set_xlim(min(widths) - margin, max(widths) + margin)

  solver = report['solver']
  names = list(dict.fromkeys(p['solver'] for p in points))
  for name in sorted(names, key=list(LOOKS).index):
    if name == 'uniform':  # its choices are the squares
      continue
    mine = sorted((place(p), p['test']) for p in points if p['solver'] == name)
    marker, line, color = LOOKS[name]
    thin = marker == 'x'
    axes.plot(
      *zip(*((x, high(y)) for x, y in mine), strict=True),
      marker=marker,
      ls=line,
      color=color,
      label=name.replace('_', ' '),
      lw=2.4 if name == solver else 1.2,
      ms=6,
      mec=color if thin else 'k',
      mew=1.5 if thin else 0.5,
      zorder=4 if name == solver else 3,
    )
  items = []
  for i, point in enumerate(sorted(uniform, key=place)):
    x, y = place(point), point['test']
    label = '' if i else 'one candidate everywhere'
    axes.plot(
      x, high(y), marker='s', color='w', mec='k', ms=7, mew=1.2, ls='none',
      zorder=3.5, label=label or None,
    )  # fmt: skip
    more = f' \N{UPWARDS ARROW} {y:.2f}' if y > top else ''
    items.append((x, high(y), point['candidate'] + more, y > top))
  for point in points:
    if point['solver'] == solver and point['asked']:
      axes.plot(
        place(point), high(point['test']), marker='*', ms=17, mec='k', mew=0.8,
        color='#f2d16b', ls='none', zorder=6, label='the plan',
      )  # fmt: skip
  axes.axvline(
    limit / factor, color='0.3', lw=1, ls=(0, (2, 2)), zorder=1,
    label=f'budget: {report["budgets"][0]["asked"]}',
  )  # fmt: skip
  if floor is not None:
    axes.axhline(
      floor, color='0.35', lw=1, ls=(0, (5, 3)), zorder=1,
      label=f'unquantized: {floor:.3f}',
    )  # fmt: skip
  words, _ = _AXES[first]
  axes.set_xlabel(unit if unit.endswith(words) else f'{words} [{unit}]')
  axes.set_ylabel('loss on the test text [nat/token]')
  axes.set_yticks([y for y in axes.get_yticks() if low <= y <= top])
  axes.set_axisbelow(True)
  axes.grid(True, color='0.9', lw=0.6)
  fig.legend(loc='outside right upper', fontsize=8, frameon=False)
  axes.set_title(f'{report["model"]}: plans by {solver}', fontsize=10)
  fig.supxlabel(_footnote(report), fontsize=7, color='0.3', ha='left', x=0.01)
  fig.draw_without_rendering()  # fixes the layout that labels are placed in
  marks = [(place(p), high(p['test'])) for p in (*points, *uniform)]
  figures.place_labels(axes, items, marks)
  return fig


def _top(values: Sequence[float]) -> float:
  """Where the axis ends: above it lies only what is far off.

  That is more than four times as far from the least as the median; with it
  on a linear axis, what is to be compared falls together.
  """
  values = sorted(values)
  low, middle = values[0], values[len(values) // 2]
  near = low + 4 * max(middle - low, 1e-3)
  inside = [y for y in values if y <= near]
  return inside[-1] + 0.05 * max(inside[-1] - low, 1e-3)


def _footnote(report: Report) -> str:
  held = ', '.join(
    f'{b["quantity"]} <= {b["asked"]}' for b in report['budgets'][1:]
  )
  setup = report['setup']
  on = setup['accelerator']
  parts = [
    f'{report["model"]}, seed {report["seed"]}, {report["steps"]} steps; '
    f'{setup["texts"]["search"]["windows"]} windows searched on, '
    f'{setup["texts"]["test"]["windows"]} tested on',
    f'on {on["name"]}, {on["phase"]}' if on else '',
    f'held: {held}' if held else '',
  ]
  return '; '.join(part for part in parts if part)
