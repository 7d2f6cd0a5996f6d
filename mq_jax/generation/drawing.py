"""From logits to tokens: the most likely one, or one drawn."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mq_jax._pytrees import pytree_dataclass


@pytree_dataclass
class Sampling:
  """How tokens are drawn; numbers may be traced, None leaves a cut out.

  Attributes:
    temperature: Divides the logits, > 0.
    top_k: Only so many tokens with the highest logits.
    top_p: Of those, only as many of the likeliest as together have at least
      this probability; the likeliest one always.
  """

  temperature: ArrayLike = 1.0
  top_k: ArrayLike | None = None
  top_p: ArrayLike | None = None


def sampling(
  temperature: float = 1.0,
  top_k: int | None = None,
  top_p: float | None = None,
) -> Sampling | None:
  """Checked options; None, which stands for greedy, of temperature 0.

  Raises:
    ValueError: for numbers out of range.
  """
  number = lambda x: isinstance(x, int | float) and not isinstance(x, bool)
  if not number(temperature) or not 0 <= temperature < float('inf'):
    raise ValueError(f'temperature={temperature!r} is not a number >= 0')
  if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
    raise ValueError(f'top_k={top_k!r} is not a whole number >= 1')
  if top_p is not None and (not number(top_p) or not 0 < top_p <= 1):
    raise ValueError(f'top_p={top_p!r} is not a probability in (0, 1]')
  if temperature == 0:
    return None
  return Sampling(temperature, top_k, top_p)


def filtered(logits: jax.Array, options: Sampling) -> jax.Array:
  """Logits of what may be drawn: divided, and -inf where cut off.

  Args:
    logits: [..., v].
    options: Applied in the order temperature, top-k, top-p.

  Returns:
    f32[..., v].

  Source:
    Nucleus sampling, arXiv 1904.09751, section 3.1. Ties at the cuts go to
    the lower token.
  """
  logits = logits.astype(jnp.float32)
  logits = logits / jnp.asarray(options.temperature, jnp.float32)
  if options.top_k is None and options.top_p is None:
    return logits
  order = jnp.argsort(-logits, axis=-1, stable=True)
  ordered = jnp.take_along_axis(logits, order, axis=-1)
  if options.top_k is not None:
    rank = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    ordered = jnp.where(rank < options.top_k, ordered, -jnp.inf)
  if options.top_p is not None:
    probs = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    # The first comes after nothing, so it stays.
    ordered = jnp.where(before < options.top_p, ordered, -jnp.inf)
  back = jnp.argsort(order, axis=-1)
  return jnp.take_along_axis(ordered, back, axis=-1)


def draw(
  logits: jax.Array, options: Sampling | None, key: jax.Array
) -> jax.Array:
  """One token a row.

  Args:
    logits: [b, v].
    options: None takes the most likely token, the lowest of equals.
    key: Row i draws with `fold_in(key, i)`, whatever rows there are.

  Returns:
    i32[b].
  """
  if options is None:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  cut = filtered(logits, options)
  keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(
    jnp.arange(logits.shape[0])
  )
  return jax.vmap(jax.random.categorical)(keys, cut).astype(jnp.int32)
