"""A small class-conditional diffusion transformer.

DiT blocks (Peebles and Xie 2022, arXiv 2212.09748) in the variant of
`Franfee/DM-DiT-DDPM-MNIST-class-cond-ImageGen`, whose names it keeps: heads as
wide as the whole model, scores divided by the root of the number of tokens,
relu, and gates that nothing bounds.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from mq_jax import equalization
from mq_jax.models import modules

_EPSILON = 1e-5  # of PyTorch's LayerNorm


@dataclasses.dataclass(frozen=True)
class DitConfig:
  """Sizes of the network.

  Attributes:
    image_size: Height and width in pixels.
    patch_channels: Channels that the convolution makes of a patch.
    attention_size: Channels of all heads.
    num_steps: Steps of the diffusion; steps go from 0 to one less.
  """

  image_size: int
  num_channels: int
  patch_size: int
  patch_channels: int
  hidden_size: int
  num_hidden_layers: int
  num_attention_heads: int
  attention_size: int
  intermediate_size: int
  num_labels: int
  num_steps: int = 1000


class _Wave(nnx.Module):
  """Sines and cosines of a step, by stored frequencies."""

  def __init__(self, size: int):
    self.half_emb = nnx.Param(jnp.zeros(size // 2))

  def __call__(self, steps: jax.Array) -> jax.Array:  # i32[b] -> [b, size]
    angle = steps.astype(jnp.float32)[:, None] * self.half_emb[...][None]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class _Block(nnx.Module):
  """Attention and MLP whose norms and outputs the condition modulates."""

  def __init__(self, config: DitConfig, *, rngs: nnx.Rngs):
    c = config
    d, a = c.hidden_size, c.attention_size
    linear = lambda n_in, n_out: nnx.Linear(n_in, n_out, rngs=rngs)
    self.gamma1, self.beta1, self.alpha1 = (linear(d, d) for _ in range(3))
    self.gamma2, self.beta2, self.alpha2 = (linear(d, d) for _ in range(3))
    self.ln1, self.ln2 = _norm(d, rngs), _norm(d, rngs)
    self.wq, self.wk, self.wv = (linear(d, a) for _ in range(3))
    self.lv = linear(a, d)
    self.ff = nnx.List(
      [linear(d, c.intermediate_size), jax.nn.relu]
      + [linear(c.intermediate_size, d)]
    )
    self.heads = c.num_attention_heads

  def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
    b, t, _ = x.shape
    heads = lambda y: y.reshape(b, t, self.heads, -1)
    of = lambda linear: linear(condition)[:, None]
    z = self.ln1(x) * (1 + of(self.gamma1)) + of(self.beta1)
    y = jax.nn.dot_product_attention(
      heads(self.wq(z)), heads(self.wk(z)), heads(self.wv(z)), scale=t**-0.5
    )
    x = x + of(self.alpha1) * self.lv(y.reshape(b, t, -1))
    z = self.ln2(x) * (1 + of(self.gamma2)) + of(self.beta2)
    for layer in self.ff:
      z = layer(z)
    return x + of(self.alpha2) * z


class Dit(nnx.Module):
  """Noise of an image: x f32[b, h, w, c], step i32[b], label i32[b]."""

  def __init__(self, config: DitConfig, *, rngs: nnx.Rngs):
    c = config
    d, n = c.hidden_size, c.image_size // c.patch_size
    linear = lambda n_in, n_out: nnx.Linear(n_in, n_out, rngs=rngs)
    self.conv = nnx.Conv(
      c.num_channels,
      c.patch_channels,
      (c.patch_size, c.patch_size),
      strides=c.patch_size,
      padding='VALID',
      rngs=rngs,
    )
    self.patch_emb = linear(c.patch_channels, d)
    self.patch_pos_emb = nnx.Param(jnp.zeros((1, n * n, d)))
    self.label_emb = nnx.Embed(c.num_labels, d, rngs=rngs)
    self.time_emb = nnx.List(
      [_Wave(d), linear(d, d), jax.nn.relu, linear(d, d)]
    )
    self.dits = nnx.List(
      [_Block(c, rngs=rngs) for _ in range(c.num_hidden_layers)]
    )
    self.ln = _norm(d, rngs)
    self.linear = linear(d, c.num_channels * c.patch_size**2)
    self.config = c

  def __call__(
    self, x: jax.Array, steps: jax.Array, labels: jax.Array
  ) -> jax.Array:
    c = self.config
    if x.shape[1:] != (c.image_size, c.image_size, c.num_channels):
      raise ValueError(
        f'images of shape {x.shape[1:]}, this network needs '
        f'{(c.image_size, c.image_size, c.num_channels)}'
      )
    b, n, p = x.shape[0], c.image_size // c.patch_size, c.patch_size
    time = steps
    for layer in self.time_emb:
      time = layer(time)
    condition = self.label_emb(labels) + time
    z = self.patch_emb(self.conv(x).reshape(b, n * n, -1))
    z = z + self.patch_pos_emb[...]
    for block in self.dits:
      z = block(z, condition)
    z = self.linear(self.ln(z))
    # Of several channels the order within a patch is our choice.
    z = z.reshape(b, n, n, c.num_channels, p, p).transpose(0, 1, 4, 2, 5, 3)
    return z.reshape(b, c.image_size, c.image_size, c.num_channels)


def _norm(size: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
  return nnx.LayerNorm(
    size,
    epsilon=_EPSILON,
    use_fast_variance=False,  # cancels where means are large
    rngs=rngs,
  )


def make(config: DitConfig) -> Dit:
  """The module, as it initialises itself."""
  return Dit(config, rngs=nnx.Rngs(0))


@functools.cache
def functional(config: DitConfig) -> Callable[..., jax.Array]:
  """The network as a pure function; one object for equal configs.

  Returns:
    `apply(params, x f32[b, h, w, c], steps i32[b], labels i32[b])`, the noise
    in x [b, h, w, c]. It raises ValueError for images of another size.
  """
  return modules.functional(lambda: make(config), 'DiT config')


def channel_pairs(
  config: DitConfig,
) -> dict[str, tuple[equalization.ChannelPair, ...]]:
  """Where a factor may move from one weight to the next, by kind.

  Returns:
    'norm': gain and bias of a LayerNorm with the outputs of beta that are
      added to it, and rows of the kernels that they feed.
    'hidden': outputs of ff.0 and rows of ff.2, through relu.
    'value': outputs of wv and rows of lv; attention averages values.
    'key': outputs of wk and of wq, whose products are the scores.
  """
  c = config
  pair = equalization.ChannelPair
  kinds: dict[str, list] = {'norm': [], 'hidden': [], 'value': [], 'key': []}
  for i in range(c.num_hidden_layers):
    block = ('dits', i)
    outputs = lambda *names, block=block: (
      ((*block, *names, 'kernel'), 1),
      ((*block, *names, 'bias'), 0),
    )
    rows = lambda *names, block=block: (((*block, *names, 'kernel'), 0),)
    gains = lambda n, block=block: (
      ((*block, n, 'scale'), 0),
      ((*block, n, 'bias'), 0),
    )
    kinds['norm'] += [
      pair(
        c.hidden_size,
        (*gains('ln1'), *outputs('beta1')),
        (*rows('wq'), *rows('wk'), *rows('wv')),
      ),
      pair(c.hidden_size, (*gains('ln2'), *outputs('beta2')), rows('ff', 0)),
    ]
    kinds['hidden'].append(
      pair(c.intermediate_size, outputs('ff', 0), rows('ff', 2))
    )
    kinds['value'].append(pair(c.attention_size, outputs('wv'), rows('lv')))
    kinds['key'].append(pair(c.attention_size, outputs('wk'), outputs('wq')))
  return {kind: tuple(pairs) for kind, pairs in kinds.items()}
