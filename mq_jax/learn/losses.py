"""Losses to learn by: how far outputs are from those of the original.

Each takes a function and gives the same object for the same one, so that what
is compiled for it stays compiled: `loss(params, (inputs, wanted)) -> scalar`,
the mean over examples, of which `wanted` holds the original's outputs
(`targets`). Distances are relative to the size of `wanted`: their figures mean
the same for all blocks.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mq_jax.evaluation import predictions

# (params, (inputs, wanted)) -> scalar
Loss = Callable[[Any, Any], jax.Array]

SMALL = 1e-12  # outputs of zero have no relative error


def targets(
  f: Callable[..., jax.Array],
  params: Any,
  inputs: tuple,
  dtype: Any = jnp.float32,
) -> jax.Array:
  """Outputs of the original for all examples, one at a time.

  Args:
    f: `f(params, *inputs)`.
    params: The original's.
    inputs: Tuple of arrays [e, ...].
    dtype: Of what is returned.

  Returns:
    Outputs [e, ...].
  """
  one = lambda example: f(params, *(x[None] for x in example))[0]
  return jax.lax.map(lambda x: one(x).astype(dtype), inputs)


def _distance(measure):
  """A loss of the difference, from how the size of one is measured."""

  @functools.cache
  def of(f: Callable[..., jax.Array]) -> Loss:
    def loss(params, examples):
      inputs, wanted = examples
      error = f(params, *inputs).astype(jnp.float32) - wanted
      return measure(error) / jnp.maximum(measure(wanted), SMALL)

    return loss

  return of


mse = _distance(lambda x: jnp.mean(x * x))
l1 = _distance(lambda x: jnp.mean(jnp.abs(x)))


@functools.cache
def cosine(f: Callable[..., jax.Array]) -> Loss:
  """One minus the cosine of the last axis, and its length's relative error."""

  def loss(params, examples):
    inputs, wanted = examples
    found = f(params, *inputs).astype(jnp.float32)
    square = lambda x: jnp.maximum(jnp.sum(x * x, axis=-1), SMALL)
    both = jnp.sqrt(square(found) * square(wanted))
    turned = 1.0 - jnp.sum(found * wanted, axis=-1) / both
    longer = jnp.sqrt(square(found) / square(wanted)) - 1.0
    return jnp.mean(turned + 0.5 * longer**2)

  return loss


@functools.cache
def divergence(f: Callable[..., jax.Array]) -> Loss:
  """Kullback-Leibler divergence of predictions, nats each, from logits."""

  def loss(params, examples):
    inputs, wanted = examples
    found = jax.nn.log_softmax(f(params, *inputs).astype(jnp.float32))
    wanted = jax.nn.log_softmax(wanted.astype(jnp.float32))
    each = predictions.divergence_per_token(found, wanted)
    return jnp.mean(each)

  return loss


LOSSES = {'mse': mse, 'l1': l1, 'cosine': cosine, 'divergence': divergence}
