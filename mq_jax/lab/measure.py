"""What is done to a model in a row: texts cut, statistics, quality."""

import collections
import dataclasses
import hashlib
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from mq_jax.compensation import Status
from mq_jax.data import docs
from mq_jax.data import text as text_data
from mq_jax.evaluation import perplexity
from mq_jax.lab import opening
from mq_jax.quantize import QuantizedMatrix

# A window is the model's context, but no longer than this: beyond it one
# window costs minutes on a CPU and says little about a quantizer.
LONGEST = 2048

# Of the docs corpus; some 250 k tokens of the reference model.
_CALIBRATION_CHARACTERS = 1_000_000


class Text(NamedTuple):
  """A text and what identifies it in a run's records."""

  content: str
  source: str
  sha256: str


def evaluation_text(path: str | None) -> Text:
  """A text file, or the docs corpus' test split for None."""
  content = (
    docs.docs_text('test') if path is None else text_data.read_text(path)
  )
  return _text(content, path or 'docs corpus, test')


def calibration_text(path: str | None) -> Text:
  """A text file, or the beginning of the docs corpus' train split."""
  if path is None:
    content = docs.docs_text('train', _CALIBRATION_CHARACTERS)
  else:
    content = text_data.read_text(path)
  return _text(content, path or 'docs corpus, train')


def _text(content: str, source: str) -> Text:
  return Text(content, source, hashlib.sha256(content.encode()).hexdigest())


def windows(
  model: opening.LanguageModel, text: Text, limit: int | None = None
) -> perplexity.TextWindows:
  """A text as windows of the model's context length, each begun by its bos.

  Raises:
    ValueError: if the model has no tokenizer, or the text is shorter than
      one window; names model and text.
  """
  if model.tokenizer is None:
    raise ValueError(
      f'{model.name}: has no tokenizer.json, so it reads no text'
    )
  length = min(model.config.max_position_embeddings, LONGEST)
  try:
    return perplexity.text_windows(
      model.tokenizer, text.content, length, model.bos, limit
    )
  except ValueError as error:
    raise ValueError(f'{text.source}: {error}') from error


def calibration_batches(
  model: opening.LanguageModel, text: Text, count: int, batch: int, seed: int
) -> list[np.ndarray]:
  """Batches of input tokens i32[batch, t] from windows drawn by the seed."""
  found = windows(model, text).tokens
  order = np.random.default_rng(seed).permutation(len(found))
  chosen = found[np.sort(order[:count]), :-1]
  batch = min(batch, len(chosen))
  # Whole batches only: one shape is one compilation.
  whole = len(chosen) - len(chosen) % batch
  return [chosen[i : i + batch] for i in range(0, whole, batch)]


def scores(
  model: opening.LanguageModel,
  params: Any,
  text: perplexity.TextWindows,
  batch: int,
  progress: Any = None,
) -> dict[str, Any]:
  """How well `params`, packed or plain, predict the text.

  Packed matrices are decoded first, always by the same program, so that an
  artifact read back gives the same numbers as the model it was written from.

  Returns:
    `nll` (nats per token), `perplexity`, `bits_per_byte`, `tokens`, `bytes`.

  Raises:
    ValueError: if the numbers are not finite.
  """
  found = perplexity.evaluate(
    model.apply,
    plain(params),
    text.tokens,
    batch=batch,
    n_bytes=text.n_bytes,
    progress=progress,
  )
  if not (math.isfinite(found.nll) and math.isfinite(found.perplexity)):
    raise ValueError(
      f'{model.name}: nll is {found.nll}, perplexity {found.perplexity}: the '
      'model predicts nothing any more'
    )
  return found._asdict()


@jax.jit
def _decode(matrix: QuantizedMatrix) -> jax.Array:
  return matrix.dequantize()


def plain(params: Any) -> Any:
  """Plain arrays in place of packed matrices, as `plans.dequantize` gives.

  Compiled once for each layout and shape. One program for a whole model would
  take longer to compile than all else in a row; op by op it would take longer
  to run.
  """

  def one(leaf):
    if not isinstance(leaf, QuantizedMatrix):
      return leaf
    # What only names the matrix would make each a program of its own.
    bare = dataclasses.replace(leaf, record={}, site=None, recipe='')
    values = _decode(bare)
    return values if leaf.site is None else leaf.site.unmatrix(values)

  is_matrix = lambda leaf: isinstance(leaf, QuantizedMatrix)
  return jax.tree.map(one, params, is_leaf=is_matrix)


def status_of(records: list[dict[str, Any]]) -> str:
  """One sentence from the sites' statuses: 'ok', or how many were not."""
  counts = collections.Counter(r['status'] for r in records)
  notes = [
    f'{count} of {len(records)} sites {name} ({Status[name].sentence})'
    for name, count in counts.items()
    if Status[name] != Status.ok
  ]
  return 'ok' if not notes else 'ok: ' + '; '.join(notes)
