"""Where tokens lie: slot i of a row holds the i-th token of the row.

Rows of a batch have lengths of their own, so a row comes out as it does
alone, whatever it is padded with.
"""

import jax
import jax.numpy as jnp


def round_up(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple


def targets(
  length: jax.Array, positions: jax.Array, capacity: int
) -> jax.Array:
  """Slots of new tokens.

  Args:
    length: Tokens that each row has. i32[b].
    positions: Of the new ones, -1 for padding. i32[b, t].
    capacity: Slots of a row.

  Returns:
    i32[b, t]; `capacity`, where `put` writes nothing, for padding and for
    what has no room.
  """
  valid = positions >= 0
  order = jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
  slot = length[:, None] + order
  return jnp.where(valid & (slot < capacity), slot, capacity)


def lengthened(length: jax.Array, positions: jax.Array) -> jax.Array:
  """Lengths after the new tokens; i32[b]."""
  return length + jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)


def put(store: jax.Array, slots: jax.Array, x: jax.Array) -> jax.Array:
  """Write x [b, g, t, ...] to slots i32[b, t] of store [b, g, n, ...].

  Slots beyond the store are left out.
  """
  rows = jnp.arange(store.shape[0])[:, None]
  x = jnp.swapaxes(x, 1, 2).astype(store.dtype)
  return store.at[rows, :, slots].set(x, mode='drop')


def take(store: jax.Array, start: jax.Array, size: int) -> jax.Array:
  """`size` slots of store [b, g, n, ...] from start i32[b] on, which fit."""
  cut = lambda x, i: jax.lax.dynamic_slice_in_dim(x, i, size, axis=1)
  return jax.vmap(cut)(store, start)


def put_span(store: jax.Array, start: jax.Array, x: jax.Array) -> jax.Array:
  """Undo `take`."""
  write = lambda s, i, y: jax.lax.dynamic_update_slice_in_dim(s, y, i, axis=1)
  return jax.vmap(write)(store, start, x)


def check_shape(
  name: str, batch: int, heads: int, capacity: int, width: int
) -> None:
  """Refuse sizes that make no cache.

  Raises:
    ValueError: that names the size.
  """
  sizes = dict(batch=batch, heads=heads, capacity=capacity, width=width)
  for what, size in sizes.items():
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
      raise ValueError(
        f'{name} cache: {what}={size!r} is not a whole number >= 1'
      )
