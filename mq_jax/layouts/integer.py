"""Integers with a float16 scale, and a zero point, per group of rows."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from mq_jax.layouts import _base, _bits


@dataclasses.dataclass(frozen=True)
class Integer:
  """`bits` a weight; per group and output a f16 scale and `bits` of zero.

  Codes: `level` i16[k, n] (rows beyond k are ignored), `scale` f16[k/g, n],
  `zero` u8[k/g, n], not stored when symmetric. Symmetric levels are stored in
  two's complement. The last group may be short.

  `ebw_paper` counts the elements only, as papers name such settings.
  """

  bits: int
  group: int
  symmetric: bool

  def _groups(self, k):
    return -(-k // self.group)

  def _spread(self, x, k):
    """One a group as one a row."""
    return jnp.repeat(x.astype(jnp.float32), self.group, axis=0)[:k]

  def decode(self, codes, k, n):
    level = codes['level'][:k].astype(jnp.float32)
    zero, scale = (self._spread(codes[x], k) for x in ('zero', 'scale'))
    return (level - zero) * scale

  def pack(self, codes, k, n):
    level = np.asarray(codes['level'])[:k].astype(np.int32)
    mask = (1 << self.bits) - 1
    buffers = {
      'level': _bits.pack_bits(level & mask, self.bits),
      'scale': _base.as_bytes(codes['scale'], np.float16),
    }
    if not self.symmetric:
      buffers['zero'] = _bits.pack_bits(np.asarray(codes['zero']), self.bits)
    return buffers

  def unpack(self, buffers, k, n):
    shape = (self._groups(k), n)
    level = _bits.unpack_bits(buffers['level'], self.bits, (k, n))
    level = level.astype(np.int16)
    if self.symmetric:
      level -= (level >> (self.bits - 1)) << self.bits
      zero = np.zeros(shape, np.uint8)
    else:
      zero = _bits.unpack_bits(buffers['zero'], self.bits, shape)
    scale = _base.from_bytes(buffers['scale'], np.float16, shape)
    codes = {'level': level, 'scale': scale, 'zero': zero}
    return {name: jnp.asarray(code) for name, code in codes.items()}

  def nbytes(self, codes, k, n):
    groups = self._groups(k) * n
    zero = 0 if self.symmetric else _bits.nbytes(groups, self.bits)
    return _bits.nbytes(k * n, self.bits) + 2 * groups + zero

  def paper_bits(self, codes, k, n):
    return float(self.bits * k * n)

  def _zero(self, codes):
    """Zero points, rounded straight through where they are learned."""
    zero = codes['zero']
    if not jnp.issubdtype(zero.dtype, jnp.floating):
      return zero
    inside = jnp.clip(zero, 0, (1 << self.bits) - 1)
    return _base.through(jnp.round(inside), inside)

  def _grid(self, codes, k):
    zero = self._spread(self._zero(codes), k)
    low = -(1 << (self.bits - 1)) if self.symmetric else 0
    span = (1 << self.bits) - 1
    step = self._spread(codes['scale'], k)
    return _base.Grid(step, low - zero, low + span - zero)

  def place(self, codes, values, k, n):
    return values

  def relax(self, codes, target, k, n, hard=True, shares=None):
    del shares  # nothing to choose
    return self._grid(codes, k).relax(target, hard)

  def recode(self, codes, target, k, n):
    zero = self._zero(codes)
    level = self._grid(codes, k).level(target) + self._spread(zero, k)
    level = codes['level'].at[:k].set(level.astype(codes['level'].dtype))
    return codes | {'level': level, 'zero': zero}

  def spacing(self, codes, k, n):
    return self._grid(codes, k).step

  def learned(self, codes):
    return ('scale',) if self.symmetric else ('scale', 'zero')
