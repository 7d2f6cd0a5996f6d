"""Writing an artifact, at once or a piece at a time."""

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
import numpy as np

from mq_jax import activations, layouts
from mq_jax.artifacts import _format, _records
from mq_jax.quantize import QuantizedMatrix

_LIBRARIES = ('mq_jax', 'jax', 'jaxlib', 'numpy', 'orbax-checkpoint')


def is_artifact(folder: str | os.PathLike) -> bool:
  """Whether a folder claims to be an artifact (nothing is checked yet)."""
  try:
    manifest = json.loads(
      (pathlib.Path(folder) / _format.MANIFEST).read_text('utf-8')
    )
  except (OSError, ValueError):
    return False
  return isinstance(manifest, dict) and manifest.get('format') == _format.FORMAT


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
  matrices, rest = split(params)
  if not matrices:
    raise ValueError(
      f'{folder}: nothing is quantized, there is nothing to pack'
    )
  folder.parent.mkdir(parents=True, exist_ok=True)
  work = folder.with_name(f'.{folder.name}.{uuid.uuid4().hex[:8]}.part')
  work.mkdir()
  try:
    entries = append(work, matrices)
    manifest = finish(work, entries, rest, model=model, tokenizer=tokenizer)
    _publish(work, folder)
  finally:
    shutil.rmtree(work, ignore_errors=True)
  return manifest


def split(
  params: Any, prefix: _format.Path = ()
) -> tuple[dict[_format.Path, QuantizedMatrix], dict[_format.Path, np.ndarray]]:
  """Quantized and other leaves of (a part of) a model, by their paths.

  Args:
    params: Nested dict of arrays and `QuantizedMatrix` leaves.
    prefix: Where in the model's parameters `params` belong.

  Raises:
    ValueError: for keys or leaves that can't be stored.
  """
  matrices, rest = {}, {}
  for path, leaf in _leaves(params, prefix):
    if isinstance(leaf, QuantizedMatrix):
      matrices[path] = leaf
    else:
      rest[path] = _array(path, leaf)
  return matrices, rest


def append(
  folder: pathlib.Path,
  matrices: Mapping[_format.Path, QuantizedMatrix],
  offset: int = 0,
) -> list[dict]:
  """Pack matrices at the end of an artifact that is being written.

  Args:
    folder: Of the artifact.
    matrices: What to pack.
    offset: Bytes packed before; what lies beyond, an append cut short, is
      written over.

  Returns:
    Their entries in the manifest, for `finish`. The bytes are on the disk.
  """
  entries = []
  with open(folder / _format.PACKED, 'r+b' if offset else 'wb') as out:
    out.truncate(offset)
    out.seek(offset)
    for path, matrix in matrices.items():
      entry, buffers = _entry(path, matrix, out.tell())
      entries.append(entry)
      for buffer in buffers:
        out.write(buffer)
    out.flush()
    os.fsync(out.fileno())
  return entries


def finish(
  folder: pathlib.Path,
  entries: list[dict],
  rest: Mapping[_format.Path, np.ndarray],
  *,
  model: Mapping[str, Any],
  tokenizer: str | None = None,
) -> dict:
  """Make a folder with packed matrices an artifact; returns the manifest.

  Args:
    folder: To which `append` wrote.
    entries: All that it returned.
    rest: The other leaves.
    model: As for `save`.
    tokenizer: As for `save`.
  """
  if rest:
    _write_rest(folder / _format.REST, rest)
  files = {_format.PACKED: _fingerprint(folder / _format.PACKED)}
  if tokenizer is not None:
    (folder / _format.TOKENIZER).write_bytes(tokenizer.encode())
    files[_format.TOKENIZER] = _fingerprint(folder / _format.TOKENIZER)
  sizes = [math.prod(entry['shape']) for entry in entries]
  nbytes, elements = files[_format.PACKED]['nbytes'], sum(sizes)
  paper = sum(e['ebw_paper'] * size for e, size in zip(entries, sizes))
  manifest = {
    'format': _format.FORMAT,
    'version': _format.VERSION,
    'model': dict(model),
    'totals': {
      'nbytes': nbytes,
      'elements': elements,
      'ebw': 8 * nbytes / max(1, elements),
      'ebw_paper': paper / max(1, elements),
    },
    'files': files,
    'packed': entries,
    'rest': [
      {
        'path': list(path),
        'shape': list(array.shape),
        'dtype': array.dtype.name,
        'sha256': _format.sha256(array),
      }
      for path, array in rest.items()
    ],
    'versions': {name: _version(name) for name in _LIBRARIES},
  }
  manifest['sha256'] = _format.manifest_sha256(manifest)
  text = json.dumps(manifest, indent=1, allow_nan=False)
  path = folder / _format.MANIFEST
  part = path.with_suffix('.part')  # a folder with a manifest is whole
  part.write_text(text + '\n', encoding='utf-8')
  os.replace(part, path)
  return manifest


def _publish(work: pathlib.Path, folder: pathlib.Path) -> None:
  """Put the finished folder in its place; an old one goes only then."""
  if folder.is_dir() and any(folder.iterdir()):
    old = work.with_suffix('.old')
    os.rename(folder, old)
    os.rename(work, folder)
    shutil.rmtree(old)
  else:
    os.rename(work, folder)


def _leaves(
  tree: Any, path: _format.Path = ()
) -> Iterator[tuple[_format.Path, Any]]:
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


def _array(path: _format.Path, leaf: Any) -> np.ndarray:
  name = '/'.join(map(str, path))
  if not isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float):
    raise ValueError(f'{name}: a {type(leaf).__name__} can not be stored')
  array = np.asarray(leaf)
  if array.dtype.name not in _format.DTYPES:
    raise ValueError(f'{name}: dtype {array.dtype} can not be stored')
  return array


def _fingerprint(path: pathlib.Path) -> dict:
  with open(path, 'rb') as file:
    digest = hashlib.file_digest(file, 'sha256').hexdigest()
  return {'nbytes': path.stat().st_size, 'sha256': digest}


def _version(name: str) -> str:
  try:
    return metadata.version(name)
  except metadata.PackageNotFoundError:
    return 'not installed'  # run from a checkout


def _entry(
  path: _format.Path, matrix: QuantizedMatrix, offset: int
) -> tuple[dict, list[bytes]]:
  """What the manifest says of a matrix, and its bytes."""
  packed = matrix.pack()
  if packed.nbytes != matrix.nbytes:
    raise ValueError(
      f'{"/".join(map(str, path))}: {packed.nbytes} bytes are packed, '
      f'{matrix.nbytes} are counted; a layout does not store what it counts'
    )
  buffers, contents = [], []
  for name, buffer in packed.buffers.items():
    assert buffer.dtype == np.uint8 and buffer.ndim == 1
    buffers.append(
      {
        'name': name,
        'offset': offset,
        'nbytes': buffer.nbytes,
        'sha256': _format.sha256(buffer),
      }
    )
    contents.append(buffer.tobytes())
    offset += buffer.nbytes
  entry = {
    'path': list(path),
    'recipe': matrix.recipe,
    'site': _records.site_to_json(matrix.site),
    'layout': layouts.to_json(packed.layout),
    'shape': list(packed.shape),
    'dtype': str(packed.dtype),
    'ebw': float(matrix.ebw),
    'ebw_paper': float(matrix.ebw_paper),
    'nbytes': packed.nbytes,
    'record': {k: _records.plain(v) for k, v in matrix.record.items()},
    'buffers': buffers,
  }
  if matrix.inputs is not None:
    entry['inputs'] = activations.quantizer_to_json(matrix.inputs)
  return entry, contents


def _write_rest(
  folder: pathlib.Path, rest: Mapping[_format.Path, np.ndarray]
) -> None:
  import orbax.checkpoint as ocp  # late: a second of imports

  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder, _format.nested(rest))
