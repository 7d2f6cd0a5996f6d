"""What writing and reading agree on: names, dtypes, checksums."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

FORMAT = 'mq_jax artifact'
VERSION = 1

MANIFEST, PACKED, REST = 'manifest.json', 'packed.bin', 'rest'
TOKENIZER = 'tokenizer.json'

DTYPES = {
  np.dtype(d).name: np.dtype(d)
  for d in (
    *(np.bool_, np.int8, np.int16, np.int32, np.int64),
    *(np.uint8, np.uint16, np.uint32, np.uint64),
    *(np.float16, np.float32, np.float64, ml_dtypes.bfloat16),
    *(ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
  )
}

Path = tuple[str | int, ...]


def sha256(array: np.ndarray) -> str:
  return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def manifest_sha256(manifest: Mapping[str, Any]) -> str:
  """Checksum of all else in the manifest: finds damage, not forgery."""
  rest = {k: v for k, v in manifest.items() if k != 'sha256'}
  text = json.dumps(rest, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def nested(items: Mapping[Path, Any]) -> dict:
  """A nested dict with text keys, as Orbax wants it."""
  tree: dict = {}
  for path, value in items.items():
    node = tree
    for key in path[:-1]:
      node = node.setdefault(str(key), {})
    node[str(path[-1])] = value
  return tree
