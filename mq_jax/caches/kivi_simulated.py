"""KIVI on a store of values: what is quantized is replaced by its values.

See `kivi` for what KIVI is, `kivi_packed` for the same in bytes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mq_jax._pytrees import pytree_dataclass, static
from mq_jax.caches import _bits, _policy, _slots, quantizers
from mq_jax.caches.full import Full, FullCache


@pytree_dataclass
class Kivi:
  """Options of KIVI, and the cache that keeps values of codes.

  Attributes:
    key_bits: 1..8; may be traced.
    value_bits: 1..8; may be traced.
    group: Tokens of one channel of keys that share a scale.
    value_group: Channels of one token of values that do; as many as there
      are, where a head has fewer.
    residual: Newest tokens that stay as they are: for values exactly so
      many, for keys what is left of whole blocks of this size.
  """

  key_bits: ArrayLike = 2
  value_bits: ArrayLike = 2
  group: int = static(32)
  value_group: int = static(32)
  residual: int = static(128)

  def __post_init__(self):
    numbers = {'group': self.group, 'value_group': self.value_group}
    for name, number in numbers.items():
      if not isinstance(number, int) or number < 1:
        raise ValueError(f'kivi: {name}={number!r} is not a whole number >= 1')
    if not isinstance(self.residual, int) or self.residual < 0:
      raise ValueError(
        f'kivi: residual={self.residual!r} is not a whole number >= 0'
      )
    if self.residual % self.group:
      raise ValueError(
        f'kivi: residual={self.residual} is not a multiple of '
        f'group={self.group}, in which keys are quantized'
      )

  @property
  def block(self) -> int:
    """Keys that are quantized together."""
    return self.residual or self.group

  def channels(self, width: int) -> int:
    """Channels of values that share a scale, in heads of `width`."""
    return min(self.value_group, width)

  def quantized_keys(self, length: jax.Array) -> jax.Array:
    """How many of a row's tokens have quantized keys."""
    return length // self.block * self.block

  def quantized_values(self, length: jax.Array) -> jax.Array:
    """How many of a row's tokens have quantized values."""
    return jnp.maximum(length - self.residual, 0)

  def capacity(self, capacity: int) -> int:
    """Slots for so many tokens: whole groups of keys."""
    return _slots.round_up(capacity, self.group)

  def check(self, batch, heads, capacity, width) -> None:
    """Refuse sizes; ValueError."""
    _slots.check_shape('kivi', batch, heads, capacity, width)
    quantizers.check_group(
      'kivi: channels of a head', width, self.channels(width)
    )

  def init(self, batch, heads, capacity, width, dtype):
    self.check(batch, heads, capacity, width)
    slots = self.capacity(capacity)
    return Full().init(batch, heads, slots, width, dtype)

  def read(self, cache):
    return Full().read(cache)

  def append(self, cache, q, k, v, positions, seen):
    new = Full().append(cache, q, k, v, positions, seen)
    t, capacity = k.shape[2], cache.k.shape[2]
    ends = [_policy.fitting(c.length, capacity) for c in (cache, new)]
    keys = lambda x: quantizers.fake_quantize(x, self.key_bits, 2, self.group)
    values = lambda x: quantizers.fake_quantize(
      x, self.value_bits, 3, self.channels(x.shape[3])
    )
    # At most so many whole blocks can become complete.
    blocks = (t + self.block - 1) // self.block * self.block
    return FullCache(
      _replace(new.k, *map(self.quantized_keys, ends), blocks, True, keys),
      _replace(new.v, *map(self.quantized_values, ends), t, False, values),
      new.length,
    )

  def bits(self, cache):
    _, heads, capacity, width = cache.k.shape
    return self.bits_at(
      _policy.fitting(cache.length, capacity),
      heads,
      width,
      _bits.width(cache.k),
    )

  def bits_at(self, length, heads, width, full_bits) -> _bits.Bits:
    """Bits of rows of given lengths; `full_bits` of an unquantized number."""
    tokens = _bits.count(length)
    keys = _bits.count(self.quantized_keys(length))
    values = _bits.count(self.quantized_values(length))
    f32 = lambda x: jnp.asarray(x, jnp.float32)
    codes = keys * f32(self.key_bits) + values * f32(self.value_bits)
    scales = keys / self.group + values / self.channels(width)
    each = float(heads * width)
    return _bits.Bits(
      codes=each * codes,
      scales=each * quantizers.SIDE_BITS * scales,
      full=each * full_bits * (2.0 * tokens - keys - values),
      side=jnp.float32(0.0),
      elements=2.0 * each * tokens,
    )


def _replace(
  store: jax.Array,
  begin: jax.Array,
  end: jax.Array,
  most: int,
  rare: bool,
  change: Callable[[jax.Array], jax.Array],
) -> jax.Array:
  """Slots begin..end of store [b, g, n, d] replaced by `change` of them.

  Args:
    store: Keys or values.
    begin: First slot of each row, i32[b].
    end: One behind the last, i32[b].
    most: Upper bound of end - begin. Groups of keys begin at multiples of
      their size, and so do `begin`, n and n - most.
    rare: There is mostly nothing to do, so it is looked up first.
    change: From [b, g, m, d] to as much.
  """
  size = min(most, store.shape[2])
  start = jnp.minimum(begin, store.shape[2] - size)
  part = _slots.take(store, start, size)
  slot = start[:, None] + jnp.arange(size)[None]
  inside = (slot >= begin[:, None]) & (slot < end[:, None])
  if rare:
    changed = jax.lax.cond(jnp.any(inside), change, lambda x: x, part)
  else:
    changed = change(part)
  part = jnp.where(inside[:, None, :, None], changed, part)
  return _slots.put_span(store, start, part)
