"""Another layout, of a matrix whose inputs were rotated."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from mq_jax import rotations
from mq_jax.layouts import _bits


@dataclasses.dataclass(frozen=True)
class Rotated:
  """R^T W of a matrix W, R a rotation of runs of `features` inputs.

  Decodes to W. The signs of the rotation, `input_sign` bool[features], are
  stored and counted, a bit each.
  """

  inner: Any
  features: int

  def decode(self, codes, k, n):
    codes = dict(codes)
    signs = codes.pop('input_sign')
    return rotations.unrotate(self.inner.decode(codes, k, n), signs, axis=0)

  def pack(self, codes, k, n):
    codes = dict(codes)
    signs = _bits.pack_bits(np.asarray(codes.pop('input_sign')), 1)
    return {**self.inner.pack(codes, k, n), 'input_sign': signs}

  def unpack(self, buffers, k, n):
    buffers = dict(buffers)
    raw = buffers.pop('input_sign')
    signs = _bits.unpack_bits(raw, 1, (self.features,)).astype(bool)
    inner = self.inner.unpack(buffers, k, n)
    return {**inner, 'input_sign': jnp.asarray(signs)}

  def nbytes(self, codes, k, n):
    return self.inner.nbytes(codes, k, n) + _bits.nbytes(self.features, 1)

  def paper_bits(self, codes, k, n):
    return self.inner.paper_bits(codes, k, n)
