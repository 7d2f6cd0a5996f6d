"""KIVI in bytes: codes of a few bits, float16 side data, a residual window.

Reads the same numbers, bit for bit, as the simulated cache: both take their
codes from `quantizers.encode`. Quantized tokens lie in slots of their own; the
window begins at the first token that is not quantized, and moves.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax._pytrees import pytree_dataclass, static
from mq_jax.caches import _bits, _policy, _slots, kivi_simulated, quantizers


class Packed(NamedTuple):
  """Keys or values of one layer.

  Attributes:
    code: u8[b, g, n, d * bits / 8].
    scale: f16 of each group.
    low: f16 of each group.
    rest: Tokens that are not quantized, from the first on. [b, g, r, d].
  """

  code: jax.Array
  scale: jax.Array
  low: jax.Array
  rest: jax.Array


@pytree_dataclass
class PackedCache:
  """Packed keys and values, and the tokens i32[b] of each row."""

  k: Packed
  v: Packed
  length: jax.Array


class _Layout(NamedTuple):
  """How one of keys and values is cut: widths, axis, and size of groups."""

  bits: int
  axis: int  # 2, tokens, or 3, channels
  group: int

  @property
  def tokens(self) -> int:
    """Tokens of a group."""
    return self.group if self.axis == 2 else 1


@pytree_dataclass
class PackedKivi:
  """The packed back-end of `Kivi`.

  Attributes:
    kivi: Its options; widths must be plain numbers, as they decide shapes.
  """

  kivi: kivi_simulated.Kivi = static()

  def __post_init__(self):
    for name in ('key_bits', 'value_bits'):
      bits = getattr(self.kivi, name)
      if not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(
          f'packed kivi: {name}={bits!r} is not a whole number in 1..8'
        )

  def _layouts(self, width: int) -> tuple[_Layout, _Layout]:
    kivi = self.kivi
    return (
      _Layout(kivi.key_bits, 2, kivi.group),
      _Layout(kivi.value_bits, 3, kivi.channels(width)),
    )

  def init(self, batch, heads, capacity, width, dtype):
    self.kivi.check(batch, heads, capacity, width)
    slots = self.kivi.capacity(capacity)

    def make(layout, rest):
      if width * layout.bits % 8:
        raise ValueError(
          f'packed kivi: {width} channels of {layout.bits} bits are no whole '
          'bytes'
        )
      shape = [batch, heads, slots, width]
      shape[layout.axis] //= layout.group
      side = jnp.zeros(shape, jnp.float16)
      code = jnp.zeros(
        (batch, heads, slots, width * layout.bits // 8), jnp.uint8
      )
      rest = jnp.zeros((batch, heads, max(rest, 1), width), dtype)
      return Packed(code, side, side, rest)

    keys, values = self._layouts(width)
    return PackedCache(
      make(keys, self.kivi.block),
      make(values, self.kivi.residual),
      jnp.zeros(batch, jnp.int32),
    )

  def _quantized(self, length):
    return self.kivi.quantized_keys(length), self.kivi.quantized_values(length)

  def _length(self, cache):
    return _policy.fitting(cache.length, cache.k.code.shape[2])

  def read(self, cache):
    layouts = self._layouts(cache.k.rest.shape[3])
    quantized = self._quantized(self._length(cache))
    k, v = (
      _read(*x)
      for x in zip((cache.k, cache.v), layouts, quantized, strict=True)
    )
    return k, v, _policy.stored_slots(cache, *k.shape[1:3])

  def append(self, cache, q, k, v, positions, seen):
    del q, seen
    capacity = cache.k.code.shape[2]
    length = _slots.lengthened(cache.length, positions)
    new = PackedCache(cache.k, cache.v, length)
    slots = _slots.targets(cache.length, positions, capacity)
    parts = zip(
      (cache.k, cache.v),
      self._layouts(k.shape[3]),
      self._quantized(self._length(cache)),
      self._quantized(self._length(new)),
      (k, v),
      strict=True,
    )
    return PackedCache(*(_append(*x, slots, capacity) for x in parts), length)

  def bits(self, cache):
    _, heads, _, width = cache.k.rest.shape
    return self.kivi.bits_at(
      self._length(cache), heads, width, _bits.width(cache.k.rest)
    )

  def buffers(self, cache: PackedCache) -> dict[str, np.ndarray]:
    """What is stored of the tokens that are there, as byte arrays u8[*].

    Their size is what `bits` counts; the arrays of the cache itself have room
    for more. On the host.
    """
    layouts = self._layouts(cache.k.rest.shape[3])
    lengths = np.asarray(self._length(cache))
    quantized = [np.asarray(x) for x in self._quantized(self._length(cache))]
    out = {}
    for name, packed, layout, ends in zip(
      'kv', (cache.k, cache.v), layouts, quantized, strict=True
    ):
      host = jax.tree.map(np.asarray, packed)
      for row, (end, length) in enumerate(zip(ends, lengths, strict=True)):
        groups = end // layout.tokens
        live = {
          'code': host.code[row, :, :end],
          'scale': host.scale[row, :, :groups],
          'low': host.low[row, :, :groups],
          'rest': host.rest[row, :, : length - end],
        }
        for what, array in live.items():
          array = np.ascontiguousarray(array)
          out[f'{name}.{row}.{what}'] = array.view(np.uint8).reshape(-1)
    return out


def _read(packed: Packed, layout: _Layout, end: jax.Array) -> jax.Array:
  """Values [b, g, n, d] of what is packed; slots from `end` on of the rest."""
  code = quantizers.unpack_bits(packed.code, layout.bits)
  codes = quantizers.Codes(code, packed.scale, packed.low)
  coded = quantizers.decode(codes, layout.axis, layout.group)
  size = packed.rest.shape[2]
  offset = jnp.arange(code.shape[2])[None] - end[:, None]  # [b, n]
  index = jnp.clip(offset, 0, size - 1)[:, None, :, None]
  rest = jnp.take_along_axis(packed.rest, index, axis=2)
  late = (offset >= 0)[:, None, :, None]
  return jnp.where(late, rest, coded.astype(rest.dtype))


def _append(
  packed: Packed,
  layout: _Layout,
  begin: jax.Array,
  end: jax.Array,
  x: jax.Array,
  slots: jax.Array,
  capacity: int,
) -> Packed:
  """With new tokens: slots begin..end become codes, the rest is kept.

  Args:
    packed: As before; its rest begins at slot `begin`.
    layout: Of the codes.
    begin: First slot that was not quantized, i32[b].
    end: First slot that will not be, i32[b].
    x: New tokens [b, g, t, d].
    slots: Of the new tokens, i32[b, t]; `capacity` for none.
    capacity: Slots of a row.
  """
  size, t = packed.rest.shape[2], x.shape[2]
  open_slots = _slots.round_up(size + t, layout.tokens)
  # Room behind, as the next rest may begin anywhere up to open_slots.
  room = jnp.zeros((*x.shape[:2], open_slots + size, x.shape[3]), x.dtype)
  buffer = jax.lax.dynamic_update_slice_in_dim(room, packed.rest, 0, axis=2)
  there = jnp.where(slots < capacity, slots - begin[:, None], buffer.shape[2])
  buffer = _slots.put(buffer, there, x)
  # Of values, only as many as came can have left the window.
  most = open_slots if layout.tokens > 1 else t
  found = buffer[:, :, :most]

  def encode(packed):
    codes = quantizers.encode(found, layout.bits, layout.axis, layout.group)
    code = quantizers.pack_bits(codes.code, layout.bits)
    return Packed(
      _put_until(packed.code, begin, end, code),
      *(
        _put_until(store, begin // layout.tokens, end // layout.tokens, side)
        for store, side in (
          (packed.scale, codes.scale),
          (packed.low, codes.low),
        )
      ),
      packed.rest,
    )

  if layout.tokens > 1:  # a block is rarely completed
    packed = jax.lax.cond(jnp.any(end > begin), encode, lambda p: p, packed)
  else:
    packed = encode(packed)
  return packed._replace(rest=_slots.take(buffer, end - begin, size))


def _put_until(
  store: jax.Array, begin: jax.Array, end: jax.Array, x: jax.Array
) -> jax.Array:
  """Slots begin..end of store [b, g, n, ...] become the first ones of x."""
  slot = begin[:, None] + jnp.arange(x.shape[2])[None]
  slot = jnp.where(slot < end[:, None], slot, store.shape[2])
  return _slots.put(store, slot, x)
