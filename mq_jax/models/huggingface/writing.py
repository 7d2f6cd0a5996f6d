"""Checkpoints written: whole, or not at all."""

import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from mq_jax.models import decoder, expected, tensors
from mq_jax.models.huggingface import names
from mq_jax.models.huggingface.configs import write_config
from mq_jax.models.huggingface.reading import LanguageModel

_DTYPES = ('float32', 'bfloat16', 'float16')
SHARD_BYTES = 5_000_000_000


def save(
  folder: str | os.PathLike,
  model: LanguageModel,
  *,
  dtype: Any = jnp.float32,
  max_shard_bytes: int = SHARD_BYTES,
) -> None:
  """Write a model such that `load` and transformers read it.

  Args:
    folder: Made if needed; a checkpoint that it holds is replaced at the end.
    model: What to write.
    dtype: Type the weights are stored in: float32, bfloat16 or float16.
    max_shard_bytes: Most bytes of tensors in one file (but at least one).

  Raises:
    ValueError: for another dtype, or parameters that do not fit the config,
      or that are not finite in that dtype.
    OSError: if the folder cannot be written; it is then as it was.
  """
  entries = names.expected_tensors(model.config)
  for name, entry in entries.items():  # all of them before any work
    for piece in entry.pieces:
      _shape(model, piece, entry, f'{folder}: {name}')

  def get(name: str) -> np.ndarray:
    return joined(
      entries[name], lambda path: np.asarray(leaf(model.params, path))
    )

  write_folder(
    folder,
    model.config,
    get,
    dtype=dtype,
    tokenizer=model.tokenizer,
    bos=model.bos,
    eos=model.eos,
    max_shard_bytes=max_shard_bytes,
  )


def write_folder(
  folder: str | os.PathLike,
  config: decoder.DecoderConfig,
  get: Callable[[str], np.ndarray],
  *,
  dtype: Any = jnp.float32,
  tokenizer: tokenizers.Tokenizer | None = None,
  bos: int | None = None,
  eos: int | None = None,
  max_shard_bytes: int = SHARD_BYTES,
  extra: Mapping[str, Any] | None = None,
) -> None:
  """Write a checkpoint from a source of tensors, one at a time in memory.

  Args:
    folder: See `save`.
    config: Of the network.
    get: Tensor of a name of `names.expected_tensors(config)`, of the shape
      given there. Called once for each in their order: what is outside the
      blocks, then block by block.
    dtype: Type the weights are stored in.
    tokenizer: Stored with them.
    bos: Token that begins every text.
    eos: Token that ends a text.
    max_shard_bytes: Most bytes of tensors in one file (but at least one).
    extra: Further fields of config.json.

  Raises:
    ValueError: for another dtype, or a tensor of another shape, or one that
      is not finite in that dtype.
    OSError: if the folder cannot be written; it is then as it was.
  """
  stored = jnp.dtype(dtype)
  if stored.name not in _DTYPES:
    raise ValueError(
      f'{folder}: weights cannot be stored as {stored.name}; use float32, '
      'bfloat16 or float16'
    )
  special = {'bos_token_id': bos, 'eos_token_id': eos}
  raw = {
    **write_config(config),
    **special,
    'pad_token_id': None,  # some classes' own may lie outside the vocabulary
    'torch_dtype': stored.name,
    **(extra or {}),
  }
  like = {
    name: jax.ShapeDtypeStruct(entry.shape, stored)
    for name, entry in names.expected_tensors(config).items()
  }

  def checked(name: str) -> np.ndarray:
    value = np.asarray(get(name))
    if value.shape != like[name].shape:
      raise ValueError(
        f'{folder}: {name} is of shape {value.shape}, the config calls for '
        f'{like[name].shape}'
      )
    return expected.finite(value, stored, f'{folder}: {name}')

  write_tensors(
    folder,
    raw,
    like,
    checked,
    tokenizer=tokenizer,
    max_shard_bytes=max_shard_bytes,
  )


def joined(
  entry: names.Entry, get: Callable[[names.Path], np.ndarray]
) -> np.ndarray:
  """A checkpoint's tensor from the parameters that it holds."""
  pieces = []
  for path, _, _, expert in entry.pieces:
    value = get(path)
    value = value if expert is None else value[expert]
    pieces.append(value.T if entry.transposed else value)
  if len(pieces) == 1:
    return pieces[0]
  return np.concatenate(pieces, axis=entry.axis)


def write_tensors(
  folder: str | os.PathLike,
  raw: Mapping[str, Any],
  like: Mapping[str, jax.ShapeDtypeStruct],
  get: Callable[[str], np.ndarray],
  *,
  tokenizer: tokenizers.Tokenizer | None,
  max_shard_bytes: int,
) -> None:
  """Write a checkpoint of any tensors, whole or not at all.

  Args:
    folder: See `save`.
    raw: The whole config.json.
    like: Shapes and dtypes of the tensors, by name, in order.
    get: Tensor of a name.
    tokenizer: Stored with them.
    max_shard_bytes: Most bytes of tensors in one file (but at least one).

  Raises:
    ValueError, OSError: see `write_folder`.
  """
  special = {f'{w}_token_id': raw[f'{w}_token_id'] for w in ('bos', 'eos')}
  folder = pathlib.Path(folder)
  if folder.exists() and not folder.is_dir():
    raise NotADirectoryError(f'{folder}: is a file, a folder is to be written')
  folder.parent.mkdir(parents=True, exist_ok=True)
  # In the folder itself where there is one: its parent may be read-only.
  beside = folder if folder.is_dir() else folder.parent
  with tempfile.TemporaryDirectory(
    dir=beside, prefix=f'.{folder.name}.'
  ) as scratch:
    new = pathlib.Path(scratch) / 'new'
    new.mkdir()  # with the usual permissions, unlike the one around it
    tensors.write_shards(new, like, get, max_shard_bytes)
    _write_json(new / 'generation_config.json', special)
    if tokenizer is not None:
      _write_tokenizer(new, tokenizer, raw)
    _write_json(new / 'config.json', raw)
    _move(new, folder)


def _move(new: pathlib.Path, folder: pathlib.Path) -> None:
  """Put a complete folder in place; between, there is none that loads."""
  if not folder.exists():
    os.rename(new, folder)
    return
  (folder / 'config.json').unlink(missing_ok=True)
  stale = [folder / tensors.INDEX, *folder.glob('model*.safetensors')]
  for path in stale:
    path.unlink(missing_ok=True)
  last = 'config.json'  # without it nothing takes the folder for a model
  for path in sorted(new.iterdir(), key=lambda p: (p.name == last, p.name)):
    shutil.move(path, folder / path.name)


def leaf(params: Any, path: names.Path) -> Any:
  """The parameter at a path; ValueError if there is none."""
  value = params
  for key in path:
    if not isinstance(value, Mapping) or key not in value:
      raise ValueError(f'the model has no parameter {path}')
    value = value[key]
  return value


def _shape(
  model: LanguageModel, piece: names.Piece, entry: names.Entry, where: str
) -> None:
  """Check one parameter against the part of a tensor that it becomes."""
  try:
    found = tuple(np.shape(leaf(model.params, piece.path)))
  except ValueError as error:
    raise ValueError(f'{where}: {error}') from None
  needed = list(entry.shape)
  needed[entry.axis] = piece.size
  needed = tuple(needed[::-1] if entry.transposed else needed)
  if piece.expert is not None:
    needed = (model.config.num_experts, *needed)
  if found != needed:
    raise ValueError(
      f'{where} is of shape {found} in the model, the config calls for {needed}'
    )


def _write_tokenizer(
  folder: pathlib.Path,
  tokenizer: tokenizers.Tokenizer,
  raw: Mapping[str, Any],
) -> None:
  text = lambda i: None if i is None else tokenizer.id_to_token(i)
  with tensors.replacing(folder / 'tokenizer.json') as path:
    path.write_text(tokenizer.to_str(pretty=True), encoding='utf-8')
  _write_json(
    folder / 'tokenizer_config.json',
    {
      'tokenizer_class': 'PreTrainedTokenizerFast',
      'bos_token': text(raw['bos_token_id']),
      'eos_token': text(raw['eos_token_id']),
      'model_max_length': raw.get(
        'max_position_embeddings', raw.get('n_positions')
      ),
      'clean_up_tokenization_spaces': False,
    },
  )


def _write_json(path: pathlib.Path, value: Any) -> None:
  with tensors.replacing(path) as temporary:
    temporary.write_text(json.dumps(value, indent=2) + '\n', encoding='utf-8')
