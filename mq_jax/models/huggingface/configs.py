"""config.json to `DecoderConfig` and back, one function a family."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mq_jax.models.decoder import DecoderConfig
from mq_jax.models.huggingface import _rope
from mq_jax.models.huggingface._options import Options

_ACTIVATIONS = {
  'silu': 'silu',
  'swish': 'silu',
  'gelu': 'gelu',
  'gelu_new': 'gelu_tanh',
  'gelu_pytorch_tanh': 'gelu_tanh',
  'gelu_fast': 'gelu_tanh',
  'relu': 'relu',
}
_STORED = {
  'silu': 'silu',
  'gelu': 'gelu',
  'gelu_tanh': 'gelu_new',
  'relu': 'relu',
}

# Blocks are listed one by one, and a config may lie about their number.
_MOST_LAYERS = 100_000

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


def _read_llama(options: Options, family: str) -> DecoderConfig:
  """Llama, and what differs from it by options only."""
  raw = options.raw
  hidden = options.whole('hidden_size')
  heads = options.whole('num_attention_heads')
  layers = options.whole('num_hidden_layers')
  if raw.get('head_dim') is None and hidden % heads:
    raise ValueError(
      f'{options.where}: hidden_size={hidden} is not a multiple of '
      f'num_attention_heads={heads}, and there is no head_dim'
    )
  values = options.whole('num_key_value_heads', heads)
  if heads % values:
    raise ValueError(
      f'{options.where}: num_attention_heads={heads} is not a multiple of '
      f'num_key_value_heads={values}'
    )
  head_dim = options.whole('head_dim', hidden // heads)
  if head_dim % 2:
    raise ValueError(
      f'{options.where}: head_dim={head_dim} is odd; rotary positions pair '
      'channels'
    )
  phi = family == 'phi3'
  rope = _rope.read(
    options,
    head_dim=head_dim,
    theta=1e6 if family == 'mixtral' else 1e4,
    partial=phi,
    phi=phi,
  )
  window, window_layers = _window(options, family, layers)
  experts = family == 'mixtral'
  biased = options.flag('attention_bias')
  return DecoderConfig(
    vocab_size=options.whole('vocab_size'),
    hidden_size=hidden,
    intermediate_size=options.whole('intermediate_size'),
    num_hidden_layers=layers,
    num_attention_heads=heads,
    num_key_value_heads=values,
    head_dim=head_dim,
    max_position_embeddings=options.whole('max_position_embeddings'),
    norm_eps=options.positive('rms_norm_eps'),
    rope_theta=rope.theta,
    tie_word_embeddings=options.flag('tie_word_embeddings'),
    family=family,
    rope_scaling=rope.scaling,
    rotary_dim=rope.size,
    sliding_window=window,
    window_layers=window_layers,
    qk_norm=family == 'qwen3',
    qkv_bias=family == 'qwen2' or biased,
    o_bias=biased,
    mlp_bias=options.flag('mlp_bias'),
    activation=options.choice('hidden_act', _ACTIVATIONS),
    num_experts=options.whole('num_local_experts') if experts else 0,
    experts_per_token=options.whole('num_experts_per_tok') if experts else 0,
  )


def _window(
  options: Options, family: str, layers: int
) -> tuple[int | None, tuple[int, ...] | None]:
  """Size of the sliding window, and the blocks that have it if not all."""
  if options.raw.get('sliding_window') is None:
    return None, None
  if not family.startswith('qwen'):
    return options.whole('sliding_window'), None
  if not options.flag('use_sliding_window'):
    return None, None
  size = options.whole('sliding_window')
  if layers > _MOST_LAYERS:
    most = f'at most {_MOST_LAYERS} with a sliding window'
    raise options.wrong('num_hidden_layers', most, layers)
  kinds = options.raw.get('layer_types')
  if kinds is None:
    first = options.raw.get('max_window_layers')
    if type(first) is not int or first < 0:
      raise options.wrong('max_window_layers', 'a whole number', first)
    chosen = tuple(range(first, layers)) if first < layers else ()
  else:
    known = ('full_attention', 'sliding_attention')
    if not isinstance(kinds, list) or len(kinds) != layers:
      raise options.wrong('layer_types', f'a list of {layers}', kinds)
    if not all(kind in known for kind in kinds):
      raise options.unsupported('layer_types', kinds, known)
    chosen = tuple(i for i, kind in enumerate(kinds) if kind == known[1])
  if not chosen:
    return None, None
  return size, None if len(chosen) == layers else chosen


def _write_llama(c: DecoderConfig) -> dict[str, Any]:
  fields = {
    **_sizes(c),
    'rms_norm_eps': c.norm_eps,
    'hidden_act': _STORED[c.activation],
    **_rope.write(c, phi=c.family == 'phi3'),
  }
  if c.family in ('llama', 'qwen3'):
    fields['attention_bias'] = c.o_bias
  if c.family == 'llama':
    fields['mlp_bias'] = c.mlp_bias
  else:
    fields['sliding_window'] = c.sliding_window
  if c.family.startswith('qwen'):
    n = c.num_hidden_layers
    chosen = [c.window(i) is not None for i in range(n)]
    kinds = ('full_attention', 'sliding_attention')
    fields['use_sliding_window'] = c.sliding_window is not None
    fields['layer_types'] = [kinds[x] for x in chosen]
    fields['max_window_layers'] = chosen.index(True) if any(chosen) else n
  if c.family == 'mixtral':
    fields['num_local_experts'] = c.num_experts
    fields['num_experts_per_tok'] = c.experts_per_token
  return fields


def _sizes(c: DecoderConfig) -> dict[str, Any]:
  names = (
    'vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers',
    'num_attention_heads', 'num_key_value_heads', 'head_dim',
    'max_position_embeddings', 'tie_word_embeddings',
  )  # fmt: skip
  return {name: getattr(c, name) for name in names}


def _read_opt(options: Options, family: str) -> DecoderConfig:
  hidden = options.whole('hidden_size')
  inner = options.raw.get('word_embed_proj_dim')
  if inner is not None and inner != hidden:
    raise options.unsupported('word_embed_proj_dim', inner, (hidden,))
  biased = options.flag('enable_bias', True)
  return DecoderConfig(
    **_classic(options, hidden, 'num_attention_heads', 'num_hidden_layers'),
    vocab_size=options.whole('vocab_size'),
    intermediate_size=options.whole('ffn_dim'),
    max_position_embeddings=options.whole('max_position_embeddings'),
    tie_word_embeddings=options.flag('tie_word_embeddings', True),
    family=family,
    position_offset=2,
    qkv_bias=biased,
    o_bias=biased,
    mlp_bias=biased,
    activation=options.choice('activation_function', _ACTIVATIONS),
  )


def _classic(
  options: Options, hidden: int, heads: str, layers: str
) -> dict[str, Any]:
  """What OPT and GPT-2 share: one key head a query head, layer norms."""
  n = options.whole(heads)
  if hidden % n:
    raise ValueError(
      f'{options.where}: hidden size {hidden} is not a multiple of {heads}={n}'
    )
  return {
    'hidden_size': hidden,
    'num_hidden_layers': options.whole(layers),
    'num_attention_heads': n,
    'num_key_value_heads': n,
    'head_dim': hidden // n,
    'norm': 'layer',
    'positions': 'learned',
    'gated': False,
  }


def _write_opt(c: DecoderConfig) -> dict[str, Any]:
  return {
    'vocab_size': c.vocab_size,
    'hidden_size': c.hidden_size,
    'word_embed_proj_dim': c.hidden_size,
    'ffn_dim': c.intermediate_size,
    'num_hidden_layers': c.num_hidden_layers,
    'num_attention_heads': c.num_attention_heads,
    'max_position_embeddings': c.max_position_embeddings,
    'do_layer_norm_before': True,
    'enable_bias': c.o_bias,
    'layer_norm_elementwise_affine': True,
    'activation_function': _STORED[c.activation],
    'tie_word_embeddings': c.tie_word_embeddings,
  }


def _read_gpt2(options: Options, family: str) -> DecoderConfig:
  hidden = options.whole('n_embd')
  return DecoderConfig(
    **_classic(options, hidden, 'n_head', 'n_layer'),
    vocab_size=options.whole('vocab_size'),
    intermediate_size=options.whole('n_inner', 4 * hidden),
    max_position_embeddings=options.whole('n_positions'),
    norm_eps=options.positive('layer_norm_epsilon'),
    tie_word_embeddings=options.flag('tie_word_embeddings', True),
    family=family,
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
    activation=options.choice('activation_function', _ACTIVATIONS),
  )


def _write_gpt2(c: DecoderConfig) -> dict[str, Any]:
  return {
    'vocab_size': c.vocab_size,
    'n_embd': c.hidden_size,
    'n_inner': c.intermediate_size,
    'n_layer': c.num_hidden_layers,
    'n_head': c.num_attention_heads,
    'n_positions': c.max_position_embeddings,
    'layer_norm_epsilon': c.norm_eps,
    'activation_function': _STORED[c.activation],
    'tie_word_embeddings': c.tie_word_embeddings,
  }


_LLAMA_DEFAULTS = {
  'rms_norm_eps': 1e-6,
  'hidden_act': 'silu',
  'max_position_embeddings': 2048,
}
_FAMILIES = {
  'llama': _Family(
    'LlamaForCausalLM',
    _read_llama,
    _write_llama,
    _LLAMA_DEFAULTS,
    _NO_WINDOW,
  ),
  'mistral': _Family(
    'MistralForCausalLM',
    _read_llama,
    _write_llama,
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
    _read_llama,
    _write_llama,
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
    _read_llama,
    _write_llama,
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
    _read_llama,
    _write_llama,
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
    _read_llama,
    _write_llama,
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
    _read_opt,
    _write_opt,
    {'activation_function': 'relu', 'max_position_embeddings': 2048},
    {
      'do_layer_norm_before': (True,),
      '_remove_final_layer_norm': (False,),
      'layer_norm_elementwise_affine': (True,),
    },
  ),
  'gpt2': _Family(
    'GPT2LMHeadModel',
    _read_gpt2,
    _write_gpt2,
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
