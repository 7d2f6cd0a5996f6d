"""The decoder as pure functions of its parameters, whole and in parts."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mq_jax.models import modules
from mq_jax.models.decoder._config import DecoderConfig
from mq_jax.models.decoder._network import Attend, Block, Decoder, attend_all


class Parts(NamedTuple):
  """A decoder cut into pure functions, to be run one block at a time.

  Attributes:
    embed: `(params, tokens i32[b, t]) -> x [b, t, hidden]`.
    block: `block(i)` is `(params['layers'][i], x) -> x`, the same object for
      all blocks that compute alike: one compilation serves them.
    head: `(params, x) -> logits [b, t, vocabulary]`, the last norm included.
      Its `params`, and those of `embed`, are all of a decoder's or those
      without 'layers'.
  """

  embed: Callable[[dict, jax.Array], jax.Array]
  block: Callable[[int], Callable[[dict, jax.Array], jax.Array]]
  head: Callable[[dict, jax.Array], jax.Array]


class _Module(NamedTuple):
  """A module taken apart: `merge(params)` puts it together again."""

  graph: Any
  abstract: dict
  what: str

  def check(self, params: dict) -> None:
    modules.check(params, self.abstract, self.what)

  def merge(self, params: dict) -> Any:
    self.check(params)
    return nnx.merge(self.graph, params)


def _module(make: Callable[[], nnx.Module], what: str) -> _Module:
  graph, state = nnx.split(nnx.eval_shape(make))
  return _Module(graph, nnx.to_pure_dict(state), what)


@functools.cache
def _outside(config: DecoderConfig) -> _Module:
  """Everything but the blocks."""
  bare = dataclasses.replace(config, num_hidden_layers=0, window_layers=None)
  return _module(
    lambda: Decoder(bare, rngs=nnx.Rngs(0)), 'decoder outside its blocks'
  )


@functools.cache
def _block(config: DecoderConfig, window: int | None) -> _Module:
  return _module(
    lambda: Block(config, window, rngs=nnx.Rngs(0)), 'block of a decoder'
  )


def _without_layers(params: dict) -> dict:
  return {name: value for name, value in params.items() if name != 'layers'}


def _positions(config: DecoderConfig, length: int) -> jax.Array:
  limit = config.max_position_embeddings
  if config.positions == 'learned' and length > limit:
    raise ValueError(
      f'{length} tokens, but the decoder has learned only {limit} positions'
    )
  return jnp.arange(length)[None]


@functools.cache
def _block_function(
  config: DecoderConfig, window: int | None
) -> Callable[[dict, jax.Array], jax.Array]:
  module = _block(config, window)

  def block(layer_params: dict, x: jax.Array) -> jax.Array:
    positions = _positions(config, x.shape[1])
    return module.merge(layer_params)(x, positions, None, attend_all)[0]

  return block


@functools.cache
def parts(config: DecoderConfig) -> Parts:
  """The functions whose composition is `functional(config)`.

  Args:
    config: Of the decoder.

  Returns:
    Pure functions that raise ValueError for parameters of another structure;
    the same objects for equal configs.
  """
  outside = _outside(config)

  def embed(params: dict, tokens: jax.Array) -> jax.Array:
    positions = _positions(config, tokens.shape[1])
    return outside.merge(_without_layers(params)).embed(tokens, positions)

  def head(params: dict, x: jax.Array) -> jax.Array:
    return outside.merge(_without_layers(params)).head(x)

  def block(i: int) -> Callable[[dict, jax.Array], jax.Array]:
    if not 0 <= i < config.num_hidden_layers:
      raise ValueError(f'block {i} of {config.num_hidden_layers}')
    return _block_function(config, config.window(i))

  return Parts(embed, block, head)


@functools.cache
def joined(parts: Parts) -> Callable[[dict, jax.Array], jax.Array]:
  """`apply(params, tokens)`, the composition of a decoder's parts."""

  def apply(params: dict, tokens: jax.Array) -> jax.Array:
    x = parts.embed(params, tokens)
    for i in range(len(params['layers'])):
      x = parts.block(i)(params['layers'][i], x)
    return parts.head(params, x)

  return apply


@functools.cache
def _whole(config: DecoderConfig) -> _Module:
  return _module(lambda: Decoder(config, rngs=nnx.Rngs(0)), 'decoder config')


@functools.cache
def functional(
  config: DecoderConfig,
) -> Callable[[dict, jax.Array], jax.Array]:
  """The decoder as a pure function of its parameters.

  Equal configs give the same function object, so that what is compiled for
  it serves every set of parameters of that config.

  Args:
    config: Of the decoder.

  Returns:
    `apply(params, tokens i32[b, t]) -> logits [b, t, v]`, where `params` is
    the nested dict of arrays that `init_params` (or a checkpoint reader)
    returns. It raises ValueError for a dict of another structure, and for
    more tokens than there are learned positions.
  """
  compose = joined(parts(config))

  def apply(params: dict, tokens: jax.Array) -> jax.Array:
    _whole(config).check(params)
    return compose(params, tokens)

  return apply


@functools.cache
def cached(config: DecoderConfig) -> Callable[..., tuple[jax.Array, tuple]]:
  """The decoder with attention that somebody else supplies.

  Args:
    config: Of the decoder.

  Returns:
    `apply(params, tokens i32[b, t], positions i32[b, t], caches, attend) ->
    (logits [b, t, v], caches)`, where `caches` is a tuple with one pytree a
    block and `attend(cache, q [b, t, h, d], k [b, t, g, d], v [b, t, g, d],
    positions, window, scale) -> (y [b, t, h, d], cache)` stores and attends.
    Queries and keys come normed and rotated, not scaled; `window` counts the
    tokens to look back at, itself included, None for all. With `attend_all`
    and a tuple of None it is `functional`. Logits are NaN at positions
    beyond those learned. It raises ValueError for parameters of another
    structure or another number of caches.
  """
  n = config.num_hidden_layers
  outside = _outside(config)

  def apply(
    params: dict,
    tokens: jax.Array,
    positions: jax.Array,
    caches: tuple[Any, ...],
    attend: Attend,
  ) -> tuple[jax.Array, tuple[Any, ...]]:
    _whole(config).check(params)
    if len(caches) != n:
      raise ValueError(f'{len(caches)} caches for {n} blocks; give one a block')
    shell = outside.merge(_without_layers(params))
    x = shell.embed(tokens, positions)
    new = []
    for i, cache in enumerate(caches):
      block = _block(config, config.window(i)).merge(params['layers'][i])
      x, cache = block(x, positions, cache, attend)
      new.append(cache)
    return shell.head(x), tuple(new)

  return apply


def init_params(config: DecoderConfig, seed: int) -> dict:
  """Randomly initialised parameters as a nested dict of f32 arrays."""
  make = jax.jit(
    lambda: nnx.to_pure_dict(nnx.state(Decoder(config, rngs=nnx.Rngs(seed))))
  )
  return make()
