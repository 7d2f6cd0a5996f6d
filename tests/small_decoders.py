"""Decoders of a block or two with the options of each family, drawn anew."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax.models import decoder
from mq_jax.models.decoder import rotary

CONFIG = decoder.DecoderConfig(
  vocab_size=40,
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=1,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=8,
  max_position_embeddings=32,
)
CLASSIC = {'norm': 'layer', 'positions': 'learned', 'gated': False}
OPTIONS = {
  'llama': {},
  'windowed': {'sliding_window': 3, 'window_layers': (1,),
               'num_hidden_layers': 2, 'tie_word_embeddings': False},
  'qwen': {'qk_norm': True, 'qkv_bias': True},
  'phi': {'rotary_dim': 4, 'rope_scaling': rotary.Dynamic(2.0, 6)},
  'opt': {**CLASSIC, 'activation': 'relu', 'position_offset': 2,
          'qkv_bias': True, 'o_bias': True, 'mlp_bias': True},
  'gpt2': {**CLASSIC, 'activation': 'gelu_tanh', 'qkv_bias': True},
  'mixtral': {'num_experts': 3, 'experts_per_token': 2},
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 12)).astype(np.int32)


@functools.cache
def make(name, vectors=0.3):
  """Config, drawn parameters, and the compiled function of both.

  `vectors` is how far gains and biases are from 1 and 0.
  """
  config = dataclasses.replace(CONFIG, **OPTIONS[name])
  shapes = jax.eval_shape(lambda: decoder.init_params(config, 0))
  rng = np.random.default_rng(0)

  def draw(path, x):
    one = float(path[-1].key == 'scale')
    size = 0.5 if len(x.shape) > 1 else vectors  # weights far from linear
    return jnp.asarray(rng.normal(one, size, x.shape), jnp.float32)

  params = jax.tree_util.tree_map_with_path(draw, shapes)
  return config, params, compiled(decoder.functional(config))


def compiled(f):
  # Half the time of a test is spent optimizing code that runs once.
  return jax.jit(f, compiler_options={'xla_backend_optimization_level': 0})
