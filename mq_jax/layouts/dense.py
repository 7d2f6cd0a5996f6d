"""Unquantized storage."""

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from mq_jax.layouts import _base


@dataclasses.dataclass(frozen=True)
class Dense:
  """bfloat16, 16 bits a weight. Codes: `value` bf16[k, n]."""

  def decode(self, codes, k, n):
    return codes['value'].astype(jnp.float32)

  def pack(self, codes, k, n):
    value = np.asarray(codes['value']).astype(ml_dtypes.bfloat16)
    return {'value': _base.as_bytes(value.view(np.uint16), np.uint16)}

  def unpack(self, buffers, k, n):
    raw = _base.from_bytes(buffers['value'], np.uint16, (k, n))
    return {'value': jnp.asarray(raw.view(ml_dtypes.bfloat16))}

  def nbytes(self, codes, k, n):
    return 2 * k * n

  def paper_bits(self, codes, k, n):
    return 16.0 * k * n

  def place(self, codes, values, k, n):
    return values

  def relax(self, codes, target, k, n, hard=True, shares=None):
    del shares  # nothing to choose
    return _base.through(_rounded(target), target) if hard else target

  def recode(self, codes, target, k, n):
    return {'value': target.astype(jnp.bfloat16)}

  def spacing(self, codes, k, n):
    # 8 significant bits.
    return jnp.abs(codes['value'].astype(jnp.float32)) / 128

  def learned(self, codes):
    return ()


def _rounded(x):
  return x.astype(jnp.bfloat16).astype(jnp.float32)
