"""Packed models on disk: what the table claims, bit by bit.

An artifact is a folder:

    manifest.json    version, model config, layouts, shapes, sizes, checksums
    packed.bin       the packed buffers of all quantized weights, back to back
    rest/            Orbax checkpoint of every other leaf (norms, embeddings)
    tokenizer.json   the model's tokenizer, if it has one

`packed.bin` is written raw and apart from the Orbax checkpoint, whose files
may be compressed or padded: its size is the sum of all stored bits divided by
8, that is `ebw * elements / 8` bytes, to the byte.

Reading trusts nothing: sizes, offsets and SHA-256 checksums are held against
the manifest before a value is used, files are only looked for under the names
above, and nothing in a folder is executed or unpickled.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

import jax
import ml_dtypes
import numpy as np

from mq_jax import layouts, plans, sites
from mq_jax.quantize import QuantizedMatrix

FORMAT = 'mq_jax artifact'
VERSION = 1

_MANIFEST, _PACKED, _REST = 'manifest.json', 'packed.bin', 'rest'
_TOKENIZER = 'tokenizer.json'
_LIBRARIES = ('mq_jax', 'jax', 'jaxlib', 'numpy', 'orbax-checkpoint')

_DTYPES = {
  np.dtype(d).name: np.dtype(d)
  for d in (
    *(np.bool_, np.int8, np.int16, np.int32, np.int64),
    *(np.uint8, np.uint16, np.uint32, np.uint64),
    *(np.float16, np.float32, np.float64, ml_dtypes.bfloat16),
    *(ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
  )
}

Path = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Artifact:
  """What `load` returns.

  Attributes:
    params: Nested dict with `QuantizedMatrix` leaves where packed.
    model: Config of the model as plain data, as given to `save`.
    tokenizer: Text of `tokenizer.json`, or None.
    totals: `nbytes`, `elements`, `ebw`, `ebw_paper` of the packed weights.
    manifest: The whole manifest.
  """

  params: dict
  model: dict
  tokenizer: str | None
  totals: dict
  manifest: dict


def is_artifact(folder: str | os.PathLike) -> bool:
  """Whether a folder claims to be an artifact (nothing is checked yet)."""
  try:
    manifest = json.loads((pathlib.Path(folder) / _MANIFEST).read_text('utf-8'))
  except (OSError, ValueError):
    return False
  return isinstance(manifest, dict) and manifest.get('format') == FORMAT


def save(
  folder: str | os.PathLike,
  params: dict,
  *,
  model: Mapping[str, Any],
  tokenizer: str | None = None,
  overwrite: bool = False,
) -> dict:
  """Write an artifact: whole, or not at all.

  It is written beside its place and renamed, so a killed save leaves nothing
  under `folder`.

  Args:
    folder: Where; its parents are made.
    params: Nested dict (keys text or whole numbers) of arrays and
      `QuantizedMatrix` leaves, as from `plans.compress`.
    model: Plain JSON data that rebuilds the model, returned by `load`.
    tokenizer: Text of a `tokenizer.json`.
    overwrite: Replace an artifact that is there; other folders never are.

  Returns:
    The manifest.

  Raises:
    FileExistsError: if `folder` holds anything else, or an artifact that may
      not be replaced.
    ValueError: if nothing in `params` is quantized, or a leaf can't be
      stored.
  """
  folder = pathlib.Path(folder).absolute()
  check_target(folder, overwrite)
  matrices, rest = {}, {}
  for path, leaf in _leaves(params):
    if isinstance(leaf, QuantizedMatrix):
      matrices[path] = leaf
    else:
      rest[path] = _array(path, leaf)
  if not matrices:
    raise ValueError(
      f'{folder}: nothing is quantized, there is nothing to pack'
    )
  folder.parent.mkdir(parents=True, exist_ok=True)
  work = folder.with_name(f'.{folder.name}.{uuid.uuid4().hex[:8]}.part')
  work.mkdir()
  try:
    entries = _write_packed(work / _PACKED, matrices)
    if rest:
      _write_rest(work / _REST, rest)
    files = {_PACKED: _fingerprint(work / _PACKED)}
    if tokenizer is not None:
      (work / _TOKENIZER).write_bytes(tokenizer.encode())
      files[_TOKENIZER] = _fingerprint(work / _TOKENIZER)
    size = plans.size(params)
    nbytes = files[_PACKED]['nbytes']
    if 8 * nbytes != size.bits:
      raise ValueError(
        f'{folder}: {nbytes} bytes are packed, the plan counts '
        f'{size.bits} bits; a layout does not store what it counts'
      )
    manifest = {
      'format': FORMAT,
      'version': VERSION,
      'model': dict(model),
      'totals': {
        'nbytes': nbytes,
        'elements': int(size.elements),
        'ebw': float(size.ebw),
        'ebw_paper': float(size.ebw_paper),
      },
      'files': files,
      'packed': entries,
      'rest': [
        {
          'path': list(path),
          'shape': list(array.shape),
          'dtype': array.dtype.name,
          'sha256': _sha256(array),
        }
        for path, array in rest.items()
      ],
      'versions': {name: _version(name) for name in _LIBRARIES},
    }
    manifest['sha256'] = _manifest_sha256(manifest)
    text = json.dumps(manifest, indent=1, allow_nan=False)
    (work / _MANIFEST).write_text(text + '\n', encoding='utf-8')
    _publish(work, folder)
  finally:
    shutil.rmtree(work, ignore_errors=True)
  return manifest


def load(folder: str | os.PathLike) -> Artifact:
  """Read an artifact and check every byte of it.

  Raises:
    FileNotFoundError: if `folder`, or a file of it, is missing.
    ValueError: if it is not an artifact, is of another version, or anything
      in it is not as the manifest says; the message names file and entry.
  """
  folder = pathlib.Path(folder)
  manifest = _read_manifest(folder)
  files = _field(folder, manifest, 'files', dict)
  allowed = {_PACKED, _TOKENIZER}
  if _PACKED not in files or not files.keys() <= allowed:
    raise ValueError(
      f'{folder}: the manifest names files {sorted(files)}; an artifact holds '
      f'{_PACKED} and at most {_TOKENIZER}'
    )
  contents = {
    name: _read_file(folder / name, _checked(folder, files, name))
    for name in files
  }
  params: dict = {}
  offset = 0
  for i, entry in enumerate(_field(folder, manifest, 'packed', list)):
    where = f'{folder}: packed[{i}]'
    path = _path(where, entry)
    matrix, offset = _read_matrix(where, entry, contents[_PACKED], offset)
    _insert(where, params, path, matrix)
  if offset != len(contents[_PACKED]):
    raise ValueError(
      f'{folder / _PACKED}: {len(contents[_PACKED])} bytes, the entries of '
      f'the manifest end at {offset}'
    )
  totals = _field(folder, manifest, 'totals', dict)
  if totals.get('nbytes') != offset:
    raise ValueError(
      f'{folder}: totals say {totals.get("nbytes")} bytes, {_PACKED} has '
      f'{offset}'
    )
  entries = _field(folder, manifest, 'rest', list)
  for path, array in _read_rest(folder, entries):
    _insert(f'{folder}: rest', params, path, array)
  tokenizer = contents.get(_TOKENIZER)
  return Artifact(
    params=params,
    model=_field(folder, manifest, 'model', dict),
    tokenizer=None if tokenizer is None else tokenizer.decode('utf-8'),
    totals=totals,
    manifest=manifest,
  )


def check_target(folder: str | os.PathLike, overwrite: bool = False) -> None:
  """Raises FileExistsError unless `save` may write there."""
  folder = pathlib.Path(folder)
  if not os.path.lexists(folder):
    return
  if folder.is_dir() and not any(folder.iterdir()):
    return
  if not is_artifact(folder):
    raise FileExistsError(
      f'{folder}: holds something that is not an artifact; nothing was written'
    )
  if not overwrite:
    raise FileExistsError(
      f'{folder}: holds an artifact already; choose another folder or say to '
      'overwrite it'
    )


def _publish(work: pathlib.Path, folder: pathlib.Path) -> None:
  """Put the finished folder in its place; an old one goes only then."""
  if folder.is_dir() and any(folder.iterdir()):
    old = work.with_suffix('.old')
    os.rename(folder, old)
    os.rename(work, folder)
    shutil.rmtree(old)
  else:
    os.rename(work, folder)


def _leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
  """Leaves of a nested dict in order of their keys."""
  if not isinstance(tree, dict):
    yield path, tree
    return
  texts = [str(key) for key in tree]
  for key, text in zip(tree, texts):
    plain = isinstance(key, str | int) and not isinstance(key, bool)
    if not plain or texts.count(text) > 1 or not text or '/' in text:
      raise ValueError(
        f'{"/".join(map(str, path))}: key {key!r} can not be stored; keys are '
        'distinct text without "/", or whole numbers'
      )
    yield from _leaves(tree[key], (*path, key))


def _array(path: Path, leaf: Any) -> np.ndarray:
  name = '/'.join(map(str, path))
  if not isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float):
    raise ValueError(f'{name}: a {type(leaf).__name__} can not be stored')
  array = np.asarray(leaf)
  if array.dtype.name not in _DTYPES:
    raise ValueError(f'{name}: dtype {array.dtype} can not be stored')
  return array


def _sha256(array: np.ndarray) -> str:
  return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _fingerprint(path: pathlib.Path) -> dict:
  with open(path, 'rb') as file:
    digest = hashlib.file_digest(file, 'sha256').hexdigest()
  return {'nbytes': path.stat().st_size, 'sha256': digest}


def _manifest_sha256(manifest: Mapping[str, Any]) -> str:
  """Checksum of all else in the manifest: finds damage, not forgery."""
  rest = {k: v for k, v in manifest.items() if k != 'sha256'}
  text = json.dumps(rest, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _version(name: str) -> str:
  try:
    return metadata.version(name)
  except metadata.PackageNotFoundError:
    return 'not installed'  # run from a checkout


def _write_packed(
  file: pathlib.Path, matrices: Mapping[Path, QuantizedMatrix]
) -> list[dict]:
  entries, offset = [], 0
  with open(file, 'wb') as out:
    for path, matrix in matrices.items():
      packed = matrix.pack()
      buffers = []
      for name, buffer in packed.buffers.items():
        assert buffer.dtype == np.uint8 and buffer.ndim == 1
        out.write(buffer.tobytes())
        buffers.append(
          {
            'name': name,
            'offset': offset,
            'nbytes': buffer.nbytes,
            'sha256': _sha256(buffer),
          }
        )
        offset += buffer.nbytes
      entries.append(
        {
          'path': list(path),
          'recipe': matrix.recipe,
          'site': _site_to_json(matrix.site),
          'layout': layouts.to_json(packed.layout),
          'shape': list(packed.shape),
          'dtype': str(packed.dtype),
          'ebw': float(matrix.ebw),
          'ebw_paper': float(matrix.ebw_paper),
          'nbytes': packed.nbytes,
          'record': {k: _plain(v) for k, v in matrix.record.items()},
          'buffers': buffers,
        }
      )
  return entries


def _nested(items: Mapping[Path, Any]) -> dict:
  """A nested dict with text keys, as Orbax wants it."""
  tree: dict = {}
  for path, value in items.items():
    node = tree
    for key in path[:-1]:
      node = node.setdefault(str(key), {})
    node[str(path[-1])] = value
  return tree


def _write_rest(folder: pathlib.Path, rest: Mapping[Path, np.ndarray]) -> None:
  import orbax.checkpoint as ocp  # late: a second of imports

  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder, _nested(rest))


def _read_manifest(folder: pathlib.Path) -> dict:
  path = folder / _MANIFEST
  if not path.is_file():
    raise FileNotFoundError(f'{path}: no such file; not an artifact')
  try:
    manifest = json.loads(path.read_text('utf-8'))
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path}: not JSON: {error}') from None
  if not isinstance(manifest, dict) or manifest.get('format') != FORMAT:
    raise ValueError(f'{path}: not the manifest of an {FORMAT}')
  if manifest.get('version') != VERSION:
    raise ValueError(
      f'{path}: format version {manifest.get("version")!r}, this mq_jax reads '
      f'version {VERSION}'
    )
  if manifest.get('sha256') != _manifest_sha256(manifest):
    raise ValueError(f'{path}: its checksum does not fit; it was damaged')
  return manifest


def _field(where: Any, mapping: Any, name: str, kind: type) -> Any:
  value = mapping.get(name) if isinstance(mapping, dict) else None
  if not isinstance(value, kind) or isinstance(value, bool):
    raise ValueError(
      f'{where}: {name!r} must be {kind.__name__}, got {value!r:.60}'
    )
  return value


def _checked(folder: pathlib.Path, files: dict, name: str) -> dict:
  return {
    'nbytes': _field(folder / name, files[name], 'nbytes', int),
    'sha256': _field(folder / name, files[name], 'sha256', str),
  }


def _read_file(path: pathlib.Path, expected: Mapping[str, Any]) -> bytes:
  if path.is_symlink() or not path.is_file():
    raise FileNotFoundError(f'{path}: no such file (links are not followed)')
  size = path.stat().st_size
  if size != expected['nbytes']:
    raise ValueError(
      f'{path}: {size} bytes, the manifest says {expected["nbytes"]}'
    )
  content = path.read_bytes()
  if hashlib.sha256(content).hexdigest() != expected['sha256']:
    raise ValueError(f'{path}: its SHA-256 is not that of the manifest')
  return content


def _path(where: str, entry: Any) -> Path:
  path = _field(where, entry, 'path', list)
  good = lambda k: isinstance(k, str | int) and not isinstance(k, bool)
  if not path or not all(map(good, path)):
    raise ValueError(f'{where}: {path!r} is not the path of a parameter')
  return tuple(path)


def _shape(where: str, entry: Any) -> tuple[int, ...]:
  shape = _field(where, entry, 'shape', list)
  if not all(type(n) is int and n >= 0 for n in shape):
    raise ValueError(f'{where}: {shape!r} is not a shape')
  return tuple(shape)


def _dtype(where: str, entry: Any) -> np.dtype:
  name = _field(where, entry, 'dtype', str)
  if name not in _DTYPES:
    raise ValueError(
      f'{where}: dtype {name!r} is not one of {", ".join(_DTYPES)}'
    )
  return _DTYPES[name]


def _insert(where: str, tree: dict, path: Path, value: Any) -> None:
  node = tree
  for key in path[:-1]:
    node = node.setdefault(key, {})
    if not isinstance(node, dict):
      break
  if not isinstance(node, dict) or path[-1] in node:
    raise ValueError(f'{where}: {"/".join(map(str, path))} is there twice')
  node[path[-1]] = value


def _read_matrix(
  where: str, entry: Any, content: bytes, offset: int
) -> tuple[QuantizedMatrix, int]:
  """One packed weight; its buffers begin at `offset`, without gaps."""
  buffers = {}
  for buffer in _field(where, entry, 'buffers', list):
    name = _field(where, buffer, 'name', str)
    nbytes = _field(where, buffer, 'nbytes', int)
    if buffer.get('offset') != offset or name in buffers:
      raise ValueError(
        f'{where}: buffer {name!r} at offset {buffer.get("offset")!r}, '
        f'expected once and at {offset}'
      )
    raw = content[offset : offset + max(nbytes, 0)]
    if len(raw) != nbytes:
      raise ValueError(
        f'{where}: buffer {name!r} ends at {offset + nbytes}, {_PACKED} has '
        f'{len(content)} bytes'
      )
    if hashlib.sha256(raw).hexdigest() != buffer.get('sha256'):
      raise ValueError(
        f'{where}: SHA-256 of buffer {name!r} is not that of the manifest'
      )
    buffers[name] = np.frombuffer(raw, np.uint8)
    offset += nbytes
  path = _path(where, entry)
  try:
    matrix = layouts.unpack(
      layouts.Packed(
        layout=layouts.from_json(_field(where, entry, 'layout', dict)),
        shape=_shape(where, entry),
        dtype=_dtype(where, entry).name,
        buffers=buffers,
      )
    )
    matrix = dataclasses.replace(
      matrix,
      record={k: _unplain(v) for k, v in entry['record'].items()},
      site=_site_from_json(where, entry['site'], path),
      recipe=_field(where, entry, 'recipe', str),
    )
    # A shape that the site's parameter can't have shows here, not in use.
    if matrix.site is not None and matrix.shape != matrix.site.matrix_shape:
      raise ValueError(
        f'shape {matrix.shape}, its site calls for {matrix.site.matrix_shape}'
      )
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise ValueError(f'{where}: {error}') from error
  except RecursionError:  # layouts of layouts of layouts...
    raise ValueError(f'{where}: its layout is nested too deeply') from None
  return matrix, offset


# What a site needs to give a matrix its parameter's shape back; how the call
# was made is not kept.
_SITE = ('name', 'kind', 'm', 'k', 'n', 'repeats', 'groups', 'calls')


def _site_to_json(site: sites.Site | None) -> dict | None:
  if site is None:
    return None
  return {
    **{name: getattr(site, name) for name in _SITE},
    'shape': list(site.shape),
    'layout': [[list(atom) for atom in axis] for axis in site.layout],
  }


def _site_from_json(where: str, data: Any, path: Path) -> sites.Site | None:
  if data is None:
    return None
  values = {
    name: _field(where, data, name, str if name in ('name', 'kind') else int)
    for name in _SITE
  }
  whole = lambda n: type(n) is int and n > 0
  layout = tuple(
    tuple((stride, size) for stride, size in axis) for axis in data['layout']
  )
  atoms = [atom for axis in layout for atom in axis]
  shape = _shape(where, data)
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


def _plain(array: Any) -> dict:
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


def _unplain(data: Any) -> np.ndarray:
  values = [math.nan if x is None else x for x in data['value']]
  array = np.array(values, _dtype('record', data))
  return array.reshape(_shape('record', data))


def _read_rest(
  folder: pathlib.Path, entries: list
) -> Iterator[tuple[Path, np.ndarray]]:
  """Leaves of the Orbax checkpoint, each checked."""
  if not entries:
    return
  import orbax.checkpoint as ocp

  where = f'{folder / _REST}'
  if not (folder / _REST).is_dir():
    raise FileNotFoundError(f'{where}: no such folder')
  target = {
    _path(where, e): jax.ShapeDtypeStruct(_shape(where, e), _dtype(where, e))
    for e in entries
  }
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      restored = checkpointer.restore(
        (folder / _REST).absolute(), _nested(target)
      )
  except Exception as error:  # whatever zarr, OCDBT or Orbax run into
    lines = str(error).splitlines() or [type(error).__name__]
    raise ValueError(f'{where}: not a whole checkpoint: {lines[0]}') from error
  for entry in entries:
    path = _path(where, entry)
    value = restored
    for key in path:
      value = value[str(key)]
    array = np.asarray(value)
    want = target[path]
    if array.shape != want.shape or array.dtype != want.dtype:
      raise ValueError(
        f'{where}: {"/".join(map(str, path))} is {array.dtype} of shape '
        f'{array.shape}, the manifest says {want.dtype} of shape {want.shape}'
      )
    if _sha256(array) != entry.get('sha256'):
      raise ValueError(
        f'{where}: SHA-256 of {"/".join(map(str, path))} is not that of the '
        'manifest'
      )
    yield path, array
