"""Tensor files (safetensors) from sources nobody vouches for.

Nothing in a file is executed, and nothing is allocated on its word: the
header is held against the file before any tensor is looked at. What the
safetensors library refuses is refused; what it lets through (a name given
twice, dtypes numpy does not have) or reports without the name of the tensor
is checked here first.

Layout: u64 length of the header, the header (JSON: name -> dtype, shape,
data_offsets), the tensors' bytes, little-endian and without gaps.
"""

import collections
import contextlib
import json
import math
import mmap
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

# Formats of less than a byte (F4, F6) have no numpy array to be viewed as.
DTYPES = {
  'BOOL': np.bool_,
  'U8': np.uint8,
  'I8': np.int8,
  'U16': np.uint16,
  'I16': np.int16,
  'U32': np.uint32,
  'I32': np.int32,
  'U64': np.uint64,
  'I64': np.int64,
  'F8_E4M3': ml_dtypes.float8_e4m3fn,
  'F8_E5M2': ml_dtypes.float8_e5m2,
  'F16': np.float16,
  'BF16': ml_dtypes.bfloat16,
  'F32': np.float32,
  'F64': np.float64,
}
INDEX = 'model.safetensors.index.json'

_MAX_HEADER = 100_000_000  # bytes, the library's own limit
_MAX_AXES = 32  # numpy 1 holds no more
_METADATA = '__metadata__'


def read_safetensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Map the tensors of a file into memory, read-only, loaded when touched.

  The file must not be truncated while arrays of it are in use.

  Args:
    path: A .safetensors file.

  Returns:
    Arrays by name, in the file's order of names.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if anything about it is not as the format says; the message
      names file, tensor, what was expected and what was found.

  Source:
    https://github.com/huggingface/safetensors, section Format.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'{path}: no such file')
  header, start, size = _read_header(path)
  _check_header(path, header, size)
  try:
    with safetensors.safe_open(path, framework='numpy'):
      pass
  except (safetensors.SafetensorError, OSError) as error:
    raise ValueError(f'{path}: not a valid safetensors file: {error}') from None
  # An empty file region cannot be mapped, nor does it need to be.
  data = np.memmap(path, np.uint8, 'r', start) if size else np.empty(0, 'u1')
  return {name: _view(data, entry) for name, entry in header.items()}


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
  """The `__metadata__` of a file, checked like `read_safetensors`."""
  read_safetensors(path)
  with safetensors.safe_open(path, framework='numpy') as file:
    return dict(file.metadata() or {})


def read_folder(folder: str | os.PathLike) -> dict[str, np.ndarray]:
  """Map the tensors of a checkpoint, in one file or in shards.

  Args:
    folder: Holds `model.safetensors`, or `model.safetensors.index.json` and
      the shards that it names.

  Returns:
    Arrays by name.

  Raises:
    FileNotFoundError: if the folder, or a shard of the index, is missing.
    ValueError: if the folder holds no safetensors, the index is malformed or
      names a file outside the folder, a link leads out of it, index and
      shards disagree, or a file is refused by `read_safetensors`.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise FileNotFoundError(f'{folder}: no such folder')
  single, index = folder / 'model.safetensors', folder / INDEX
  if single.is_file():
    return read_safetensors(inside(single))
  if not index.is_file():
    pickles = sorted(p.name for p in folder.glob('*.bin'))
    raise ValueError(
      f'{folder}: holds neither model.safetensors nor {INDEX}'
      + (
        f', only {pickles}: torch pickles can run code when read; convert '
        'them to safetensors where they come from'
        if pickles
        else ''
      )
    )
  shards = _read_index(inside(index))
  tensors = {}
  for shard, names in shards.items():
    if not (folder / shard).is_file():
      raise FileNotFoundError(
        f'{index}: shard {shard} is missing ({len(names)} tensors, first '
        f'{names[0]!r}); {len(shards)} shards are needed'
      )
    found = read_safetensors(inside(folder / shard))
    for name in found.keys() & tensors.keys():
      raise ValueError(f'{folder / shard}: {name!r} is in another shard too')
    missing = sorted(set(names) - found.keys())
    extra = sorted(found.keys() - set(names))
    if missing or extra:
      raise ValueError(
        f'{folder / shard}: not what {INDEX} says: missing {missing[:5]} '
        f'({len(missing)}), not in the index {extra[:5]} ({len(extra)})'
      )
    tensors |= found
  return tensors


def inside(path: pathlib.Path) -> pathlib.Path:
  """The path, if no link leads it out of its folder or hub cache.

  In a cache of the hub, `snapshots/<revision>` holds links to `blobs`.

  Raises:
    ValueError: if it leads elsewhere.
  """
  folder, real = path.parent.resolve(), path.resolve()
  rooms = [folder]
  if folder.parent.name == 'snapshots':
    rooms.append(folder.parent.parent / 'blobs')
  if not any(real.is_relative_to(room) for room in rooms):
    raise ValueError(
      f'{path}: is a link to {real}, outside its folder; put the file itself '
      'there if you trust it'
    )
  return path


def give_back(arrays: Iterable[np.ndarray]) -> None:
  """Let go of the memory that holds what was touched of mapped tensors.

  They stay usable: what is touched again is read from the file again.
  """
  maps = {}
  for array in arrays:
    while isinstance(array, np.ndarray):
      if isinstance(array.base, mmap.mmap):
        maps[id(array.base)] = array.base
      array = array.base
  for each in maps.values():
    each.madvise(mmap.MADV_DONTNEED)


def write_shards(
  folder: str | os.PathLike,
  like: Mapping[str, jax.ShapeDtypeStruct],
  get: Callable[[str], np.ndarray],
  max_shard_bytes: int,
) -> None:
  """Write tensors to one file or several with an index, one at a time.

  Args:
    folder: Where `model.safetensors`, or shards and `model.safetensors.
      index.json` go; exists.
    like: Shapes and dtypes of the tensors, by name, in the order in which
      they are written.
    get: Gives the tensor of a name; only one is in memory at a time.
    max_shard_bytes: Most bytes of tensors in a file; a larger tensor gets a
      file of its own.

  Raises:
    ValueError: if `max_shard_bytes` is not positive, or `get` gives another
      shape or dtype.
  """
  folder = pathlib.Path(folder)
  if max_shard_bytes <= 0:
    raise ValueError(f'max_shard_bytes={max_shard_bytes} must be positive')
  sizes = {name: _nbytes(each) for name, each in like.items()}
  shards: list[list[str]] = [[]]
  room = max_shard_bytes
  for name, size in sizes.items():
    if size > room and shards[-1]:
      shards.append([])
      room = max_shard_bytes
    shards[-1].append(name)
    room -= size
  many = len(shards) > 1
  weight_map = {}
  for number, members in enumerate(shards, 1):
    file = f'model-{number:05}-of-{len(shards):05}.safetensors'
    weight_map |= dict.fromkeys(members, file)
    path = folder / (file if many else 'model.safetensors')
    _write_one(path, {name: like[name] for name in members}, get)
  if many:
    index = {
      'metadata': {'total_size': sum(sizes.values())},
      'weight_map': weight_map,
    }
    with replacing(folder / INDEX) as temporary:
      temporary.write_text(json.dumps(index, indent=2) + '\n')


def _nbytes(like: jax.ShapeDtypeStruct) -> int:
  return math.prod(like.shape) * np.dtype(like.dtype).itemsize


def _write_one(
  path: pathlib.Path,
  like: Mapping[str, jax.ShapeDtypeStruct],
  get: Callable[[str], np.ndarray],
) -> None:
  """Write a safetensors file tensor by tensor; the library needs them all."""
  kinds = {np.dtype(known): kind for kind, known in DTYPES.items()}
  header: dict[str, Any] = {_METADATA: {'format': 'pt'}}
  end = 0
  for name, each in like.items():
    begin, end = end, end + _nbytes(each)
    header[name] = {
      'dtype': kinds[np.dtype(each.dtype)],
      'shape': list(each.shape),
      'data_offsets': [begin, end],
    }
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)  # so that tensors begin aligned
  with replacing(path) as temporary, open(temporary, 'wb') as file:
    file.write(len(text).to_bytes(8, 'little') + text)
    for name, each in like.items():
      array = np.ascontiguousarray(get(name))
      if array.shape != each.shape or array.dtype != each.dtype:
        raise ValueError(
          f'{path}: {name!r} is {array.dtype}{list(array.shape)}, expected '
          f'{np.dtype(each.dtype)}{list(each.shape)}'
        )
      file.write(array.reshape(-1).view(np.uint8))
    file.flush()


def write_safetensors(
  path: str | os.PathLike,
  tensors: Mapping[str, np.ndarray],
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Write a file of tensors: whole, or not at all.

  Args:
    path: The file, replaced if it exists; its folder must exist.
    tensors: Arrays by name, of the dtypes in `DTYPES`.
    metadata: Text stored with them.

  Raises:
    ValueError: for a name or dtype the format cannot hold.
  """
  known = {np.dtype(dtype) for dtype in DTYPES.values()}
  arrays = {}
  for name, tensor in tensors.items():
    array = np.asarray(tensor)
    if array.dtype.newbyteorder('=') not in known:
      raise ValueError(
        f'{path}: {name!r} is of dtype {array.dtype}; a safetensors file '
        f'holds {sorted(map(str, known))}'
      )
    if not isinstance(name, str) or name == _METADATA:
      raise ValueError(f'{path}: {name!r} cannot name a tensor')
    arrays[name] = np.ascontiguousarray(array).reshape(array.shape)
  for key, value in (metadata or {}).items():
    if not (isinstance(key, str) and isinstance(value, str)):
      raise ValueError(
        f'{path}: metadata {key!r}: {value!r} is not a text named by a text'
      )
  with replacing(path) as temporary:
    safetensors.numpy.save_file(arrays, temporary, dict(metadata or {}) or None)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Give a file to write to that takes the place of `path` at the end.

  No reader ever sees a part of it; after an error `path` is as it was.
  """
  path = pathlib.Path(path)
  # A folder, because writers may want to make the file themselves.
  with tempfile.TemporaryDirectory(
    dir=path.parent, prefix=f'.{path.name}.'
  ) as folder:
    temporary = pathlib.Path(folder) / path.name
    temporary.touch()
    mode = temporary.stat().st_mode
    yield temporary
    temporary.chmod(mode)  # writers that replace it may have made it private
    with open(temporary, 'rb') as file:
      os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json_object(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object from an untrusted file; ValueError for anything else."""
  if path.stat().st_size > _MAX_HEADER:
    raise ValueError(
      f'{path}: {path.stat().st_size} bytes of JSON, at most {_MAX_HEADER}'
    )
  return _parse(path, path.read_bytes(), 'file')


def _parse(path: pathlib.Path, raw: bytes, what: str) -> dict[str, Any]:
  """Parse JSON that must be an object without a name given twice."""

  def unique(pairs):
    counts = collections.Counter(name for name, _ in pairs)
    for name, count in counts.items():
      if count > 1:
        raise ValueError(f'{name!r} is given {count} times')
    return dict(pairs)

  try:
    value = json.loads(raw.decode('utf-8'), object_pairs_hook=unique)
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path}: the {what} is not JSON: {error}') from None
  if not isinstance(value, dict):
    raise ValueError(
      f'{path}: the {what} must be a JSON object, found a '
      f'{type(value).__name__}'
    )
  return value


def _read_header(path: pathlib.Path) -> tuple[dict[str, Any], int, int]:
  """Header without metadata, offset of the tensors' bytes, their count."""
  total = path.stat().st_size
  with open(path, 'rb') as file:
    prefix = file.read(8)
    if len(prefix) < 8:
      raise ValueError(
        f'{path}: {total} bytes are too few for a safetensors file, which '
        'begins with a header length of 8 bytes'
      )
    length = int.from_bytes(prefix, 'little')
    if length > min(total - 8, _MAX_HEADER):
      raise ValueError(
        f'{path}: header of {length} bytes announced, {total - 8} bytes '
        f'follow and at most {_MAX_HEADER} are allowed: the file is truncated '
        'or no safetensors file'
      )
    header = _parse(path, file.read(length), 'header')
  metadata = header.pop(_METADATA, None)
  if metadata is not None:
    if not isinstance(metadata, dict) or not all(
      isinstance(value, str) for value in metadata.values()
    ):
      raise ValueError(f'{path}: {_METADATA} must map texts to texts')
  return header, 8 + length, total - 8 - length


def _check_header(path: pathlib.Path, header: dict[str, Any], size: int):
  """Check every entry, then that together they cover `size` bytes once."""
  for name, entry in header.items():
    _check_entry(f'{path}: {name!r}', entry, size)
  position, before = 0, 'the beginning'
  spans = sorted((*entry['data_offsets'], n) for n, entry in header.items())
  for begin, end, name in spans:
    if begin != position:
      kind = 'overlaps' if begin < position else 'leaves a hole after'
      raise ValueError(
        f'{path}: {name!r} {kind} {before}: expected to begin at byte '
        f'{position}, found {begin}'
      )
    position, before = end, repr(name)
  if position != size:
    raise ValueError(
      f'{path}: the tensors end at byte {position}, the file at {size}'
    )


def _check_entry(where: str, entry: Any, size: int) -> None:
  """Check dtype, shape and offsets of one tensor, before any arithmetic."""
  fields = {'dtype', 'shape', 'data_offsets'}
  if not isinstance(entry, dict) or entry.keys() != fields:
    found = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
    raise ValueError(f'{where}: expected {sorted(fields)}, found {found}')
  dtype, shape, offsets = entry['dtype'], entry['shape'], entry['data_offsets']
  if not isinstance(dtype, str) or dtype not in DTYPES:
    raise ValueError(
      f'{where}: dtype {str(dtype)[:40]!r} is not supported; supported are '
      f'{", ".join(DTYPES)}'
    )
  # A dimension beyond int64 could not be a numpy array's, even next to a 0.
  for field, values, limit in (
    ('shape', shape, 2**63 - 1),
    ('data_offsets', offsets, size),
  ):
    whole = isinstance(values, list) and all(type(v) is int for v in values)
    if not whole or not all(0 <= v <= limit for v in values):
      raise ValueError(
        f'{where}: {field} must be whole numbers from 0 to {limit}, found '
        f'{str(values)[:80]}'
      )
  if len(shape) > _MAX_AXES or math.prod(n or 1 for n in shape) >= 2**60:
    raise ValueError(
      f'{where}: shape {str(shape)[:80]} is more than an array of '
      f'{_MAX_AXES} axes can hold'
    )
  if len(offsets) != 2 or offsets[0] > offsets[1]:
    raise ValueError(
      f'{where}: data_offsets must be [begin, end], found {str(offsets)[:80]}'
    )
  expected = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
  if offsets[1] - offsets[0] != expected:
    raise ValueError(
      f'{where}: {dtype} of shape {shape} is {expected} bytes, found '
      f'{offsets[1] - offsets[0]} in data_offsets {offsets}'
    )


def _view(data: np.ndarray, entry: dict[str, Any]) -> np.ndarray:
  begin, end = entry['data_offsets']
  dtype = np.dtype(DTYPES[entry['dtype']])
  array = data[begin:end].view(np.ndarray).view(dtype).reshape(entry['shape'])
  # Headers need not be padded; what then lies askew is copied here, because
  # few libraries besides numpy can read it.
  return np.require(array, requirements='A')


def _read_index(index: pathlib.Path) -> dict[str, list[str]]:
  """Names of the tensors in each shard, shards in order of their names."""
  weight_map = read_json_object(index).get('weight_map')
  if not isinstance(weight_map, dict) or not weight_map:
    raise ValueError(f'{index}: weight_map must map tensors to shards')
  shards = {}
  for name, shard in weight_map.items():
    # A name with a folder in it could lead out of the checkpoint.
    plain = isinstance(shard, str) and not set(shard) & set('/\\:\0')
    if not plain or not shard.endswith('.safetensors'):
      raise ValueError(
        f'{index}: {name!r}: shard {str(shard)[:80]!r} is not the plain name '
        'of a .safetensors file in this folder'
      )
    shards.setdefault(shard, []).append(name)
  return dict(sorted(shards.items()))
