"""Outlier-victim pairs of neighbouring inputs."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from mq_jax.layouts import _base, _bits

# Magnitudes that an outlier can take, in steps of the scale, by its code. At
# 4 bits abfloat E2M1 with bias 2 (0 stays unused); at 2 bits our choice.
OUTLIER_LEVELS = {
  2: (2.0, 4.0),
  4: (0.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0),
}


@dataclasses.dataclass(frozen=True)
class Olive:
  """`bits` a weight, and a f16 scale per output.

  Codes: `code` u8[2 ceil(k/2), n], `scale` f16[n]. A pair is two neighbouring
  inputs of one output; the code 1000b marks the victim of a pair, whose other
  member is then an outlier: {sign, magnitude code}. Other codes are two's
  complement.

  Source: OliVe, arXiv 2304.07493; read in summaries only.
  """

  bits: int

  def _pairs(self, codes, n):
    """Codes in pairs; which are victims, and which outliers. [k/2, 2, n]."""
    code = codes['code'].astype(jnp.int32).reshape(-1, 2, n)
    victim = code == 1 << (self.bits - 1)
    return code, victim, victim[:, ::-1]

  def decode(self, codes, k, n):
    code, victim, outlier = self._pairs(codes, n)
    victim_code = 1 << (self.bits - 1)
    normal = jnp.where(code > victim_code, code - (1 << self.bits), code)
    table = jnp.array(OUTLIER_LEVELS[self.bits], jnp.float32)
    magnitude = table[code & (victim_code - 1)]
    level = jnp.where(
      outlier,
      jnp.where(code >= victim_code, -magnitude, magnitude),
      normal.astype(jnp.float32),
    )
    level = jnp.where(victim, 0.0, level).reshape(-1, n)[:k]
    return level * codes['scale'].astype(jnp.float32)[None]

  def pack(self, codes, k, n):
    return {
      'code': _bits.pack_bits(np.asarray(codes['code']), self.bits),
      'scale': _base.as_bytes(codes['scale'], np.float16),
    }

  def unpack(self, buffers, k, n):
    shape = (k + k % 2, n)
    code = _bits.unpack_bits(buffers['code'], self.bits, shape)
    scale = _base.from_bytes(buffers['scale'], np.float16, (n,))
    return {'code': jnp.asarray(code), 'scale': jnp.asarray(scale)}

  def nbytes(self, codes, k, n):
    return _bits.nbytes((k + k % 2) * n, self.bits) + 2 * n

  def paper_bits(self, codes, k, n):
    return float(self.bits * k * n)

  def place(self, codes, values, k, n):
    return values

  def _level(self, codes, target, n, hard=True):
    """Levels of all rows and the codes of outliers; straight-through."""
    _, victim, outlier = self._pairs(codes, n)
    extra = codes['code'].shape[0] - target.shape[0]
    target = jnp.pad(target, ((0, extra), (0, 0))).reshape(victim.shape)
    step = jnp.broadcast_to(codes['scale'].astype(jnp.float32), victim.shape)
    most = (1 << (self.bits - 1)) - 1
    normal = _base.Grid(step, -most, most).level(target, hard)
    table = jnp.array(OUTLIER_LEVELS[self.bits], jnp.float32)
    safe = jnp.where(step > 0, step, 1.0)
    # Code 0 of a negative one would read as a victim's, and of a positive one
    # it may stand for no number.
    first = jnp.where(target < 0, 1, int(OUTLIER_LEVELS[self.bits][0] == 0))
    wide = jnp.clip(jnp.abs(target) / safe, table[first], table[-1])
    index = jnp.searchsorted((table[1:] + table[:-1]) / 2, wide)
    index = jnp.maximum(index, first)
    magnitude = _base.through(table[index], wide) if hard else wide
    level = jnp.where(
      outlier, jnp.where(target < 0, -magnitude, magnitude), normal
    )
    return jnp.where(victim, 0.0, level), index, target < 0

  def relax(self, codes, target, k, n, hard=True, shares=None):
    del shares  # nothing to choose
    level, _, _ = self._level(codes, target, n, hard)
    scale = codes['scale'].astype(jnp.float32)[None]
    return level.reshape(-1, n)[:k] * scale

  def recode(self, codes, target, k, n):
    _, victim, outlier = self._pairs(codes, n)
    level, index, negative = self._level(codes, target, n)
    victim_code = 1 << (self.bits - 1)
    normal = level.astype(jnp.int32) & ((1 << self.bits) - 1)
    wide = index | jnp.where(negative, victim_code, 0)
    code = jnp.where(victim, victim_code, jnp.where(outlier, wide, normal))
    dtype = codes['code'].dtype
    return codes | {'code': code.astype(dtype).reshape(-1, n)}

  def spacing(self, codes, k, n):
    return jnp.broadcast_to(codes['scale'].astype(jnp.float32), (k, n))

  def learned(self, codes):
    return ('scale',)
