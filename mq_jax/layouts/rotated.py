"""Another layout, of a matrix whose inputs were rotated."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from mq_jax import rotations
from mq_jax.layouts import _base, _bits


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

  def _split(self, codes):
    """The other codes, and the signs."""
    codes = dict(codes)
    return codes, codes.pop('input_sign')

  def place(self, codes, values, k, n):
    inner, signs = self._split(codes)
    return self.inner.place(
      inner, rotations.rotate(values, signs, axis=0), k, n
    )

  def relax(self, codes, target, k, n, hard=True, shares=None):
    inner, signs = self._split(codes)
    values = self.inner.relax(inner, target, k, n, hard, shares)
    return rotations.unrotate(values, signs, axis=0)

  def choices(self, codes, target, k, n):
    inner, _ = self._split(codes)
    return _base.choices(self.inner, inner, target, k, n)

  def settle(self, codes, logits, target, k, n):
    inner, _ = self._split(codes)
    return codes | _base.settle(self.inner, inner, logits, target, k, n)

  def recode(self, codes, target, k, n):
    return codes | self.inner.recode(self._split(codes)[0], target, k, n)

  def spacing(self, codes, k, n):
    return self.inner.spacing(self._split(codes)[0], k, n)

  def learned(self, codes):
    return self.inner.learned(self._split(codes)[0])
