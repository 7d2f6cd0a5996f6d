"""Another layout with one float16 scale per input in front."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from mq_jax.layouts import _base


@dataclasses.dataclass(frozen=True)
class InputScaled:
  """The matrix divided by `input_scale` f16[k], row by row.

  Stored and counted, although a model may fold such scales into what feeds
  the layer; papers count them as nothing.
  """

  inner: Any

  def decode(self, codes, k, n):
    codes = dict(codes)
    scale = codes.pop('input_scale').astype(jnp.float32)
    return self.inner.decode(codes, k, n) / scale[:, None]

  def pack(self, codes, k, n):
    codes = dict(codes)
    scale = _base.as_bytes(codes.pop('input_scale'), np.float16)
    return {**self.inner.pack(codes, k, n), 'input_scale': scale}

  def unpack(self, buffers, k, n):
    buffers = dict(buffers)
    raw = buffers.pop('input_scale')
    scale = jnp.asarray(_base.from_bytes(raw, np.float16, (k,)))
    return {**self.inner.unpack(buffers, k, n), 'input_scale': scale}

  def nbytes(self, codes, k, n):
    return self.inner.nbytes(codes, k, n) + 2 * k

  def paper_bits(self, codes, k, n):
    return self.inner.paper_bits(codes, k, n)

  def _split(self, codes):
    """The other codes, and the scales."""
    codes = dict(codes)
    return codes, codes.pop('input_scale').astype(jnp.float32)[:, None]

  def place(self, codes, values, k, n):
    inner, scale = self._split(codes)
    return self.inner.place(inner, values * scale, k, n)

  def relax(self, codes, target, k, n, hard=True, shares=None):
    inner, scale = self._split(codes)
    return self.inner.relax(inner, target, k, n, hard, shares) / scale

  def choices(self, codes, target, k, n):
    inner, _ = self._split(codes)
    return _base.choices(self.inner, inner, target, k, n)

  def settle(self, codes, logits, target, k, n):
    inner, _ = self._split(codes)
    return codes | _base.settle(self.inner, inner, logits, target, k, n)

  def recode(self, codes, target, k, n):
    inner, _ = self._split(codes)
    return codes | self.inner.recode(inner, target, k, n)

  def spacing(self, codes, k, n):
    return self.inner.spacing(self._split(codes)[0], k, n)

  def learned(self, codes):
    return (*self.inner.learned(self._split(codes)[0]), 'input_scale')
