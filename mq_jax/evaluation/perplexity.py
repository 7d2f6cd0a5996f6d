"""How well a language model predicts a text."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from mq_jax import sharding
from mq_jax.data import text as text_data


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


class TextWindows(NamedTuple):
  """Windows of a text, and how much text their predicted tokens stand for.

  Attributes:
    tokens: Windows; the first token of each is context only. i32[w, t + 1].
    n_bytes: UTF-8 bytes of the text that tokens 1..t of all windows make up.
  """

  tokens: np.ndarray
  n_bytes: int


def text_windows(
  tokenizer: tokenizers.Tokenizer,
  text: str,
  length: int,
  bos: int | None,
  limit: int | None = None,
) -> TextWindows:
  """Cut a text into windows to evaluate on.

  Args:
    tokenizer: From text to tokens; its special tokens are not added.
    text: The text.
    length: Tokens predicted by a window, >= 1.
    bos: Token put before each window; None takes the preceding one instead.
    limit: Use the first `limit` windows only.

  Returns:
    The windows and the bytes their predicted tokens stand for. A character
    split into several tokens counts with the last of them.

  Raises:
    ValueError: if the text is shorter than one window, or `length` or
      `limit` is less than 1.
  """
  if length < 1 or (limit is not None and limit < 1):
    raise ValueError(f'length={length} and limit={limit} must be at least 1')
  encoding = tokenizer.encode(text, add_special_tokens=False)
  tokens = text_data.windows(
    np.asarray(encoding.ids, np.int32), length, bos=bos
  )[:limit]
  first = 0 if bos is not None else 1  # without bos, token 0 is context only
  last = first + tokens.shape[0] * length
  begin, end = (_characters(encoding.offsets, i) for i in (first, last))
  return TextWindows(tokens, len(text[begin:end].encode('utf-8')))


def _characters(offsets: list[tuple[int, int]], count: int) -> int:
  """Characters of the text that the first `count` tokens complete."""
  if count == 0:
    return 0
  end = offsets[count - 1][1]
  # Tokens that share a character all span it: it is not complete before the
  # last of them.
  return end if count == len(offsets) else min(end, offsets[count][0])


def nll_per_token(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Negative log likelihood of each target, in nats.

  Args:
    logits: Of any float type; computed in float32. Shape [..., v].
    targets: Tokens; NaN is returned for those outside the vocabulary, which
      plain indexing would clamp in silence. Shape [...].

  Returns:
    f32[...].

  Examples:
    >>> nll_per_token(jnp.zeros((1, 4)), jnp.array([2])).round(3)
    Array([1.386], dtype=float32)
  """
  logits = logits.astype(jnp.float32)
  chosen = jnp.take_along_axis(
    logits, targets[..., None], axis=-1, mode='fill', fill_value=jnp.nan
  )[..., 0]
  return jax.nn.logsumexp(logits, axis=-1) - chosen


@functools.partial(jax.jit, static_argnums=0)
def _window_nll(
  apply: Callable[[Any, jax.Array], jax.Array], params: Any, windows: jax.Array
) -> jax.Array:
  """Sum over the tokens of each window. f32[w]."""
  logits = apply(params, windows[:, :-1])
  return nll_per_token(logits, windows[:, 1:]).sum(axis=-1)


def evaluate(
  apply: Callable[[Any, jax.Array], jax.Array],
  params: Any,
  windows: np.ndarray,
  *,
  batch: int = 16,
  n_bytes: int | None = None,
  progress: Callable[[int, int], None] | None = None,
) -> Scores:
  """Score a language model on windows of tokens.

  Compiled once for an `apply` and the shapes of parameters and windows: pass
  the same function object, not a new lambda, to evaluate further parameters.

  Args:
    apply: `(params, tokens i32[b, t]) -> logits [b, t, v]`.
    params: Any tree of arrays.
    windows: Tokens; each window predicts all but its first. i32[w, t + 1].
    batch: Windows at a time; it does not change the result.
    n_bytes: Length of the predicted text, for bits per byte.
    progress: Called with the windows done and their total after each batch.

  Returns:
    The scores. Sums of a window are taken in float32, over windows in
    float64. A token outside the vocabulary makes them NaN.

  Raises:
    ValueError: if there is nothing to predict, or windows are not whole
      numbers from 0, or `batch` is less than 1.
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
  if batch < 1 or (n_bytes is not None and n_bytes < 1):
    raise ValueError(f'batch={batch} and n_bytes={n_bytes} must be positive')
  count, width = windows.shape
  batch = min(batch, count)
  sums = []
  for start in range(0, count, batch):
    chunk = windows[start : start + batch].astype(np.int32)
    # The last batch is filled up: one shape, so one compilation.
    padded = np.zeros((batch, width), np.int32)
    padded[: len(chunk)] = chunk
    value = _window_nll(apply, params, padded)
    sums.append(sharding.to_host(value).astype(np.float64)[: len(chunk)])
    if progress is not None:
      progress(start + len(chunk), count)
  tokens = count * (width - 1)
  total = math.fsum(np.concatenate(sums))
  nll = total / tokens
  return Scores(
    nll=nll,
    perplexity=math.exp(nll) if not nll > 709 else math.inf,
    bits_per_byte=total / (math.log(2) * n_bytes) if n_bytes else None,
    tokens=tokens,
    bytes=n_bytes,
  )
