"""What is done to a model in a row: texts cut, statistics, quality."""

import collections
import hashlib
import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mq_jax import generation, plans, streaming
from mq_jax.compensation import Status
from mq_jax.data import docs, wikitext
from mq_jax.data import text as text_data
from mq_jax.evaluation import agreement, choices, cuts, perplexity
from mq_jax.lab import opening

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
  """A text file, a folder of WikiText-2, or the docs corpus' test split.

  Args:
    path: The file or folder; None for the docs corpus. Of a folder, the raw
      test split of `data.wikitext`.
  """
  if path is None:
    content = docs.docs_text('test')
  elif pathlib.Path(path).is_dir():
    content = wikitext.test_text(path)
  else:
    content = text_data.read_text(path)
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


class Cut(NamedTuple):
  """How a text is cut into windows; `evaluation.cuts` says what that means.

  Attributes:
    field: As the field does it; otherwise each window is begun by the bos.
    stride: Tokens from window to window, of the field's.
    context: Tokens of a window; None for the model's context, at most
      `LONGEST`.
  """

  field: bool = False
  stride: int | None = None
  context: int | None = None


OURS = Cut()


def windows(
  model: opening.LanguageModel,
  text: Text,
  limit: int | None = None,
  cut: Cut = OURS,
) -> cuts.TextWindows:
  """A text as windows of the model's context length, each begun by its bos.

  Args:
    model: Its tokenizer and context count.
    text: The text.
    limit: Use the first `limit` windows only.
    cut: Another way to cut.

  Raises:
    ValueError: if the model has no tokenizer, or the text is shorter than
      one window, or a window longer than the context; names model and text.
  """
  if model.tokenizer is None:
    raise ValueError(
      f'{model.name}: has no tokenizer.json, so it reads no text'
    )
  length = _length(model, cut)
  try:
    if cut.field:
      return cuts.field_windows(
        model.tokenizer,
        cuts.field_text(text.content),
        length,
        stride=cut.stride,
        limit=limit,
      )
    return cuts.text_windows(
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


def generated_batches(
  model: opening.LanguageModel, count: int | None, like: np.ndarray, seed: int
) -> list[np.ndarray]:
  """Batches of windows that the model itself writes, sampled as it predicts.

  They need no text and no licence, and are as many as asked for: learning on
  few windows of text fits what is peculiar to them (LLM-QAT, arXiv 2305.17888,
  learns on nothing else).

  Args:
    model: Not quantized yet.
    count: Windows, made up to whole batches; None for none.
    like: A batch of calibration, of whose shape they are. i32[b, t].
    seed: Of what is drawn.

  Raises:
    ValueError: if the model has no token to begin with.
  """
  if not count:
    return []
  if model.bos is None:
    raise ValueError(
      f'{model.name}: has no token that begins a text, so it writes none; '
      'calibrate on a text alone'
    )
  batch, length = like.shape
  keys = jax.random.split(jax.random.key(seed), 1 + count // batch)
  one = lambda key: generation.generate(
    model.config,
    model.params,
    [[model.bos]] * batch,
    length - 1,
    sampling=generation.sampling(),
    key=key,
  )
  begin = np.full((batch, 1), model.bos, np.int32)
  return [
    np.concatenate([begin, np.asarray(one(key).tokens)], axis=1)
    for key in keys[: -(-count // batch)]
  ]


def scores(
  model: opening.LanguageModel,
  params: Any,
  text: cuts.TextWindows,
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
    *plans.runnable(model.apply, params),
    text.tokens,
    batch=batch,
    n_bytes=text.n_bytes,
    counted=text.counted,
    progress=progress,
  )
  _check_finite(model, found)
  return found._asdict()


def streamed_scores(
  model: Any,
  blocks: streaming.Blocks,
  text: cuts.TextWindows,
  batch: int,
  progress: Any = None,
) -> dict[str, Any]:
  """`scores`, with the weights of one block in memory.

  Args:
    model: Names it in errors.
    blocks: The model, packed or plain.
    text: What to predict.
    batch: Windows at a time.
    progress: Called with the blocks done and their number.
  """
  found = streaming.evaluate(
    blocks,
    text.tokens,
    batch=batch,
    n_bytes=text.n_bytes,
    counted=text.counted,
    progress=progress,
  )
  _check_finite(model, found)
  return found._asdict()


def compared(
  model: opening.LanguageModel,
  reference: opening.LanguageModel,
  text: cuts.TextWindows,
  batch: int,
) -> dict[str, Any]:
  """`scores` of a model beside those of a reference, by one pass of both.

  Returns:
    What `scores` does, and `reference_nll`, `reference_perplexity`, and of
    `agreement.Agreement` `divergence`, `top1` and their standard errors.

  Raises:
    ValueError: if their tokens are not the same, or numbers not finite.
  """
  names = f'{model.name} and {reference.name}'
  vocabularies = [
    None if m.tokenizer is None else m.tokenizer.get_vocab()
    for m in (model, reference)
  ]
  if None not in vocabularies and vocabularies[0] != vocabularies[1]:
    raise ValueError(f'{names}: their tokenizers have different tokens')
  try:
    found = agreement.compare(
      *plans.runnable(model.apply, model.params),
      *plans.runnable(reference.apply, reference.params),
      text.tokens,
      batch=batch,
      n_bytes=text.n_bytes,
      counted=text.counted,
    )
  except ValueError as error:
    raise ValueError(f'{names}: {error}') from error
  _check_finite(model, found.scores)
  _check_finite(reference, found.reference)
  rest = found._asdict()
  own, other = rest.pop('scores'), rest.pop('reference')
  return {
    **own._asdict(),
    'reference_nll': other.nll,
    'reference_perplexity': other.perplexity,
    **rest,
  }


def answered(
  model: opening.LanguageModel,
  questions: Sequence[choices.Question],
  cut: Cut,
  batch: int,
) -> choices.Accuracy:
  """How many questions a model answers right.

  Unless the cut is the field's, every context begins with the model's bos.

  Raises:
    ValueError: if the model has no tokenizer, or a question is not to be
      answered by it; names model and question.
  """
  if model.tokenizer is None:
    raise ValueError(
      f'{model.name}: has no tokenizer.json, so it reads no questions'
    )
  prefix = model.eos if model.bos is None else model.bos
  return choices.evaluate(
    *plans.runnable(model.apply, model.params),
    model.tokenizer,
    questions,
    length=_length(model, cut),
    prefix=prefix,
    always=not cut.field and model.bos is not None,
    batch=batch,
  )


def _length(model: opening.LanguageModel, cut: Cut) -> int:
  """Tokens of a window."""
  longest = model.config.max_position_embeddings
  length = cut.context or min(longest, LONGEST)
  if length > longest:
    raise ValueError(
      f'{model.name}: windows of {length} tokens, its context is {longest}'
    )
  return length


def _check_finite(
  model: opening.LanguageModel, found: perplexity.Scores
) -> None:
  if not (math.isfinite(found.nll) and math.isfinite(found.perplexity)):
    raise ValueError(
      f'{model.name}: nll is {found.nll}, perplexity {found.perplexity}: the '
      'model predicts nothing any more'
    )


def status_of(records: list[dict[str, Any]]) -> str:
  """One sentence from the sites' statuses: 'ok', or how many were not."""
  counts = collections.Counter(r['status'] for r in records)
  notes = [
    f'{count} of {len(records)} sites {name} ({Status[name].sentence})'
    for name, count in counts.items()
    if Status[name] != Status.ok
  ]
  return 'ok' if not notes else 'ok: ' + '; '.join(notes)
