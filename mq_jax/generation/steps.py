"""The compiled programs of generation: a prompt, a step, all steps."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mq_jax import activations
from mq_jax import caches as caches_lib
from mq_jax.generation import drawing
from mq_jax.generation.prompts import NO_TOKEN
from mq_jax.models import decoder


class State(NamedTuple):
  """Between two steps.

  Attributes:
    caches: One a layer; they hold all tokens but the last.
    token: The last token of each row, i32[b].
    position: Its position, i32[b].
    done: Rows that have met a stop token, bool[b].
    index: Tokens drawn so far, i32[].
  """

  caches: tuple[Any, ...]
  token: jax.Array
  position: jax.Array
  done: jax.Array
  index: jax.Array


class Generated(NamedTuple):
  """What came of prompts.

  Attributes:
    tokens: New tokens, the stop token included; -1 after it. i32[b, n].
    lengths: How many there are of each row, i32[b].
    caches: Of all layers. They lack the last token.
  """

  tokens: jax.Array
  lengths: jax.Array
  caches: tuple[Any, ...]


def new_caches(
  config: decoder.DecoderConfig,
  policy: caches_lib.Policy,
  batch: int,
  capacity: int,
  dtype: Any = jnp.float32,
) -> tuple[Any, ...]:
  """Empty caches of all layers.

  Args:
    config: Of the model.
    policy: Kind of cache.
    batch: Rows.
    capacity: Tokens that a row may get, prompt included.
    dtype: Of what is kept unquantized.

  Raises:
    ValueError: for sizes that the policy can't hold.
  """
  c = config
  make = lambda: policy.init(
    batch, c.num_key_value_heads, capacity, c.head_dim, dtype
  )
  return tuple(make() for _ in range(c.num_hidden_layers))


@functools.cache
def _network(config: decoder.DecoderConfig, fresh: bool) -> Callable[..., Any]:
  """The decoder with caches of a policy; one object for equal arguments."""
  apply = decoder.cached(config)

  def network(params, tokens, positions, caches, policy):
    def attend(cache, q, k, v, positions, window, scale):
      return caches_lib.attend(
        policy, cache, q, k, v, positions, window, scale, fresh=fresh
      )

    return apply(params, tokens, positions, caches, attend)

  return network


def _run(config, fresh, params, *rest) -> tuple[jax.Array, tuple[Any, ...]]:
  network = _network(config, fresh)
  if isinstance(params, tuple):
    network = activations.quantize_inputs(network)
  return network(params, *rest)


def prefill(
  config: decoder.DecoderConfig,
  params: Any,
  tokens: jax.Array,
  positions: jax.Array,
  caches: tuple[Any, ...],
  policy: caches_lib.Policy,
) -> tuple[jax.Array, tuple[Any, ...]]:
  """Read prompts into empty caches.

  Args:
    config: Of the model.
    params: Its parameters, as of `generate`.
    tokens: Prompts, i32[b, t].
    positions: Of the tokens, from 0 on; -1 for padding, at either end.
    caches: From `new_caches`.
    policy: Kind of cache.

  Returns:
    Logits [b, v] after the last token of each prompt, and the caches.
  """
  logits, caches = _run(config, True, params, tokens, positions, caches, policy)
  last = jnp.argmax(positions, axis=1)[:, None, None]
  return jnp.take_along_axis(logits, last, axis=1)[:, 0], caches


def advance(
  config: decoder.DecoderConfig,
  params: Any,
  state: State,
  policy: caches_lib.Policy,
  sampling: drawing.Sampling | None,
  key: jax.Array,
  stop: jax.Array,
) -> State:
  """Read the last tokens and draw the next; rows that are done stay so.

  Args:
    config: Of the model.
    params: Its parameters, as of `generate`.
    state: Before.
    policy: Kind of cache.
    sampling: How tokens are drawn; None for the most likely one.
    key: Of the whole text; token i is drawn with `fold_in(key, i)`.
    stop: Tokens that end a row, i32[s].

  Returns:
    The state after. The token of a row that was done is -1.
  """
  position = jnp.where(state.done, NO_TOKEN, state.position)[:, None]
  token = jnp.where(state.done, 0, state.token)[:, None]
  logits, caches = _run(
    config, False, params, token, position, state.caches, policy
  )
  return _drawn(
    logits[:, 0], state._replace(caches=caches), sampling, key, stop
  )


def _drawn(logits, state, sampling, key, stop) -> State:
  key = jax.random.fold_in(key, state.index)
  token = drawing.draw(logits, sampling, key)
  token = jnp.where(state.done, NO_TOKEN, token)
  ended = jnp.any(token[:, None] == stop[None], axis=1)
  return state._replace(
    token=token,
    position=state.position + 1,
    done=state.done | ended,
    index=state.index + 1,
  )


@functools.partial(jax.jit, static_argnames=('config', 'capacity', 'dtype'))
def begin(
  config: decoder.DecoderConfig,
  params: Any,
  tokens: jax.Array,
  positions: jax.Array,
  policy: caches_lib.Policy,
  sampling: drawing.Sampling | None,
  key: jax.Array,
  stop: jax.Array,
  capacity: int,
  dtype: Any,
) -> State:
  """Read prompts i32[b, t] and draw a token for each; see `advance`.

  Compiled, and so is `finish`: the two programs of `generate`.
  """
  batch = tokens.shape[0]
  caches = new_caches(config, policy, batch, capacity, dtype)
  logits, caches = prefill(config, params, tokens, positions, caches, policy)
  state = State(
    caches=caches,
    token=jnp.zeros(batch, jnp.int32),
    position=jnp.max(positions, axis=1),
    done=jnp.zeros(batch, bool),
    index=jnp.zeros((), jnp.int32),
  )
  return _drawn(logits, state, sampling, key, stop)


# The caches of one step are the memory of the next.
step = functools.partial(
  jax.jit, static_argnames='config', donate_argnames='state'
)(advance)


@functools.partial(jax.jit, static_argnames=('config', 'count'))
def finish(
  config: decoder.DecoderConfig,
  params: Any,
  state: State,
  policy: caches_lib.Policy,
  sampling: drawing.Sampling | None,
  key: jax.Array,
  stop: jax.Array,
  count: int,
) -> Generated:
  """From `begin` on: draw until `count` tokens are there or all rows done."""
  tokens = jnp.full((state.token.shape[0], count), NO_TOKEN, jnp.int32)

  def more(carry):
    state, _ = carry
    return (state.index < count) & ~jnp.all(state.done)

  def step(carry):
    state, tokens = carry
    state = advance(config, params, state, policy, sampling, key, stop)
    return state, tokens.at[:, state.index - 1].set(state.token)

  carry = state, tokens.at[:, 0].set(state.token)
  state, tokens = jax.lax.while_loop(more, step, carry)
  lengths = jnp.sum(tokens != NO_TOKEN, axis=1, dtype=jnp.int32)
  return Generated(tokens, lengths, state.caches)
