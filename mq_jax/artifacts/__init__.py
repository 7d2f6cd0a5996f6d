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

from mq_jax.artifacts._reading import Artifact, load
from mq_jax.artifacts._writing import (
  append,
  check_target,
  finish,
  is_artifact,
  save,
  split,
)

__all__ = [
  'Artifact',
  'append',
  'check_target',
  'finish',
  'is_artifact',
  'load',
  'save',
  'split',
]
