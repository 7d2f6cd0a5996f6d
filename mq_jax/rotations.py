"""Randomised Hadamard rotations of one axis, in blocks of powers of two.

R = D B: D holds random signs, B is block diagonal with the symmetric Hadamard
matrices of the powers of two that the length is a sum of, largest first (352 =
256 + 64 + 32). B is its own inverse, so x R is `rotate(x)`, and `unrotate`
undoes it. For y = x W, rotating the last axis of x and the first of W leaves
y as it was, while an outlier of x is spread over its whole block.

Source: QuaRot, arXiv 2404.00456, and ViDiT-Q, arXiv 2406.02540, for the use
(both from memory); blocks for other lengths are our choice.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def blocks_of(length: int) -> tuple[int, ...]:
  """The powers of two that `length` is a sum of, largest first.

  Examples:
    >>> blocks_of(352)
    (256, 64, 32)
  """
  bits = range(length.bit_length() - 1, -1, -1)
  return tuple(1 << bit for bit in bits if length >> bit & 1)


@functools.cache
def _matrix(size: int) -> np.ndarray:
  """Sylvester's Hadamard matrix f32[size, size], of 1 and -1."""
  matrix = np.ones((1, 1))
  while len(matrix) < size:
    matrix = np.block([[matrix, matrix], [matrix, -matrix]])
  return matrix.astype(np.float32)


def hadamard(x: jax.Array, axis: int = -1) -> jax.Array:
  """Multiply an axis by B; doing it twice changes nothing but rounding.

  Args:
    x: Any real float, computed in float32. Shape [..., length, ...].
    axis: Which axis.

  Returns:
    f32 of the shape of `x`.

  Raises:
    ValueError: for an axis of length 0.

  Examples:
    >>> hadamard(jnp.array([2.0, 0.0, 0.0, 0.0, 5.0]))
    Array([1., 1., 1., 1., 5.], dtype=float32)
  """
  x = jnp.moveaxis(jnp.asarray(x, jnp.float32), axis, -1)
  if not x.shape[-1]:
    raise ValueError(f'hadamard: axis {axis} of shape {x.shape} is empty')
  parts, start = [], 0
  for size in blocks_of(x.shape[-1]):
    part = x[..., start : start + size]
    parts.append(_one_block(part, size))
    start += size
  whole = jnp.concatenate(parts, -1) if len(parts) > 1 else parts[0]
  return jnp.moveaxis(whole, -1, axis)


def _one_block(x: jax.Array, size: int) -> jax.Array:
  # A Hadamard matrix is the Kronecker product of smaller ones: two products
  # with factors of about sqrt(size) in place of one with the whole.
  low = 1 << (size.bit_length() - 1) // 2
  high = size // low
  exact = jax.lax.Precision.HIGHEST
  y = x.reshape(*x.shape[:-1], high, low)
  y = jnp.matmul(y, jnp.asarray(_matrix(low)), precision=exact)
  y = jnp.einsum('...hl,hg->...gl', y, _matrix(high), precision=exact)
  return y.reshape(x.shape) * np.float32(1 / np.sqrt(size))


def draw_signs(seed: int, length: int) -> jax.Array:
  """True, for -1, with even odds; bool[length].

  They depend on seed and length alone: sites that read the same inputs share
  one rotation.
  """
  rng = np.random.default_rng([seed, length])  # on the host: nothing compiles
  return jnp.asarray(rng.integers(0, 2, length).astype(bool))


def _flip(x: jax.Array, signs: jax.Array, axis: int) -> jax.Array:
  shape = [1] * x.ndim
  shape[axis] = x.shape[axis]
  return jnp.where(signs.reshape(shape), -x, x)


def rotate(x: jax.Array, signs: jax.Array, axis: int = -1) -> jax.Array:
  """Multiply an axis by R^T, of the length of `signs`; f32.

  An axis of several times that length holds runs of it (taps of a
  convolution), each rotated alike.

  Args:
    x: Shape [..., r * length, ...].
    signs: bool[length], True for -1.
    axis: Which axis.
  """
  f = lambda x: hadamard(_flip(x, signs, -1))
  return _by_run(f, jnp.asarray(x, jnp.float32), signs, axis)


def unrotate(x: jax.Array, signs: jax.Array, axis: int = -1) -> jax.Array:
  """Undo `rotate`."""
  f = lambda x: _flip(hadamard(x), signs, -1)
  return _by_run(f, jnp.asarray(x, jnp.float32), signs, axis)


def _by_run(f, x, signs, axis):
  x = jnp.moveaxis(x, axis, -1)
  if x.shape[-1] % signs.shape[0]:
    raise ValueError(
      f'rotation of {signs.shape[0]} features: an axis of {x.shape[-1]} holds '
      'no whole number of them'
    )
  runs = x.reshape(*x.shape[:-1], -1, signs.shape[0])
  return jnp.moveaxis(f(runs).reshape(x.shape), -1, axis)
