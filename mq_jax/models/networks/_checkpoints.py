"""Checkpoints of networks: options of a config, tensors into parameters.

A folder is taken for untrusted: its config is checked field by field, its
tensors against the network that the config calls for, before any is used.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from mq_jax.models import expected, modules, options

Rules = Sequence[tuple[str, str]]

# Last parts of paths here and in checkpoints.
_WEIGHTS = {
  'kernel': 'weight',
  'scale': 'weight',
  'embedding': 'weight',
  'mean': 'running_mean',
  'var': 'running_var',
}


class Options(options.Options):
  """Fields of a config, with what only networks have."""

  __slots__ = ()

  def given(self, *names: str) -> str:
    """The first of several names of a field that is there; else the first."""
    there = (n for n in names if self.raw.get(n) is not None)
    return next(there, names[0])

  def wholes(self, name: str, default: Sequence[int]) -> tuple[int, ...]:
    """A list of positive whole numbers."""
    value = self.raw.get(name)
    value = default if value is None else value
    good = isinstance(value, list | tuple) and 0 < len(value) <= 1024
    if not good or not all(type(n) is int and 0 < n < 2**31 for n in value):
      raise self.wrong(name, 'a list of positive whole numbers', value)
    return tuple(value)

  def square(self, name: str, default: int | None = None) -> int:
    """A length, or two equal ones."""
    value = self.raw.get(name)
    if isinstance(value, list | tuple) and len(set(map(repr, value))) == 1:
      return Options({name: value[0]}, self.where).whole(name)
    return self.whole(name, default)

  def one_of(self, name: str, known: Sequence[Any]) -> Any:
    """One of `known`, by default the first; others are not supported."""
    self.neutral({name: known})
    return self.raw.get(name, known[0])

  def labels(self) -> int:
    """Number of classes: of the table id2label, or num_labels, or 2."""
    table = self.raw.get('id2label')
    if isinstance(table, dict) and table:
      return len(table)
    return self.whole('num_labels', 2)


class Part(NamedTuple):
  """A leaf of the parameters, as a checkpoint stores it."""

  path: tuple[str | int, ...]
  shape: tuple[int, ...]  # in the checkpoint
  axes: tuple[int, ...]  # of the stored array, in the order of ours


def parts(wanted: dict) -> dict[str, Part]:
  """Leaves by name: the path with '.', and PyTorch's word for the last part.

  Args:
    wanted: Nested dict of shapes, from `modules.abstract`.

  Returns:
    Where each goes. Kernels of linear layers are [out, in] in checkpoints and
    [in, out] here, those of convolutions [out, in, h, w] and [h, w, in, out].
  """
  found = {}
  for path in modules.names(wanted).values():
    leaf = wanted
    for key in path:
      leaf = leaf[key]
    *head, last = map(str, path)
    name = '.'.join([*head, _WEIGHTS.get(last, last)])
    axes = tuple(range(len(leaf.shape)))
    if last == 'kernel':
      axes = (1, 0) if len(axes) == 2 else (2, 3, 1, 0)
    shape = tuple(leaf.shape[axes.index(i)] for i in range(len(axes)))
    found[name] = Part(path, shape, axes)
  return found


def renamed(
  tensors: Mapping[str, np.ndarray], rules: Rules, where: str
) -> dict[str, tuple[str, np.ndarray]]:
  """Tensors by our names, with the names they had.

  Args:
    tensors: By the checkpoint's names.
    rules: (pattern, replacement) of `re.sub`, applied one after the other;
      what becomes '' is left out.
    where: For messages.

  Raises:
    ValueError: if two tensors get one name.
  """
  found: dict[str, tuple[str, np.ndarray]] = {}
  for name, array in tensors.items():
    new = name
    for pattern, replacement in rules:
      new = re.sub(pattern, replacement, new)
    if new in found:
      raise ValueError(
        f'{where}: {found[new][0]} and {name} are the same parameter, {new}'
      )
    if new:
      found[new] = (name, array)
  return found


def drop_copy(
  found: dict[str, tuple[str, np.ndarray]], copy: str, of: str, where: str
) -> None:
  """Leave a tensor out that must be the same as another.

  Raises:
    ValueError: if it differs.
  """
  if copy not in found:
    return
  name, array = found.pop(copy)
  if of in found and not np.array_equal(array, found[of][1]):
    raise ValueError(f'{where}: {name} differs from {found[of][0]}, its tie')


def to_params(
  found: Mapping[str, tuple[str, np.ndarray]],
  wanted: dict,
  dtype: Any,
  where: str,
) -> dict:
  """Nested parameters from tensors, all checked first.

  Args:
    found: From `renamed`.
    wanted: Nested dict of shapes, from `modules.abstract`.
    dtype: Type of the parameters.
    where: For messages.

  Raises:
    ValueError: for tensors that are missing, too many, of the wrong shape or
      dtype, or not finite; all of the first kinds at once, by name.
  """
  leaves = parts(wanted)
  expected.check(
    {name: array for name, (_, array) in found.items()},
    {name: part.shape for name, part in leaves.items()},
    where,
    called=lambda name: found[name][0],
  )
  params: dict = {}
  for name, part in leaves.items():
    stored, array = found[name]
    array = expected.finite(array, dtype, f'{where}: {stored}')
    inner = params
    for key in part.path[:-1]:
      inner = inner.setdefault(key, {})
    inner[part.path[-1]] = jnp.asarray(array.transpose(part.axes))
  return params


def to_tensors(params: Mapping, wanted: dict) -> dict[str, np.ndarray]:
  """Undo `to_params`: arrays by our names, in the checkpoint's order of axes.

  Raises:
    ValueError: if a parameter is missing or of the wrong shape.
  """
  tensors = {}
  for name, part in parts(wanted).items():
    value = params
    for key in part.path:
      if not isinstance(value, Mapping) or key not in value:
        raise ValueError(f'{name}: the network has no parameter {part.path}')
      value = value[key]
    array = np.asarray(value).transpose(np.argsort(part.axes))
    if array.shape != part.shape:
      raise ValueError(
        f'{name} is of shape {array.shape}, the config calls for {part.shape}'
      )
    tensors[name] = array
  return tensors
