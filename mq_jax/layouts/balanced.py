"""An odd number of levels around zero, packed by radix; a scale per group."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from mq_jax.layouts import _base, _bits


@dataclasses.dataclass(frozen=True)
class Balanced:
  """`levels` values -h .. h of a weight, and a float16 scale per group.

  Several weights share a field of at most a byte: five of 3 levels take 8 bits
  (1.6 a weight), three of 5 levels 7 (2.33). The first weight of a field is its
  lowest digit; the last field is filled up with zeros.

  Codes: `level` i16[k, n] (rows beyond k are ignored), `scale` f16[k/g, n]. The
  last group may be short.

  `ebw_paper` counts whole bits a weight, 3 for 5 levels, as ABQ-LLM's kernels
  store them (arXiv 2408.08554), without scales.
  """

  levels: int
  group: int

  @property
  def bits(self) -> int:
    """Of a level by itself, as a multiplier sees it."""
    return (self.levels - 1).bit_length()

  @property
  def half(self) -> int:
    """The largest level."""
    return (self.levels - 1) // 2

  @property
  def field(self) -> tuple[int, int]:
    """Weights that share a field, and its bits: the densest within a byte."""
    found = [
      (bits / count, count, bits)
      for count in range(1, 9)
      if (bits := (self.levels**count - 1).bit_length()) <= 8
    ]
    return min(found)[1:]

  def _spread(self, scale, k):
    """One a group as one a row."""
    return jnp.repeat(scale.astype(jnp.float32), self.group, axis=0)[:k]

  def decode(self, codes, k, n):
    level = codes['level'][:k].astype(jnp.float32)
    return level * self._spread(codes['scale'], k)

  def pack(self, codes, k, n):
    count, bits = self.field
    digits = np.asarray(codes['level'])[:k].astype(np.int64).reshape(-1)
    digits = np.pad(digits, (0, -len(digits) % count)) + self.half
    place = self.levels ** np.arange(count)
    fields = digits.reshape(-1, count) @ place
    return {
      'level': _bits.pack_bits(fields, bits),
      'scale': _base.as_bytes(codes['scale'], np.float16),
    }

  def unpack(self, buffers, k, n):
    count, bits = self.field
    fields = _bits.unpack_bits(buffers['level'], bits, (-(-k * n // count),))
    if fields.max(initial=0) >= self.levels**count:
      raise ValueError(
        f'Balanced: a field of {fields.max()} is not {count} levels of '
        f'{self.levels}'
      )
    place = self.levels ** np.arange(count)
    digits = fields.astype(np.int64)[:, None] // place % self.levels
    level = (digits.reshape(-1)[: k * n] - self.half).reshape(k, n)
    shape = (-(-k // self.group), n)
    scale = _base.from_bytes(buffers['scale'], np.float16, shape)
    codes = {'level': level.astype(np.int16), 'scale': scale}
    return {name: jnp.asarray(code) for name, code in codes.items()}

  def nbytes(self, codes, k, n):
    count, bits = self.field
    groups = -(-k // self.group) * n
    return _bits.nbytes(-(-k * n // count), bits) + 2 * groups

  def paper_bits(self, codes, k, n):
    return float(self.bits * k * n)

  def _grid(self, codes, k):
    return _base.Grid(self._spread(codes['scale'], k), -self.half, self.half)

  def place(self, codes, values, k, n):
    return values

  def relax(self, codes, target, k, n, hard=True, shares=None):
    del shares  # nothing to choose
    return self._grid(codes, k).relax(target, hard)

  def recode(self, codes, target, k, n):
    level = self._grid(codes, k).level(target)
    return codes | {
      'level': codes['level'].at[:k].set(level.astype(codes['level'].dtype))
    }

  def spacing(self, codes, k, n):
    return self._grid(codes, k).step

  def learned(self, codes):
    return ('scale',)
