"""config.json to `DecoderConfig` and back, one function a family."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mq_jax.models.decoder import DecoderConfig
from mq_jax.models.huggingface import _classic, _llama
from mq_jax.models.options import Options

# Options that change the function, with the values under which they do not.
# transformers' own defaults are among them, so an option may be left out.
_NEUTRAL = {'quantization_config': (None,)}
_NO_BIAS = {'attention_bias': (False, None), 'mlp_bias': (False, None)}
_NO_WINDOW = {'sliding_window': (None,), 'layer_types': (None,)}


class _Family(NamedTuple):
  """One architecture.

  Attributes:
    architecture: Its name in `architectures`.
    read: Options (with `defaults` filled in) to config.
    write: Config to the fields that are its own.
    defaults: What transformers 5 takes where a field is absent.
    neutral: See `Options.neutral`.
  """

  architecture: str
  read: Callable[[Options, str], DecoderConfig]
  write: Callable[[DecoderConfig], dict[str, Any]]
  defaults: Mapping[str, Any]
  neutral: Mapping[str, tuple[Any, ...]]


_LLAMA_DEFAULTS = {
  'rms_norm_eps': 1e-6,
  'hidden_act': 'silu',
  'max_position_embeddings': 2048,
}
_FAMILIES = {
  'llama': _Family(
    'LlamaForCausalLM',
    _llama.read,
    _llama.write,
    _LLAMA_DEFAULTS,
    _NO_WINDOW,
  ),
  'mistral': _Family(
    'MistralForCausalLM',
    _llama.read,
    _llama.write,
    {
      **_LLAMA_DEFAULTS,
      'num_key_value_heads': 8,
      'max_position_embeddings': 131072,
      'sliding_window': 4096,
    },
    {**_NO_BIAS, 'layer_types': (None,)},
  ),
  'qwen2': _Family(
    'Qwen2ForCausalLM',
    _llama.read,
    _llama.write,
    {
      **_LLAMA_DEFAULTS,
      'num_key_value_heads': 32,
      'max_position_embeddings': 32768,
      'sliding_window': 4096,
      'max_window_layers': 28,
    },
    _NO_BIAS,
  ),
  'qwen3': _Family(
    'Qwen3ForCausalLM',
    _llama.read,
    _llama.write,
    {
      **_LLAMA_DEFAULTS,
      'num_key_value_heads': 32,
      'head_dim': 128,
      'max_position_embeddings': 32768,
      'sliding_window': 4096,
      'max_window_layers': 28,
    },
    {'mlp_bias': (False, None)},
  ),
  'phi3': _Family(
    'Phi3ForCausalLM',
    _llama.read,
    _llama.write,
    {
      **_LLAMA_DEFAULTS,
      'rms_norm_eps': 1e-5,
      'max_position_embeddings': 4096,
      'original_max_position_embeddings': 4096,
    },
    {**_NO_BIAS, 'layer_types': (None,)},
  ),
  'mixtral': _Family(
    'MixtralForCausalLM',
    _llama.read,
    _llama.write,
    {
      **_LLAMA_DEFAULTS,
      'rms_norm_eps': 1e-5,
      'num_key_value_heads': 8,
      'max_position_embeddings': 131072,
      'num_local_experts': 8,
      'num_experts_per_tok': 2,
    },
    {**_NO_BIAS, 'layer_types': (None,)},
  ),
  'opt': _Family(
    'OPTForCausalLM',
    _classic.read_opt,
    _classic.write_opt,
    {'activation_function': 'relu', 'max_position_embeddings': 2048},
    {
      'do_layer_norm_before': (True,),
      '_remove_final_layer_norm': (False,),
      'layer_norm_elementwise_affine': (True,),
    },
  ),
  'gpt2': _Family(
    'GPT2LMHeadModel',
    _classic.read_gpt2,
    _classic.write_gpt2,
    {
      'activation_function': 'gelu_new',
      'layer_norm_epsilon': 1e-5,
      'n_positions': 1024,
    },
    {
      'scale_attn_weights': (True,),
      'scale_attn_by_inverse_layer_idx': (False,),
      'add_cross_attention': (False,),
    },
  ),
}
_BY_ARCHITECTURE = {f.architecture: name for name, f in _FAMILIES.items()}
ARCHITECTURES = tuple(_BY_ARCHITECTURE)


def read_config(raw: Mapping[str, Any], where: str) -> DecoderConfig:
  """The decoder of a Hugging Face config, with its defaults filled in.

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
  name = _BY_ARCHITECTURE.get(str(architectures[0]))
  if name is None:
    raise ValueError(
      f'{where}: architecture {str(architectures[0])[:80]} is not supported; '
      f'supported: {", ".join(ARCHITECTURES)}'
    )
  family = _FAMILIES[name]
  options = Options({**family.defaults, **raw}, where)
  options.neutral({**_NEUTRAL, **family.neutral})
  try:
    return family.read(options, name)
  except ValueError as error:
    if str(error).startswith(where):
      raise
    raise ValueError(f'{where}: {error}') from error


def write_config(config: DecoderConfig) -> dict[str, Any]:
  """The Hugging Face config of a decoder, which `read_config` reads back.

  What the network computes in is not part of it.

  Raises:
    ValueError: if the family of the config has no way to say it.
  """
  if config.family not in _FAMILIES:
    raise ValueError(
      f'family={config.family!r} is not supported; supported: '
      f'{", ".join(_FAMILIES)}'
    )
  family = _FAMILIES[config.family]
  raw = {
    'architectures': [family.architecture],
    'model_type': config.family,
    **family.write(config),
  }
  again = read_config(raw, f'a config of family {config.family}')
  for name, value in vars(config).items():
    if name != 'dtype' and getattr(again, name) != value:
      raise ValueError(
        f'{config.family} checkpoints cannot say {name}={value!r}; they mean '
        f'{getattr(again, name)!r}'
      )
  return raw
