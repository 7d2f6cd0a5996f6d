"""Files of folders, read with an eye to damage: what, where, what was found."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from mq_jax.lab.files import RunError

# What `need` calls types.
_WORDS = {
  dict: 'an object',
  list: 'a list',
  str: 'a text',
  int: 'a whole number',
  float: 'a finite number',
  bool: 'true or false',
}

MAYBE = float | None  # a number that may be missing: null


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """A file that is one object.

  Raises:
    RunError: if it is not.
  """
  try:
    data = json.loads(path.read_bytes().decode('utf-8'))
  except (ValueError, RecursionError) as error:
    raise RunError(f'{path}: damaged: not JSON: {error}') from None
  if not isinstance(data, dict):
    raise RunError(f'{path}: damaged: not an object but {_found(data)}')
  return data


def need(
  data: Any, where: str, fields: Mapping[str, Any], *, missing: str = ''
) -> None:
  """Refuse an object that lacks a field, or has another type there.

  Args:
    data: The object.
    where: Where it stands, for messages.
    fields: Type by name. Where it is float, any finite number will do; a list
      of one type is a list of such, a dict an object whose fields are so.
    missing: What a missing field means.

  Raises:
    RunError: names the first field that is not so.
  """
  if not isinstance(data, dict):
    raise RunError(f'{where}: damaged: not an object but {_found(data)}')
  for name, kind in fields.items():
    if name not in data:
      raise RunError(f'{where}: has no {name!r}{missing}')
    value, place = data[name], f'{where}: {name}'
    if isinstance(kind, dict):
      need(value, place, kind, missing=missing)
    elif isinstance(kind, list):
      _check(value, where, name, list)
      for i, member in enumerate(value):
        need({i: member}, place, {i: kind[0]}, missing=missing)
    else:
      _check(value, where, name, kind)


def _check(value: Any, where: str, name: str, kind: Any) -> None:
  if kind in (float, MAYBE):
    good = (isinstance(value, int | float) and math.isfinite(value)) or (
      value is None and kind is MAYBE
    )
  else:
    good = isinstance(value, kind)
  # Of Python, but not of JSON, true is a number.
  if not good or (isinstance(value, bool) and kind is not bool):
    wanted = _WORDS.get(kind, _WORDS[float])
    raise RunError(f'{where}: damaged: {name} is {_found(value)}, not {wanted}')


def _found(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 40 else f'{text[:40]}...'


def text_name(text: Any) -> str:
  """A text by its source and digest.

  Examples:
    >>> text_name({'source': 'docs', 'sha256': '0123456789abcdef'})
    'docs (01234567)'
  """
  if not isinstance(text, Mapping):
    return 'an unknown text'
  digest = str(text.get('sha256', '?'))[:8]
  return f'{text.get("source", "?")} ({digest})'


def flat(data: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Nested objects as one, with names such as 'texts.test.windows'.

  Digests are shortened, as people compare them.

  Examples:
    >>> flat({'a': {'b': 1}, 'c': [{'d': 2}]})
    {'a.b': 1, 'c': ["{'d': 2}"]}
  """
  out: dict[str, Any] = {}
  for name, value in data.items():
    if isinstance(value, Mapping):
      out |= flat(value, f'{prefix}{name}.')
    elif isinstance(value, list):
      out[prefix + name] = [str(member) for member in value]
    elif isinstance(value, str) and _is_digest(value):
      out[prefix + name] = value[:12]
    else:
      out[prefix + name] = value
  return out


def _is_digest(text: str) -> bool:
  return len(text) == 64 and set(text) <= set('0123456789abcdef')
