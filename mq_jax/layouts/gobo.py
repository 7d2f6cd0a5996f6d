"""Dictionary indices with a sparse list of float32 outliers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax.layouts import _base, _bits


@dataclasses.dataclass(frozen=True)
class Gobo:
  """`bits` a weight into a table, and outliers as (position u32, value f32).

  Codes: `index` u8[k, n], `outlier` bool[k, n], `value` f32[k, n] (where
  outliers are), `centroids` f32[2^bits]. An outlier's index is stored too.

  `ebw_paper` leaves out the positions and the table: GOBO, arXiv 2005.03842,
  counts the index and 32 bits an outlier.
  """

  bits: int

  def decode(self, codes, k, n):
    table = codes['centroids'][codes['index'].astype(jnp.int32)]
    return jnp.where(codes['outlier'], codes['value'], table)

  def _positions(self, codes):
    return np.flatnonzero(np.asarray(codes['outlier']))

  def pack(self, codes, k, n):
    if k * n > 2**32:
      raise ValueError(f'Gobo: {k} x {n} weights exceed 32-bit positions')
    positions = self._positions(codes)
    values = np.asarray(codes['value']).reshape(-1)[positions]
    return {
      'index': _bits.pack_bits(np.asarray(codes['index']), self.bits),
      'position': _base.as_bytes(positions, np.uint32),
      'outlier': _base.as_bytes(values, np.float32),
      'centroids': _base.as_bytes(codes['centroids'], np.float32),
    }

  def unpack(self, buffers, k, n):
    count = buffers['position'].size // 4
    position = _base.from_bytes(buffers['position'], np.uint32, (count,))
    values = _base.from_bytes(buffers['outlier'], np.float32, (count,))
    if count and position.max() >= k * n:
      raise ValueError(
        f'Gobo: outlier position {position.max()} outside of {k} x {n}'
      )
    outlier, value = np.zeros(k * n, bool), np.zeros(k * n, np.float32)
    outlier[position], value[position] = True, values
    codes = {
      'index': _bits.unpack_bits(buffers['index'], self.bits, (k, n)),
      'outlier': outlier.reshape(k, n),
      'value': value.reshape(k, n),
      'centroids': _base.from_bytes(
        buffers['centroids'], np.float32, (2**self.bits,)
      ),
    }
    return {name: jnp.asarray(code) for name, code in codes.items()}

  def nbytes(self, codes, k, n):
    outliers = int(np.asarray(codes['outlier']).sum())
    return _bits.nbytes(k * n, self.bits) + 8 * outliers + 4 * 2**self.bits

  def paper_bits(self, codes, k, n):
    return self.bits * k * n + 32.0 * np.asarray(codes['outlier']).sum()

  def place(self, codes, values, k, n):
    return values

  def _index(self, codes, target):
    """The nearest entry of the table; outliers keep theirs."""
    order = jnp.argsort(codes['centroids'])
    ascending = codes['centroids'][order]
    middles = (ascending[1:] + ascending[:-1]) / 2
    nearest = order[jnp.searchsorted(middles, target)]
    return jnp.where(
      codes['outlier'], codes['index'].astype(nearest.dtype), nearest
    )

  def relax(self, codes, target, k, n, hard=True, shares=None):
    del shares  # nothing to choose
    # The entry follows its weights, and the weight passes as if unrounded.
    if not hard:
      ends = jnp.min(codes['centroids']), jnp.max(codes['centroids'])
      return jnp.where(codes['outlier'], target, jnp.clip(target, *ends))
    entry = codes['centroids'][self._index(codes, target)]
    through = entry + (target - jax.lax.stop_gradient(target))
    return jnp.where(codes['outlier'], target, through)

  def recode(self, codes, target, k, n):
    index = self._index(codes, target)
    return codes | {
      'index': index.astype(codes['index'].dtype),
      'value': jnp.where(codes['outlier'], target, codes['value']),
    }

  def spacing(self, codes, k, n):
    ascending = jnp.sort(codes['centroids'])
    gap = (ascending[-1] - ascending[0]) / (2**self.bits - 1)
    return jnp.broadcast_to(gap, (k, n))

  def learned(self, codes):
    return ('centroids',)
