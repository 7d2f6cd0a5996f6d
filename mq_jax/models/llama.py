"""A Llama-style decoder: RMSNorm, rotary positions, SwiGLU, grouped queries.

The architecture is that of Touvron et al. 2023 (arXiv 2307.09288); attribute
names follow the Hugging Face layout, so a parameter's path here is its path
there with `kernel` for `weight`.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from mq_jax import equalization


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
  """Sizes of a decoder, in Hugging Face's names."""

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  max_position_embeddings: int
  rms_norm_eps: float = 1e-5
  rope_theta: float = 10000.0
  tie_word_embeddings: bool = True


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
  """Rotary position embedding, halves of the head dimension paired.

  Args:
    x: Queries or keys. Shape [b, t, h, d], d even.
    positions: Token positions. Shape [t].
    theta: Base of the geometric series of wavelengths.

  Returns:
    `x` with dimensions i and i + d/2 rotated by `positions * theta^(-2i/d)`.

  Source:
    RoFormer, arXiv 2104.09864, equation 34; the half-split pairing is that of
    Hugging Face's Llama.
  """
  half = x.shape[-1] // 2
  frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = positions.astype(jnp.float32)[:, None] * frequency[None]  # [t, d/2]
  cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
  x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)
  return rotated.astype(x.dtype)


class Attention(nnx.Module):
  """Causal self-attention with fewer key/value heads than query heads."""

  def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
    c = config
    linear = lambda n_in, n_out: nnx.Linear(
      n_in, n_out, use_bias=False, rngs=rngs
    )
    self.q_proj = linear(c.hidden_size, c.num_attention_heads * c.head_dim)
    self.k_proj = linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
    self.v_proj = linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
    self.o_proj = linear(c.num_attention_heads * c.head_dim, c.hidden_size)
    self.head_dim = c.head_dim
    self.rope_theta = c.rope_theta

  def __call__(self, x: jax.Array) -> jax.Array:  # [b, t, hidden]
    b, t, _ = x.shape
    heads = lambda y: y.reshape(b, t, -1, self.head_dim)
    positions = jnp.arange(t)
    q = rotate(heads(self.q_proj(x)), positions, self.rope_theta)
    k = rotate(heads(self.k_proj(x)), positions, self.rope_theta)
    v = heads(self.v_proj(x))
    y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return self.o_proj(y.reshape(b, t, -1))


class MLP(nnx.Module):
  """SwiGLU feed-forward layer, arXiv 2002.05202."""

  def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
    c = config
    linear = lambda n_in, n_out: nnx.Linear(
      n_in, n_out, use_bias=False, rngs=rngs
    )
    self.gate_proj = linear(c.hidden_size, c.intermediate_size)
    self.up_proj = linear(c.hidden_size, c.intermediate_size)
    self.down_proj = linear(c.intermediate_size, c.hidden_size)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.down_proj(nnx.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
  """Pre-norm transformer block."""

  def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
    norm = lambda: nnx.RMSNorm(
      config.hidden_size, epsilon=config.rms_norm_eps, rngs=rngs
    )
    self.input_layernorm = norm()
    self.self_attn = Attention(config, rngs=rngs)
    self.post_attention_layernorm = norm()
    self.mlp = MLP(config, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = x + self.self_attn(self.input_layernorm(x))
    return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nnx.Module):
  """Decoder-only language model: tokens i32[b, t] -> logits f32[b, t, v]."""

  def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
    c = config
    self.embed_tokens = nnx.Embed(
      c.vocab_size,
      c.hidden_size,
      embedding_init=nnx.initializers.normal(0.02),
      rngs=rngs,
    )
    self.layers = nnx.List(
      [Block(c, rngs=rngs) for _ in range(c.num_hidden_layers)]
    )
    self.norm = nnx.RMSNorm(c.hidden_size, epsilon=c.rms_norm_eps, rngs=rngs)
    if not c.tie_word_embeddings:
      self.lm_head = nnx.Linear(
        c.hidden_size, c.vocab_size, use_bias=False, rngs=rngs
      )
    self.tied = c.tie_word_embeddings

  def __call__(self, tokens: jax.Array) -> jax.Array:
    x = self.embed_tokens(tokens)
    for block in self.layers:
      x = block(x)
    x = self.norm(x)
    return self.embed_tokens.attend(x) if self.tied else self.lm_head(x)


@functools.cache
def functional(config: LlamaConfig) -> Callable[[dict, jax.Array], jax.Array]:
  """The decoder as a pure function of its parameters.

  Equal configs give the same function object, so that what is compiled for
  it serves every set of parameters of that config.

  Args:
    config: Sizes of the decoder.

  Returns:
    `apply(params, tokens i32[b, t]) -> logits [b, t, v]`, where `params` is
    the nested dict of arrays that `init_params` (or a checkpoint reader)
    returns. It raises ValueError for a dict of another structure.
  """
  graph, state = nnx.split(
    nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
  )
  abstract = nnx.to_pure_dict(state)

  def apply(params: dict, tokens: jax.Array) -> jax.Array:
    if jax.tree.structure(params) != jax.tree.structure(abstract):
      # nnx matches leaves by order: a renamed one would be taken for another.
      got, want = _names(params), _names(abstract)
      raise ValueError(
        f'parameters do not fit the Llama config: missing '
        f'{sorted(want - got)}, unexpected {sorted(got - want)}'
      )
    return nnx.merge(graph, params)(tokens)

  return apply


def _names(params: dict) -> set[str]:
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  return {jax.tree_util.keystr(p, simple=True, separator='/') for p in paths}


def init_params(config: LlamaConfig, seed: int) -> dict:
  """Randomly initialised parameters as a nested dict of f32 arrays."""
  make = jax.jit(
    lambda: nnx.to_pure_dict(nnx.state(Llama(config, rngs=nnx.Rngs(seed))))
  )
  return make()


def channel_pairs(
  config: LlamaConfig,
) -> dict[str, tuple[equalization.ChannelPair, ...]]:
  """Where a factor may move from one weight to the next, by kind.

  Returns:
    One or two pairs a layer for each kind:
    'norm': the gain of an RMSNorm, and the rows of the kernels it feeds.
    'hidden': columns of up_proj and rows of down_proj; exact because
      silu(gate) * up is linear in up.
    'value': columns of v_proj and rows of o_proj; attention averages values
      of one channel. Query heads that share a value head share its factors.
    'key': columns of k_proj and of q_proj, whose products are the scores.
      The two channels that a rotary position mixes share a factor.
  """
  c = config
  pair = equalization.ChannelPair
  kinds = {'norm': [], 'hidden': [], 'value': [], 'key': []}
  for i in range(c.num_hidden_layers):
    attention, mlp = ('layers', i, 'self_attn'), ('layers', i, 'mlp')
    q, k, v, o = (
      (*attention, f'{n}_proj', 'kernel') for n in ('q', 'k', 'v', 'o')
    )
    gate, up, down = (
      (*mlp, f'{n}_proj', 'kernel') for n in ('gate', 'up', 'down')
    )
    before = ('layers', i, 'input_layernorm', 'scale')
    after = ('layers', i, 'post_attention_layernorm', 'scale')
    n_values = c.num_key_value_heads * c.head_dim
    kinds['norm'] += [
      pair(c.hidden_size, ((before, 0),), ((q, 0), (k, 0), (v, 0))),
      pair(c.hidden_size, ((after, 0),), ((gate, 0), (up, 0))),
    ]
    kinds['hidden'].append(pair(c.intermediate_size, ((up, 1),), ((down, 0),)))
    # block: o_proj's rows are [kv head, query head of it, d], v_proj's
    # columns [kv head, d]; rotary splits d into [half, d / 2].
    kinds['value'].append(pair(n_values, ((v, 1),), ((o, 0),), c.head_dim))
    kinds['key'].append(
      pair(n_values // 2, ((k, 1),), ((q, 1),), c.head_dim // 2)
    )
  return {kind: tuple(pairs) for kind, pairs in kinds.items()}
