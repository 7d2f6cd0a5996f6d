"""Which tokens matter: scores, ranks and counts; masks in place of gathers.

Numbers of tokens may be traced; shapes never depend on values.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def ranks(scores: jax.Array) -> jax.Array:
  """Place of each score from the highest, 0, along the last axis.

  Ties go to the lower index. i32, in the shape of `scores`.

  Examples:
    >>> ranks(jnp.array([2.0, 5.0, 2.0]))
    Array([1, 0, 2], dtype=int32)
  """
  order = jnp.argsort(-scores, axis=-1, stable=True)
  return jnp.argsort(order, axis=-1).astype(jnp.int32)


def rank_mask(
  scores: jax.Array, count: ArrayLike, among: jax.Array | None = None
) -> jax.Array:
  """The `count` highest scores along the last axis.

  Args:
    scores: f32[..., n].
    count: Whole number, may be traced; broadcasts against [..., 1].
    among: Where a score may be chosen, bool[..., n]; all by default. If there
      are fewer of them than `count`, all are.

  Returns:
    bool[..., n].

  Examples:
    >>> rank_mask(jnp.array([1.0, 3.0, 2.0]), 2)
    Array([False,  True,  True], dtype=bool)
  """
  if among is None:
    return ranks(scores) < count
  # Of NaN no rank is known; it comes last, as all argsorts put it.
  chosen = ranks(jnp.where(among, scores, -jnp.inf)) < count
  return chosen & among


def mass_count(scores: jax.Array, share: ArrayLike) -> jax.Array:
  """The smallest number of scores that hold a share of their sum.

  Args:
    scores: f32[..., n], not negative.
    share: In 0..1; may be traced.

  Returns:
    i32[...]; 0 of scores that are all 0.

  Source:
    ZipVL, arXiv 2410.08584, equation 6.

  Examples:
    >>> int(mass_count(jnp.array([1.0, 6.0, 3.0]), 0.85))
    2
  """
  ordered = -jnp.sort(-scores, axis=-1)
  # Rounding of a sum must not ask for a score more than there are.
  total = jnp.cumsum(ordered, axis=-1)
  missing = total < jnp.asarray(share, jnp.float32) * total[..., -1:]
  some = total[..., -1] > 0
  return jnp.where(some, jnp.sum(missing, axis=-1) + 1, 0).astype(jnp.int32)


def mean_score(score: jax.Array, seen: jax.Array) -> jax.Array:
  """Attention per query that could read a token; 0 where none could.

  Source:
    ZipVL, arXiv 2410.08584, equation 7: early tokens lose their head start.
  """
  return jnp.where(seen > 0, score / jnp.maximum(seen, 1.0), 0.0)


def spread_mask(
  distances: jax.Array, count: ArrayLike, among: jax.Array
) -> jax.Array:
  """`count` items equally spaced along the order of their distances.

  Args:
    distances: f32[..., n]; ties keep their order.
    count: Whole number, may be traced; broadcasts against [..., 1].
    among: Which items there are, bool[..., n].

  Returns:
    bool[..., n], `count` times True, or as often as there are items.

  Source:
    KVCrush, arXiv 2503.00022, the pick of representatives. Of m items those
    at ranks r with floor((r + 1) count / m) > floor(r count / m), which unlike
    a stride always are so many, is ours.
  """
  rank = ranks(jnp.where(among, -distances, -jnp.inf))
  items = jnp.maximum(jnp.sum(among, axis=-1, keepdims=True), 1)
  count = jnp.minimum(jnp.asarray(count, items.dtype), items)
  rank = rank.astype(items.dtype)
  picked = (rank + 1) * count // items > rank * count // items
  return picked & among


def share_of(share: ArrayLike, count: jax.Array) -> jax.Array:
  """floor(share * count) as i32, exact where share * count is whole."""
  product = jnp.asarray(share, jnp.float32) * count.astype(jnp.float32)
  return jnp.floor(product + 1e-4).astype(jnp.int32)
