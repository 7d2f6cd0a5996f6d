"""What every kind of cache offers, and attention with any of them."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from mq_jax.caches import _attention, _slots
from mq_jax.caches._bits import Bits


class Seen(NamedTuple):
  """What attention found out about tokens, for caches that choose by it.

  Attributes:
    mass: Attention that stored tokens got, f32[b, g, n].
    rows: Queries that could read them, f32[b, g, n].
    new_mass: The same of the new tokens, f32[b, g, t].
    new_rows: f32[b, g, t].
  """

  mass: jax.Array
  rows: jax.Array
  new_mass: jax.Array
  new_rows: jax.Array


class Policy(Protocol):
  """How a cache keeps keys and values; frozen data, the cache is a pytree.

  Slot i of a row holds its token of position i: positions of a row count on
  from its length, and -1 marks padding. A cache has `length` i32[b].
  """

  def init(
    self, batch: int, heads: int, capacity: int, width: int, dtype: Any
  ) -> Any:
    """An empty cache of one layer.

    Args:
      batch: Rows.
      heads: Of keys and values, g.
      capacity: Tokens that a row has room for; more where a policy needs it.
      width: Of a head, d.
      dtype: Of what is kept unquantized.

    Raises:
      ValueError: for sizes that the policy can't hold.
    """

  def read(self, cache: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys and values [b, g, n, d] to attend to; which exist, bool[b, g, n]."""

  def append(
    self,
    cache: Any,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    seen: Seen,
  ) -> Any:
    """The cache with new tokens, compressed.

    Args:
      cache: From `init` or `append`.
      q: Queries [b, t, h, d].
      k: Keys [b, g, t, d]; zeros for padding.
      v: Values, like `k`.
      positions: i32[b, t], -1 for padding.
      seen: What attention found.
    """

  def bits(self, cache: Any) -> Bits:
    """Bits that it takes, and of what they are."""


def attend(
  policy: Policy,
  cache: Any,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  positions: jax.Array,
  window: int | None = None,
  scale: float = 1.0,
  *,
  fresh: bool = False,
) -> tuple[jax.Array, Any]:
  """Attend to a cache and to new tokens, then put the tokens into it.

  New tokens are read exactly, by themselves and by each other; only what was
  in the cache before comes as the policy keeps it. So does KIVI.

  Args:
    policy: Kind of cache.
    cache: Its state.
    q: Queries [b, t, h, d], rotated.
    k: Keys [b, t, g, d], rotated; g divides h.
    v: Values [b, t, g, d].
    positions: i32[b, t], counting on from the row's length; -1 is padding.
    window: Positions that a token reads, itself included; None is all.
    scale: Of the products of queries and keys.
    fresh: The cache is known to be empty, so it need not be read.

  Returns:
    What attention gives, [b, t, h, d] in the dtype of q, and the cache. Rows
    of padding hold anything finite.

  Raises:
    ValueError: if more tokens come than the cache has slots. Those that find
      no room in a cache with tokens are lost, and its length says so.
  """
  kept_k, kept_v, stored = policy.read(cache)
  t, capacity = k.shape[1], stored.shape[-1]
  if t > capacity:
    raise ValueError(
      f'cache: {t} tokens at once, but capacity is {capacity}; make it larger'
    )
  valid = (positions >= 0)[:, None, :, None]
  # As they will be stored, or the first reading would differ from later ones.
  enter = lambda x: jnp.where(
    valid, jnp.swapaxes(x, 1, 2), jnp.zeros((), x.dtype)
  ).astype(kept_k.dtype)
  k, v = enter(k), enter(v)
  new = _attention.Part(k, v, _attention.visible_tokens(positions, window))
  rows = lambda visible: jnp.broadcast_to(
    jnp.sum(visible, axis=2, dtype=jnp.float32),
    (*stored.shape[:2], visible.shape[-1]),
  )
  if fresh:
    y, (new_mass,) = _attention.attention(q, [new], scale)
    mass = count = jnp.zeros(stored.shape, jnp.float32)
  else:
    visible = _attention.visible_slots(stored, positions, window)
    old = _attention.Part(kept_k, kept_v, visible)
    y, (mass, new_mass) = _attention.attention(q, [old, new], scale)
    count = rows(visible)
  seen = Seen(mass, count, new_mass, rows(new.visible))
  return y, policy.append(cache, q, k, v, positions, seen)


def stored_slots(cache: Any, heads: int, capacity: int) -> jax.Array:
  """Slots below the rows' lengths; bool[b, g, n]."""
  filled = jnp.arange(capacity)[None] < cache.length[:, None]
  return jnp.broadcast_to(
    filled[:, None], (cache.length.shape[0], heads, capacity)
  )


def fitting(length: jax.Array, capacity: int) -> jax.Array:
  """Tokens that are in the cache: what had no room is not."""
  return jnp.minimum(length, capacity)


def write(store, length, positions, x):
  """New tokens x [b, g, t, d] behind the others of store [b, g, n, d]."""
  slots = _slots.targets(length, positions, store.shape[2])
  return _slots.put(store, slots, x)
