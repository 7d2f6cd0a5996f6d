"""What a text costs when attention reads a compressed cache."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mq_jax import caches as caches_lib
from mq_jax import generation
from mq_jax.models import decoder


@functools.cache
def reader(
  config: decoder.DecoderConfig,
  policy: caches_lib.Policy,
  chunk: int = 1,
  dtype: str = 'float32',
) -> Callable[[Any, jax.Array], tuple[jax.Array, tuple[Any, ...]]]:
  """A decoder that reads a text through a cache.

  Tokens come in chunks. Those of a chunk read each other exactly and all
  before as the cache keeps it, and then enter the cache themselves: with
  chunks of one, each token is read as in generation; larger ones are faster,
  and kinder by what a token sees exactly. Nothing is seen of the future.

  The field does it in other ways, too: many published perplexities come from
  one pass over a window with all keys and values rounded (no token is read
  exactly), and scores of tasks from an exact prompt and a compressed cache
  behind it, which is one chunk as long as the prompt.

  Args:
    config: Of the model.
    policy: Kind of cache, with plain numbers as options.
    chunk: Tokens at a time.
    dtype: Of what the cache keeps unquantized.

  Returns:
    `(params, tokens i32[b, t]) -> (logits [b, t, v], caches)`; the same
    function object for equal arguments.

  Raises:
    ValueError: if `chunk` is less than 1.
  """
  if not isinstance(chunk, int) or chunk < 1:
    raise ValueError(f'chunk={chunk!r} is not a whole number >= 1')
  model = decoder.cached(config)

  def attend(cache, q, k, v, positions, window, scale):
    return caches_lib.attend(policy, cache, q, k, v, positions, window, scale)

  def read(params, tokens):
    b, t = tokens.shape
    size = min(chunk, t)
    width = -(-t // size) * size
    caches = generation.new_caches(config, policy, b, width, jnp.dtype(dtype))
    at = jnp.arange(width)[None]
    positions = jnp.where(at < t, at, generation.NO_TOKEN).astype(jnp.int32)
    cut = lambda x: jnp.swapaxes(x.reshape(b, -1, size), 0, 1)
    given = (
      cut(jnp.pad(tokens, ((0, 0), (0, width - t)))),
      cut(jnp.broadcast_to(positions, (b, width))),
    )

    def step(caches, chunk):
      logits, caches = model(params, *chunk, caches, attend)
      return caches, logits

    caches, logits = jax.lax.scan(step, caches, given)
    logits = jnp.swapaxes(logits, 0, 1).reshape(b, width, -1)
    return logits[:, :t], caches

  return read


@functools.cache
def through_cache(
  config: decoder.DecoderConfig,
  policy: caches_lib.Policy,
  chunk: int = 1,
  dtype: str = 'float32',
) -> Callable[[Any, jax.Array], jax.Array]:
  """`reader` without the caches: an `apply` for all of `evaluation`."""
  read = reader(config, policy, chunk, dtype)
  return lambda params, tokens: read(params, tokens)[0]


@functools.cache
def bits_reader(
  config: decoder.DecoderConfig,
  policy: caches_lib.Policy,
  chunk: int = 1,
  dtype: str = 'float32',
) -> Callable[[Any, jax.Array], caches_lib.Bits]:
  """`reader` of the bits that all caches take at the end of the texts."""
  read = reader(config, policy, chunk, dtype)
  return lambda params, tokens: caches_lib.total_bits(
    policy, read(params, tokens)[1]
  )
