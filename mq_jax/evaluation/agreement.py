"""How far a language model's predictions are from those of another."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax.evaluation import perplexity, predictions
from mq_jax.evaluation.perplexity import Apply


class Agreement(NamedTuple):
  """How a model's predictions compare with a reference's.

  Attributes:
    scores: Of the model itself on the text.
    reference: Of the reference on the text.
    divergence: Mean Kullback-Leibler divergence from the reference, nats a
      token.
    top1: Share of tokens for which both would choose the same next one.
    divergence_error: Standard error of `divergence`, from that between
      windows; None of one window.
    top1_error: The same of `top1`.
  """

  scores: perplexity.Scores
  reference: perplexity.Scores
  divergence: float
  top1: float
  divergence_error: float | None
  top1_error: float | None


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sums(
  apply: Apply,
  reference: Apply,
  params: Any,
  wanted_params: Any,
  windows: jax.Array,
  counted: jax.Array,
) -> jax.Array:
  """Sums over the tokens of each window. f32[w, 4].

  Of the negative log likelihood of both, the divergence, and agreement.
  """
  inputs, targets = windows[:, :-1], windows[:, 1:]
  log_softmax = lambda x: jax.nn.log_softmax(x.astype(jnp.float32))
  found = log_softmax(apply(params, inputs))
  wanted = log_softmax(reference(wanted_params, inputs))
  same = jnp.argmax(found, axis=-1) == jnp.argmax(wanted, axis=-1)
  each = (
    predictions.nll_per_token(found, targets),
    predictions.nll_per_token(wanted, targets),
    predictions.divergence_per_token(found, wanted),
    same.astype(jnp.float32),
  )
  return jnp.stack([x.sum(axis=-1, where=counted) for x in each], axis=-1)


def compare(
  apply: Apply,
  params: Any,
  reference: Apply,
  reference_params: Any,
  windows: np.ndarray,
  *,
  batch: int = 16,
  n_bytes: int | None = None,
  counted: np.ndarray | None = None,
  progress: Callable[[int, int], None] | None = None,
) -> Agreement:
  """Compare the predictions of two models on windows, in one pass of each.

  Args:
    apply: The model, e.g. a quantized one.
    params: Its parameters.
    reference: What it is judged by, of the same vocabulary; often the same
      function.
    reference_params: Its parameters.
    windows: As in `perplexity.evaluate`.
    batch: Windows at a time, at most (see `perplexity.fitting`); it
      changes rounding only.
    n_bytes: Length of the predicted text, for bits per byte.
    counted: As in `perplexity.evaluate`.
    progress: Called with the windows done and their total after each batch.

  Returns:
    The comparison; sums as in `perplexity.evaluate`.

  Raises:
    ValueError: as `perplexity.evaluate`, or if the vocabularies differ.
  """
  counted = perplexity.checked(windows, counted, batch)
  probe = jax.ShapeDtypeStruct((1, 2), np.int32)
  sizes = [
    jax.eval_shape(f, p, probe).shape[-1]
    for f, p in ((apply, params), (reference, reference_params))
  ]
  if sizes[0] != sizes[1]:
    raise ValueError(
      f'the model predicts {sizes[0]} tokens, the reference {sizes[1]}; '
      'predictions of different vocabularies can not be compared'
    )
  one = lambda *batch: _sums(apply, reference, params, reference_params, *batch)
  batch = perplexity.fitting(batch, counted.shape[1], params)
  sums = perplexity.in_batches(one, windows, counted, batch, progress)
  each = counted.sum(axis=-1)
  tokens = int(each.sum())
  nll, wanted_nll, divergence, same = (math.fsum(x) for x in sums.T)
  return Agreement(
    scores=perplexity.scores(nll, tokens, n_bytes),
    reference=perplexity.scores(wanted_nll, tokens, n_bytes),
    # Rounding can leave a hair less than nothing.
    divergence=max(divergence / tokens, 0.0),
    top1=same / tokens,
    divergence_error=_error(sums[:, 2], each),
    top1_error=_error(sums[:, 3], each),
  )


def _error(sums: np.ndarray, counts: np.ndarray) -> float | None:
  """Standard error of sum(sums) / sum(counts), windows being independent.

  That of a ratio of sums, to first order in what the windows differ by.
  """
  n = len(sums)
  if n < 2:
    return None
  rest = sums - sums.sum() / counts.sum() * counts
  return float(np.sqrt(n / (n - 1) * np.sum(rest**2)) / counts.sum())
