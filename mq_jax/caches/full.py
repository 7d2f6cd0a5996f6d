"""Keys and values as they are."""

import jax
import jax.numpy as jnp

from mq_jax._pytrees import pytree_dataclass
from mq_jax.caches import _bits, _policy, _slots


@pytree_dataclass
class FullCache:
  """Keys and values of one layer.

  Attributes:
    k: [b, g, n, d].
    v: [b, g, n, d].
    length: Tokens of each row, i32[b].
  """

  k: jax.Array
  v: jax.Array
  length: jax.Array


@pytree_dataclass
class Full:
  """Keeps keys and values in the dtype of the cache."""

  def init(self, batch, heads, capacity, width, dtype):
    _slots.check_shape('full', batch, heads, capacity, width)
    empty = jnp.zeros((batch, heads, capacity, width), dtype)
    return FullCache(empty, empty, jnp.zeros(batch, jnp.int32))

  def read(self, cache):
    stored = _policy.stored_slots(cache, *cache.k.shape[1:3])
    return cache.k, cache.v, stored

  def append(self, cache, q, k, v, positions, seen):
    del q, seen
    return FullCache(
      _policy.write(cache.k, cache.length, positions, k),
      _policy.write(cache.v, cache.length, positions, v),
      _slots.lengthened(cache.length, positions),
    )

  def bits(self, cache):
    _, heads, capacity, width = cache.k.shape
    tokens = _bits.count(_policy.fitting(cache.length, capacity))
    elements = 2.0 * heads * width * tokens
    zero = jnp.float32(0.0)
    full = elements * _bits.width(cache.k)
    return _bits.Bits(zero, zero, full, zero, elements)


def full() -> Full:
  """A cache in full precision."""
  return Full()
