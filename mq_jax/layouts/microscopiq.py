"""Micro-blocks of equal width, with metadata for those that hold outliers."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax import clusters, formats, steps
from mq_jax.layouts import _base, _bits

_MOVES = (-1, 0, 1)  # of exponents that are learned


def _most(scores, count):
  """The `count` entries of a micro-block with the highest scores."""
  return jax.vmap(jax.vmap(steps.rank))(-scores) < count[..., None]


@dataclasses.dataclass(frozen=True)
class MicroScopiQ:
  """MicroScopiQ's packed tensor.

  Blocks run along the outputs (`axis='out'`) or the inputs ('in'); a row
  below is the other axis. Every element has `bits` bits; a block of `block`
  has an exponent byte; every micro-block has a flag, and, when it holds
  outliers, an MXScale byte and a permutation list of micro_block / 2 pairs of
  slots. Elements beyond the last micro-block are not stored.

  With `pruned=False` (an ablation) nothing makes room for the lower halves:
  then a flagged micro-block has instead a mask of its outliers, followed by
  their lower halves.

  MXScale byte: {level-1 exponent, two's complement, upper 9 - bits bits; uX,
  lower bits - 1 bits}. The larger uX comes first, so most blocks have all its
  bits set.

  Codes, r rows, c blocks and u micro-blocks a row: `element` u8[r, c block],
  `isf` i8[r, c], `osf` i8[r, u] (zero where no outliers), and `upper`, `lower`
  u8[r, u, micro_block/2], or unpruned `outlier` bool and `low` u8
  [r, c block].

  Source:
    MicroScopiQ, arXiv 2411.05282, section 4 and figure 5; field order is our
    choice. `ebw_paper` is the paper's: element, permutation and MXScale bits;
    without pruning elements, lower halves and MXScale.
  """

  bits: int
  block: int = 128
  micro_block: int = 8
  axis: str = 'out'
  pruned: bool = True
  prescale: bool = True

  def _sizes(self, k, n):
    """Rows, blocks, micro-blocks and stored micro-blocks a row."""
    rows, length = (k, n) if self.axis == 'out' else (n, k)
    blocks = -(-length // self.block)
    micro = self.block // self.micro_block
    return rows, blocks, blocks * micro, -(-length // self.micro_block)

  @property
  def _slot_bits(self):
    return int(math.log2(self.micro_block))

  @property
  def permutation_bits(self) -> int:
    """Bits of a permutation list: micro_block / 2 pairs of slots."""
    return self.micro_block * self._slot_bits

  def decode(self, codes, k, n):
    rows, blocks, micros, _ = self._sizes(k, n)
    split = lambda x: x.reshape(rows, micros, self.micro_block)
    isf = jnp.repeat(codes['isf'], self.block // self.micro_block, axis=1)
    element = split(codes['element'])
    if self.pruned:
      merge = lambda e, u, l, i, o: steps.merge_outliers(
        e, u, l, i, o, self.bits
      )
      # Masks of pairs by slots are micro_block / 2 times as large as a weight.
      room = (1 << 23) // (element[0].size * self.micro_block)
      values = jax.lax.map(
        lambda row: jax.vmap(merge)(*row),
        (element, codes['upper'], codes['lower'], isf, codes['osf']),
        batch_size=clusters.batch_of(rows, room),
      )
    else:
      merge = lambda e, x, l, i, o: steps.merge_unpruned(
        e, x, l, i, o, self.bits
      )
      values = jax.vmap(jax.vmap(merge))(
        element,
        split(codes['outlier']),
        split(codes['low']),
        isf,
        codes['osf'],
      )
    values = values.reshape(rows, -1)
    return values[:, :n] if self.axis == 'out' else values[:, :k].T

  def flagged(self, codes) -> np.ndarray:
    """Micro-blocks that hold an outlier. bool[r, u]."""
    if self.pruned:
      upper, lower = np.asarray(codes['upper']), np.asarray(codes['lower'])
      return (upper != lower).any(axis=-1)
    outlier = np.asarray(codes['outlier'])
    split = (outlier.shape[0], -1, self.micro_block)
    return outlier.reshape(split).any(axis=-1)

  def _mxscale(self, osf, isf):
    """The byte {O_l1, uX} with O_l1 + uX - bias = osf (+ isf)."""
    private = self.bits - 1
    bias = (1 << (self.bits - 2)) - 1
    total = osf.astype(np.int32) + bias
    if self.prescale:
      total = total + isf
    ux = np.minimum((1 << private) - 1, total + (1 << (8 - self.bits)))
    return (((total - ux) << private) | ux) & 0xFF

  def _exponent(self, byte, isf):
    private = self.bits - 1
    bias = (1 << (self.bits - 2)) - 1
    level = byte.astype(np.int8).astype(np.int32) >> private
    total = level + (byte.astype(np.int32) & ((1 << private) - 1)) - bias
    return total - isf if self.prescale else total

  def pack(self, codes, k, n):
    rows, blocks, micros, stored = self._sizes(k, n)
    element = np.asarray(codes['element'])[:, : stored * self.micro_block]
    flags = self.flagged(codes)
    isf = np.asarray(codes['isf']).astype(np.int32)
    isf = np.repeat(isf, self.block // self.micro_block, axis=1)[flags]
    osf = np.asarray(codes['osf'])[flags]
    buffers = {
      'element': _bits.pack_bits(element, self.bits),
      'isf': _base.as_bytes(codes['isf'], np.int8),
      'flag': _bits.pack_bits(flags[:, :stored], 1),
      'mxscale': self._mxscale(osf, isf).astype(np.uint8),
    }
    if self.pruned:
      pairs = np.stack(
        [np.asarray(codes[name])[flags] for name in ('upper', 'lower')], -1
      )  # [f, pair, 2]
      buffers['permutation'] = _bits.pack_bits(pairs, self._slot_bits)
    else:
      split = lambda name: np.asarray(codes[name]).reshape(
        rows, micros, self.micro_block
      )
      outlier = split('outlier')[flags]
      low = split('low')[flags][outlier]
      buffers['mask'] = _bits.pack_bits(outlier, 1)
      buffers['low'] = _bits.pack_bits(low, self.bits)
    return buffers

  def unpack(self, buffers, k, n):
    rows, blocks, micros, stored = self._sizes(k, n)
    m = self.micro_block
    flags = np.zeros((rows, micros), bool)
    flags[:, :stored] = _bits.unpack_bits(buffers['flag'], 1, (rows, stored))
    count = int(flags.sum())
    element = np.zeros((rows, micros * m), np.uint8)
    element[:, : stored * m] = _bits.unpack_bits(
      buffers['element'], self.bits, (rows, stored * m)
    )
    isf = _base.from_bytes(buffers['isf'], np.int8, (rows, blocks))
    each = np.repeat(isf.astype(np.int32), self.block // m, axis=1)[flags]
    byte = _base.from_bytes(buffers['mxscale'], np.uint8, (count,))
    osf = np.zeros((rows, micros), np.int8)
    osf[flags] = self._exponent(byte, each)
    codes = {'element': element, 'isf': isf, 'osf': osf}
    if self.pruned:
      pairs = np.zeros((rows, micros, m // 2, 2), np.uint8)
      pairs[flags] = _bits.unpack_bits(
        buffers['permutation'], self._slot_bits, (count, m // 2, 2)
      )
      codes |= {'upper': pairs[..., 0], 'lower': pairs[..., 1]}
    else:
      outlier = np.zeros((rows, micros, m), bool)
      outlier[flags] = _bits.unpack_bits(buffers['mask'], 1, (count, m)) > 0
      low = np.zeros((rows, micros, m), np.uint8)
      total = int(outlier.sum())
      low[outlier] = _bits.unpack_bits(buffers['low'], self.bits, (total,))
      codes |= {
        'outlier': outlier.reshape(rows, -1),
        'low': low.reshape(rows, -1),
      }
    return {name: jnp.asarray(code) for name, code in codes.items()}

  def _outliers(self, codes) -> int:
    return int(np.asarray(codes['outlier']).sum())

  def nbytes(self, codes, k, n):
    rows, blocks, _, stored = self._sizes(k, n)
    flagged = int(self.flagged(codes).sum())
    total = _bits.nbytes(rows * stored * self.micro_block, self.bits)
    total += rows * blocks + _bits.nbytes(rows * stored, 1) + flagged
    if self.pruned:
      return total + _bits.nbytes(flagged * self.permutation_bits, 1)
    total += _bits.nbytes(flagged * self.micro_block, 1)
    return total + _bits.nbytes(self._outliers(codes), self.bits)

  def paper_bits(self, codes, k, n):
    flagged = int(self.flagged(codes).sum())
    if self.pruned:
      extra = flagged * (self.permutation_bits + 8)
    else:
      extra = flagged * 8 + self._outliers(codes) * self.bits
    return float(self.bits * k * n + extra)

  def _roles(self, codes):
    """By element: whether an outlier, whether the slot of a lower half; and
    of upper halves the slot of the lower one. [r, c block] each."""
    element = codes['element']
    rows = element.shape[0]
    if not self.pruned:
      outlier = codes['outlier']
      return outlier, jnp.zeros_like(outlier), None
    if 'roles' in codes:  # settled
      outlier, lower = codes['roles']
      return outlier, lower, None
    index = jnp.arange(self.micro_block, dtype=jnp.uint8)[None, None, None]
    used = (codes['upper'] != codes['lower'])[..., None]
    is_upper = used & (codes['upper'][..., None] == index)
    is_lower = used & (codes['lower'][..., None] == index)
    flat = lambda mask: jnp.any(mask, axis=2).reshape(rows, -1)
    return flat(is_upper), flat(is_lower), (is_upper, is_lower)

  def _grids(self, codes, negative):
    """Of [r, c block], all inliers; and all outliers, of these signs."""

    def step(exponent, width, by=0):
      exponent = exponent.astype(jnp.int32) - by
      step = formats.ldexp(jnp.float32(1.0), exponent)
      return jnp.repeat(step, width, axis=1)

    most = float((1 << (self.bits - 1)) - 1)
    near, far = float(1 << self.bits), float((2 << self.bits) - 1)
    return (
      _base.Grid(step(codes['isf'], self.block), -most, most),
      _base.Grid(
        step(codes['osf'], self.micro_block, self.bits),
        jnp.where(negative, -far, near),
        jnp.where(negative, -near, far),
      ),
    )

  def _grid(self, codes):
    """The grid of [r, c block], outliers with the signs they have."""
    outlier, lower, _ = self._roles(codes)
    negative = codes['element'].astype(jnp.int32) >> (self.bits - 1) > 0
    inlier, wide = self._grids(codes, negative)
    pick = lambda a, b: jnp.where(outlier, b, jnp.where(lower, 0.0, a))
    return _base.Grid(
      jnp.where(outlier, wide.step, inlier.step),
      pick(inlier.low, wide.low),
      pick(inlier.high, wide.high),
    )

  def _rowwise(self, values, k, n):
    """A matrix as rows of whole blocks, padded with zeros."""
    rows = values if self.axis == 'out' else values.T
    extra = self._sizes(k, n)[1] * self.block - rows.shape[1]
    return jnp.pad(rows, ((0, 0), (0, extra)))

  def _matrix(self, rows, k, n):
    return rows[:, :n] if self.axis == 'out' else rows[:, :k].T

  def place(self, codes, values, k, n):
    return values

  def relax(self, codes, target, k, n, hard=True, shares=None):
    rows = self._rowwise(target, k, n)
    value = self._grid(codes).relax(rows, hard)
    if shares:
      found = self._suppose(codes, rows)
      for name, share in shares.items():
        share = jnp.repeat(share, value.shape[1] // share.shape[2], axis=2)
        value += _base.lean(share, found[name])
    return self._matrix(value, k, n)

  def _suppose(self, codes, rows):
    """Values [3, r, c block] under the options of each choice, by its name."""
    outlier, lower, _ = self._roles(codes)
    grids = lambda name: [
      self._grids(self._moved(codes, {name: by}), rows < 0) for by in _MOVES
    ]
    wide = jnp.stack([grid.relax(rows) for _, grid in grids('osf')])
    inlier = jnp.stack([grid.relax(rows) for grid, _ in grids('isf')])
    pick = lambda a, b: jnp.where(
      lower[None], 0.0, jnp.where(outlier[None], b, a)
    )
    now = _MOVES.index(0)
    found = {'isf': pick(inlier, wide[now : now + 1])}
    found['osf'] = pick(inlier[now : now + 1], wide)
    if self.pruned:
      found['role'] = jnp.stack([inlier[now], wide[now], jnp.zeros_like(rows)])
    return found

  def _moved(self, codes, moves):
    """Exponents moved, as far as their bytes can hold them."""
    isf, osf = (codes[name].astype(jnp.int32) for name in ('isf', 'osf'))
    isf = jnp.clip(isf + moves.get('isf', 0), -120, 120)
    low, high = steps.outlier_exponent_range(self.bits)
    shift = 0
    if self.prescale:
      shift = jnp.repeat(isf, self.block // self.micro_block, axis=1)
    wide = jnp.clip(osf + moves.get('osf', 0), low - shift, high - shift)
    wide = jnp.clip(wide, -120, 120)
    return codes | {
      'isf': isf.astype(jnp.int8),
      'osf': jnp.where(self._count(codes) > 0, wide, osf).astype(jnp.int8),
    }

  def _count(self, codes):
    """Outliers of each micro-block. i32[r, u]."""
    if self.pruned:
      found = codes['upper'] != codes['lower']
    else:
      found = codes['outlier'].reshape(*codes['osf'].shape, self.micro_block)
    return jnp.sum(found, axis=-1, dtype=jnp.int32)

  def choices(self, codes, target, k, n):
    """'isf' and 'osf' a power of two less, as they are, or more; pruned also
    the 'role' of each element: inlier, outlier, or room for half of one."""
    rows = self._rowwise(target, k, n)
    step = self._grid(codes).step
    step = jnp.where(step > 0, step, 1.0)
    one = jnp.array(_MOVES)[:, None, None] == 0
    found = {}
    for name, values in self._suppose(codes, rows).items():
      if name == 'role':
        outlier, lower, _ = self._roles(codes)
        now = jnp.stack([~(outlier | lower), outlier, lower])
        width = 1
      else:
        now = jnp.broadcast_to(one, (len(_MOVES), *codes[name].shape))
        width = rows.shape[1] // codes[name].shape[1]
      error = ((values - rows[None]) / step[None]) ** 2
      error = jnp.mean(error.reshape(*error.shape[:2], -1, width), axis=-1)
      found[name] = _base.Choice(now.astype(jnp.float32), error)
    return found

  def settle(self, codes, logits, target, k, n):
    moves = {
      name: jnp.array(_MOVES)[jnp.argmax(logits[name], axis=0)]
      for name in ('isf', 'osf')
      if name in logits
    }
    if moves:
      codes = self._moved(codes, moves)
    if 'role' not in logits:
      return codes
    rows = self._rowwise(target, k, n)
    count = self._count(codes)
    logit = logits['role'].reshape(3, *count.shape, self.micro_block)
    outlier = _most(logit[1] - logit[0], count)
    pruned = _most(jnp.where(outlier, -jnp.inf, logit[2] - logit[0]), count)
    negative = jnp.where(outlier.reshape(rows.shape), rows < 0, False)
    upper, lower = jax.vmap(jax.vmap(steps.pair_slots))(outlier, pruned)
    sign = negative.astype(jnp.uint8) << (self.bits - 1)
    flat = lambda x: x.reshape(rows.shape)
    return codes | {
      'element': sign,
      'upper': upper,
      'lower': lower,
      'roles': (flat(outlier), flat(pruned)),
    }

  def recode(self, codes, target, k, n):
    codes = {name: x for name, x in codes.items() if name != 'roles'}
    outlier, _, pairs = self._roles(codes)
    level = self._grid(codes).level(self._rowwise(target, k, n))
    level = level.astype(jnp.int32)
    negative, magnitude = level < 0, jnp.abs(level)
    mantissa = magnitude - (1 << self.bits)
    magnitude = jnp.where(outlier, mantissa, magnitude)
    if not self.pruned:
      element, low = steps.split_unpruned(
        negative, magnitude, outlier, self.bits
      )
      return codes | {'element': element, 'low': low}
    half = self.bits // 2
    split = lambda x: x.reshape(*codes['upper'].shape[:2], 1, self.micro_block)
    is_upper, is_lower = pairs
    take = lambda x: jnp.sum(jnp.where(is_upper, split(x), 0), -1)[..., None]
    give = lambda x: jnp.sum(jnp.where(is_lower, x, 0), axis=2)
    lower = is_lower.any(axis=2)
    flat = lambda x: x.reshape(level.shape)
    low_bits = flat(give(take(magnitude & ((1 << half) - 1))))
    low_sign = flat(give(take(negative.astype(jnp.int32)))) > 0
    magnitude = jnp.where(outlier, magnitude >> half, magnitude)
    magnitude = jnp.where(flat(lower), low_bits, magnitude)
    negative = jnp.where(flat(lower), low_sign, negative)
    element = steps.sign_magnitude(negative, magnitude, self.bits)
    return codes | {'element': element}

  def spacing(self, codes, k, n):
    return self._matrix(self._grid(codes).step, k, n)

  def learned(self, codes):
    return ()
