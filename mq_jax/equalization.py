"""Rewrites of a model's parameters that leave its function as it was.

A factor on a channel of one weight is taken back in the weight that reads
the channel. Which weights those are is the model's knowledge, given here as
`ChannelPair`s (`mq_jax.models.decoder.channel_pairs` for a decoder).
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Path = tuple[str | int, ...]
Use = tuple[Path, int]  # a parameter and the axis that holds the channels


class ChannelPair(NamedTuple):
  """Weights that write and weights that read the same channels.

  Attributes:
    channels: Number of channels.
    producers: Parameters multiplied by a factor per channel, with their axis.
    consumers: Parameters divided by it, with their axis.
    block: Where an axis is r times as long as `channels`, it holds blocks of
      this many channels, each r times in a row: [channels / block, r, block].
      None for axes of exactly `channels`.
  """

  channels: int
  producers: tuple[Use, ...]
  consumers: tuple[Use, ...]
  block: int | None = None


def rescale_channels(
  params: Mapping[Any, Any],
  pairs: Sequence[ChannelPair],
  factors: Sequence[jax.Array],
) -> dict:
  """Multiply channels where they are written, divide where they are read.

  Exact in floating point for powers of two, as long as nothing leaves the
  range of normal numbers; otherwise the function changes by rounding. Pure,
  and differentiable in the factors.

  Args:
    params: Nested dicts of arrays.
    pairs: What belongs together.
    factors: Positive factors of each pair. Shapes [channels].

  Returns:
    The parameters with those of `pairs` replaced.

  Raises:
    ValueError: if there are not as many factors as pairs, or a parameter is
      missing, or an axis does not hold the channels.

  Examples:
    >>> params = {'up': jnp.ones((1, 2)), 'down': jnp.ones((2, 1))}
    >>> pair = ChannelPair(2, ((('up',), 1),), ((('down',), 0),))
    >>> out = rescale_channels(params, [pair], [jnp.array([1.0, 4.0])])
    >>> out['up'].tolist(), out['down'].tolist()
    ([[1.0, 4.0]], [[1.0], [0.25]])
  """
  if len(pairs) != len(factors):
    raise ValueError(
      f'{len(factors)} arrays of factors for {len(pairs)} channel pairs; '
      'give one array a pair'
    )
  for pair, factor in zip(pairs, factors):
    if jnp.shape(factor) != (pair.channels,):
      raise ValueError(
        f'{_text(pair.producers[0][0])}: factors of shape '
        f'{jnp.shape(factor)} for {pair.channels} channels'
      )
    for uses, operation in (
      (pair.producers, jnp.multiply),
      (pair.consumers, jnp.divide),
    ):
      for path, axis in uses:
        value = _get(params, path)
        spread = _spread(factor, pair, path, value, axis)
        params = _replace(params, path, operation(value, spread))
  return dict(params)


def plant_outliers(
  params: Mapping[Any, Any],
  pairs: Sequence[ChannelPair],
  key: jax.Array,
  *,
  share: float,
  scale: float,
) -> dict:
  """Give a model the outlier channels that large language models have.

  In each pair, randomly chosen channels are multiplied where they are written
  and divided where they are read. The function stays exactly the same, since
  factors are powers of two, while a quantizer meets what small models lack:

  - `scale` above 1: the activations get outlier channels, and so do the
    producers' weights along their output axis (columns of a kernel);
  - `scale` below 1: the consumers' weights get outliers along their input
    axis (rows). Clusters that run along the outputs of one row do not see
    those, because the row grows as a whole.

  Args:
    params: Nested dicts of arrays.
    pairs: Where channels may be scaled.
    key: Random key, not traced; it alone chooses the channels.
    share: Share of a pair's channels to scale, rounded to whole channels, at
      least one. In (0, 1].
    scale: Most extreme factor, a power of two other than 1. The chosen
      channels get it, its half and its quarter in turn (in powers: 16, 8, 4;
      but at least a factor of 2), for a profile with few extremes.

  Returns:
    The parameters with outliers planted.

  Raises:
    ValueError: if `scale` is no such power of two, or `share` is outside
      (0, 1], or a pair does not fit the parameters.
  """
  exponent = math.log2(scale) if 0 < scale < math.inf else 0.0
  if exponent == 0 or exponent % 1:
    raise ValueError(
      f'scale={scale} is not a power of two other than 1; only those rescale '
      'without rounding'
    )
  if not 0 < share <= 1:
    raise ValueError(f'share={share} of the channels is not in (0, 1]')
  # Chosen on the host: compiling a permutation for every size takes seconds.
  rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
  factors = []
  for pair in pairs:
    count = max(1, round(share * pair.channels))
    levels = np.maximum(abs(exponent) - np.arange(count) % 3, 1.0)
    factor = np.ones(pair.channels, np.float32)
    factor[:count] = np.exp2(math.copysign(1.0, exponent) * levels)
    factors.append(jnp.asarray(rng.permutation(factor)))
  return rescale_channels(params, pairs, factors)


def smoothing_scale(
  inputs: jax.Array, weights: jax.Array, alpha: jax.typing.ArrayLike
) -> jax.Array:
  """Scales s that move the difficulty of quantizing inputs into weights.

  s = inputs^alpha / weights^(1 - alpha): inputs are to be divided by it, the
  weights that read them multiplied. With alpha 1 all inputs become equally
  large, with 0 all rows of the weight.

  Args:
    inputs: Largest magnitude of each input, f32[..., k].
    weights: Largest magnitude of the weights that read it, f32[..., k].
    alpha: Migration exponent, 0..1; may be traced.

  Returns:
    f32[..., k]; 1 for inputs that are never active or never read.

  Source:
    SmoothQuant, arXiv 2211.10438, equation 4 (from memory).

  Examples:
    >>> smoothing_scale(jnp.array([8.0, 0.0]), jnp.array([0.5, 1.0]), 0.5)
    Array([4., 1.], dtype=float32)
  """
  inputs, weights = (jnp.asarray(x, jnp.float32) for x in (inputs, weights))
  some = (inputs > 0) & (weights > 0)
  one = lambda x: jnp.where(some, x, 1.0)
  return one(inputs) ** alpha / one(weights) ** (1 - alpha)


def smoothing_factors(
  params: Mapping[Any, Any],
  pairs: Sequence[ChannelPair],
  largest: Mapping[str, jax.Array],
  alpha: jax.typing.ArrayLike,
) -> list[jax.Array]:
  """Factors for `rescale_channels` which smooth the inputs of consumers.

  Nothing has to be done to the inputs then: the norm, or the weight, that
  writes them divides by s. One s serves all consumers of a pair.

  Args:
    params: Nested dicts of arrays.
    pairs: Where a factor may move.
    largest: Largest magnitude of each input of the consumers, by their path
      joined with '/', as `calibrate` names sites. Shapes [k], taps before
      channels for kernels of convolutions.
    alpha: See `smoothing_scale`.

  Returns:
    1 / s of each pair. Shapes [channels].

  Raises:
    ValueError: for a consumer that is no parameter, or is not in `largest`.
  """
  factors = []
  for pair in pairs:
    inputs, weights = [], []
    for path, axis in pair.consumers:
      weight = _get(params, path)
      name = _text(path)
      if largest.get(name) is None:
        raise ValueError(f'{name}: the largest of its inputs are not known')
      if largest[name].ndim > 1 or largest[name].shape[0] % pair.channels:
        raise ValueError(
          f'{name}: largest inputs of shape {largest[name].shape} are not '
          f'those of {pair.channels} channels of one matrix'
        )
      other = tuple(i for i in range(weight.ndim) if i != axis % weight.ndim)
      size = jnp.max(jnp.abs(weight.astype(jnp.float32)), axis=other)
      inputs.append(_gathered(largest[name], pair))
      weights.append(_gathered(size, pair))
    most = lambda arrays: jnp.max(jnp.stack(arrays), axis=0)
    factors.append(1.0 / smoothing_scale(most(inputs), most(weights), alpha))
  return factors


def _gathered(x: jax.Array, pair: ChannelPair) -> jax.Array:
  """Largest over what shares a channel: [r * channels] -> [channels]."""
  if pair.block is None:  # r taps of a convolution
    return jnp.max(x.reshape(-1, pair.channels), axis=0)
  blocks = x.reshape(pair.channels // pair.block, -1, pair.block)
  return jnp.max(blocks, axis=1).reshape(pair.channels)


def _text(path: Path) -> str:
  return '/'.join(map(str, path))


def _get(params: Mapping[Any, Any], path: Path) -> jax.Array:
  value = params
  for depth, name in enumerate(path):
    if not isinstance(value, Mapping) or name not in value:
      known = list(map(str, value)) if isinstance(value, Mapping) else []
      near = difflib.get_close_matches(str(name), known) or known[:5]
      raise ValueError(
        f'{_text(path)}: no such parameter; {_text(path[:depth]) or "params"} '
        f'has no {name!r}, nearest are {near}'
      )
    value = value[name]
  return value


def _replace(params: Mapping[Any, Any], path: Path, value: jax.Array) -> dict:
  """A copy of the dicts along `path` with its leaf replaced."""
  head, *rest = path
  inner = _replace(params[head], tuple(rest), value) if rest else value
  return {**params, head: inner}


def _spread(
  factor: jax.Array, pair: ChannelPair, path: Path, value: jax.Array, axis: int
) -> jax.Array:
  """Factors repeated along the blocks of `axis`, shaped to broadcast."""
  size = value.shape[axis]
  repeats, rest = divmod(size, pair.channels)
  if rest or not repeats or (repeats > 1 and pair.block is None):
    raise ValueError(
      f'{_text(path)}: axis {axis} of shape {value.shape} does not hold '
      f'{pair.channels} channels'
      + (f' in blocks of {pair.block}' if pair.block else '')
    )
  shape = [1] * value.ndim
  shape[axis] = size
  return spread(jnp.asarray(factor, value.dtype), pair, size).reshape(shape)


def spread(factor: jax.Array, pair: ChannelPair, size: int) -> jax.Array:
  """Factors [channels] of a pair along an axis of `size` that holds them.

  Without blocks, of several times as many: taps of a convolution.
  """
  repeats = size // pair.channels
  if pair.block is None or repeats == 1:
    return jnp.tile(factor, repeats)
  return jnp.repeat(factor.reshape(-1, pair.block), repeats, axis=0).reshape(
    size
  )
