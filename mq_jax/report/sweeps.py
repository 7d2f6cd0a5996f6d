"""Sweeps, drawn and written from one summary a trial.

A summary holds `trial`, `setting` (values by name), `values` (of objectives,
less is better; None where it failed) and `status`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import figure as mpl
from matplotlib import patches, ticker

from mq_jax.report import style, tables

Summary = Mapping[str, Any]

HEADINGS = {
  'bits_per_byte': 'bits per byte of text [bit/byte]',
  'nll': 'negative log likelihood [nat/token]',
  'perplexity': 'perplexity',
  'ebw': 'effective bit width, ebw [bit/weight]',
  'ebw_paper': 'bit width as the paper counts [bit/weight]',
  'weight_mse': 'error of weights, relative, mean of sites',
  'output_error': 'error of outputs, relative, mean of sites',
}

_MOST_PANELS = 6
_MOST_LABELS = 24


def front(summaries: Sequence[Summary]) -> list[Summary]:
  """Trials that no other equals or beats in all objectives and beats in one.

  Of one objective: the best. Sorted by the first objective.

  Examples:
    >>> rows = [{'values': v} for v in ([1, 3], [2, 2], [2, 3], None)]
    >>> [row['values'] for row in front(rows)]
    [[1, 3], [2, 2]]
  """
  done = [s for s in summaries if s['values'] is not None]
  values = np.array([s['values'] for s in done], float)
  kept = []
  for s in done:
    mine = np.array(s['values'], float)
    beaten = (values <= mine).all(axis=1) & (values < mine).any(axis=1)
    if not beaten.any():
      kept.append(s)
  return sorted(kept, key=lambda s: s['values'])


def shown(value: Any) -> str:
  """A value of a setting in a table."""
  if isinstance(value, float):
    return f'{value:.4g}'
  return str(value)


def markdown(summaries: Sequence[Summary], objectives: Sequence[str]) -> str:
  """Trials as a table; those of the front are marked."""
  names = _names(summaries)
  best = {s['trial'] for s in front(summaries)}
  escape = lambda s: s.replace('|', '\\|').replace('\n', ' ')
  rows = []
  for s in summaries:
    values = s['values'] or [math.nan] * len(objectives)
    rows.append(
      [
        str(s['trial']),
        *(escape(shown(s['setting'].get(n))) for n in names),
        *('' if math.isnan(x) else f'{x:.5g}' for x in values),
        '*' if s['trial'] in best else '',
        escape(s['status']),
      ]
    )
  mark = 'best' if len(objectives) == 1 else 'front'
  return tables.markdown_table(
    ['trial', *map(escape, names), *objectives, mark, 'status'],
    [True] * (1 + len(names) + len(objectives)) + [False, False],
    rows,
  )


def figure(
  summaries: Sequence[Summary],
  objectives: Sequence[str],
  logarithmic: Sequence[str] = (),
  *,
  footnote: str = '',
) -> mpl.Figure:
  """What a sweep found.

  Of several objectives the first two with their front; of one its map where
  two numbers form a grid, else a panel for each name.

  Args:
    summaries: One a trial.
    objectives: Names of their values.
    logarithmic: Names whose values are spread by their logarithm.
    footnote: Names config and seed, printed below.

  Raises:
    ValueError: if no trial has values.
  """
  done = [s for s in summaries if s['values'] is not None]
  if not done:
    raise ValueError('no figure: no trial has a result')
  names = _names(done)
  if len(objectives) > 1:
    fig = _fronts(done, objectives, names, logarithmic)
  else:
    columns = [
      sorted({s['setting'][n] for s in done}, key=_order) for n in names
    ]
    full = math.prod(map(len, columns)) == len(done)
    if len(names) == 2 and full and min(map(len, columns)) > 1:
      fig = _map(done, objectives[0], names, columns)
    else:
      fig = _panels(done, objectives[0], names, logarithmic)
  style.footnote(fig, footnote)
  return fig


def _names(summaries: Sequence[Summary]) -> list[str]:
  return list(dict.fromkeys(n for s in summaries for n in s['setting']))


def _order(value: Any) -> tuple:
  """Numbers by size, then all else as text."""
  return (0, value, '') if _is_number(value) else (1, 0, str(value))


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _heading(objective: str) -> str:
  return HEADINGS.get(objective, objective)


def _fronts(done, objectives, names, logarithmic) -> mpl.Figure:
  """The first two objectives; a third objective or number as colour."""
  fig = style.new(6.4, 4.8)
  axes = fig.subplots()
  x, y = ([s['values'][i] for s in done] for i in (1, 0))
  best = front(done)
  if len(objectives) > 2:
    label, colour = _heading(objectives[2]), [s['values'][2] for s in done]
  else:
    numbers = [
      n for n in names if all(_is_number(s['setting'][n]) for s in done)
    ]
    label = numbers[0] if numbers else 'trial'
    colour = [s['setting'].get(label, s['trial']) for s in done]
  norm = 'log' if label in logarithmic else None
  points = axes.scatter(
    x, y, c=colour, cmap=style.SCALE, norm=norm, s=30, edgecolors='k',
    linewidths=0.5, zorder=3,
  )  # fmt: skip
  if len(set(colour)) > 1:
    fig.colorbar(points, ax=axes, label=label)
  # A third objective keeps trials on the front that lie inside it here.
  line = tables.pareto(list(zip(x, y)))
  if len(line) > 1:
    axes.step(*zip(*line), where='post', color=style.LINE, lw=1.2, zorder=1)
  for s in best[:_MOST_LABELS]:
    axes.annotate(
      str(s['trial']), (s['values'][1], s['values'][0]), xytext=(4, 4),
      textcoords='offset points', fontsize=7,
    )  # fmt: skip
  axes.set_xlabel(_heading(objectives[1]))
  axes.set_ylabel(_heading(objectives[0]))
  style.grid(axes)
  style.title(
    axes, f'{len(done)} trials, numbered: the {len(best)} of the front'
  )
  return fig


def _map(done, objective, names, columns) -> mpl.Figure:
  """One objective over a grid of two names."""
  fig = style.new(2.6 + 0.75 * len(columns[0]), 1.8 + 0.45 * len(columns[1]))
  axes = fig.subplots()
  table = np.full((len(columns[1]), len(columns[0])), np.nan)
  for s in done:
    i, j = (c.index(s['setting'][n]) for n, c in zip(names, columns))
    table[j, i] = s['values'][0]
  image = axes.imshow(table, cmap=style.SCALE, aspect='auto', origin='lower')
  fig.colorbar(image, ax=axes, label=_heading(objective))
  low, high = np.nanmin(table), np.nanmax(table)
  best = np.unravel_index(np.nanargmin(table), table.shape)
  for (j, i), value in np.ndenumerate(table):
    dark = value < low + 0.55 * (high - low)
    axes.text(
      i, j, f'{value:.4g}', ha='center', va='center', fontsize=7,
      color='w' if dark else 'k',
      fontweight='bold' if (j, i) == best else 'normal',
    )  # fmt: skip
  corner = (best[1] - 0.5, best[0] - 0.5)
  axes.add_patch(patches.Rectangle(corner, 1, 1, fill=False, ec='k', lw=1.8))
  for which, name, column in zip('xy', names, columns):
    getattr(axes, f'set_{which}label')(name)
    ticks = [shown(v) for v in column]
    getattr(axes, f'set_{which}ticks')(range(len(column)), ticks, fontsize=8)
  return fig


def _panels(done, objective, names, logarithmic) -> mpl.Figure:
  """One objective against each name; the best trial ringed."""
  drawn = names[:_MOST_PANELS]
  fig = style.new(1.0 + 3.0 * len(drawn), 3.6)
  panels = fig.subplots(1, len(drawn), squeeze=False, sharey=True)[0]
  y = [s['values'][0] for s in done]
  best = front(done)[0]
  for axes, name in zip(panels, drawn):
    values = [s['setting'][name] for s in done]
    column = sorted(set(values), key=_order)
    where = {v: v for v in column}
    if not all(map(_is_number, column)):
      where = {v: i for i, v in enumerate(column)}
      axes.set_xticks(range(len(column)), map(shown, column), fontsize=8)
    elif name in logarithmic:
      axes.set_xscale('log')
      axes.xaxis.set_major_formatter(
        ticker.FuncFormatter(lambda v, _: f'{v:g}')
      )
      axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    x = [where[v] for v in values]
    axes.plot(x, y, 'o', color=style.COLORS[1], ms=4.5, mec='k', mew=0.4)
    # The least at each value: what the name can do, the others at their best.
    if len(column) < len(done) or len(names) == 1:
      least = [min(b for a, b in zip(values, y) if a == v) for v in column]
      axes.plot([where[v] for v in column], least, color=style.LINE, zorder=1)
    axes.plot(
      where[best['setting'][name]], best['values'][0], 'o', ms=10,
      mfc='none', mec=style.COLORS[2], mew=1.5,
    )  # fmt: skip
    axes.set_xlabel(name)
    style.grid(axes)
  panels[0].set_ylabel(_heading(objective))
  return fig
