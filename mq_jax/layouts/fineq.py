"""Patterned clusters with their shared codes in front, in whole bytes."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from mq_jax.layouts import _base, _bits

_WIDTH = {0: 0, 1: 2, 3: 3}  # bits of a member by its largest level


@dataclasses.dataclass(frozen=True)
class FineQ:
  """Clusters along the inputs of one output; `share` clusters have one code.

  Canonically (clusters of 3, two under one code) a block of 7 bytes holds 24
  weights: byte 0 the codes of four pairs, pair p at bits 2p..2p+1; then 48
  data bits, cluster c at bits 6c..6c+5, kept members in order, each magnitude
  first and its sign above. Zeros have sign 0, but -0 is read as 0.

  Codes: `pattern` u8[k/(size share), n], `level` i8[k, n] (k padded with
  zeros, pattern 0, which is stored), `scale` f16[scales, n] with one scale, or
  one for pattern 0 and one for the others.

  Source:
    FineQ, arXiv 2504.19746: index and data concatenated in aligned memory;
    order of bits and table of codes are our choice.
  """

  patterns: tuple[tuple[int, ...], ...]
  share: int = 2
  scales: int = 1

  @property
  def size(self) -> int:
    """Members of a cluster."""
    return len(self.patterns[0])

  @property
  def code_bits(self) -> int:
    return math.ceil(math.log2(len(self.patterns)))

  @property
  def data_bits(self) -> int:
    """Bits of one cluster's members."""
    return sum(_WIDTH[level] for level in self.patterns[0])

  @property
  def _block(self) -> tuple[int, int]:
    """Groups (of `share` clusters) in a block, and the block's bytes."""
    bits = self.code_bits + self.share * self.data_bits
    groups = 8 // math.gcd(bits, 8)
    return groups, groups * bits // 8

  def _padded(self, k: int) -> tuple[int, int]:
    """Blocks along k, and rows that they hold."""
    rows = self._block[0] * self.share * self.size
    blocks = -(-k // rows)
    return blocks, blocks * rows

  def decode(self, codes, k, n):
    level = codes['level'][:k].astype(jnp.float32)
    return level * self._step(codes, k)

  def _pattern(self, codes, k):
    """The pattern that each weight is under. u8[k, n]."""
    return jnp.repeat(codes['pattern'], self.size * self.share, axis=0)[:k]

  def _step(self, codes, k):
    scale = codes['scale'].astype(jnp.float32)
    if self.scales == 1:
      return scale
    pattern = self._pattern(codes, k)
    return jnp.where(pattern == 0, scale[0][None], scale[1][None])

  def _fields(self):
    """Width and offset of every member by pattern. int[p, size] each."""
    width = np.array([[_WIDTH[x] for x in row] for row in self.patterns])
    return width, np.cumsum(width, axis=1) - width

  def pack(self, codes, k, n):
    blocks, rows = self._padded(k)
    size = self.size
    level = np.asarray(codes['level']).astype(np.int32)
    pattern = np.asarray(codes['pattern']).astype(np.int32)
    extra = rows - level.shape[0]
    level = np.pad(level, ((0, extra), (0, 0))).T
    extra = rows // (size * self.share) - pattern.shape[0]
    pattern = np.pad(pattern, ((0, extra), (0, 0))).T  # [n, group]
    level = level.reshape(n, -1, self.share, size)
    width, offset = (table[pattern][:, :, None] for table in self._fields())
    sign = np.where(width > 0, (level < 0) << np.maximum(width - 1, 0), 0)
    field = np.sum((np.abs(level) | sign) << offset, axis=-1)
    index_bits = _bits.to_bits(pattern, self.code_bits)
    data_bits = _bits.to_bits(field, self.data_bits)
    split = lambda bits: bits.reshape(n, blocks, -1)
    stream = np.concatenate([split(index_bits), split(data_bits)], axis=-1)
    return {
      'block': np.packbits(stream.reshape(-1), bitorder='little'),
      'scale': _base.as_bytes(codes['scale'], np.float16),
    }

  def unpack(self, buffers, k, n):
    blocks, rows = self._padded(k)
    groups, block_bytes = self._block
    raw = _base.from_bytes(buffers['block'], np.uint8, (n, blocks, block_bytes))
    bits = np.unpackbits(raw, axis=-1, bitorder='little')
    index_bits, data_bits = np.split(bits, [groups * self.code_bits], axis=-1)
    pattern = _bits.from_bits(index_bits.reshape(n, -1, self.code_bits))
    if pattern.max(initial=0) >= len(self.patterns):
      raise ValueError(
        f'FineQ: code {pattern.max()} is not one of {len(self.patterns)} '
        'patterns'
      )
    field = _bits.from_bits(
      data_bits.reshape(n, -1, self.share, self.data_bits)
    ).astype(np.int32)
    width, offset = (
      table[pattern.astype(np.int32)][:, :, None] for table in self._fields()
    )
    member = (field[..., None] >> offset) & ((1 << width) - 1)
    top = np.maximum(width - 1, 0)
    magnitude = member & ((1 << top) - 1)
    level = np.where((member >> top) & (width > 0), -magnitude, magnitude)
    level = level.reshape(n, rows).T.astype(np.int8)
    scale = _base.from_bytes(buffers['scale'], np.float16, (self.scales, n))
    codes = {'pattern': pattern.T, 'level': level, 'scale': scale}
    return {name: jnp.asarray(code) for name, code in codes.items()}

  def nbytes(self, codes, k, n):
    return n * self._padded(k)[0] * self._block[1] + 2 * self.scales * n

  def paper_bits(self, codes, k, n):
    """Codes and data without padding and scales, e.g. 14/6 a weight."""
    bits = self.code_bits + self.share * self.data_bits
    return bits / (self.share * self.size) * k * n

  def _grid(self, codes, k):
    member = jnp.arange(k) % self.size
    pattern = self._pattern(codes, k).astype(jnp.int32)
    most = jnp.array(self.patterns, jnp.float32)[pattern, member[:, None]]
    step = jnp.broadcast_to(self._step(codes, k), most.shape)
    return _base.Grid(step, -most, most)

  def place(self, codes, values, k, n):
    return values

  def relax(self, codes, target, k, n, hard=True, shares=None):
    value = self._grid(codes, k).relax(target, hard)
    if shares:
      share = jnp.repeat(shares['pattern'], self.size * self.share, axis=1)
      value += _base.lean(share[:, :k], self._by_pattern(codes, target, k))
    return value

  def _by_pattern(self, codes, target, k):
    """What weights would be under each pattern. f32[p, k, n]."""
    each = lambda p: codes | {'pattern': jnp.full_like(codes['pattern'], p)}
    return jnp.stack(
      [self._grid(each(p), k).relax(target) for p in range(len(self.patterns))]
    )

  def choices(self, codes, target, k, n):
    """'pattern' of every group of clusters under one code."""
    step = jnp.broadcast_to(self._step(codes, k), (k, n))
    error = self._by_pattern(codes, target, k) - target[None]
    error = (error / jnp.where(step > 0, step, 1.0)[None]) ** 2
    groups = codes['pattern'].shape[0]
    size = self.size * self.share
    error = jnp.pad(error, ((0, 0), (0, groups * size - k), (0, 0)))
    error = jnp.mean(error.reshape(len(self.patterns), groups, size, n), axis=2)
    index = jnp.arange(len(self.patterns))[:, None, None]
    now = (codes['pattern'][None].astype(jnp.int32) == index).astype(
      jnp.float32
    )
    return {'pattern': _base.Choice(now, error)}

  def settle(self, codes, logits, target, k, n):
    pattern = jnp.argmax(logits['pattern'], axis=0)
    return codes | {'pattern': pattern.astype(codes['pattern'].dtype)}

  def recode(self, codes, target, k, n):
    level = self._grid(codes, k).level(target)
    return codes | {
      'level': codes['level'].at[:k].set(level.astype(codes['level'].dtype))
    }

  def spacing(self, codes, k, n):
    return self._grid(codes, k).step

  def learned(self, codes):
    return ('scale',)
