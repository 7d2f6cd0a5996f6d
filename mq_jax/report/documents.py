"""A report as plain data: sections of text, tables and figures.

What is said is decided once, in `pages`; `html`, Markdown and LaTeX say it.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from matplotlib import figure as mpl
from rich import table as rich_table


class Cell(NamedTuple):
  """What stands in a cell, and whether it is the best of its kind."""

  text: str
  best: bool = False


class Column(NamedTuple):
  """A heading, with its unit, and whether numbers stand below it."""

  heading: str
  number: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
  """A caption, columns, and rows of as many cells.

  Attributes:
    sortable: Whether rows may change places; not where one is a total.
  """

  caption: str
  columns: tuple[Column, ...]
  rows: tuple[tuple[Cell, ...], ...]
  sortable: bool = False


@dataclasses.dataclass(frozen=True)
class Figure:
  """A picture, and what it says to those who don't see it."""

  image: mpl.Figure
  caption: str


@dataclasses.dataclass(frozen=True)
class Text:
  """A paragraph; a warning where `warning` says so."""

  text: str
  warning: bool = False


@dataclasses.dataclass(frozen=True)
class Listing:
  """A file as it is, folded away below its name."""

  name: str
  content: str


Block = Table | Figure | Text | Listing


@dataclasses.dataclass(frozen=True)
class Section:
  """A heading and what stands below it."""

  title: str
  blocks: tuple[Block, ...]

  @property
  def anchor(self) -> str:
    """Its name in links."""
    return re.sub(r'[^a-z0-9]+', '-', self.title.lower()).strip('-')


@dataclasses.dataclass(frozen=True)
class Document:
  """A title and sections."""

  title: str
  sections: tuple[Section, ...]

  def blocks(self) -> Iterator[Block]:
    """All blocks, in order."""
    for section in self.sections:
      yield from section.blocks


def from_rich(
  found: rich_table.Table, before: Sequence[tuple[Column, str]] = ()
) -> Table:
  """A table of the terminal as one of a document.

  Args:
    found: The table; styles are left behind.
    before: Columns that it lacks, with what all of its rows have there.

  Examples:
    >>> terminal = rich_table.Table('site', title='bits')
    >>> terminal.add_row('up')
    >>> from_rich(terminal).rows
    ((Cell(text='up', best=False),),)
  """
  line = lambda text: ' '.join(str(text).split())
  columns = [
    Column(line(column.header), column.justify == 'right')
    for column in found.columns
  ]
  cells = [[line(cell) for cell in column.cells] for column in found.columns]
  first = [Cell(text) for _, text in before]
  return Table(
    line(found.title or ''),
    (*(column for column, _ in before), *columns),
    tuple((*first, *map(Cell, row)) for row in zip(*cells, strict=True)),
  )


def joined(tables: Sequence[Table]) -> Table:
  """Tables of the same columns, one below the other.

  Raises:
    ValueError: if their columns differ.
  """
  if len({table.columns for table in tables}) != 1:
    raise ValueError(f'columns differ: {[table.columns for table in tables]}')
  rows = (row for table in tables for row in table.rows)
  return dataclasses.replace(tables[0], rows=tuple(rows))
