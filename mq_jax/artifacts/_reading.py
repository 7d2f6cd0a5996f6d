"""Reading an artifact: nothing is trusted."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from mq_jax import activations, layouts
from mq_jax.artifacts import _format, _records
from mq_jax.quantize import QuantizedMatrix


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


def load(folder: str | os.PathLike) -> Artifact:
  """Read an artifact and check every byte of it.

  Raises:
    FileNotFoundError: if `folder`, or a file of it, is missing.
    ValueError: if it is not an artifact, is of another version, or anything
      in it is not as the manifest says; the message names file and entry.
  """
  folder = pathlib.Path(folder)
  manifest = _read_manifest(folder)
  files = _records.field(folder, manifest, 'files', dict)
  allowed = {_format.PACKED, _format.TOKENIZER}
  if _format.PACKED not in files or not files.keys() <= allowed:
    raise ValueError(
      f'{folder}: the manifest names files {sorted(files)}; an artifact holds '
      f'{_format.PACKED} and at most {_format.TOKENIZER}'
    )
  contents = {
    name: _read_file(folder / name, _checked(folder, files, name))
    for name in files
  }
  params: dict = {}
  offset = 0
  for i, entry in enumerate(_records.field(folder, manifest, 'packed', list)):
    where = f'{folder}: packed[{i}]'
    path = _path(where, entry)
    matrix, offset = _read_matrix(
      where, entry, contents[_format.PACKED], offset
    )
    _insert(where, params, path, matrix)
  if offset != len(contents[_format.PACKED]):
    raise ValueError(
      f'{folder / _format.PACKED}: {len(contents[_format.PACKED])} bytes, the '
      f'entries of the manifest end at {offset}'
    )
  totals = _records.field(folder, manifest, 'totals', dict)
  if totals.get('nbytes') != offset:
    raise ValueError(
      f'{folder}: totals say {totals.get("nbytes")} bytes, '
      f'{_format.PACKED} has {offset}'
    )
  entries = _records.field(folder, manifest, 'rest', list)
  for path, array in _read_rest(folder, entries):
    _insert(f'{folder}: rest', params, path, array)
  tokenizer = contents.get(_format.TOKENIZER)
  return Artifact(
    params=params,
    model=_records.field(folder, manifest, 'model', dict),
    tokenizer=None if tokenizer is None else tokenizer.decode('utf-8'),
    totals=totals,
    manifest=manifest,
  )


def _read_manifest(folder: pathlib.Path) -> dict:
  path = folder / _format.MANIFEST
  if not path.is_file():
    raise FileNotFoundError(f'{path}: no such file; not an artifact')
  try:
    manifest = json.loads(path.read_text('utf-8'))
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path}: not JSON: {error}') from None
  if not isinstance(manifest, dict) or manifest.get('format') != _format.FORMAT:
    raise ValueError(f'{path}: not the manifest of an {_format.FORMAT}')
  if manifest.get('version') != _format.VERSION:
    raise ValueError(
      f'{path}: format version {manifest.get("version")!r}, this mq_jax reads '
      f'version {_format.VERSION}'
    )
  if manifest.get('sha256') != _format.manifest_sha256(manifest):
    raise ValueError(f'{path}: its checksum does not fit; it was damaged')
  return manifest


def _checked(folder: pathlib.Path, files: dict, name: str) -> dict:
  return {
    'nbytes': _records.field(folder / name, files[name], 'nbytes', int),
    'sha256': _records.field(folder / name, files[name], 'sha256', str),
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


def _path(where: str, entry: Any) -> _format.Path:
  path = _records.field(where, entry, 'path', list)
  good = lambda k: isinstance(k, str | int) and not isinstance(k, bool)
  if not path or not all(map(good, path)):
    raise ValueError(f'{where}: {path!r} is not the path of a parameter')
  return tuple(path)


def _insert(where: str, tree: dict, path: _format.Path, value: Any) -> None:
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
  for buffer in _records.field(where, entry, 'buffers', list):
    name = _records.field(where, buffer, 'name', str)
    nbytes = _records.field(where, buffer, 'nbytes', int)
    if buffer.get('offset') != offset or name in buffers:
      raise ValueError(
        f'{where}: buffer {name!r} at offset {buffer.get("offset")!r}, '
        f'expected once and at {offset}'
      )
    raw = content[offset : offset + max(nbytes, 0)]
    if len(raw) != nbytes:
      raise ValueError(
        f'{where}: buffer {name!r} ends at {offset + nbytes}, '
        f'{_format.PACKED} has {len(content)} bytes'
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
        layout=layouts.from_json(_records.field(where, entry, 'layout', dict)),
        shape=_records.shape_of(where, entry),
        dtype=_records.dtype_of(where, entry).name,
        buffers=buffers,
      )
    )
    matrix = dataclasses.replace(
      matrix,
      record={k: _records.unplain(v) for k, v in entry['record'].items()},
      site=_records.site_from_json(where, entry['site'], path),
      recipe=_records.field(where, entry, 'recipe', str),
      inputs=activations.quantizer_from_json(entry.get('inputs')),
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


def _read_rest(
  folder: pathlib.Path, entries: list
) -> Iterator[tuple[_format.Path, np.ndarray]]:
  """Leaves of the Orbax checkpoint, each checked."""
  if not entries:
    return
  import orbax.checkpoint as ocp

  where = f'{folder / _format.REST}'
  if not (folder / _format.REST).is_dir():
    raise FileNotFoundError(f'{where}: no such folder')
  target = {
    _path(where, e): jax.ShapeDtypeStruct(
      _records.shape_of(where, e), _records.dtype_of(where, e)
    )
    for e in entries
  }
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      restored = checkpointer.restore(
        (folder / _format.REST).absolute(), _format.nested(target)
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
    if _format.sha256(array) != entry.get('sha256'):
      raise ValueError(
        f'{where}: SHA-256 of {"/".join(map(str, path))} is not that of the '
        'manifest'
      )
    yield path, array
