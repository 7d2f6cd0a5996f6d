"""Heat maps: a number for each site and each recipe or run."""

import re
from collections.abc import Mapping

import numpy as np
from matplotlib import colors
from matplotlib import figure as mpl

from mq_jax.report import allocation, style

MOST_ROWS, MOST_COLUMNS = 96, 24
_MOST_NUMBERS = 700  # in cells; with more they could not be read


def table_of(
  columns: Mapping[str, Mapping[str, float]],
) -> tuple[list[str], np.ndarray]:
  """Names of sites, and their numbers; with many sites, means over layers.

  Args:
    columns: Site -> number, by name of the column.

  Returns:
    Sites [l] and numbers f64[l, c]; nan where a column has none.

  Examples:
    >>> table_of({'a': {'up': 2.0}, 'b': {'up': 3.0, 'down': 4.0}})[0]
    ['up', 'down']
  """
  sites = list(dict.fromkeys(s for values in columns.values() for s in values))
  group = lambda site: site
  if len(sites) > MOST_ROWS:
    # One name for what differs in numbers only: the same place of all layers.
    group = lambda site: re.sub(r'(?<![^/])\d+(?![^/])', '*', site)
  rows = list(dict.fromkeys(map(group, sites)))
  at = {site: rows.index(group(site)) for site in sites}
  total = np.zeros((len(rows), len(columns)))
  count = np.zeros_like(total)
  for c, values in enumerate(columns.values()):
    for site, value in values.items():
      total[at[site], c] += value
      count[at[site], c] += 1
  return rows, np.where(count > 0, total / np.maximum(count, 1), np.nan)


def heat_map(
  columns: Mapping[str, Mapping[str, float]],
  *,
  label: str,
  title: str = '',
  footnote: str = '',
  logarithmic: bool = False,
) -> mpl.Figure:
  """Sites down, recipes or runs across, a number in each cell.

  Args:
    columns: Site -> number, by name of the column; what is missing stays
      white.
    label: What the numbers are, with their unit.
    title: Printed above.
    footnote: Config and seed, printed below.
    logarithmic: Whether steps of the scale are factors; then only numbers
      above zero are drawn.

  Returns:
    The figure, which `savefig` writes.

  Raises:
    ValueError: if there is no number to draw.
  """
  rows, values = table_of(columns)
  values = np.where(values > 0, values, np.nan) if logarithmic else values
  if not np.isfinite(values).any():
    raise ValueError(f'no figure: there are no numbers ({label})')
  low, high = np.nanmin(values), np.nanmax(values)
  if low == high:  # one colour, in the middle of its scale
    low, high = (low / 2, 2 * high) if logarithmic else (low - 1, high + 1)
  norm = (colors.LogNorm if logarithmic else colors.Normalize)(low, high)
  fig = style.new(
    3.4 + max(0.34 * len(columns), 2.6), 1.9 + 0.17 * max(len(rows), 8)
  )
  axes = fig.subplots()
  mesh = axes.pcolormesh(
    np.ma.masked_invalid(values), cmap=style.SCALE, norm=norm, rasterized=True
  )
  axes.invert_yaxis()
  axes.set_yticks(
    np.arange(len(rows)) + 0.5,
    allocation.short(rows),
    fontsize=7,
    parse_math=False,
  )
  axes.set_xticks(
    np.arange(len(columns)) + 0.5,
    list(columns),
    fontsize=7,
    rotation=60,
    ha='right',
    rotation_mode='anchor',
    parse_math=False,
  )
  axes.tick_params(length=0)
  mean = len(rows) < len({s for c in columns.values() for s in c})
  axes.set_ylabel('site, mean over layers' if mean else 'site')
  bar = fig.colorbar(mesh, ax=axes, fraction=0.05, pad=0.02)
  bar.set_label(label, fontsize=8)
  bar.ax.tick_params(labelsize=7)
  if values.size <= _MOST_NUMBERS:
    for (i, j), value in np.ndenumerate(values):
      if np.isfinite(value):
        axes.text(
          j + 0.5, i + 0.5, _short(value), ha='center', va='center',
          fontsize=5, color='w' if norm(value) < 0.5 else 'k',
        )  # fmt: skip
  if title:
    style.title(axes, title)
  style.footnote(fig, footnote)
  return fig


def _short(value: float) -> str:
  """At most five characters.

  Examples:
    >>> _short(2.28125), _short(0.0312), _short(0.00004), _short(-0.0005)
    ('2.28', '.031', '4e-5', '-5e-4')
  """
  size = abs(value)
  if size == 0:
    return '0'
  if size < 1e-2:
    return f'{value:.0e}'.replace('e-0', 'e-')
  if size < 1:
    return f'{value:.3f}'.replace('0.', '.', 1)
  return f'{value:.{2 if size < 10 else 1}f}'
