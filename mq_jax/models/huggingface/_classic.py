"""Configs of OPT and GPT-2: learned positions, layer norms, plain MLPs."""

from typing import Any

from mq_jax.models import options as options_lib
from mq_jax.models.decoder import DecoderConfig
from mq_jax.models.options import Options


def read_opt(options: Options, family: str) -> DecoderConfig:
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
    activation=options.choice('activation_function', options_lib.ACTIVATIONS),
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


def write_opt(c: DecoderConfig) -> dict[str, Any]:
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
    'activation_function': options_lib.STORED[c.activation],
    'tie_word_embeddings': c.tie_word_embeddings,
  }


def read_gpt2(options: Options, family: str) -> DecoderConfig:
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
    activation=options.choice('activation_function', options_lib.ACTIVATIONS),
  )


def write_gpt2(c: DecoderConfig) -> dict[str, Any]:
  return {
    'vocab_size': c.vocab_size,
    'n_embd': c.hidden_size,
    'n_inner': c.intermediate_size,
    'n_layer': c.num_hidden_layers,
    'n_head': c.num_attention_heads,
    'n_positions': c.max_position_embeddings,
    'layer_norm_epsilon': c.norm_eps,
    'activation_function': options_lib.STORED[c.activation],
    'tie_word_embeddings': c.tie_word_embeddings,
  }
