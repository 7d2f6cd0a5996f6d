"""Configs of Llama, and of what differs from it by options only."""

from typing import Any

from mq_jax.models import options as options_lib
from mq_jax.models.decoder import DecoderConfig
from mq_jax.models.huggingface import _rope
from mq_jax.models.options import Options

# Blocks are listed one by one, and a config may lie about their number.
_MOST_LAYERS = 100_000


def read(options: Options, family: str) -> DecoderConfig:
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
    activation=options.choice('hidden_act', options_lib.ACTIVATIONS),
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


def write(c: DecoderConfig) -> dict[str, Any]:
  fields = {
    **_sizes(c),
    'rms_norm_eps': c.norm_eps,
    'hidden_act': options_lib.STORED[c.activation],
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
