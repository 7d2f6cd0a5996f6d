"""Bit-exact packed storage: pack, unpack, exact byte counts.

A layout is a frozen dataclass; `to_json` and `from_json` carry it in a
manifest.
"""

import dataclasses
import difflib
from typing import Any

from mq_jax.layouts._base import (
  Choice,
  Layout,
  Packed,
  choices,
  settle,
  through,
)
from mq_jax.layouts.balanced import Balanced
from mq_jax.layouts.blocks import Blocks
from mq_jax.layouts.dense import Dense
from mq_jax.layouts.fineq import FineQ
from mq_jax.layouts.gobo import Gobo
from mq_jax.layouts.integer import Integer
from mq_jax.layouts.microscopiq import MicroScopiQ
from mq_jax.layouts.olive import Olive
from mq_jax.layouts.rotated import Rotated
from mq_jax.layouts.scaled import InputScaled

_ALL = {
  cls.__name__: cls
  for cls in (
    *(Balanced, Blocks, Dense, FineQ, Gobo),
    *(InputScaled, Integer, MicroScopiQ, Olive, Rotated),
  )
}


def to_json(layout: Layout) -> dict[str, Any]:
  """A layout as plain data: its name and its fields."""

  def plain(value):
    if isinstance(value, tuple):
      return [plain(x) for x in value]
    return to_json(value) if type(value).__name__ in _ALL else value

  fields = dataclasses.fields(layout)
  values = {field.name: plain(getattr(layout, field.name)) for field in fields}
  return {'layout': type(layout).__name__, **values}


def from_json(data: dict[str, Any]) -> Layout:
  """Undo `to_json`.

  Raises:
    ValueError: for an unknown layout or field, or a field of the wrong kind.
  """
  if not isinstance(data, dict) or data.get('layout') not in _ALL:
    name = data.get('layout') if isinstance(data, dict) else data
    near = difflib.get_close_matches(str(name), _ALL) or list(_ALL)
    raise ValueError(f'unknown layout {name!r}; known are {near}')
  cls = _ALL[data['layout']]
  given = {name: value for name, value in data.items() if name != 'layout'}
  kinds = {field.name: field.type for field in dataclasses.fields(cls)}
  unknown = set(given) - set(kinds)
  if unknown:
    raise ValueError(
      f'layout {cls.__name__}: unknown fields {sorted(unknown)}; it has '
      f'{sorted(kinds)}'
    )
  for name, value in given.items():
    if kinds[name] in (int, bool, str) and type(value) is not kinds[name]:
      raise ValueError(
        f'layout {cls.__name__}: {name}={value!r} is not a '
        f'{kinds[name].__name__}'
      )
    given[name] = _inner(value)
  try:
    return cls(**given)
  except TypeError as error:
    raise ValueError(f'layout {cls.__name__}: {error}') from error


def _inner(value: Any) -> Any:
  """A field's value: layouts and tuples of whatever in place of JSON."""
  if isinstance(value, list):
    return tuple(_inner(x) for x in value)
  return from_json(value) if isinstance(value, dict) else value


def unpack(packed: Packed):
  """The `QuantizedMatrix` of packed buffers, with an empty record."""
  from mq_jax import quantize  # a lower room, which builds on this one

  return quantize.from_packed(packed)


__all__ = [
  'Balanced',
  'Blocks',
  'Choice',
  'Dense',
  'FineQ',
  'Gobo',
  'InputScaled',
  'Integer',
  'Layout',
  'MicroScopiQ',
  'Olive',
  'Packed',
  'Rotated',
  'choices',
  'from_json',
  'settle',
  'through',
  'to_json',
  'unpack',
]
