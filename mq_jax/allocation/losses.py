"""Losses to allocate by: what quantization does to a model's predictions.

They give the same function object for the same `apply`, so that what is
compiled for it stays compiled.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mq_jax.allocation._blocks import Loss
from mq_jax.evaluation import predictions

# (params, inputs) -> logits [..., classes]
Apply = Callable[[Any, jax.Array], jax.Array]


class Reference(NamedTuple):
  """Inputs, and what the unquantized model predicts from them.

  Attributes:
    inputs: As the model takes them; for `reference`, [b, ...] batches.
    log_probs: Of all classes. f16[..., classes].
  """

  inputs: jax.Array
  log_probs: jax.Array


def reference(apply: Apply, params: Any, inputs: jax.Array) -> Reference:
  """Predictions of the unquantized model for batches of inputs [b, ...].

  They take two bytes a class: `b` batches of 512 tokens and a vocabulary of
  32,000 take 33 MB each.
  """
  one = jax.jit(lambda params, x: _log_probs(apply, params, x))
  each = [one(params, x).astype(jnp.float16) for x in inputs]
  return Reference(jnp.asarray(inputs), jnp.stack(each))


def _log_probs(apply, params, inputs):
  return jax.nn.log_softmax(apply(params, inputs).astype(jnp.float32))


@functools.cache
def divergence(apply: Apply) -> Loss:
  """Kullback-Leibler divergence from the unquantized model, nats a prediction.

  The expectation of the rise of the loss over targets that the unquantized
  model itself would draw: unlike the rise on the targets of a text, it has no
  noise of targets, and never rewards an error.

  Args:
    apply: (params, inputs) -> logits.

  Returns:
    (params, one batch of a `Reference`) -> scalar.
  """

  def loss(params, batch):
    log_probs = _log_probs(apply, params, batch.inputs)
    return _divergence(log_probs, batch.log_probs)

  return loss


def _divergence(log_probs, wanted):
  return jnp.mean(predictions.divergence_per_token(log_probs, wanted))


@functools.cache
def next_token(apply: Apply) -> Loss:
  """Mean negative log likelihood of a text, nats a token.

  Args:
    apply: (params, tokens i32[b, t]) -> logits [b, t, vocabulary].

  Returns:
    (params, windows i32[b, t + 1]) -> scalar.
  """

  def loss(params, windows):
    logits = apply(params, windows[:, :-1])
    return predictions.nll_per_token(logits, windows[:, 1:]).mean()

  return loss


@functools.cache
def both(apply: Apply) -> Loss:
  """`next_token` and `divergence` from one pass, to judge plans by.

  Args:
    apply: (params, tokens i32[b, t]) -> logits [b, t, vocabulary].

  Returns:
    (params, (one batch of a `Reference`, targets i32[b, t])) -> f32[2].
  """

  def loss(params, batch):
    source, targets = batch
    log_probs = _log_probs(apply, params, source.inputs)
    own = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)
    return jnp.stack([-own.mean(), _divergence(log_probs, source.log_probs)])

  return loss
