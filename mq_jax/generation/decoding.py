"""Token by token: one compiled prompt, one compiled step, any cache."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax import caches as caches_lib
from mq_jax.generation import drawing, steps
from mq_jax.generation import prompts as prompts_lib
from mq_jax.models import decoder


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
  tokens, positions = prompts_lib.pad(prompts, config.vocab_size, multiple)
  longest = int(positions.max()) + 1
  capacity = longest + count if capacity is None else capacity
  prompts_lib.check_room(config, longest, count, capacity)
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
  sampling: drawing.Sampling | None = None,
  key: jax.Array | None = None,
  stop: Sequence[int] = (),
  capacity: int | None = None,
  dtype: Any = jnp.float32,
) -> steps.Generated:
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
  state = steps.begin(
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
  return steps.finish(
    config, params, state, policy, sampling, ready.key, ready.stop, count
  )


def stream(
  config: decoder.DecoderConfig,
  params: Any,
  prompt: Sequence[int],
  count: int,
  *,
  policy: caches_lib.Policy | None = None,
  sampling: drawing.Sampling | None = None,
  key: jax.Array | None = None,
  stop: Sequence[int] = (),
  dtype: Any = jnp.float32,
  multiple: int = 32,
) -> Iterator[steps.State]:
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

  def run():
    state = steps.begin(
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
      state = steps.step(
        config, params, state, policy, sampling, ready.key, ready.stop
      )
      yield state

  return run()
