"""The decoder as Flax NNX modules.

Attribute names are those of Hugging Face's Llama, so a parameter's path here
is its path there with `kernel` for `weight`; other families' tensors are
renamed on reading.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mq_jax.models.decoder import rotary
from mq_jax.models.decoder._config import DecoderConfig

# attend(cache, q [b, t, h, d], k [b, t, g, d], v [b, t, g, d], positions
# i32[b, t], window, scale) -> (y [b, t, h, d], cache)
Attend = Callable[..., tuple[jax.Array, Any]]

_ACTIVATIONS = {
  'silu': nnx.silu,
  'gelu': lambda x: nnx.gelu(x, approximate=False),
  'gelu_tanh': lambda x: nnx.gelu(x, approximate=True),
  'relu': nnx.relu,
}


def attend_all(
  cache: Any,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  positions: jax.Array,
  window: int | None,
  scale: float,
) -> tuple[jax.Array, Any]:
  """Causal attention within the given tokens, without a cache.

  Args:
    cache: Returned as it is.
    q: Queries, rotated. Shape [b, t, h, d].
    k: Keys, rotated. Shape [b, t, g, d], h a multiple of g.
    v: Values. Shape [b, t, g, d].
    positions: Not used: tokens follow each other.
    window: Tokens to look back at, itself included; None for all.
    scale: Factor on the products of queries and keys.

  Returns:
    What each head saw, [b, t, h, d], and the cache.
  """
  del positions
  local = None if window is None else (window - 1, 0)
  y = jax.nn.dot_product_attention(
    q, k, v, is_causal=True, scale=scale, local_window_size=local
  )
  return y, cache


def _norm(config: DecoderConfig, size: int, rngs: nnx.Rngs) -> nnx.Module:
  """A norm that computes and returns float32."""
  options = {'epsilon': config.norm_eps, 'dtype': jnp.float32, 'rngs': rngs}
  if config.norm == 'rms':
    return nnx.RMSNorm(size, **options)
  # E[x^2] - E[x]^2 cancels where the mean is large, as in OPT.
  return nnx.LayerNorm(size, use_fast_variance=False, **options)


class Attention(nnx.Module):
  """Causal self-attention with at most as many key as query heads."""

  def __init__(
    self, config: DecoderConfig, window: int | None, *, rngs: nnx.Rngs
  ):
    c = config
    linear = lambda n_in, n_out, bias: nnx.Linear(
      n_in, n_out, use_bias=bias, dtype=jnp.dtype(c.dtype), rngs=rngs
    )
    queries = c.num_attention_heads * c.head_dim
    values = c.num_key_value_heads * c.head_dim
    self.q_proj = linear(c.hidden_size, queries, c.qkv_bias)
    self.k_proj = linear(c.hidden_size, values, c.qkv_bias)
    self.v_proj = linear(c.hidden_size, values, c.qkv_bias)
    self.o_proj = linear(queries, c.hidden_size, c.o_bias)
    if c.qk_norm:
      self.q_norm = _norm(c, c.head_dim, rngs)
      self.k_norm = _norm(c, c.head_dim, rngs)
    self.config = c
    self.window = window

  def __call__(
    self, x: jax.Array, positions: jax.Array, cache: Any, attend: Attend
  ) -> tuple[jax.Array, Any]:
    c = self.config
    b, t, _ = x.shape
    heads = lambda y: y.reshape(b, t, -1, c.head_dim)
    q, k = heads(self.q_proj(x)), heads(self.k_proj(x))
    if c.qk_norm:
      q = self.q_norm(q).astype(q.dtype)
      k = self.k_norm(k).astype(k.dtype)
    if c.positions == 'rotary':
      turn = lambda y: rotary.rotate(
        y, positions, c.rope_theta, c.rope_scaling, c.rotary_dim
      )
      q, k = turn(q), turn(k)
    v = heads(self.v_proj(x))
    scale = float(1.0 / np.sqrt(c.head_dim))
    y, cache = attend(cache, q, k, v, positions, self.window, scale)
    return self.o_proj(y.reshape(b, t, -1)), cache


class MLP(nnx.Module):
  """Feed-forward layer, gated (arXiv 2002.05202) or plain."""

  def __init__(self, config: DecoderConfig, linear: Callable[[int, int], Any]):
    c = config
    if c.gated:
      self.gate_proj = linear(c.hidden_size, c.intermediate_size)
    self.up_proj = linear(c.hidden_size, c.intermediate_size)
    self.down_proj = linear(c.intermediate_size, c.hidden_size)
    self.gated = c.gated
    self.activation = c.activation

  def __call__(self, x: jax.Array) -> jax.Array:
    act = _ACTIVATIONS[self.activation]
    if self.gated:
      return self.down_proj(act(self.gate_proj(x)) * self.up_proj(x))
    return self.down_proj(act(self.up_proj(x)))


class Stacked(nnx.Module):
  """Several linear maps side by side: [e, m, k] -> [e, m, n]."""

  def __init__(self, e: int, k: int, n: int, dtype: Any, *, rngs: nnx.Rngs):
    init = nnx.initializers.lecun_normal(batch_axis=0)
    self.kernel = nnx.Param(init(rngs.params(), (e, k, n), jnp.float32))
    self.dtype = dtype

  def __call__(self, x: jax.Array) -> jax.Array:
    x, kernel = nnx.nn.dtypes.promote_dtype(
      (x, self.kernel[...]), dtype=self.dtype
    )
    return jnp.einsum('emk,ekn->emn', x, kernel)


class Mixture(nnx.Module):
  """Experts of which a router chooses a few for each token.

  Every expert is given rows for all tokens, zero where a token is not its
  own: their number is static, no token is ever dropped, and Gram matrices of
  an expert's inputs hold its own tokens only. It costs e / k times what the
  chosen experts would.

  Source:
    Mixtral of Experts, arXiv 2401.04088, section 2.1: softmax over the
    chosen ones; here as in transformers, over all and then normalised.
  """

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    c = config
    self.router = nnx.Linear(
      c.hidden_size,
      c.num_experts,
      use_bias=False,
      dtype=jnp.dtype(c.dtype),
      rngs=rngs,
    )
    self.experts = MLP(
      c,
      lambda k, n: Stacked(c.num_experts, k, n, jnp.dtype(c.dtype), rngs=rngs),
    )
    self.per_token = c.experts_per_token

  def __call__(self, x: jax.Array) -> jax.Array:
    rows = x.reshape(-1, x.shape[-1])
    scores = jax.nn.softmax(self.router(rows).astype(jnp.float32), axis=-1)
    top, chosen = jax.lax.top_k(scores, self.per_token)  # [m, k]
    top = top / jnp.sum(top, axis=-1, keepdims=True)
    hot = jax.nn.one_hot(chosen, scores.shape[-1])  # f32[m, k, e]
    share = jnp.sum(hot * top[..., None], axis=1).T[..., None]  # [e, m, 1]
    own = jnp.any(hot > 0, axis=1).T[..., None]
    zero = jnp.zeros((), rows.dtype)
    y = self.experts(jnp.where(own, rows[None], zero))
    # Summed elementwise: a matmul of two activations would count as attention.
    y = jnp.sum(y * share.astype(y.dtype), axis=0)
    return y.reshape(x.shape)


class Block(nnx.Module):
  """Pre-norm transformer block."""

  def __init__(
    self, config: DecoderConfig, window: int | None, *, rngs: nnx.Rngs
  ):
    c = config
    self.input_layernorm = _norm(c, c.hidden_size, rngs)
    self.self_attn = Attention(c, window, rngs=rngs)
    self.post_attention_layernorm = _norm(c, c.hidden_size, rngs)
    if c.num_experts:
      self.mlp = Mixture(c, rngs=rngs)
    else:
      self.mlp = MLP(
        c,
        lambda k, n: nnx.Linear(
          k, n, use_bias=c.mlp_bias, dtype=jnp.dtype(c.dtype), rngs=rngs
        ),
      )

  def __call__(
    self, x: jax.Array, positions: jax.Array, cache: Any, attend: Attend
  ) -> tuple[jax.Array, Any]:
    y = self.input_layernorm(x).astype(x.dtype)
    y, cache = self.self_attn(y, positions, cache, attend)
    x = x + y
    y = self.post_attention_layernorm(x).astype(x.dtype)
    return x + self.mlp(y), cache


class Decoder(nnx.Module):
  """Decoder-only language model: tokens i32[b, t] -> logits [b, t, v]."""

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    c = config
    embedding = lambda rows: nnx.Embed(
      rows,
      c.hidden_size,
      dtype=jnp.dtype(c.dtype),
      embedding_init=nnx.initializers.normal(0.02),
      rngs=rngs,
    )
    self.embed_tokens = embedding(c.vocab_size)
    if c.positions == 'learned':
      self.embed_positions = embedding(
        c.max_position_embeddings + c.position_offset
      )
    self.layers = nnx.List(
      [Block(c, c.window(i), rngs=rngs) for i in range(c.num_hidden_layers)]
    )
    self.norm = _norm(c, c.hidden_size, rngs)
    if not c.tie_word_embeddings:
      self.lm_head = nnx.Linear(
        c.hidden_size,
        c.vocab_size,
        use_bias=False,
        dtype=jnp.dtype(c.dtype),
        rngs=rngs,
      )
    self.config = c

  def embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    """Embeds i32[b, t] at positions i32[b, t] or [1, t]: [b, t, hidden]."""
    x = self.embed_tokens(tokens)
    if self.config.positions == 'learned':
      # Beyond the table this is NaN, which nobody takes for a result.
      x = x + self.embed_positions(positions + self.config.position_offset)
    return x

  def head(self, x: jax.Array) -> jax.Array:
    """The last norm and the logits, [b, t, hidden] -> [b, t, vocabulary]."""
    x = self.norm(x).astype(x.dtype)
    if self.config.tie_word_embeddings:
      return self.embed_tokens.attend(x)
    return self.lm_head(x)

  def __call__(self, tokens: jax.Array) -> jax.Array:
    positions = jnp.arange(tokens.shape[1])[None]
    x = self.embed(tokens, positions)
    for block in self.layers:
      x, _ = block(x, positions, None, attend_all)
    return self.head(x)
