"""Several layouts inside one matrix: blocks of rows or of columns."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mq_jax.layouts import _base

AXES = ('rows', 'columns')


def spans(
  length: int, count: int, sizes: Sequence[int] = ()
) -> tuple[slice, ...]:
  """Where the blocks of an axis begin and end.

  Args:
    length: Of the axis.
    count: Blocks.
    sizes: Of each block; none for blocks of equal size. Where `length` is no
      multiple of `count`, the first blocks are one longer: unlike a short
      last block, that is never an empty one.

  Raises:
    ValueError: for more blocks than the axis is long, or sizes that do not
      add up to it.

  Examples:
    >>> [(span.start, span.stop) for span in spans(10, 4)]
    [(0, 3), (3, 6), (6, 8), (8, 10)]
  """
  if not sizes:
    if not 1 <= count <= length:
      raise ValueError(
        f'a length of {length} can not be cut into {count} blocks; take '
        f'1 to {length}'
      )
    each, longer = divmod(length, count)
    sizes = [each + (i < longer) for i in range(count)]
  if len(sizes) != count or sum(sizes) != length or min(sizes) < 1:
    raise ValueError(
      f'blocks of sizes {list(sizes)}; {count} whole numbers >= 1 that add up '
      f'to the length, {length}, are needed'
    )
  ends = [sum(sizes[: i + 1]) for i in range(count)]
  return tuple(slice(b - a, b) for a, b in zip(sizes, ends, strict=True))


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Blocks along one axis, each stored by a layout of its own.

  Codes and buffers are those of the blocks, named '<block>/<name>'. Every
  block begins at a whole byte: bits are counted block by block, and a
  block's buffers say nothing of the others. Blocks of blocks are tiles.

  Attributes:
    parts: The layout of each block.
    axis: 'rows' (inputs) or 'columns' (outputs).
    sizes: Of the blocks; empty for equal ones, see `spans`.
  """

  parts: tuple[Any, ...]
  axis: str = 'rows'
  sizes: tuple[int, ...] = ()

  def __post_init__(self):
    good = isinstance(self.parts, tuple) and self.parts
    if not good or not all(hasattr(part, 'unpack') for part in self.parts):
      raise ValueError(f'Blocks: {self.parts!r:.60} is no tuple of layouts')
    if self.axis not in AXES:
      raise ValueError(f'Blocks: axis={self.axis!r} is not one of {AXES}')
    sizes = self.sizes
    if not isinstance(sizes, tuple) or not all(type(x) is int for x in sizes):
      raise ValueError(f'Blocks: sizes {sizes!r:.60} are no whole numbers')
    if sizes and len(sizes) != len(self.parts):
      raise ValueError(
        f'Blocks: {len(sizes)} sizes for {len(self.parts)} blocks'
      )

  def shapes(self, k: int, n: int) -> tuple[tuple[int, int], ...]:
    """Shape of each block of a matrix [k, n].

    Raises:
      ValueError: if the matrix can't be cut so, see `spans`.
    """
    length = k if self.axis == 'rows' else n
    found = spans(length, len(self.parts), self.sizes)
    each = [span.stop - span.start for span in found]
    return tuple((x, n) if self.axis == 'rows' else (k, x) for x in each)

  def split(
    self, named: dict, k: int, n: int
  ) -> Iterator[tuple[Any, dict, int, int]]:
    """Layout, codes (or buffers) and shape of each block."""
    each = self._inner(named)
    shapes = self.shapes(k, n)
    for part, mine, shape in zip(self.parts, each, shapes, strict=True):
      yield part, mine, *shape

  def decode(self, codes, k, n):
    values = [part.decode(*rest) for part, *rest in self.split(codes, k, n)]
    return jnp.concatenate(values, axis=AXES.index(self.axis))

  def pack(self, codes, k, n):
    blocks = self.split(codes, k, n)
    return join([part.pack(*rest) for part, *rest in blocks])

  def unpack(self, buffers, k, n):
    blocks = list(self.split(buffers, k, n))
    strange = set(buffers) - set(join([mine for _, mine, *_ in blocks]))
    if strange:
      raise ValueError(
        f'Blocks: buffers {sorted(strange)[:3]} belong to none of '
        f'{len(blocks)} blocks'
      )
    found = []
    for i, (part, *rest) in enumerate(blocks):
      try:
        found.append(part.unpack(*rest))
      except KeyError as error:
        raise KeyError(f'{i}/{error.args[0]}') from error
    return join(found)

  def nbytes(self, codes, k, n):
    return sum(p.nbytes(*rest) for p, *rest in self.split(codes, k, n))

  def paper_bits(self, codes, k, n):
    return sum(p.paper_bits(*rest) for p, *rest in self.split(codes, k, n))

  def _pieces(self, matrix, k, n):
    """The blocks' parts of a matrix [k, n]."""
    axis = AXES.index(self.axis)
    sizes = [shape[axis] for shape in self.shapes(k, n)]
    return jnp.split(matrix, np.cumsum(sizes)[:-1], axis=axis)

  def _inner(self, named):
    """What is named by block and name, by name for each block."""
    each = [{} for _ in self.parts]
    for name, array in named.items():
      block, _, inner = name.partition('/')
      if block.isdecimal() and int(block) < len(each) and inner:
        each[int(block)][inner] = array
    return each

  def _each(self, name, codes, k, n, matrix=None):
    """A method of every block, with its part of a matrix [k, n]."""
    pieces = [()] * len(self.parts)
    if matrix is not None:
      pieces = [(x,) for x in self._pieces(matrix, k, n)]
    blocks = self.split(codes, k, n)
    return [
      getattr(part, name)(mine, *piece, *shape)
      for (part, mine, *shape), piece in zip(blocks, pieces, strict=True)
    ]

  def _whole(self, *arguments):
    return jnp.concatenate(self._each(*arguments), AXES.index(self.axis))

  def place(self, codes, values, k, n):
    return self._whole('place', codes, k, n, values)

  def relax(self, codes, target, k, n, hard=True, shares=None):
    axis = AXES.index(self.axis)
    found = [
      part.relax(mine, piece, *shape, hard, inner)
      for (part, mine, *shape), piece, inner in self._with(
        codes, target, shares or {}, k, n
      )
    ]
    return jnp.concatenate(found, axis)

  def _with(self, codes, target, named, k, n):
    """Blocks with their parts of a matrix, and of arrays by name."""
    pieces = self._pieces(target, k, n)
    mine = self._inner(named)
    return zip(self.split(codes, k, n), pieces, mine, strict=True)

  def choices(self, codes, target, k, n):
    return join(
      [
        _base.choices(part, mine, piece, *shape)
        for (part, mine, *shape), piece, _ in self._with(
          codes, target, {}, k, n
        )
      ]
    )

  def settle(self, codes, logits, target, k, n):
    return join(
      [
        _base.settle(part, mine, inner, piece, *shape)
        for (part, mine, *shape), piece, inner in self._with(
          codes, target, logits, k, n
        )
      ]
    )

  def recode(self, codes, target, k, n):
    return join(self._each('recode', codes, k, n, target))

  def spacing(self, codes, k, n):
    return self._whole('spacing', codes, k, n)

  def learned(self, codes):
    return tuple(
      f'{i}/{name}'
      for i, (part, mine) in enumerate(
        zip(self.parts, self._inner(codes), strict=True)
      )
      for name in part.learned(mine)
    )


def join(blocks: Sequence[dict]) -> dict:
  """Undo `Blocks.split`: the codes (or buffers) of blocks under one roof."""
  return {
    f'{i}/{name}': array
    for i, block in enumerate(blocks)
    for name, array in block.items()
  }
