"""Checkpoints in the Hugging Face layout, read and written.

A folder holds config.json, model.safetensors (or shards with an index) and
perhaps tokenizer.json. It is taken for untrusted: its config is checked
field by field, and its tensors against the config, before weights are read.
"""

from mq_jax.models.huggingface.configs import (
  ARCHITECTURES,
  read_config,
  write_config,
)
from mq_jax.models.huggingface.names import Entry, Path, expected_tensors
from mq_jax.models.huggingface.reading import (
  Checkpoint,
  LanguageModel,
  load,
  open_folder,
)
from mq_jax.models.huggingface.writing import (
  SHARD_BYTES,
  joined,
  leaf,
  save,
  write_folder,
  write_tensors,
)

__all__ = [
  'ARCHITECTURES',
  'Checkpoint',
  'Entry',
  'LanguageModel',
  'Path',
  'SHARD_BYTES',
  'expected_tensors',
  'joined',
  'leaf',
  'load',
  'open_folder',
  'read_config',
  'save',
  'write_config',
  'write_folder',
  'write_tensors',
]
