"""How well a language model predicts a text."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from mq_jax import sharding
from mq_jax.evaluation import predictions

# Of a batch on a CPU. Of the reference model on two cores, one window of 256
# takes 220 us a token, four at once 270, eight 285.
_CPU_TOKENS = 256

# (params, tokens i32[b, t]) -> logits [b, t, v]
Apply = Callable[[Any, jax.Array], jax.Array]


class Scores(NamedTuple):
  """How well a text was predicted.

  Attributes:
    nll: Mean negative log likelihood of a token, in nats.
    perplexity: exp(nll); infinite where that overflows.
    bits_per_byte: Bits that the model needs for a byte of the text, which
      compares models with different vocabularies; None without `bytes`.
    tokens: Number of predicted tokens.
    bytes: Length of the predicted text in UTF-8; None if it was not given.
  """

  nll: float
  perplexity: float
  bits_per_byte: float | None
  tokens: int
  bytes: int | None


@functools.partial(jax.jit, static_argnums=0)
def window_nll(
  apply: Apply, params: Any, windows: jax.Array, counted: jax.Array
) -> jax.Array:
  """Negative log likelihood of each window, the sum over its counted tokens.

  Args:
    apply: The model.
    params: Its parameters.
    windows: Tokens. i32[w, t + 1].
    counted: Which of the tokens 1..t count. bool[w, t].

  Returns:
    f32[w].
  """
  logits = apply(params, windows[:, :-1])
  each = predictions.nll_per_token(logits, windows[:, 1:])
  return each.sum(axis=-1, where=counted)


def evaluate(
  apply: Apply,
  params: Any,
  windows: np.ndarray,
  *,
  batch: int = 16,
  n_bytes: int | None = None,
  counted: np.ndarray | None = None,
  progress: Callable[[int, int], None] | None = None,
) -> Scores:
  """Score a language model on windows of tokens.

  Compiled once for an `apply` and the shapes of parameters and windows: pass
  the same function object, not a new lambda, to evaluate further parameters.

  Args:
    apply: `(params, tokens i32[b, t]) -> logits [b, t, v]`.
    params: Any tree of arrays.
    windows: Tokens; each window predicts all but its first. i32[w, t + 1].
    batch: Windows at a time, at most (see `fitting`); it changes rounding only.
    n_bytes: Length of the predicted text, for bits per byte.
    counted: Which predicted tokens count; None for all. bool[w, t].
    progress: Called with the windows done and their total after each batch.

  Returns:
    The scores. Sums of a window are taken in float32, over windows in
    float64. A token outside the vocabulary makes them NaN.

  Raises:
    ValueError: if there is nothing to predict, or windows are not whole
      numbers from 0, or `counted` doesn't fit them, or `batch` is less than 1.
  """
  if n_bytes is not None and n_bytes < 1:
    raise ValueError(f'batch={batch} and n_bytes={n_bytes} must be positive')
  counted = checked(windows, counted, batch)
  batch = fitting(batch, counted.shape[1], params)
  one = lambda *batch: window_nll(apply, params, *batch)
  sums = in_batches(one, windows, counted, batch, progress)
  return scores(math.fsum(sums), int(counted.sum()), n_bytes)


def scores(total: float, tokens: int, n_bytes: int | None) -> Scores:
  """Scores of a text from the sum of its tokens' negative log likelihoods."""
  nll = total / tokens
  return Scores(
    nll=nll,
    perplexity=math.exp(nll) if not nll > 709 else math.inf,
    bits_per_byte=total / (math.log(2) * n_bytes) if n_bytes else None,
    tokens=tokens,
    bytes=n_bytes,
  )


def checked(
  windows: np.ndarray, counted: np.ndarray | None, batch: int
) -> np.ndarray:
  """Which tokens count, once all are found fit to be evaluated.

  Args:
    windows: i32[w, t + 1].
    counted: bool[w, t], or None for all.
    batch: Windows at a time.

  Returns:
    bool[w, t].

  Raises:
    ValueError: see `evaluate`.
  """
  windows = np.asarray(windows)
  if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
    raise ValueError(
      f'windows of shape {windows.shape} predict nothing; expected [w, t + 1]'
    )
  if not np.issubdtype(windows.dtype, np.integer) or windows.min() < 0:
    raise ValueError(
      f'windows must hold tokens >= 0, found {windows.dtype} from '
      f'{windows.min()}'
    )
  if batch < 1:
    raise ValueError(f'batch={batch} must be positive')
  shape = (windows.shape[0], windows.shape[1] - 1)
  if counted is None:
    return np.ones(shape, bool)
  counted = np.asarray(counted)
  if counted.shape != shape or counted.dtype != bool or not counted.any():
    raise ValueError(
      f'counted is {counted.dtype} of shape {counted.shape}, true '
      f'{np.count_nonzero(counted)} times; expected bool of shape {shape}, '
      'true somewhere'
    )
  return counted


def fitting(batch: int, length: int, params: Any) -> int:
  """Windows at a time that the machine likes, `batch` at most.

  A CPU is fastest while activations stay in its caches; a mesh needs whole
  batches to divide.

  Args:
    batch: Windows at a time that were asked for.
    length: Tokens of a window.
    params: Of the model, where they are.
  """
  arrays = [x for x in jax.tree.leaves(params) if isinstance(x, jax.Array)]
  divided = any(len(x.sharding.device_set) > 1 for x in arrays)
  if divided or jax.default_backend() != 'cpu':
    return batch
  return min(batch, max(1, _CPU_TOKENS // length))


def in_batches(
  one: Callable[[jax.Array, jax.Array], jax.Array],
  windows: np.ndarray,
  counted: np.ndarray,
  batch: int,
  progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
  """Sums over each window, a batch at a time.

  Args:
    one: (windows i32[batch, t + 1], counted bool[batch, t]) -> f32[batch, ...].
    windows: All windows. i32[w, t + 1].
    counted: Which tokens count. bool[w, t].
    batch: Windows at a time, at most.
    progress: Called with the windows done and their total after each batch.

  Returns:
    f64[w, ...].
  """
  done = []
  for size, chunk, mask in batches(windows, counted, batch):
    values = sharding.to_host(one(chunk, mask))
    done.append(values.astype(np.float64)[:size])
    if progress is not None:
      progress(sum(map(len, done)), len(windows))
  return np.concatenate(done)


def batches(
  windows: np.ndarray, counted: np.ndarray, batch: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
  """Batches, the last filled up: one shape, so one compilation.

  Yields:
    How many windows are real; windows i32[batch, t + 1]; which tokens count,
    bool[batch, t].
  """
  batch = min(batch, len(windows))
  for start in range(0, len(windows), batch):
    chunk, mask = (x[start : start + batch] for x in (windows, counted))
    fill = ((0, batch - len(chunk)), (0, 0))
    yield len(chunk), np.pad(chunk.astype(np.int32), fill), np.pad(mask, fill)
