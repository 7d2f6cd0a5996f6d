"""Token by token: one compiled prompt, one compiled step, any cache."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax import activations
from mq_jax import caches as caches_lib
from mq_jax.generation import sampling as sampling_lib
from mq_jax.models import decoder

NO_TOKEN = -1


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


def pad(
  prompts: Sequence[Sequence[int]], vocabulary: int, multiple: int = 1
) -> tuple[np.ndarray, np.ndarray]:
  """Prompts of different lengths as one array, filled up at the end.

  Args:
    prompts: Tokens of each.
    vocabulary: Tokens that there are.
    multiple: Of the array's width, so that fewer widths are compiled.

  Returns:
    Tokens i32[b, t], 0 behind a prompt; positions i32[b, t], -1 there.

  Raises:
    ValueError: if there is no prompt, or one is empty or has an unknown
      token; names it.
  """
  if len(prompts) == 0:
    raise ValueError('generate: no prompt')
  for i, prompt in enumerate(prompts):
    found = np.asarray(prompt)
    if found.ndim != 1 or found.size == 0:
      raise ValueError(f'generate: prompt {i} has no tokens')
    if not np.issubdtype(found.dtype, np.integer):
      raise ValueError(f'generate: prompt {i} is of {found.dtype}, not tokens')
    if found.min() < 0 or found.max() >= vocabulary:
      raise ValueError(
        f'generate: prompt {i} has tokens {found.min()} to {found.max()}, the '
        f'model knows 0 to {vocabulary - 1}'
      )
  longest = max(map(len, prompts))
  width = -(-longest // multiple) * multiple
  tokens = np.zeros((len(prompts), width), np.int32)
  positions = np.full((len(prompts), width), NO_TOKEN, np.int32)
  for i, prompt in enumerate(prompts):
    tokens[i, : len(prompt)] = prompt
    positions[i, : len(prompt)] = np.arange(len(prompt))
  return tokens, positions


def check_room(
  config: decoder.DecoderConfig, longest: int, count: int, capacity: int
) -> None:
  """Refuse more tokens than there is room for, before any work.

  Args:
    config: Of the model.
    longest: Tokens of the longest prompt.
    count: Tokens to generate.
    capacity: Tokens that a row's cache holds.

  Raises:
    ValueError: that says what is too small.
  """
  if count < 1:
    raise ValueError(f'generate: {count} tokens asked for; needs at least 1')
  total = longest + count
  if total > capacity:
    raise ValueError(
      f'generate: a prompt of {longest} tokens and {count} new ones are '
      f'{total}; the cache has room for {capacity}'
    )
  if total > config.max_position_embeddings:
    raise ValueError(
      f'generate: a prompt of {longest} tokens and {count} new ones are '
      f'{total}; the model is made for {config.max_position_embeddings}'
    )


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
  sampling: sampling_lib.Sampling | None,
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
  token = sampling_lib.draw(logits, sampling, key)
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
  sampling: sampling_lib.Sampling | None,
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
_advance = functools.partial(
  jax.jit, static_argnames='config', donate_argnames='state'
)(advance)


@functools.partial(jax.jit, static_argnames=('config', 'count'))
def finish(
  config: decoder.DecoderConfig,
  params: Any,
  state: State,
  policy: caches_lib.Policy,
  sampling: sampling_lib.Sampling | None,
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


class _Ready(NamedTuple):
  """Checked input of `begin` and `advance`."""

  tokens: np.ndarray
  positions: np.ndarray
  key: jax.Array
  stop: jax.Array
  capacity: int


def _ready(
  config, prompts, count, policy, sampling, key, stop, capacity, multiple
) -> _Ready:
  tokens, positions = pad(prompts, config.vocab_size, multiple)
  longest = int(positions.max()) + 1
  capacity = longest + count if capacity is None else capacity
  check_room(config, longest, count, capacity)
  if sampling is not None and key is None:
    raise ValueError('generate: sampling needs a key')
  key = jax.random.key(0) if key is None else key
  return _Ready(
    tokens,
    positions,
    key,
    jnp.asarray(stop, jnp.int32).reshape(-1),
    # Padding is no token, but attention takes in as many at once.
    max(capacity, tokens.shape[1]),
  )


def generate(
  config: decoder.DecoderConfig,
  params: Any,
  prompts: Sequence[Sequence[int]],
  count: int,
  *,
  policy: caches_lib.Policy | None = None,
  sampling: sampling_lib.Sampling | None = None,
  key: jax.Array | None = None,
  stop: Sequence[int] = (),
  capacity: int | None = None,
  dtype: Any = jnp.float32,
) -> Generated:
  """Continue prompts; two compiled programs, and one call of each.

  A row comes out as it does alone, up to the order of sums. Compiled once for
  a config, the shapes, and the kind of cache: other widths of codes (not of
  the packed cache), temperatures and keys compile nothing.

  Args:
    config: Of the model.
    params: Its parameters, plain arrays; or these and what is done to inputs
      of sites, as `plans.runnable` gives them of a compressed model.
    prompts: Tokens of each; of different lengths if need be.
    count: New tokens at most.
    policy: Kind of cache; full precision by default.
    sampling: How tokens are drawn; None for the most likely one.
    key: Needed to draw.
    stop: Tokens that end a row.
    capacity: Tokens that a row's cache holds; by default what is needed.
    dtype: Of what the cache keeps unquantized.

  Returns:
    Tokens, their numbers, and the caches.

  Raises:
    ValueError: if prompts are empty or hold unknown tokens, if prompt and new
      tokens exceed the cache or the model's positions, or a key is missing.
  """
  policy = caches_lib.full() if policy is None else policy
  ready = _ready(
    config, prompts, count, policy, sampling, key, stop, capacity, 1
  )
  state = begin(
    config,
    params,
    ready.tokens,
    ready.positions,
    policy,
    sampling,
    ready.key,
    ready.stop,
    ready.capacity,
    jnp.dtype(dtype),
  )
  return finish(
    config, params, state, policy, sampling, ready.key, ready.stop, count
  )


def stream(
  config: decoder.DecoderConfig,
  params: Any,
  prompt: Sequence[int],
  count: int,
  *,
  policy: caches_lib.Policy | None = None,
  sampling: sampling_lib.Sampling | None = None,
  key: jax.Array | None = None,
  stop: Sequence[int] = (),
  dtype: Any = jnp.float32,
  multiple: int = 32,
) -> Iterator[State]:
  """Continue one prompt, a state for each new token as it comes.

  Takes the same tokens as `generate`. The state given before is used up by
  the next step: take from it what is needed first.

  Args:
    config: Of the model.
    params: Its parameters, as of `generate`.
    prompt: Tokens.
    count: New tokens at most.
    policy: As of `generate`, and so are the others.
    sampling: See there.
    key: See there.
    stop: See there.
    dtype: See there.
    multiple: Prompt and capacity are filled up to multiples of this, so that
      programs kept from earlier texts fit.

  Yields:
    States; `token[0]` is the newest token.

  Raises:
    ValueError: as `generate`, before the first step.
  """
  policy = caches_lib.full() if policy is None else policy
  room = -(-(len(prompt) + max(count, 1)) // multiple) * multiple
  ready = _ready(
    config, [prompt], count, policy, sampling, key, stop, room, multiple
  )
  dtype = jnp.dtype(dtype)

  def steps():
    state = begin(
      config,
      params,
      ready.tokens,
      ready.positions,
      policy,
      sampling,
      ready.key,
      ready.stop,
      ready.capacity,
      dtype,
    )
    yield state
    for _ in range(count - 1):
      if bool(state.done[0]):
        return
      state = _advance(
        config, params, state, policy, sampling, ready.key, ready.stop
      )
      yield state

  return steps()
