"""Checkpoints opened, checked, and read whole or a block at a time."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from mq_jax.models import decoder, expected, tensors
from mq_jax.models.huggingface import compressed_tensors, names
from mq_jax.models.huggingface.configs import read_config

# Stored by old versions of transformers, computed from the config today.
_IGNORED = re.compile(
  r'model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq'
  r'|transformer\.h\.\d+\.attn\.(masked_)?bias'
)
_HEAD = 'lm_head.weight'

_DOWNLOADED = [
  'config.json',
  'generation_config.json',
  'model.safetensors',
  'model-*-of-*.safetensors',
  tensors.INDEX,
  'tokenizer.json',
  'tokenizer_config.json',
]


@dataclasses.dataclass(frozen=True)
class LanguageModel:
  """A causal language model: a function, its parameters, its vocabulary.

  Attributes:
    config: Sizes and options of the network.
    params: Nested dict of arrays.
    apply: `(params, tokens i32[b, t]) -> logits [b, t, v]`; the same object
      for equal configs.
    tokenizer: Text to tokens; None where the checkpoint has none.
    bos: Token that begins every text; None if texts begin without one.
    name: What to call it in tables.
    eos: Token that ends a text.
  """

  config: decoder.DecoderConfig
  params: dict
  apply: Callable[[dict, jax.Array], jax.Array]
  tokenizer: tokenizers.Tokenizer | None
  bos: int | None
  name: str
  eos: int | None = None


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A checkpoint of which everything is checked and no weight read.

  Attributes:
    config: Sizes and options of the network.
    tokenizer: Text to tokens; None where the checkpoint has none.
    bos: Token that begins every text; None if texts begin without one.
    eos: Token that ends a text.
    name: What to call it in tables.
    folder: Where it lies.
    arrays: The tensors by name, mapped into memory; packed weights are
      unpacked when they are read.
  """

  config: decoder.DecoderConfig
  tokenizer: tokenizers.Tokenizer | None
  bos: int | None
  eos: int | None
  name: str
  folder: pathlib.Path
  arrays: Mapping[str, np.ndarray]

  def block(self, i: int, dtype: Any = jnp.float32) -> dict:
    """Parameters of one block, `params['layers'][i]` of the whole.

    Only this block is read, and the pages it was mapped to are given back.

    Args:
      i: Number of the block.
      dtype: Type of the parameters, whatever the checkpoint stores.

    Raises:
      ValueError: for weights that are not finite in that type, by tensor.
    """
    if not 0 <= i < self.config.num_hidden_layers:
      raise ValueError(
        f'{self.folder}: block {i} of {self.config.num_hidden_layers}'
      )
    return self._read(names.block_tensors(self.config, i), dtype)

  def rest(self, dtype: Any = jnp.float32) -> dict:
    """All parameters but those of the blocks: embeddings, last norm, head.

    Raises:
      ValueError: as `block`; and if a head is stored that differs from the
        embedding with which the config ties it.
    """
    name = names.embedding_name(self.config)
    if _HEAD in self.arrays and self.config.tie_word_embeddings:
      if not np.array_equal(self.arrays[_HEAD], self.arrays[name]):
        raise ValueError(
          f'{self.folder}: tie_word_embeddings is true, but {_HEAD} differs '
          f'from {name}'
        )
    return self._read(names.rest_tensors(self.config), dtype)

  def params(self, dtype: Any = jnp.float32) -> dict:
    """All parameters."""
    rest = self.rest(dtype)
    n = self.config.num_hidden_layers
    return {**rest, 'layers': {i: self.block(i, dtype) for i in range(n)}}

  def _read(self, entries: Mapping[str, names.Entry], dtype: Any) -> dict:
    params: dict = {}
    stacks: dict[names.Path, dict[int, np.ndarray]] = {}
    for name, entry in entries.items():
      what = f'{self.folder}: {name}'
      array = expected.finite(self.arrays[name], dtype, what)
      for path, start, size, expert in entry.pieces:
        index = [slice(None)] * array.ndim
        index[entry.axis] = slice(start, start + size)
        part = array[tuple(index)]
        part = part.T if entry.transposed else part
        if expert is None:
          _put(params, path, jnp.asarray(part))
        else:
          stacks.setdefault(path, {})[expert] = part
    for path in list(stacks):
      found = stacks.pop(path)
      stacked = np.stack([found[e] for e in sorted(found)])
      _put(params, path, jnp.asarray(stacked))
    for name in entries:
      tensors.give_back(
        getattr(self.arrays[name], 'parts', [self.arrays[name]])
      )
    return params


def _put(params: dict, path: names.Path, value: jax.Array) -> None:
  for key in path[:-1]:
    params = params.setdefault(key, {})
  params[path[-1]] = value


def open_folder(
  folder_or_name: str | os.PathLike,
  *,
  name: str | None = None,
  compute: str = 'float32',
) -> Checkpoint:
  """Open a checkpoint: check everything about it, read no weights.

  Args:
    folder_or_name: A folder in the Hugging Face layout, or the name of a
      repository on the hub ('org/name') if there is no such folder.
    name: Name of the model; by default that of the folder.
    compute: What the network is to compute in, 'float32' or 'bfloat16'.

  Raises:
    FileNotFoundError: if there is neither such a folder nor could such a
      repository be had, or a file of it is missing.
    ValueError: if the architecture or an option is not supported, or a file
      is malformed, or the tensors are not those that the config calls for.
  """
  folder = pathlib.Path(folder_or_name)
  if not folder.is_dir():
    folder = _download(os.fspath(folder_or_name))
  path = folder / 'config.json'
  if not path.is_file():
    raise FileNotFoundError(
      f'{path}: no such file; a Hugging Face folder holds config.json, '
      'model.safetensors and tokenizer.json'
    )
  raw = tensors.read_json_object(tensors.inside(path))
  schemes = None
  packed = raw.get('quantization_config')
  if isinstance(packed, dict) and packed.get('quant_method') == (
    compressed_tensors.METHOD
  ):
    schemes = compressed_tensors.read_schemes(packed, str(path))
    raw = {k: v for k, v in raw.items() if k != 'quantization_config'}
  config = dataclasses.replace(read_config(raw, str(path)), dtype=compute)
  found = tensors.read_folder(folder)
  if schemes is not None:
    found = compressed_tensors.unpacked(found, schemes, str(folder))
  found = _checked(found, config, str(folder))
  tokenizer = _read_tokenizer(folder, config)
  bos, eos = (
    _special(raw.get(f'{which}_token_id'), config, f'{path}: {which}_token_id')
    for which in ('bos', 'eos')
  )
  return Checkpoint(
    config=config,
    tokenizer=tokenizer,
    bos=bos,
    eos=eos,
    name=name or pathlib.Path(folder_or_name).name,
    folder=folder,
    arrays=found,
  )


def load(
  folder_or_name: str | os.PathLike,
  *,
  dtype: Any = jnp.float32,
  name: str | None = None,
  compute: str = 'float32',
) -> LanguageModel:
  """Read a language model from a folder or from the Hugging Face hub.

  Args:
    folder_or_name: A folder in the Hugging Face layout, or the name of a
      repository on the hub ('org/name') if there is no such folder.
    dtype: Type of the parameters, whatever the checkpoint stores.
    name: Name of the model; by default that of the folder.
    compute: What the network computes in, whatever the parameters are:
      'float32' or 'bfloat16'.

  Returns:
    The model with its parameters as jax arrays.

  Raises:
    FileNotFoundError: if there is neither such a folder nor could such a
      repository be had, or a file of it is missing.
    ValueError: if the architecture or an option is not supported, or a file
      is malformed, or the tensors are not those that the config calls for,
      or weights are not finite.
  """
  found = open_folder(folder_or_name, name=name, compute=compute)
  return LanguageModel(
    config=found.config,
    params=found.params(dtype),
    apply=decoder.functional(found.config),
    tokenizer=found.tokenizer,
    bos=found.bos,
    name=found.name,
    eos=found.eos,
  )


def _special(
  value: Any, config: decoder.DecoderConfig, where: str
) -> int | None:
  """A special token's id; of several, the first."""
  if isinstance(value, list) and value:
    value = value[0]
  if value is None:
    return None
  if type(value) is not int or not 0 <= value < config.vocab_size:
    raise ValueError(
      f'{where} must be a token from 0 to {config.vocab_size - 1}, found '
      f'{str(value)[:80]}'
    )
  return value


def _checked(
  found: dict[str, np.ndarray], config: decoder.DecoderConfig, where: str
) -> dict[str, np.ndarray]:
  """The tensors if they are those of the config, by their full names."""
  for many, what in (
    (config.num_hidden_layers, 'layers'),
    (config.num_experts, 'experts'),
  ):
    # Also keeps a lying config from making up names by the billion.
    if many > len(found):
      raise ValueError(
        f'{where}: the config calls for {many} {what}, the checkpoint has '
        f'only {len(found)} tensors'
      )
  prefix = names.base_prefix(config)
  if not any(name.startswith(prefix) for name in found):
    # Saved without its head, as GPT-2 is on the hub.
    found = {
      name if name == _HEAD else prefix + name: array
      for name, array in found.items()
    }
  found = {k: v for k, v in found.items() if not _IGNORED.fullmatch(k)}
  entries = names.expected_tensors(config)
  shapes = {name: entry.shape for name, entry in entries.items()}
  if config.tie_word_embeddings and _HEAD in found:
    shapes[_HEAD] = shapes[names.embedding_name(config)]
  expected.check(found, shapes, where)
  return found


def _read_tokenizer(
  folder: pathlib.Path, config: decoder.DecoderConfig
) -> tokenizers.Tokenizer | None:
  path = folder / 'tokenizer.json'
  if not path.is_file():
    return None
  tensors.read_json_object(tensors.inside(path))
  try:
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # the library raises no narrower type
    raise ValueError(f'{path}: not a tokenizer: {error}') from None
  tokenizer.no_truncation()  # some were saved with limits of their training
  tokenizer.no_padding()
  largest = max(tokenizer.get_vocab().values(), default=-1)
  if largest >= config.vocab_size:
    raise ValueError(
      f'{path}: has token {largest}, the model only {config.vocab_size}'
    )
  return tokenizer


def _download(name: str) -> pathlib.Path:
  """Fetch the readable files of a repository on the hub, or find them."""
  if not re.fullmatch(r'[\w-][\w.-]*/[\w-][\w.-]*', name):
    raise FileNotFoundError(
      f'{name}: no such folder, and no name of a hub repository (org/name)'
    )
  import huggingface_hub  # slow to import, and needed by few

  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(name, allow_patterns=_DOWNLOADED)
    )
  except Exception as error:  # network, hub and cache each have their own
    raise FileNotFoundError(
      f'{name}: no such folder, and the Hugging Face hub did not give a '
      f'repository of that name ({type(error).__name__}: '
      f'{str(error).splitlines()[0] if str(error) else ""}); offline, download '
      'it elsewhere and give its folder'
    ) from error
