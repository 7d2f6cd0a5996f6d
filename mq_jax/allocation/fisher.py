"""The empirical Fisher matrix of a model's sites, and plain gradients."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax.allocation import _blocks
from mq_jax.allocation._blocks import Estimate, Leaves, Loss
from mq_jax.sites import Site


def _examples(batch: Any) -> int:
  shapes = [np.shape(x) for x in jax.tree.leaves(batch)]
  counts = {shape[0] if shape else None for shape in shapes}
  if len(counts) != 1 or None in counts or 0 in counts:
    raise ValueError(
      f'fisher: batch has arrays of shapes {shapes}; all need a first axis, '
      'of the same number of examples'
    )
  return counts.pop()


def _each_gradient(loss, params, sites):
  """Gradient of one example, given without the axis of examples."""
  f, leaves = _blocks.at_sites(loss, params, sites)
  slope = jax.grad(f)
  alone = lambda example: jax.tree.map(lambda x: x[None], example)
  return (lambda example: slope(leaves, alone(example))), leaves


@_blocks.compiled()
def fisher_diagonal(
  loss: Loss, params: Any, batch: Any, sites: Sequence[Site]
) -> Leaves:
  """Mean over examples of the squared gradient, weight by weight.

  The diagonal of the empirical Fisher matrix: labels are those of the data,
  not drawn from the model. An example is what the first axis of `batch`
  counts; for a loss that is the mean of t tokens, this is by about 1 / t
  less than over tokens.

  Args:
    loss: (params, batch) -> scalar, called with batches of one example.
    params: The model's parameters.
    batch: Arrays [e, ...].
    sites: Sites with a parameter.

  Returns:
    By the site's name, f32 of the parameter's shape.

  Raises:
    KeyError, ValueError: for sites without a parameter of their own, or
      batches without examples.
  """
  count = _examples(batch)
  gradient, leaves = _each_gradient(loss, params, sites)

  def add(total, example):
    new = gradient(example)
    return jax.tree.map(lambda x, g: x + g**2, total, new), None

  zero = jax.tree.map(jnp.zeros_like, leaves)
  total, _ = jax.lax.scan(add, zero, jax.tree.map(jnp.asarray, batch))
  return jax.tree.map(lambda x: x / count, total)


@_blocks.compiled()
def fisher_trace(
  loss: Loss, params: Any, batch: Any, sites: Sequence[Site]
) -> Estimate:
  """Sum of a site's `fisher_diagonal`, which is not kept.

  Args and errors are those of `fisher_diagonal`.

  Returns:
    Mean over examples of the squared norm of the gradient, in squared loss
    over squared weight; the errors are those of the choice of examples.
  """
  _examples(batch)
  gradient, leaves = _each_gradient(loss, params, sites)

  def sample(example):
    new = gradient(example)
    return _blocks.dots(new, new, leaves)

  return _blocks.estimate(jax.lax.map(sample, jax.tree.map(jnp.asarray, batch)))


@_blocks.compiled()
def site_gradient(
  loss: Loss, params: Any, batch: Any, sites: Sequence[Site]
) -> Leaves:
  """Gradient of the loss of a whole batch at the sites, by name."""
  f, leaves = _blocks.at_sites(loss, params, sites)
  return jax.grad(f)(leaves, batch)
