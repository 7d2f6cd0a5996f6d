"""Quality over bits, drawn from result records."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import figure as mpl
from matplotlib import lines, ticker, transforms

from mq_jax.report import style, tables

# Where a label may stand around its point, in points, best first.
_SPOTS = tuple(
  (
    radius * math.cos(math.radians(angle)),
    radius * math.sin(math.radians(angle)),
  )
  for radius in (7, 14, 22, 32, 44)
  for angle in (30, -30, 150, -150, 90, -90, 0, 180, 60, -60, 120, -120)
)
_BESIDE = ((7, 0), (-7, 0))

# With more points in a panel only those of the front get a label; with more
# rows in the strip they share one; and many points are drawn as pixels, which
# take less room than as many shapes.
_MOST_LABELS, _MOST_STRIP, _MOST_SHAPES = 40, 12, 400


def _finite(value: Any) -> bool:
  return isinstance(value, int | float) and math.isfinite(value)


def _ceiling(values: Sequence[float], reference: float | None) -> float:
  """Where the axis ends: above it lies only what no longer works.

  A model at twice the bits per byte of the unquantized one has lost its
  language; with it on a linear axis, the recipes that work fall together.
  """
  floor = reference if reference is not None else min(values)
  usable = [v for v in values if v <= 2.0 * floor] or [min(values)]
  return max(usable) + 0.12 * max(max(usable) - floor, 0.02 * floor)


def place_labels(axes, items, obstacles) -> None:
  """Write labels beside their points, where they cover nothing yet written.

  Args:
    axes: The panel, its limits final.
    items: (x, y, label, beside), x and y in data units; `beside` asks for a
      place straight to the right or left.
    obstacles: Points (x, y) in data units that labels must not cover.
  """
  renderer = axes.figure.canvas.get_renderer()
  scale = axes.figure.dpi / 72
  frame = axes.get_window_extent(renderer)
  box = lambda x, y: transforms.Bbox.from_bounds(
    *(axes.transData.transform((x, y)) - 4 * scale), 8 * scale, 8 * scale
  )
  taken = [box(x, y) for x, y in obstacles]
  overlap = lambda a, b: (
    max(0.0, min(a.x1, b.x1) - max(a.x0, b.x0))
    * max(0.0, min(a.y1, b.y1) - max(a.y0, b.y0))
  )
  for x, y, label, beside in sorted(items, key=lambda item: item[1]):
    note = axes.annotate(
      label,
      (x, y),
      xytext=(0, 0),
      textcoords='offset points',
      fontsize=7,
      zorder=4,
      parse_math=False,
    )
    best = None
    for dx, dy in _BESIDE if beside else _SPOTS:
      # Text grows away from its point, so a leader never crosses it.
      note.set_ha('left' if dx > 1 else 'right' if dx < -1 else 'center')
      note.set_va('bottom' if dy > 1 else 'top' if dy < -1 else 'center')
      note.set_position((dx, dy))
      extent = note.get_window_extent(renderer)
      outside = extent.width * extent.height - overlap(extent, frame)
      clash = sum(overlap(extent, other) for other in taken) + outside
      if best is None or clash < best[0] - 1e-6:
        best = (clash, dx, dy, note.get_ha(), note.get_va(), extent)
      if clash < 1e-6:
        break
    _, dx, dy, ha, va, extent = best
    note.set_position((dx, dy))
    note.set_ha(ha)
    note.set_va(va)
    taken.append(extent)
    if math.hypot(dx, dy) > 10:
      axes.annotate(
        '',
        (x, y),
        xytext=(dx, dy),
        textcoords='offset points',
        arrowprops={'arrowstyle': '-', 'color': '0.55', 'lw': 0.6},
        zorder=2,
      )


def quality_over_bits(
  records: Sequence[Mapping[str, Any]],
  *,
  footnote: str = '',
  title: str | None = None,
) -> mpl.Figure:
  """Bits per byte over effective bit width: one panel a model.

  Each recipe is a labelled point, the shape of its marker naming its family.
  A staircase joins the recipes that none beats in both, a dashed line is the
  unquantized model. A recipe beyond the axis (more than twice the bits per
  byte of the unquantized model) stands in a grey strip at the top, in no order,
  with an arrow and its value. Of many recipes only those that none beats have
  labels.

  Args:
    records: Result records with `model`, `recipe`, `family`, `ebw`,
      `bits_per_byte`; those without numbers (failed) are left out. A mean may
      have `bits_per_byte_range`, (least, most), drawn as a bar.
    footnote: Names config and seed, printed below.
    title: Printed above.

  Returns:
    The figure, which `savefig` writes.

  Raises:
    ValueError: if no record holds numbers.
  """
  drawn = [
    r
    for r in records
    if _finite(r.get('ebw')) and _finite(r.get('bits_per_byte'))
  ]
  if not drawn:
    raise ValueError('no figure: no record has both ebw and bits_per_byte')
  models = list(dict.fromkeys(r.get('model', '') for r in drawn))
  families = [_family(r) for r in drawn if _family(r) != 'none']
  look = style.looks(families)

  fig = style.new(1.2 + 5.4 * len(models), 5.2)
  panels = fig.subplots(1, len(models), squeeze=False)[0]
  labels = []
  for axes, model in zip(panels, models):
    mine = [r for r in drawn if r.get('model', '') == model]
    labels.append((axes, *_panel(axes, mine, look)))
    style.title(axes, model)
  panels[0].set_ylabel('bits per byte of text [bit/byte]')
  handles = [_entry(*pair, name) for name, pair in look.items()] + [
    _entry('', style.LINE, 'Pareto line', ls='-')
  ]
  fig.legend(
    handles=handles,
    loc='outside upper center',
    ncols=min(len(handles), 5 * len(models)),
    fontsize=8,
    frameon=False,
    title=title,
  )
  style.footnote(fig, footnote)
  fig.draw_without_rendering()  # fixes the layout that labels are placed in
  for axes, items, obstacles in labels:
    place_labels(axes, items, obstacles)
  return fig


def _family(record: Mapping[str, Any]) -> str:
  return record.get('family') or str(record.get('recipe'))


def _panel(axes, records, look) -> tuple[list, list]:
  """Draw one model; returns labels to place and points not to cover."""
  rows = [r for r in records if _family(r) != 'none']
  reference = next((r for r in records if _family(r) == 'none'), None)
  floor = reference and reference['bits_per_byte']
  values = [r['bits_per_byte'] for r in rows] + [floor] * bool(reference)
  top, low = _ceiling(values, floor), min(values)
  strip, edge = _strip(rows, top, 0.055 * (top - low))
  axes.set_ylim(low - 0.06 * (top - low), edge)
  if edge > top:
    axes.axhspan(top, edge, color=style.BEYOND, zorder=0)
  few = len(rows) <= _MOST_LABELS
  if strip and not few:
    most = max(r['bits_per_byte'] for r in rows)
    axes.annotate(
      f'{len(strip)} more, up to {most:.2f}',
      (0.99, 0.99),
      xycoords='axes fraction',
      ha='right',
      va='top',
      fontsize=7,
    )
  widths = [r['ebw'] for r in rows] or [reference['ebw']]
  span = max(max(widths) - min(widths), 0.5)
  axes.set_xlim(min(widths) - 0.14 * span, max(widths) + 0.22 * span)
  if reference:
    _unquantized(axes, floor, reference['ebw'])

  front = tables.pareto([(r['ebw'], r['bits_per_byte']) for r in rows])
  if front:
    # A staircase: with fewer bits than the next point, the last one is
    # still the best that can be had.
    inside = [(x, min(y, top)) for x, y in front]
    x, y = zip(*inside, (axes.get_xlim()[1], inside[-1][1]))
    axes.step(x, y, where='post', color=style.LINE, lw=1.2, zorder=1)
  # Of many, those of the front, one for each point, evenly if still many.
  stride = math.ceil(len(front) / _MOST_LABELS) if front else 1
  labelled = set(front[::stride])
  place = lambda r: (r['ebw'], r['bits_per_byte'])
  named = {place(r): r for r in reversed(rows) if place(r) in labelled}
  items, places, spread = [], {}, []
  for r in rows:
    x, y = r['ebw'], r['bits_per_byte']
    text, height = str(r['recipe']), strip.get(id(r), y)
    if id(r) in strip:
      text = f'{text} \N{UPWARDS ARROW} {y:.2f}'
    elif 'bits_per_byte_range' in r:
      spread.append((x, *(min(y, top) for y in r['bits_per_byte_range'])))
    places.setdefault(_family(r), []).append((x, height))
    if few or (r is named.get((x, y)) and id(r) not in strip):
      items.append((x, height, text, id(r) in strip))
  many = len(rows) > _MOST_SHAPES
  if spread:  # all at once: one by one they take a second for each hundred
    axes.vlines(*zip(*spread), color='0.3', lw=1.4, zorder=2.5, rasterized=many)
  for name, points in places.items():
    marker, color = look[name]
    axes.plot(
      *zip(*points), marker=marker, color=color, ls='none', mec='k', mew=0.5,
      ms=6.5 if few else 4.5, zorder=3, rasterized=many,
    )  # fmt: skip
  axes.set_xlabel('effective bit width, ebw [bit/weight]')
  style.grid(axes)
  axes.xaxis.set_major_locator(ticker.MaxNLocator(8))
  # No numbers beside the strip, where heights mean nothing.
  low = axes.get_ylim()[0]
  axes.set_yticks([y for y in axes.get_yticks() if low < y <= top])
  obstacles = [p for points in places.values() for p in points]
  if many:  # labels find no place between so many
    obstacles = [item[:2] for item in items]
  return items, obstacles


def _strip(rows, top: float, height: float) -> tuple[dict[int, float], float]:
  """Heights of what lies beyond an axis, by identity, and where they end.

  A line for each that shares the strip, so that their labels find room.
  """
  beyond = [r for r in rows if r['bits_per_byte'] > top]
  beyond.sort(key=lambda r: r['ebw'])
  if len(beyond) > _MOST_STRIP or len(rows) > _MOST_LABELS:
    middle, edge = top + 0.5 * height, top + 1.6 * height  # and for words
    return {id(r): middle for r in beyond}, edge if beyond else top
  places = {id(r): top + (i + 0.7) * height for i, r in enumerate(beyond)}
  return places, top + (len(beyond) + 0.5) * height if beyond else top


def _unquantized(axes, floor: float, ebw: float) -> None:
  axes.axhline(floor, color='0.35', lw=1, ls=style.DASHES, zorder=1)
  axes.annotate(
    f'unquantized, {ebw:g} bits: {floor:.3f}',
    (0.01, floor),
    xycoords=('axes fraction', 'data'),
    xytext=(0, -3),
    textcoords='offset points',
    ha='left',
    va='top',
    fontsize=7,
    color='0.25',
  )


def _entry(marker: str, color: str, label: str, ls: str = ''):
  """A legend entry: a marker, or a line where `ls` says so."""
  return lines.Line2D(
    [], [], marker=marker, color=color, ls=ls, label=label, mec='k', mew=0.5
  )
