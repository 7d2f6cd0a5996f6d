"""Results of runs compared: tables with the best marked, and fronts."""

from collections.abc import Iterator, Sequence
from typing import Any

from mq_jax.report import figures, fronts, sources, tables
from mq_jax.report.documents import Block, Cell, Column, Figure, Table, Text
from mq_jax.report.sources import Bench, Record

# Rows of all tables, and figures of one kind; with more the page would be
# slow to open.
MOST_ROWS, MOST_FIGURES = 600, 6

_MOST_TOLD = 20

# Right of it no front is of interest: recipes here have 8 bits at most.
_WIDEST = 8.0
_RANGE = '\N{EN DASH}'


def tables_of(benches: Sequence[Bench]) -> Iterator[Block]:
  """A table for each model and text."""
  names = sources.short_models(benches)
  most = max(MOST_ROWS // max(len(benches), 1), 5)
  for bench in benches:
    rows, note = bench.rows, ''
    if len(rows) > most:
      rows = _most_telling(bench, most)
      note = (
        f' The {len(rows)} with fewest bits per byte and those of the front, '
        f'of {len(bench.rows)}.'
      )
    yield _table(bench, rows, f'{names[bench.model]}: {bench.text}.{note}')
    told = [row for row in rows if ':' in row['status']]
    if len(told) > _MOST_TOLD:
      yield Text(f'Of {len(told)} statuses the first {_MOST_TOLD}:')
    for row in told[:_MOST_TOLD]:
      word = row['status'].partition(':')[0]
      where = f'{names[bench.model]}, {row["recipe"]} ({row["runs"]})'
      yield Text(f'{where}: {row["status"]}', word == 'failed')


def _most_telling(bench: Bench, most: int) -> list[Record]:
  front = {id(row) for row in front_of(bench.quantized)}
  lost = float('inf')
  order = sorted(
    bench.rows,
    key=lambda r: (
      id(r) not in front,
      lost if r['bits_per_byte'] is None else r['bits_per_byte'],
    ),
  )
  kept = {id(row) for row in order[:most]}
  return [row for row in bench.rows if id(row) in kept]


def front_of(rows: Sequence[Record]) -> list[Record]:
  """Rows that no other beats in both bits and bits per byte."""
  place = lambda r: (r['ebw'], r['bits_per_byte'])
  points = set(tables.pareto([place(r) for r in rows]))
  return [r for r in rows if place(r) in points]


def _table(bench: Bench, rows: Sequence[Record], caption: str) -> Table:
  best = bench.best()
  front = {id(row) for row in front_of(bench.quantized)}
  several = len({row['runs'] for row in bench.rows}) > 1
  seeds = any(row['seeds'] for row in rows)
  spread = any(len(row['seeds']) > 1 for row in rows)
  columns = [c for c in tables.COLUMNS if c.field not in ('model', 'status')]
  # Seconds of what was not measured, bits that papers don't count ...
  columns = [c for c in columns if any(tables.cell(r, c) for r in rows)]

  def cells(row: Record) -> Iterator[Cell]:
    if several:
      yield Cell(row['runs'])
    good = row['family'] != 'none' and row['bits_per_byte'] is not None
    for column in columns:
      name = column.field
      yield Cell(
        _with_range(row, column), good and row.get(name) == best.get(name, '')
      )
    yield Cell('yes' if id(row) in front else '')
    if seeds:
      yield Cell(', '.join(map(str, row['seeds'])))
    if troubles:
      yield Cell(row['status'].partition(':')[0])

  troubles = any(row['status'] != 'ok' for row in rows)
  heads = [Column('run')] * several
  heads += [Column(c.heading, bool(c.format)) for c in columns]
  heads += [Column('on the front')]
  heads += [Column('seeds')] * seeds + [Column('status')] * troubles
  caption += ' Less is better; the best of quantized rows is marked.'
  if spread:
    caption += ' Mean (least\N{EN DASH}most) over seeds.'
  return Table(
    caption, tuple(heads), tuple(tuple(cells(row)) for row in rows), True
  )


def _with_range(row: Record, column: tables.Column) -> str:
  # Of times the mean says enough.
  ends = column.field != 'seconds' and row.get(f'{column.field}_range')
  text = tables.cell(row, column)
  low, high = (format(end, column.format) for end in ends) if ends else (0, 0)
  return text if low == high else f'{text} ({low}{_RANGE}{high})'


def fronts_of(benches: Sequence[Bench]) -> Iterator[Block]:
  """A figure and the hypervolumes for each model and text."""
  names = sources.short_models(benches)
  good = [bench for bench in benches if bench.quantized]
  if len(good) > MOST_FIGURES:
    yield Text(f'Of {len(good)} models and texts the first {MOST_FIGURES}:')
  for bench in good[:MOST_FIGURES]:
    name = names[bench.model]
    groups = list(dict.fromkeys(row['runs'] for row in bench.rows))
    # Of one recipe in several runs, each is named.
    labels = [row['recipe'] for row in bench.quantized]
    drawn = [
      row
      | {'model': f'{name}: {bench.text}'}
      | (
        {'recipe': f'{row["recipe"]}, {row["runs"]}'}
        if labels.count(row['recipe']) > 1
        else {}
      )
      for row in bench.rows
    ]
    yield Figure(
      figures.quality_over_bits(drawn, footnote=footnote(bench.rows)),
      f'{name}: bits per byte over effective bits; lower and further left is '
      f'better. {footnote(bench.rows)}.',
    )
    yield _volumes(bench, name, groups)


def footnote(rows: Sequence[Record]) -> str:
  """Runs and seeds that rows are of."""
  runs = list(dict.fromkeys(row['runs'] for row in rows))
  seeds = sorted({seed for row in rows for seed in row['seeds']})
  more = f' and {len(runs) - 4} more' if len(runs) > 4 else ''
  shown = ', '.join(map(str, seeds[:10])) + (' ...' if len(seeds) > 10 else '')
  words = f'{", ".join(runs[:4])}{more}'
  if not seeds:
    return words
  return f'{words}; seed{"s" if len(seeds) > 1 else ""} {shown}'


def _volumes(bench: Bench, name: str, groups: Sequence[str]) -> Table:
  """Hypervolume of all rows, of each run and of each family."""
  rows, own = bench.quantized, bench.unquantized
  floor = own['bits_per_byte'] if own else None
  least = min(r['bits_per_byte'] for r in rows)
  corner = (_WIDEST, 2 * (least if floor is None else floor))
  said = (
    'twice the bits per byte of the unquantized model'
    if own
    else 'twice the least bits per byte here'
  )
  families = list(dict.fromkeys(row['family'] for row in rows))
  sets: list[tuple[str, list[Any]]] = [('all', rows)]
  if len(groups) > 1:
    sets += [(g, [r for r in rows if r['runs'] == g]) for g in groups]
  if len(families) > 1:
    sets += [
      (f'all {f}', [r for r in rows if r['family'] == f]) for f in families
    ]
  lines = []
  for label, members in sets:
    points = [(r['ebw'], r['bits_per_byte']) for r in members]
    lines.append(
      (
        Cell(label),
        Cell(str(len(points))),
        Cell(str(len(front_of(members)))),
        Cell(f'{fronts.hypervolume(points, corner):.4f}'),
      )
    )
  return Table(
    f'{name}: hypervolume of bits per byte against ebw, more is better; up to '
    f'the reference point {corner[0]:g} bit/weight, {corner[1]:.4f} bit/byte '
    f'({said}).',
    (
      Column('rows of'),
      Column('points', True),
      Column('on their front', True),
      Column('hypervolume [bit/weight x bit/byte]', True),
    ),
    tuple(lines),
    sortable=True,
  )
