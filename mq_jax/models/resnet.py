"""Residual convolutional networks, of the ImageNet and the CIFAR type.

He et al. 2015 (arXiv 1512.03385). Batch norm is kept, not folded into the
convolutions: its gain, bias, mean and variance are parameters like others,
and the network computes as it does for inference.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from mq_jax import equalization
from mq_jax.models import encoder, modules

_EPSILON = 1e-5  # of PyTorch's batch norm; neither config says it
_REDUCTION = 4  # of a bottleneck


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
  """Sizes and options, in Hugging Face's names where it has one.

  Attributes:
    embedding_size: Channels of the first convolution.
    hidden_sizes: Channels of each stage.
    depths: Blocks of each stage.
    layer_type: 'basic' (two 3x3) or 'bottleneck' (1x1, 3x3, 1x1).
    small: CIFAR type: the first convolution is 3x3 and nothing is pooled, and
      shortcuts have no parameters (every second pixel, channels padded with
      zeros on both sides).
    downsample_in_first_stage: Whether its first block has stride 2.
    downsample_in_bottleneck: Whether the stride is that of the first 1x1.
  """

  num_channels: int
  embedding_size: int
  hidden_sizes: tuple[int, ...]
  depths: tuple[int, ...]
  layer_type: str
  num_labels: int
  hidden_act: str = 'relu'
  small: bool = False
  downsample_in_first_stage: bool = False
  downsample_in_bottleneck: bool = False


class _ConvNorm(nnx.Module):
  """A convolution without bias, batch norm, perhaps an activation."""

  def __init__(
    self,
    n_in: int,
    n_out: int,
    size: int,
    stride: int = 1,
    activation: str | None = None,
    *,
    rngs: nnx.Rngs,
  ):
    pad = size // 2
    self.conv = nnx.Conv(
      n_in,
      n_out,
      (size, size),
      strides=stride,
      padding=((pad, pad), (pad, pad)),
      use_bias=False,
      rngs=rngs,
    )
    self.norm = nnx.BatchNorm(
      n_out, use_running_average=True, epsilon=_EPSILON, rngs=rngs
    )
    self.activation = activation

  def __call__(self, x: jax.Array) -> jax.Array:
    x = self.norm(self.conv(x))
    return x if self.activation is None else _activate(self.activation, x)


def _activate(name: str, x: jax.Array) -> jax.Array:
  return encoder.ACTIVATIONS[name](x)


class _Block(nnx.Module):
  """A residual block of two or three convolutions."""

  def __init__(
    self,
    config: ResNetConfig,
    n_in: int,
    n_out: int,
    stride: int,
    *,
    rngs: nnx.Rngs,
  ):
    c = config
    make = functools.partial(_ConvNorm, rngs=rngs)
    act = c.hidden_act
    if c.layer_type == 'basic':
      convs = [
        make(n_in, n_out, 3, stride, act),
        make(n_out, n_out, 3),
      ]
    else:
      mid = n_out // _REDUCTION
      first, second = (stride, 1) if c.downsample_in_bottleneck else (1, stride)
      convs = [
        make(n_in, mid, 1, first, act),
        make(mid, mid, 3, second, act),
        make(mid, n_out, 1),
      ]
    self.convs = nnx.List(convs)
    self.changes = n_in != n_out or stride != 1
    if self.changes and not c.small:
      self.shortcut = make(n_in, n_out, 1, stride)
    self.small, self.stride, self.more = c.small, stride, n_out - n_in
    self.activation = act

  def __call__(self, x: jax.Array) -> jax.Array:
    y = x
    for conv in self.convs:
      y = conv(y)
    if self.changes and self.small:
      low = self.more // 2
      x = x[:, :: self.stride, :: self.stride]
      x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (low, self.more - low)))
    elif self.changes:
      x = self.shortcut(x)
    return _activate(self.activation, x + y)


class ResNet(nnx.Module):
  """Image classifier: pixels f32[b, h, w, c] -> scores [b, labels]."""

  def __init__(self, config: ResNetConfig, *, rngs: nnx.Rngs):
    c = config
    size, stride = (3, 1) if c.small else (7, 2)
    self.stem = _ConvNorm(
      c.num_channels, c.embedding_size, size, stride, c.hidden_act, rngs=rngs
    )
    stages, n_in = [], c.embedding_size
    for i, (n_out, depth) in enumerate(zip(c.hidden_sizes, c.depths)):
      first = 2 if i or c.downsample_in_first_stage else 1
      blocks = []
      for j in range(depth):
        blocks.append(_Block(c, n_in, n_out, 1 if j else first, rngs=rngs))
        n_in = n_out
      stages.append(nnx.List(blocks))
    self.stages = nnx.List(stages)
    self.classifier = nnx.Linear(n_in, c.num_labels, rngs=rngs)
    self.config = c

  def __call__(self, pixels: jax.Array) -> jax.Array:
    if pixels.ndim != 4 or pixels.shape[-1] != self.config.num_channels:
      raise ValueError(
        f'images of shape {pixels.shape[1:]}, this network needs [h, w, '
        f'{self.config.num_channels}]'
      )
    x = self.stem(pixels)
    if not self.config.small:
      x = nnx.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    for stage in self.stages:
      for block in stage:
        x = block(x)
    return self.classifier(jnp.mean(x, axis=(1, 2)))


def make(config: ResNetConfig) -> ResNet:
  """The module, as it initialises itself."""
  return ResNet(config, rngs=nnx.Rngs(0))


@functools.cache
def functional(config: ResNetConfig) -> Callable[[dict, jax.Array], jax.Array]:
  """The network as a pure function; one object for equal configs.

  Returns:
    `apply(params, pixels f32[b, h, w, c]) -> scores [b, labels]`. It raises
    ValueError for images of another number of channels.
  """
  return modules.functional(lambda: make(config), 'ResNet config')


def channel_pairs(
  config: ResNetConfig,
) -> dict[str, tuple[equalization.ChannelPair, ...]]:
  """Where a factor may move from one weight to the next, by kind.

  Returns:
    For all convolutions of a block but its last:
    'conv': columns of the kernel with the mean of its batch norm, and the
      gain of that, which divides them again.
    'norm': gain and bias of the batch norm, and rows of the next kernel;
      only with relu, through which positive factors pass.
    What enters or leaves a block goes through its shortcut too, and stays.
  """
  pair = equalization.ChannelPair
  kinds: dict[str, list] = {'conv': [], 'norm': []}
  for i, (width, depth) in enumerate(zip(config.hidden_sizes, config.depths)):
    basic = config.layer_type == 'basic'
    n_convs, channels = (2, width) if basic else (3, width // _REDUCTION)
    for j in range(depth):
      for k in range(n_convs - 1):
        this, after = (('stages', i, j, 'convs', n) for n in (k, k + 1))
        kernel, mean, gain, bias = (
          (*this, *names)
          for names in (
            ('conv', 'kernel'),
            ('norm', 'mean'),
            ('norm', 'scale'),
            ('norm', 'bias'),
          )
        )
        kinds['conv'].append(
          pair(channels, ((kernel, 3), (mean, 0)), ((gain, 0),))
        )
        if config.hidden_act == 'relu':
          kinds['norm'].append(
            pair(
              channels,
              ((gain, 0), (bias, 0)),
              (((*after, 'conv', 'kernel'), 2),),
            )
          )
  return {kind: tuple(pairs) for kind, pairs in kinds.items() if pairs}
