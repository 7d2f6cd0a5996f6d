"""Rounding, with or without gradients."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from mq_jax.formats._numbers import check_option

Rounding = Callable[[jax.Array], jax.Array]


@jax.custom_jvp
def _with_gradient_of(x, value):
  """`value`, with the gradient of `x`."""
  del x
  return value


@_with_gradient_of.defjvp
def _with_gradient_of_jvp(primals, tangents):
  return primals[1], tangents[0]


def round_nearest(x: jax.Array) -> jax.Array:
  """Round to the nearest integer, ties to even; the gradient is zero."""
  return jnp.round(x)


def round_straight_through(x: jax.Array) -> jax.Array:
  """Round as `round_nearest`; the surrogate gradient is the identity.

  Source:
    Bengio et al., arXiv 1308.3432, the straight-through estimator.

  Examples:
    >>> float(jax.grad(round_straight_through)(0.3))
    1.0
  """
  return _with_gradient_of(x, jnp.round(x))


def round_stochastic(key: jax.Array, x: jax.Array) -> jax.Array:
  """Round up with probability equal to the fraction, so without bias.

  The surrogate gradient is the identity, which is the gradient of the mean.

  Args:
    key: A JAX random key. Under `vmap` map over keys as well, or all blocks
      get the same noise.
    x: Values, any shape.

  Returns:
    An integer neighbour of `x`, with mean `x`. Same shape and dtype.
  """
  low = jnp.floor(x)
  up = jax.random.uniform(key, x.shape, x.dtype) < x - low
  # NaN must pass: `up` is False there and `low` is NaN.
  return _with_gradient_of(x, low + up.astype(x.dtype))


def rounder(
  mode: Literal['nearest', 'straight_through', 'stochastic'],
  key: jax.Array | None = None,
) -> Rounding:
  """Choose a rounding by name.

  Args:
    mode: 'nearest', 'straight_through' or 'stochastic'.
    key: Random key, needed by 'stochastic' and ignored by the others.

  Returns:
    A function from an array to its rounded values.

  Raises:
    ValueError: if the mode is unknown, or 'stochastic' has no key.

  Examples:
    >>> rounder('nearest')(jnp.array([0.5, 1.5, 2.6]))
    Array([0., 2., 3.], dtype=float32)
  """
  check_option('rounding', mode, ('nearest', 'straight_through', 'stochastic'))
  if mode == 'nearest':
    return round_nearest
  if mode == 'straight_through':
    return round_straight_through
  if key is None:
    raise ValueError("rounding 'stochastic' needs a key; pass key=...")
  return lambda x: round_stochastic(key, x)
