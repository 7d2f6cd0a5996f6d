"""One list of result records as a terminal table, CSV and Markdown.

A record is a dict; what it does not hold is left blank, so that tables of
failed, partial and finished runs are drawn alike.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich import box, table, text


class Column(NamedTuple):
  """A field of a record, its headings with unit, and how to print it."""

  field: str
  heading: str
  short: str  # for terminals of 80 characters
  format: str = ''


COLUMNS = (
  Column('model', 'model', 'model'),
  Column('recipe', 'recipe', 'recipe'),
  Column('bits', 'bits', 'bits', 'd'),
  Column('ebw', 'ebw [bit/weight]', 'ebw', '.3f'),
  Column('ebw_paper', 'ebw_paper [bit/weight]', 'ebw\npaper', '.3f'),
  Column('nll', 'nll [nat/token]', 'nll\n[nat]', '.4f'),
  Column('perplexity', 'perplexity', 'perple-\nxity', '.2f'),
  Column('bits_per_byte', 'bits_per_byte', 'bits\n/byte', '.4f'),
  Column('seconds', 'seconds', 'time\n[s]', '.1f'),
  Column('status', 'status', 'status'),
)


def cell(record: Mapping[str, Any], column: Column) -> str:
  """The text of one field: rounded as its column says, blank if missing.

  Examples:
    >>> cell({'ebw': 4.125}, Column('ebw', 'ebw', 'ebw', '.2f'))
    '4.12'
    >>> cell({}, Column('ebw', 'ebw', 'ebw', '.2f'))
    ''
  """
  value = record.get(column.field)
  if value is None:
    return ''
  if column.format and isinstance(value, int | float):
    whole = column.format == 'd' and value != int(value)
    return str(value) if whole else format(value, column.format)
  return str(value)


def fields(records: Sequence[Mapping[str, Any]]) -> list[str]:
  """All fields of the records: the columns first, then others as they come."""
  known = [c.field for c in COLUMNS]
  extra = {name: None for r in records for name in r if name not in known}
  return known + list(extra)


def csv_text(
  records: Sequence[Mapping[str, Any]], names: Sequence[str] | None = None
) -> str:
  """Fields of records as CSV, numbers in full; by default those of `fields`."""
  names = fields(records) if names is None else names
  out = io.StringIO()
  writer = csv.DictWriter(out, names, lineterminator='\n')
  writer.writeheader()
  writer.writerows(records)
  return out.getvalue()


def markdown(records: Sequence[Mapping[str, Any]]) -> str:
  """The records as a Markdown table; numbers are right-aligned."""
  escape = lambda s: s.replace('|', '\\|').replace('\n', ' ')
  return markdown_table(
    [c.heading for c in COLUMNS],
    [bool(c.format) for c in COLUMNS],
    [[escape(cell(r, c)) for c in COLUMNS] for r in records],
  )


def markdown_table(
  headings: Sequence[str],
  numbers: Sequence[bool],
  rows: Sequence[Sequence[str]],
) -> str:
  """Lines of a Markdown table.

  Args:
    headings: Of columns, escaped as all cells are.
    numbers: Which columns are right-aligned.
    rows: Of as many cells.

  Examples:
    >>> print(markdown_table(['x'], [True], [['1']]), end='')
    | x |
    | ---: |
    | 1 |
  """
  line = lambda cells: '| ' + ' | '.join(cells) + ' |\n'
  rule = ['---:' if number else '---' for number in numbers]
  return ''.join(map(line, (headings, rule, *rows)))


def rich_table(
  records: Sequence[Mapping[str, Any]], *, title: str | None = None
) -> table.Table:
  """The records as a table for `rich.print`, one section a model.

  Its last column holds the first word of a status; whole sentences stand
  below, where they don't squeeze the numbers.
  """
  out = table.Table(
    title=title,
    title_justify='left',
    caption_justify='left',
    box=box.SIMPLE_HEAD,
    pad_edge=False,
    padding=0,  # the box parts columns already
  )
  columns = [c for c in COLUMNS if c.field != 'model']
  for c in columns:
    out.add_column(
      c.short,
      justify='right' if c.format else 'left',
      # Words wrap where the terminal is narrow; numbers never do.
      no_wrap=bool(c.format),
      overflow='fold',
      min_width={'recipe': 19, 'status': 6}.get(c.field),
    )
  model, notes = object(), []
  for record in records:
    if record.get('model') != model:
      model = record.get('model')
      out.add_section()
      out.add_row(text.Text(str(model or ''), style='bold'))
    # `Text` keeps brackets in a status from being read as markup.
    cells = [text.Text(cell(record, c)) for c in columns]
    word, more, _ = cells[-1].plain.partition(':')
    if more:
      notes.append(f'{model}, {cells[0].plain}: {cells[-1].plain}')
      cells[-1] = text.Text(word)
    out.add_row(*cells, style='red' if word == 'failed' else None)
  out.caption = text.Text('\n'.join(notes)) if notes else None
  return out


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
  """Points that no other beats in both coordinates (less is better), sorted.

  Examples:
    >>> pareto([(4, 1.0), (3, 2.0), (3.5, 2.5), (4.5, 1.0)])
    [(3, 2.0), (4, 1.0)]
  """
  front, best = [], math.inf
  for x, y in sorted(points):
    if y < best:
      front.append((x, y))
      best = y
  return front
