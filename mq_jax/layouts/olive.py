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

  def decode(self, codes, k, n):
    code = codes['code'].astype(jnp.int32)
    code = code.reshape(-1, 2, n)
    victim_code = 1 << (self.bits - 1)
    victim = code == victim_code
    outlier = victim[:, ::-1]
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
