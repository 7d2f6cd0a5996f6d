"""Checkpoints in the Hugging Face layout, read and written.

A folder holds config.json, model.safetensors (or shards with an index) and
perhaps tokenizer.json. It is taken for untrusted: its config is checked
field by field, and its tensors against the config, before weights are read.
"""

import dataclasses
import difflib
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from mq_jax.models import llama, tensors

ARCHITECTURES = ('LlamaForCausalLM',)

# Options that change the function, with the values under which they do not.
# transformers' own defaults are among them, so an option may be left out.
_NEUTRAL = {
  'hidden_act': ('silu', 'swish'),
  'attention_bias': (False, None),
  'mlp_bias': (False, None),
  'sliding_window': (None,),
  'partial_rotary_factor': (None, 1.0),
  'quantization_config': (None,),
}

# Stored by old versions of transformers, computed from the config today.
_IGNORED = re.compile(r'model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq')

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
    config: Sizes of the network.
    params: Nested dict of arrays.
    apply: `(params, tokens i32[b, t]) -> logits [b, t, v]`; the same object
      for equal configs.
    tokenizer: Text to tokens; None where the checkpoint has none.
    bos: Token that begins every text; None if texts begin without one.
    name: What to call it in tables.
    eos: Token that ends a text.
  """

  config: llama.LlamaConfig
  params: dict
  apply: Callable[[dict, jax.Array], jax.Array]
  tokenizer: tokenizers.Tokenizer | None
  bos: int | None
  name: str
  eos: int | None = None


class Entry(NamedTuple):
  """Where a tensor of a checkpoint goes: its path in `params`, its shape."""

  path: tuple[str | int, ...]
  shape: tuple[int, ...]  # in the checkpoint
  transposed: bool  # linear weights are [out, in] there, [in, out] here


def load(
  folder_or_name: str | os.PathLike,
  *,
  dtype: Any = jnp.float32,
  name: str | None = None,
) -> LanguageModel:
  """Read a language model from a folder or from the Hugging Face hub.

  Args:
    folder_or_name: A folder in the Hugging Face layout, or the name of a
      repository on the hub ('org/name') if there is no such folder.
    dtype: Type of the parameters, whatever the checkpoint stores. The network
      computes in float32 in any case, because the embedding gives float32.
    name: Name of the model; by default that of the folder.

  Returns:
    The model with its parameters as jax arrays.

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
  raw = tensors.read_json_object(path)
  config = read_config(raw, str(path))
  found = tensors.read_folder(folder)
  params = _to_params(found, config, dtype, str(folder))
  tokenizer = _read_tokenizer(folder, config)
  bos, eos = (
    _special(raw.get(f'{which}_token_id'), config, f'{path}: {which}_token_id')
    for which in ('bos', 'eos')
  )
  return LanguageModel(
    config=config,
    params=params,
    apply=llama.functional(config),
    tokenizer=tokenizer,
    bos=bos,
    name=name or pathlib.Path(folder_or_name).name,
    eos=eos,
  )


def save(
  folder: str | os.PathLike, model: LanguageModel, *, dtype: Any = jnp.float32
) -> None:
  """Write a model such that `load` and transformers read it.

  Args:
    folder: Made if needed; files of the same names are replaced.
    model: What to write.
    dtype: Type the weights are stored in: float32, bfloat16 or float16.

  Raises:
    ValueError: for another dtype, or parameters that do not fit the config.
  """
  stored = jnp.dtype(dtype)
  if stored.name not in ('float32', 'bfloat16', 'float16'):
    raise ValueError(
      f'{folder}: weights cannot be stored as {stored.name}; use float32, '
      'bfloat16 or float16'
    )
  c = model.config
  weights = {}
  for name, entry in expected_tensors(c).items():
    value = model.params
    for key in entry.path:
      if not isinstance(value, Mapping) or key not in value:
        raise ValueError(f'{folder}: the model has no parameter {entry.path}')
      value = value[key]
    value = np.asarray(value)
    value = value.T if entry.transposed else value
    if value.shape != entry.shape:
      raise ValueError(
        f'{folder}: {name} is of shape {value.shape}, the config calls for '
        f'{entry.shape}'
      )
    weights[name] = value.astype(stored)
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  tensors.write_safetensors(
    folder / 'model.safetensors', weights, {'format': 'pt'}
  )
  config = {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    **dataclasses.asdict(c),
    'hidden_act': 'silu',
    'attention_bias': False,
    'mlp_bias': False,
    'rope_scaling': None,
    'bos_token_id': model.bos,
    'eos_token_id': model.eos,
    'torch_dtype': stored.name,
  }
  special = {'bos_token_id': model.bos, 'eos_token_id': model.eos}
  _write_json(folder / 'generation_config.json', special)
  if model.tokenizer is not None:
    text = lambda i: None if i is None else model.tokenizer.id_to_token(i)
    with tensors.replacing(folder / 'tokenizer.json') as path:
      path.write_text(model.tokenizer.to_str(pretty=True), encoding='utf-8')
    _write_json(
      folder / 'tokenizer_config.json',
      {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'bos_token': text(model.bos),
        'eos_token': text(model.eos),
        'model_max_length': c.max_position_embeddings,
        'clean_up_tokenization_spaces': False,
      },
    )
  _write_json(folder / 'config.json', config)


def read_config(raw: Mapping[str, Any], where: str) -> llama.LlamaConfig:
  """The sizes in a Hugging Face config, with its defaults filled in.

  Args:
    raw: The parsed config.json.
    where: Its path, for messages.

  Raises:
    ValueError: for another architecture, an option that would change the
      function, or a size that is missing or makes no sense.
  """
  architectures = raw.get('architectures')
  if not isinstance(architectures, list) or len(architectures) != 1:
    raise ValueError(
      f'{where}: architectures must name one architecture, found '
      f'{str(architectures)[:80]}; supported: {", ".join(ARCHITECTURES)}'
    )
  if architectures[0] not in ARCHITECTURES:
    raise ValueError(
      f'{where}: architecture {str(architectures[0])[:80]} is not supported; '
      f'supported: {", ".join(ARCHITECTURES)}'
    )
  for option, neutral in _NEUTRAL.items():
    value = raw.get(option, neutral[0])
    if not any(type(value) is type(n) and value == n for n in neutral):
      raise ValueError(
        f'{where}: {option}={str(value)[:80]} is not supported; supported: '
        f'{" or ".join(map(json.dumps, neutral))}'
      )
  hidden, heads = (
    _whole(raw, name, None, where)
    for name in ('hidden_size', 'num_attention_heads')
  )
  if raw.get('head_dim') is None and hidden % heads:
    raise ValueError(
      f'{where}: hidden_size={hidden} is not a multiple of '
      f'num_attention_heads={heads}, and there is no head_dim'
    )
  config = llama.LlamaConfig(
    vocab_size=_whole(raw, 'vocab_size', None, where),
    hidden_size=hidden,
    intermediate_size=_whole(raw, 'intermediate_size', None, where),
    num_hidden_layers=_whole(raw, 'num_hidden_layers', None, where),
    num_attention_heads=heads,
    num_key_value_heads=_whole(raw, 'num_key_value_heads', heads, where),
    head_dim=_whole(raw, 'head_dim', hidden // heads, where),
    max_position_embeddings=_whole(raw, 'max_position_embeddings', 2048, where),
    rms_norm_eps=_positive(
      raw.get('rms_norm_eps', 1e-6), 'rms_norm_eps', where
    ),
    rope_theta=_rope_theta(raw, where),
    tie_word_embeddings=raw.get('tie_word_embeddings', False),
  )
  if not isinstance(config.tie_word_embeddings, bool):
    raise ValueError(
      f'{where}: tie_word_embeddings must be true or false, found '
      f'{str(config.tie_word_embeddings)[:80]}'
    )
  if heads % config.num_key_value_heads:
    raise ValueError(
      f'{where}: num_attention_heads={heads} is not a multiple of '
      f'num_key_value_heads={config.num_key_value_heads}'
    )
  if config.head_dim % 2:
    raise ValueError(
      f'{where}: head_dim={config.head_dim} is odd; rotary positions pair '
      'channels'
    )
  return config


def expected_tensors(config: llama.LlamaConfig) -> dict[str, Entry]:
  """Every tensor of a Llama checkpoint by its Hugging Face name."""
  c = config
  queries = c.num_attention_heads * c.head_dim
  values = c.num_key_value_heads * c.head_dim
  linear = {
    'self_attn.q_proj': (queries, c.hidden_size),
    'self_attn.k_proj': (values, c.hidden_size),
    'self_attn.v_proj': (values, c.hidden_size),
    'self_attn.o_proj': (c.hidden_size, queries),
    'mlp.gate_proj': (c.intermediate_size, c.hidden_size),
    'mlp.up_proj': (c.intermediate_size, c.hidden_size),
    'mlp.down_proj': (c.hidden_size, c.intermediate_size),
  }
  names = {
    'model.embed_tokens.weight': Entry(
      ('embed_tokens', 'embedding'), (c.vocab_size, c.hidden_size), False
    )
  }
  for i in range(c.num_hidden_layers):
    for norm in ('input_layernorm', 'post_attention_layernorm'):
      names[f'model.layers.{i}.{norm}.weight'] = Entry(
        ('layers', i, norm, 'scale'), (c.hidden_size,), False
      )
    for module, shape in linear.items():
      names[f'model.layers.{i}.{module}.weight'] = Entry(
        ('layers', i, *module.split('.'), 'kernel'), shape, True
      )
  names['model.norm.weight'] = Entry(('norm', 'scale'), (c.hidden_size,), False)
  if not c.tie_word_embeddings:
    names['lm_head.weight'] = Entry(
      ('lm_head', 'kernel'), (c.vocab_size, c.hidden_size), True
    )
  return names


def _whole(
  raw: Mapping[str, Any], name: str, default: int | None, where: str
) -> int:
  """A positive whole number of the config."""
  value = raw.get(name)
  value = default if value is None else value
  # No real size comes near 2**31; beyond it products would overflow.
  if type(value) is not int or not 0 < value < 2**31:
    found = 'nothing' if value is None else str(value)[:80]
    raise ValueError(
      f'{where}: {name} must be a positive whole number, found {found}'
    )
  return value


def _positive(value: Any, name: str, where: str) -> float:
  if type(value) not in (int, float) or not 0 < value < math.inf:
    raise ValueError(
      f'{where}: {name} must be a positive number, found {str(value)[:80]}'
    )
  return float(value)


def _rope_theta(raw: Mapping[str, Any], where: str) -> float:
  """Base of the rotary wavelengths: where transformers 4 or 5 puts it."""
  theta = raw.get('rope_theta')
  # transformers 5 moved rope_theta, and what rope_scaling was, together.
  for field in ('rope_scaling', 'rope_parameters'):
    options = raw.get(field)
    if options is None:
      continue
    if not isinstance(options, dict):
      raise ValueError(
        f'{where}: {field} must be an object or null, found {str(options)[:80]}'
      )
    kind = options.get('rope_type', options.get('type', 'default'))
    extra = sorted(options.keys() - {'rope_type', 'type', 'rope_theta'})
    if kind != 'default' or extra:
      raise ValueError(
        f'{where}: {field} of type {str(kind)[:40]!r}'
        f'{f" with {extra}" if extra else ""} is not supported; supported: '
        'rotary positions without scaling'
      )
    inner = options.get('rope_theta', theta)
    if theta is not None and inner != theta:
      raise ValueError(
        f'{where}: rope_theta={str(theta)[:40]} and {field}.rope_theta='
        f'{str(inner)[:40]} contradict each other'
      )
    theta = inner
  return _positive(10000.0 if theta is None else theta, 'rope_theta', where)


def _special(value: Any, config: llama.LlamaConfig, where: str) -> int | None:
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


def _to_params(
  found: dict[str, np.ndarray],
  config: llama.LlamaConfig,
  dtype: Any,
  where: str,
) -> dict:
  """Nested parameters from a checkpoint's tensors, all checked first."""
  if config.num_hidden_layers > len(found):
    # Also keeps a lying config from making up names by the billion.
    raise ValueError(
      f'{where}: the config calls for {config.num_hidden_layers} layers, the '
      f'checkpoint has only {len(found)} tensors'
    )
  found = {k: v for k, v in found.items() if not _IGNORED.fullmatch(k)}
  if config.tie_word_embeddings and 'lm_head.weight' in found:
    head = found.pop('lm_head.weight')
    embedding = found.get('model.embed_tokens.weight')
    if embedding is not None and not np.array_equal(head, embedding):
      raise ValueError(
        f'{where}: tie_word_embeddings is true, but lm_head.weight differs '
        'from model.embed_tokens.weight'
      )
  expected = expected_tensors(config)
  problems = []
  for name, entry in expected.items():
    if name not in found:
      near = difflib.get_close_matches(name, found.keys() - expected.keys(), 1)
      problems.append(
        f'{name} is missing' + (f' (there is {near[0]})' if near else '')
      )
      continue
    array = found[name]
    if array.shape != entry.shape:
      problems.append(
        f'{name} is of shape {array.shape}, expected {entry.shape}'
      )
    elif array.dtype.name not in ('float32', 'float16', 'bfloat16'):
      problems.append(
        f'{name} is {array.dtype}, supported are float32, float16, bfloat16'
      )
  problems += [
    f'{name} is not part of the architecture'
    for name in sorted(found.keys() - expected.keys())
  ]
  if problems:
    more = f'\n  and {len(problems) - 20} more' if len(problems) > 20 else ''
    raise ValueError(
      f'{where}: the tensors are not those the config calls for:\n  '
      + '\n  '.join(problems[:20])
      + more
    )
  params: dict = {}
  for name, entry in expected.items():
    # Overflow shows as inf, and is reported with its tensor just below.
    with np.errstate(over='ignore'):
      array = found[name].astype(jnp.dtype(dtype))
    bad = int(np.size(array) - np.isfinite(array).sum())
    if bad:
      raise ValueError(
        f'{where}: {name}: {bad} of {array.size} weights are not finite as '
        f'{array.dtype}'
      )
    inner = params
    for key in entry.path[:-1]:
      inner = inner.setdefault(key, {})
    inner[entry.path[-1]] = jnp.asarray(array.T if entry.transposed else array)
  return params


def _read_tokenizer(
  folder: pathlib.Path, config: llama.LlamaConfig
) -> tokenizers.Tokenizer | None:
  path = folder / 'tokenizer.json'
  if not path.is_file():
    return None
  tensors.read_json_object(path)
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


def _write_json(path: pathlib.Path, value: Any) -> None:
  with tensors.replacing(path) as temporary:
    temporary.write_text(json.dumps(value, indent=2) + '\n', encoding='utf-8')
