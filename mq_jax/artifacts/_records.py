"""Sites and records as JSON, and back."""

import math
from typing import Any

import jax
import numpy as np

from mq_jax import sites
from mq_jax.artifacts import _format

# What a site needs to give a matrix its parameter's shape back; how the call
# was made is not kept.
_SITE = ('name', 'kind', 'm', 'k', 'n', 'repeats', 'groups', 'calls')


def field(where: Any, mapping: Any, name: str, kind: type) -> Any:
  value = mapping.get(name) if isinstance(mapping, dict) else None
  if not isinstance(value, kind) or isinstance(value, bool):
    raise ValueError(
      f'{where}: {name!r} must be {kind.__name__}, got {value!r:.60}'
    )
  return value


def shape_of(where: str, entry: Any) -> tuple[int, ...]:
  shape = field(where, entry, 'shape', list)
  if not all(type(n) is int and n >= 0 for n in shape):
    raise ValueError(f'{where}: {shape!r} is not a shape')
  return tuple(shape)


def dtype_of(where: str, entry: Any) -> np.dtype:
  name = field(where, entry, 'dtype', str)
  if name not in _format.DTYPES:
    raise ValueError(
      f'{where}: dtype {name!r} is not one of {", ".join(_format.DTYPES)}'
    )
  return _format.DTYPES[name]


def site_to_json(site: sites.Site | None) -> dict | None:
  if site is None:
    return None
  return {
    **{name: getattr(site, name) for name in _SITE},
    'shape': list(site.shape),
    'layout': [[list(atom) for atom in axis] for axis in site.layout],
  }


def site_from_json(
  where: str, data: Any, path: _format.Path
) -> sites.Site | None:
  if data is None:
    return None
  values = {
    name: field(where, data, name, str if name in ('name', 'kind') else int)
    for name in _SITE
  }
  whole = lambda n: type(n) is int and n > 0
  layout = tuple(
    tuple((stride, size) for stride, size in axis) for axis in data['layout']
  )
  atoms = [atom for axis in layout for atom in axis]
  shape = shape_of(where, data)
  sizes = math.prod(size for _, size in atoms)
  if not all(whole(n) for atom in atoms for n in atom) or (
    sizes != math.prod(shape)
  ):
    raise ValueError(f'site layout {data["layout"]} does not fit {shape}')
  return sites.Site(
    path=tuple(jax.tree_util.DictKey(key) for key in path),
    shape=shape,
    layout=layout,
    **values,
  )


def plain(array: Any) -> dict:
  """A small array of a record as JSON; null stands for what is not finite."""
  array = np.asarray(array)
  values = [
    x if not isinstance(x, float) or math.isfinite(x) else None
    for x in array.reshape(-1).tolist()
  ]
  return {
    'dtype': array.dtype.name,
    'shape': list(array.shape),
    'value': values,
  }


def unplain(data: Any) -> np.ndarray:
  values = [math.nan if x is None else x for x in data['value']]
  array = np.array(values, dtype_of('record', data))
  return array.reshape(shape_of('record', data))
