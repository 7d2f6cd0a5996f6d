"""Vision transformers: ViT and DeiT.

Pre-norm blocks on patches of an image, as in Dosovitskiy et al. 2020 (arXiv
2010.11929), with DeiT's distillation token (arXiv 2012.12877) by option.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from mq_jax import equalization
from mq_jax.models import encoder, modules


@dataclasses.dataclass(frozen=True)
class VitConfig:
  """Sizes and options, in Hugging Face's names.

  Attributes:
    distilled: Whether a distillation token stands beside the class token.
    teacher: Whether that token has classes of its own; the scores are the
      mean of both.
  """

  image_size: int
  patch_size: int
  num_channels: int
  hidden_size: int
  num_hidden_layers: int
  num_attention_heads: int
  intermediate_size: int
  num_labels: int
  layer_norm_eps: float = 1e-12
  hidden_act: str = 'gelu'
  qkv_bias: bool = True
  distilled: bool = False
  teacher: bool = False


class _Block(nnx.Module):
  """Pre-norm transformer block."""

  def __init__(self, config: VitConfig, *, rngs: nnx.Rngs):
    c = config
    self.attention_norm = _norm(c, rngs)
    self.attention = encoder.Attention(
      c.hidden_size, c.num_attention_heads, qkv_bias=c.qkv_bias, rngs=rngs
    )
    self.mlp_norm = _norm(c, rngs)
    self.mlp = encoder.Mlp(
      c.hidden_size, c.intermediate_size, c.hidden_act, rngs=rngs
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    x = x + self.attention(self.attention_norm(x))
    return x + self.mlp(self.mlp_norm(x))


class Vit(nnx.Module):
  """Image classifier: pixels f32[b, h, w, c] -> scores [b, labels]."""

  def __init__(self, config: VitConfig, *, rngs: nnx.Rngs):
    c = config
    token = lambda n: nnx.Param(jnp.zeros((1, n, c.hidden_size)))
    self.cls_token = token(1)
    if c.distilled:
      self.distillation_token = token(1)
    n_tokens = (c.image_size // c.patch_size) ** 2 + 1 + c.distilled
    self.position_embeddings = token(n_tokens)
    self.patch_embed = nnx.Conv(
      c.num_channels,
      c.hidden_size,
      (c.patch_size, c.patch_size),
      strides=c.patch_size,
      padding='VALID',
      rngs=rngs,
    )
    self.layers = nnx.List(
      [_Block(c, rngs=rngs) for _ in range(c.num_hidden_layers)]
    )
    self.norm = _norm(c, rngs)
    self.classifier = nnx.Linear(c.hidden_size, c.num_labels, rngs=rngs)
    if c.teacher:
      self.distillation_classifier = nnx.Linear(
        c.hidden_size, c.num_labels, rngs=rngs
      )
    self.config = c

  def __call__(self, pixels: jax.Array) -> jax.Array:
    c = self.config
    if pixels.shape[1:] != (c.image_size, c.image_size, c.num_channels):
      raise ValueError(
        f'images of shape {pixels.shape[1:]}, this network needs '
        f'{(c.image_size, c.image_size, c.num_channels)}'
      )
    b = pixels.shape[0]
    patches = self.patch_embed(pixels).reshape(b, -1, c.hidden_size)
    tokens = [self.cls_token]
    if c.distilled:
      tokens.append(self.distillation_token)
    tokens = [jnp.broadcast_to(t[...], (b, 1, c.hidden_size)) for t in tokens]
    x = jnp.concatenate([*tokens, patches], axis=1)
    x = x + self.position_embeddings[...]
    for block in self.layers:
      x = block(x)
    x = self.norm(x)
    scores = self.classifier(x[:, 0])
    if not c.teacher:
      return scores
    return (scores + self.distillation_classifier(x[:, 1])) / 2


def _norm(config: VitConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
  return nnx.LayerNorm(
    config.hidden_size,
    epsilon=config.layer_norm_eps,
    use_fast_variance=False,  # cancels where means are large
    rngs=rngs,
  )


def make(config: VitConfig) -> Vit:
  """The module, as it initialises itself."""
  return Vit(config, rngs=nnx.Rngs(0))


@functools.cache
def functional(config: VitConfig) -> Callable[[dict, jax.Array], jax.Array]:
  """The network as a pure function; one object for equal configs.

  Returns:
    `apply(params, pixels f32[b, h, w, c]) -> scores [b, labels]`. It raises
    ValueError for images of another size.
  """
  return modules.functional(lambda: make(config), 'ViT config')


def channel_pairs(
  config: VitConfig,
) -> dict[str, tuple[equalization.ChannelPair, ...]]:
  """Where a factor may move from one weight to the next, by kind.

  Returns:
    'norm': gain and bias of a LayerNorm, and rows of the kernels it feeds.
    'value', 'key', 'hidden': as of `encoder.channel_pairs`; without biases of
      q, k and v there are no pairs of theirs.
  """
  c = config
  pair = equalization.ChannelPair
  kinds: dict[str, list] = {'norm': [], 'value': [], 'key': [], 'hidden': []}
  for i in range(c.num_hidden_layers):
    layer = ('layers', i)
    gains = lambda n, layer=layer: (
      ((*layer, n, 'scale'), 0),
      ((*layer, n, 'bias'), 0),
    )
    rows = lambda *names, layer=layer: (((*layer, *names, 'kernel'), 0),)
    qkv = tuple(use for n in 'qkv' for use in rows('attention', f'{n}_proj'))
    kinds['norm'] += [
      pair(c.hidden_size, gains('attention_norm'), qkv),
      pair(c.hidden_size, gains('mlp_norm'), rows('mlp', 'fc1')),
    ]
    if c.qkv_bias:
      found = encoder.attention_pairs((*layer, 'attention'), c.hidden_size)
      for kind, one in found.items():
        kinds[kind].append(one)
    if c.hidden_act == 'relu':
      kinds['hidden'].append(
        encoder.hidden_pair((*layer, 'mlp'), c.intermediate_size)
      )
  return {kind: tuple(pairs) for kind, pairs in kinds.items() if pairs}
