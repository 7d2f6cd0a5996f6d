"""Transformer encoders of text: BERT, RoBERTa, DistilBERT.

One module for all, by options: post-norm blocks as in Devlin et al. 2018
(arXiv 1810.04805), learned positions. Its attention and MLP also serve the
vision transformers of `vit`.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from mq_jax import equalization
from mq_jax.models import modules

ACTIVATIONS = {
  'gelu': functools.partial(jax.nn.gelu, approximate=False),
  'gelu_new': functools.partial(jax.nn.gelu, approximate=True),
  'gelu_pytorch_tanh': functools.partial(jax.nn.gelu, approximate=True),
  'relu': jax.nn.relu,
  'silu': jax.nn.silu,
}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
  """Sizes and options of an encoder, in Hugging Face's names.

  Attributes:
    task: 'features' (hidden states), 'tokens' (masked language model) or
      'sequence' (classes of a text).
    model_type: 'bert', 'roberta' (positions begin after that of padding and
      skip padding) or 'distilbert' (relu before the classes).
    type_vocab_size: Kinds of segments; 0 for none.
    pad_token_id: Token that RoBERTa gives no position.
    num_labels: Classes of the task 'sequence'.
  """

  task: str
  model_type: str
  vocab_size: int
  hidden_size: int
  num_hidden_layers: int
  num_attention_heads: int
  intermediate_size: int
  max_position_embeddings: int
  type_vocab_size: int
  layer_norm_eps: float = 1e-12
  hidden_act: str = 'gelu'
  pad_token_id: int = 0
  tie_word_embeddings: bool = True
  num_labels: int = 2


class Attention(nnx.Module):
  """Self-attention over all positions, [b, t, hidden] -> the same."""

  def __init__(
    self, hidden: int, heads: int, *, rngs: nnx.Rngs, qkv_bias: bool = True
  ):
    linear = lambda bias: nnx.Linear(hidden, hidden, use_bias=bias, rngs=rngs)
    self.q_proj = linear(qkv_bias)
    self.k_proj = linear(qkv_bias)
    self.v_proj = linear(qkv_bias)
    self.o_proj = linear(True)
    self.heads = heads

  def __call__(
    self, x: jax.Array, mask: jax.Array | None = None
  ) -> jax.Array:  # mask: bool[b, t], True for keys that are seen
    b, t, _ = x.shape
    split = lambda y: y.reshape(b, t, self.heads, -1)
    y = jax.nn.dot_product_attention(
      split(self.q_proj(x)),
      split(self.k_proj(x)),
      split(self.v_proj(x)),
      mask=None if mask is None else mask[:, None, None, :],
    )
    return self.o_proj(y.reshape(b, t, -1))


class Mlp(nnx.Module):
  """Two linear layers with an activation between them."""

  def __init__(
    self, hidden: int, intermediate: int, activation: str, *, rngs: nnx.Rngs
  ):
    self.fc1 = nnx.Linear(hidden, intermediate, rngs=rngs)
    self.fc2 = nnx.Linear(intermediate, hidden, rngs=rngs)
    self.activation = activation

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class _Block(nnx.Module):
  """Post-norm transformer block."""

  def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
    c = config
    self.attention = Attention(c.hidden_size, c.num_attention_heads, rngs=rngs)
    self.attention_norm = _norm(c, rngs)
    self.mlp = Mlp(c.hidden_size, c.intermediate_size, c.hidden_act, rngs=rngs)
    self.mlp_norm = _norm(c, rngs)

  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    x = self.attention_norm(x + self.attention(x, mask))
    return self.mlp_norm(x + self.mlp(x))


class _Embeddings(nnx.Module):
  """Sum of the embeddings of word, position and segment, normalized."""

  def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
    c = config
    table = lambda n: nnx.Embed(n, c.hidden_size, rngs=rngs)
    self.word_embeddings = table(c.vocab_size)
    self.position_embeddings = table(c.max_position_embeddings)
    if c.type_vocab_size:
      self.token_type_embeddings = table(c.type_vocab_size)
    self.norm = _norm(c, rngs)
    self.config = c

  def __call__(self, tokens: jax.Array, types: jax.Array) -> jax.Array:
    c = self.config
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    if c.model_type == 'roberta':
      real = tokens != c.pad_token_id
      counted = jnp.cumsum(real, axis=1, dtype=jnp.int32)
      positions = c.pad_token_id + jnp.where(real, counted, 0)
    x = self.word_embeddings(tokens) + self.position_embeddings(positions)
    if c.type_vocab_size:
      x = x + self.token_type_embeddings(types)
    return self.norm(x)


class _MaskedHead(nnx.Module):
  """Scores of all words at every position."""

  def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
    c = config
    self.dense = nnx.Linear(c.hidden_size, c.hidden_size, rngs=rngs)
    self.norm = _norm(c, rngs)
    self.bias = nnx.Param(jnp.zeros(c.vocab_size))
    if not c.tie_word_embeddings:
      self.decoder = nnx.Linear(
        c.hidden_size, c.vocab_size, use_bias=False, rngs=rngs
      )
    self.activation, self.tied = c.hidden_act, c.tie_word_embeddings

  def __call__(self, x: jax.Array, words: nnx.Embed) -> jax.Array:
    x = self.norm(ACTIVATIONS[self.activation](self.dense(x)))
    logits = words.attend(x) if self.tied else self.decoder(x)
    return logits + self.bias[...][None, None]


class Encoder(nnx.Module):
  """Text encoder: tokens i32[b, t] -> [b, t, hidden | vocabulary] or [b, n]."""

  def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
    c = config
    self.embeddings = _Embeddings(c, rngs=rngs)
    self.layers = nnx.List(
      [_Block(c, rngs=rngs) for _ in range(c.num_hidden_layers)]
    )
    if c.task == 'tokens':
      self.head = _MaskedHead(c, rngs=rngs)
    if c.task == 'sequence':
      self.pooler = nnx.Linear(c.hidden_size, c.hidden_size, rngs=rngs)
      self.classifier = nnx.Linear(c.hidden_size, c.num_labels, rngs=rngs)
    self.config = c

  def __call__(
    self,
    tokens: jax.Array,
    mask: jax.Array | None = None,
    types: jax.Array | None = None,
  ) -> jax.Array:
    c = self.config
    mask = jnp.ones_like(tokens) if mask is None else mask
    types = jnp.zeros_like(tokens) if types is None else types
    x = self.embeddings(tokens, types)
    for block in self.layers:
      x = block(x, mask.astype(bool))
    if c.task == 'tokens':
      return self.head(x, self.embeddings.word_embeddings)
    if c.task == 'sequence':
      pooled = jax.nn.relu if c.model_type == 'distilbert' else jnp.tanh
      return self.classifier(pooled(self.pooler(x[:, 0])))
    return x


def _norm(config: EncoderConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
  return nnx.LayerNorm(
    config.hidden_size,
    epsilon=config.layer_norm_eps,
    use_fast_variance=False,  # cancels where means are large
    rngs=rngs,
  )


def make(config: EncoderConfig) -> Encoder:
  """The module, as it initialises itself."""
  return Encoder(config, rngs=nnx.Rngs(0))


@functools.cache
def functional(config: EncoderConfig) -> Callable[..., jax.Array]:
  """The encoder as a pure function; one object for equal configs.

  Args:
    config: Sizes and options.

  Returns:
    `apply(params, tokens i32[b, t], mask=None, types=None)`, where `mask`
    [b, t] is 0 for padding and `types` i32[b, t] are segments. It gives hidden
    states [b, t, hidden], scores [b, t, vocabulary] or scores [b, labels].
  """
  return modules.functional(lambda: make(config), 'encoder config')


def attention_pairs(
  attention: tuple[str | int, ...], hidden: int
) -> dict[str, equalization.ChannelPair]:
  """Pairs 'value' and 'key' of an attention with biases, see `channel_pairs`.

  Args:
    attention: Path of its parameters.
    hidden: Its width.
  """
  pair = equalization.ChannelPair
  uses = lambda n: (
    ((*attention, n, 'kernel'), 1),
    ((*attention, n, 'bias'), 0),
  )
  rows = ((*attention, 'o_proj', 'kernel'), 0)
  return {
    'value': pair(hidden, uses('v_proj'), (rows,)),
    'key': pair(hidden, uses('k_proj'), uses('q_proj')),
  }


def channel_pairs(
  config: EncoderConfig,
) -> dict[str, tuple[equalization.ChannelPair, ...]]:
  """Where a factor may move from one weight to the next, by kind.

  Returns:
    'value': outputs of v_proj and rows of o_proj; attention averages values.
    'key': outputs of k_proj and of q_proj, whose products are the scores.
    'hidden': outputs of fc1 and rows of fc2; only with relu, through which
      positive factors pass.
    The norms of post-norm blocks feed the residual too, so there are no pairs
    of them.
  """
  kinds: dict[str, list] = {'value': [], 'key': []}
  for i in range(config.num_hidden_layers):
    found = attention_pairs(('layers', i, 'attention'), config.hidden_size)
    for kind, pair in found.items():
      kinds[kind].append(pair)
  if config.hidden_act == 'relu':
    kinds['hidden'] = [
      hidden_pair(('layers', i, 'mlp'), config.intermediate_size)
      for i in range(config.num_hidden_layers)
    ]
  return {kind: tuple(pairs) for kind, pairs in kinds.items()}


def hidden_pair(
  mlp: tuple[str | int, ...], intermediate: int
) -> equalization.ChannelPair:
  """The pair of an `Mlp` with relu, at the path `mlp`."""
  return equalization.ChannelPair(
    intermediate,
    (((*mlp, 'fc1', 'kernel'), 1), ((*mlp, 'fc1', 'bias'), 0)),
    (((*mlp, 'fc2', 'kernel'), 0),),
  )
