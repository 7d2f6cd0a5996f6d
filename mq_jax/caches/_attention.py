"""Attention over what a cache holds and over the tokens that come."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Part(NamedTuple):
  """Keys and values of one place.

  Attributes:
    k: Keys. Shape [b, g, n, d].
    v: Values, like `k`.
    visible: Which query may read which. bool[b, g or 1, t, n].
  """

  k: jax.Array
  v: jax.Array
  visible: jax.Array


def attention(
  q: jax.Array, parts: Sequence[Part], scale: float
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """Softmax attention over several parts together.

  Args:
    q: Queries, [b, t, h, d]; h a multiple of the parts' g.
    parts: What they read. A query that may read nothing gets some mean of
      values and counts nowhere.
    scale: Of the products.

  Returns:
    Means of values [b, t, h, d] in the dtype of q, and for each part the
    attention that its tokens got, summed over queries and the heads that
    share them, f32[b, g, n].
  """
  b, t, h, d = q.shape
  g = parts[0].k.shape[1]
  grouped = q.reshape(b, t, g, h // g, d)
  scores = [
    jnp.where(
      part.visible[:, :, None],
      scale
      * jnp.einsum(
        'btgrd,bgnd->bgrtn',
        grouped,
        part.k.astype(q.dtype),
        preferred_element_type=jnp.float32,
      ),
      jnp.finfo(jnp.float32).min,
    )
    for part in parts
  ]
  probs = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
  y = jnp.zeros((b, t, g, h // g, d), jnp.float32)
  masses, start = [], 0
  for part in parts:
    n = part.k.shape[2]
    mine = jax.lax.slice_in_dim(probs, start, start + n, axis=-1)
    y += jnp.einsum(
      'bgrtn,bgnd->btgrd',
      mine,
      part.v.astype(jnp.float32),
      preferred_element_type=jnp.float32,
    )
    seen = jnp.where(part.visible[:, :, None], mine, 0.0)
    masses.append(jnp.sum(seen, axis=(2, 3)))
    start += n
  return y.reshape(b, t, h, d).astype(q.dtype), tuple(masses)


def visible_slots(
  stored: jax.Array, positions: jax.Array, window: int | None
) -> jax.Array:
  """Which slots the queries at `positions` i32[b, t] read; bool[b, g, t, n].

  `stored` bool[b, g, n] marks slots that hold a token; slot i holds position
  i. A window w is positions p - w + 1 .. p.
  """
  at = positions[:, None, :, None]  # [b, 1, t, 1]
  visible = stored[:, :, None] & (at >= 0)
  if window is not None:
    slot = jnp.arange(stored.shape[-1])[None, None, None]
    visible &= slot > at - window
  return visible


def visible_tokens(positions: jax.Array, window: int | None) -> jax.Array:
  """Which of the new tokens each of them reads; bool[b, 1, t, t]."""
  row, column = positions[:, None, :, None], positions[:, None, None]
  visible = (column >= 0) & (column <= row)
  if window is not None:
    visible &= column > row - window
  return visible
