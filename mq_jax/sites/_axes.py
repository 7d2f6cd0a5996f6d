"""How the axes of an array are cut out of the axes of a parameter.

An *atom* (stride, size) is a run of `size` elements of the row-major parameter
that lie `stride` elements apart. A view names, for every axis of an array, the
atoms which make it up, slowest first; the atoms of all axes together cover the
parameter exactly once. Transposing permutes axes and reshaping regroups atoms
(and cuts one in two if need be), so any chain of both stays a list of atoms
and can be undone.
"""

import math
from typing import Any

Atom = tuple[int, int]
Atoms = tuple[Atom, ...]
Axes = tuple[Atoms, ...]


def whole(shape: tuple[int, ...]) -> Axes:
  """The view of a parameter as itself: one atom an axis, none if size 1."""
  axes, stride = [], math.prod(shape)
  for size in shape:
    stride //= size
    axes.append(((stride, size),) if size > 1 else ())
  return tuple(axes)


def size(atoms: Atoms) -> int:
  """Number of elements an axis of these atoms has."""
  return math.prod(n for _, n in atoms)


def reshape(axes: Axes, shape: tuple[int, ...]) -> Axes | None:
  """Regroups atoms into a new shape, or None where no such cut exists."""
  queue = [atom for axis in axes for atom in axis]
  result = []
  for need in shape:
    axis = []
    while need > 1 and queue:
      stride, length = queue.pop(0)
      if need % length == 0:
        axis.append((stride, length))
        need //= length
      elif length % need == 0:
        rest = length // need
        axis.append((stride * rest, need))
        queue.insert(0, (stride, rest))
        need = 1
      else:  # for example 6 -> 4 of [6, 2] to [4, 3]: rows would interleave
        return None
    if need != 1:
      return None
    result.append(tuple(axis))
  return None if queue else tuple(result)


def merge(atoms: Atoms) -> Atoms:
  """Joins neighbours that form one longer run: the canonical form."""
  merged: list[Atom] = []
  for stride, length in atoms:
    if merged and merged[-1][0] == stride * length:
      merged[-1] = (stride, merged[-1][1] * length)
    else:
      merged.append((stride, length))
  return tuple(merged)


def _order(axes: Axes) -> tuple[list[Atom], list[int]]:
  atoms = [atom for axis in axes for atom in axis]
  return atoms, sorted(range(len(atoms)), key=lambda i: -atoms[i][0])


def take(leaf: Any, axes: Axes) -> Any:
  """Arranges a parameter as the view `axes` says; one axis per entry."""
  atoms, order = _order(axes)
  place = [order.index(i) for i in range(len(atoms))]
  factored = leaf.reshape([atoms[i][1] for i in order])
  return factored.transpose(place).reshape([size(axis) for axis in axes])


def untake(view: Any, axes: Axes, shape: tuple[int, ...]) -> Any:
  """Inverse of `take`: from the view back to the parameter's own shape."""
  atoms, order = _order(axes)
  factored = view.reshape([length for _, length in atoms])
  return factored.transpose(order).reshape(shape)
