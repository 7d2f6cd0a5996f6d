"""Caches driven token by token, and what they should do, in NumPy."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax import caches

SCALE = 0.25

# What tests compile runs for a moment only.
_QUICK = {
  'xla_backend_optimization_level': 0,
  'xla_llvm_disable_expensive_passes': True,
}
jit = functools.partial(jax.jit, compiler_options=_QUICK)


class Text(NamedTuple):
  """Queries [b, t, h, d], keys and values [b, t, g, d], positions [b, t]."""

  q: np.ndarray
  k: np.ndarray
  v: np.ndarray
  positions: np.ndarray


def text(seed=0, b=2, t=24, g=2, h=4, d=16):
  rng = np.random.default_rng(seed)
  draw = lambda heads: rng.normal(size=(b, t, heads, d)).astype(np.float32)
  positions = np.broadcast_to(np.arange(t, dtype=np.int32), (b, t))
  k = draw(g)
  k[..., 3] *= 8  # keys have channels that stand out
  return Text(draw(h), k, draw(g), positions)


def drive(policy, given, first, capacity, window=None, dtype='float32'):
  """Reads `first` tokens together and the others one by one.

  Returns, as NumPy arrays, what attention gave [b, t, h, d], the cache at the
  end, and of each step but the first, stacked, what the policy read before
  it: k, v, stored.
  """
  out = _drive(policy, given, first, capacity, window, dtype)
  return jax.tree.map(np.asarray, out)


@functools.partial(
  jit, static_argnames=('first', 'capacity', 'window', 'dtype')
)
def _drive(policy, given, first, capacity, window, dtype):
  return traced(policy, given, first, capacity, window, dtype)


def traced(policy, given, first, capacity, window=None, dtype='float32'):
  """`drive` for use in a program."""
  b, _, g, d = given.k.shape
  given = jax.tree.map(jnp.asarray, given)
  cache = policy.init(b, g, capacity, d, jnp.dtype(dtype))
  head = jax.tree.map(lambda x: x[:, :first], given)
  y0, cache = caches.attend(policy, cache, *head, window, SCALE, fresh=True)

  def step(cache, token):
    read = policy.read(cache)
    token = jax.tree.map(lambda x: x[:, None], token)
    y, cache = caches.attend(policy, cache, *token, window, SCALE)
    return cache, (y[:, 0], read)

  rest = jax.tree.map(lambda x: jnp.swapaxes(x[:, first:], 0, 1), given)
  cache, (ys, reads) = jax.lax.scan(step, cache, rest)
  return jnp.concatenate([y0, jnp.swapaxes(ys, 0, 1)], axis=1), cache, reads


def affine(x, bits, axis, group):
  """Round to 2^bits levels from minimum to maximum, f16 scale and minimum."""
  x = np.moveaxis(np.asarray(x, np.float32), axis, -1)
  shape = x.shape
  x = x.reshape(*shape[:-1], shape[-1] // group, group)
  low = x.min(-1, keepdims=True).astype(np.float16).astype(np.float32)
  one = np.float32(1)
  scale = (x - low).max(-1, keepdims=True) * (one / np.float32(2**bits - 1))
  scale = np.where(scale > 0, np.maximum(scale, 2.0**-24), 0)
  scale = scale.astype(np.float16).astype(np.float32)
  level = np.round((x - low) * (one / np.where(scale > 0, scale, one)))
  value = low + np.clip(level, 0, 2**bits - 1) * scale
  return np.moveaxis(value.reshape(shape), -1, axis)


def softmax_rows(q, k, visible):
  """Attention of one head: q [t, d], k [n, d], visible [t, n] -> f64[t, n]."""
  scores = SCALE * np.asarray(q, np.float64) @ np.asarray(k, np.float64).T
  scores = np.where(visible, scores, -np.inf)
  e = np.exp(scores - scores.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def attention(q, k, v, window=None):
  """Causal attention [b, t, h, d] of whole texts, in float64."""
  b, t, h, d = q.shape
  at = np.arange(t)
  visible = at[None] <= at[:, None]
  if window is not None:
    visible &= at[None] > at[:, None] - window
  out = np.zeros(q.shape)
  for i in range(b):
    for j in range(h):
      g = j // (h // k.shape[2])
      out[i, :, j] = softmax_rows(q[i, :, j], k[i, :, g], visible) @ v[i, :, g]
  return out
