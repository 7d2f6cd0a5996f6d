"""Multiple-choice questions, answered by the likelihood of the choices.

The rules are those of EleutherAI's lm-evaluation-harness (lm_eval/api/task.py
and api/model.py, read): a choice is a continuation of the context, behind a
delimiter; white space at the end of the context goes with the continuation;
the tokens of a continuation are those of the whole text behind as many as the
context alone has; what is too long is cut at its beginning.
"""

import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from mq_jax.evaluation import perplexity

_SHORTEST = 16  # tokens; lengths double from here on


class Question(NamedTuple):
  """A context, its possible continuations, and which of them is right."""

  context: str
  choices: tuple[str, ...]
  gold: int
  where: str = 'question'  # for messages


class Accuracy(NamedTuple):
  """How many questions were answered right; the first best choice counts.

  Attributes:
    acc: Share where the right choice is the likeliest.
    acc_norm: The same by log likelihood over the choice's characters, as the
      harness computes what it calls length-normalized.
    acc_bytes: The same over its UTF-8 bytes; equal for ASCII.
    acc_error: Standard error of `acc`, sqrt(p (1 - p) / (n - 1)).
    acc_norm_error: The same of `acc_norm`.
    questions: Their number.
  """

  acc: float
  acc_norm: float
  acc_bytes: float
  acc_error: float | None
  acc_norm_error: float | None
  questions: int


def read_questions(path: str | pathlib.Path) -> list[Question]:
  """Questions from a file of JSON objects, one a line.

  Each has `query` or `context` (text, may be empty), `choices` (two texts or
  more, none empty) and `gold` or `answer`: the number of the right choice,
  from 0, or its text. Other fields are ignored, and so are empty lines.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it holds no question, or one of another form; names the
      line.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'questions {path}: no such file')
  found = []
  for number, line in enumerate(path.read_bytes().split(b'\n'), 1):
    if line.strip():
      found.append(_question(f'{path}:{number}', line))
  if not found:
    raise ValueError(f'{path}: holds no questions')
  return found


def _question(where: str, line: bytes) -> Question:
  try:
    raw = json.loads(line.decode('utf-8'))
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{where}: not JSON in UTF-8: {error}') from None
  if not isinstance(raw, dict):
    raise ValueError(
      f'{where}: a question is a JSON object, found a {type(raw).__name__}'
    )
  context = _one_of(where, raw, ('query', 'context'))
  if not isinstance(context, str):
    raise ValueError(f'{where}: query must be text, found {context!r:.60}')
  choices = raw.get('choices')
  if (
    not isinstance(choices, list)
    or len(choices) < 2
    or not all(isinstance(c, str) and c for c in choices)
  ):
    raise ValueError(
      f'{where}: choices must be two texts or more, none empty, found '
      f'{choices!r:.60}'
    )
  gold = _one_of(where, raw, ('gold', 'answer'))
  if isinstance(gold, str) and choices.count(gold) == 1:
    gold = choices.index(gold)
  if type(gold) is not int or not 0 <= gold < len(choices):
    raise ValueError(
      f'{where}: gold must be the text of one choice or its number from 0 to '
      f'{len(choices) - 1}, found {gold!r:.60}'
    )
  return Question(context, tuple(choices), gold, where)


def _one_of(where: str, raw: dict[str, Any], names: tuple[str, str]) -> Any:
  given = [name for name in names if name in raw]
  if len(given) != 1:
    raise ValueError(
      f'{where}: needs one of {" and ".join(names)}, found '
      f'{" and ".join(given) or sorted(raw)}'
    )
  return raw[given[0]]


def continuation(
  tokenizer: tokenizers.Tokenizer,
  context: str,
  text: str,
  prefix: int | None,
  *,
  always: bool = False,
) -> tuple[list[int], int]:
  """Tokens of a context with its continuation.

  Args:
    tokenizer: From text to tokens; its special tokens are not added.
    context: What comes before; may be empty.
    text: The continuation, with the delimiter in front of it.
    prefix: Token put before an empty context, so that there is something to
      predict from; None if there is none.
    always: Put it before all others, too, as a model needs that was trained
      so; the harness does not, by default.

  Returns:
    The tokens, and how many of them, at the end, are the continuation's.

  Raises:
    ValueError: if the continuation has no token of its own, or there is
      nothing to predict it from.
  """
  stem = context.rstrip()
  encode = lambda x: tokenizer.encode(x, add_special_tokens=False).ids
  whole = encode(context + text)
  # Of an empty context nothing is moved: it has no tokens in any case.
  before = len(encode(stem)) if stem else 0
  count = len(whole) - before
  if count < 1:
    raise ValueError(f'{text!r:.60} has no token of its own behind its context')
  if always or not before:
    if prefix is None:
      raise ValueError(
        'the context is empty, and the model has no token that begins or ends '
        'a text'
      )
    whole = [prefix, *whole]
  return whole, count


def evaluate(
  apply: perplexity.Apply,
  params: Any,
  tokenizer: tokenizers.Tokenizer,
  questions: Sequence[Question],
  *,
  length: int,
  prefix: int | None,
  always: bool = False,
  delimiter: str = ' ',
  batch: int = 16,
  progress: Callable[[int, int], None] | None = None,
) -> Accuracy:
  """Answer questions by the likelihood of each choice as a continuation.

  Sequences are padded to 16 tokens, 32, 64, ... and each length is compiled
  once; what is padded stands behind and changes nothing in a causal model.

  Args:
    apply: `(params, tokens i32[b, t]) -> logits [b, t, v]`, causal.
    params: Any tree of arrays.
    tokenizer: From text to tokens.
    questions: From `read_questions`.
    length: Most tokens the model takes; contexts lose their beginning.
    prefix: See `continuation`.
    always: See `continuation`.
    delimiter: Put before each choice.
    batch: Choices at a time; it does not change the result but for rounding.
    progress: Called with the choices done and their number.

  Returns:
    The accuracy.

  Raises:
    ValueError: for no questions, a choice without tokens or with more than
      `length`, named by question, or log likelihoods that are not finite.
  """
  if not questions or batch < 1 or length < 1:
    raise ValueError(
      f'{len(questions)} questions, batch={batch}, length={length}: each must '
      'be at least 1'
    )
  sequences = []
  for question in questions:
    for i, choice in enumerate(question.choices):
      try:
        whole, count = continuation(
          tokenizer,
          question.context,
          delimiter + choice,
          prefix,
          always=always,
        )
      except ValueError as error:
        raise ValueError(f'{question.where}: choice {i}: {error}') from None
      if count > length:
        raise ValueError(
          f'{question.where}: choice {i} has {count} tokens, the model takes '
          f'{length}'
        )
      sequences.append((whole[-length - 1 :], count))
  likelihoods = _log_likelihoods(
    apply, params, sequences, length, batch, progress
  )
  right, start = [], 0
  for question in questions:
    own = likelihoods[start : start + len(question.choices)]
    start += len(question.choices)
    if not np.isfinite(own).all():
      raise ValueError(
        f'{question.where}: log likelihoods {own.tolist()!s:.80} are not finite'
      )
    characters = [len(c) for c in question.choices]
    n_bytes = [len(c.encode('utf-8')) for c in question.choices]
    right.append(
      [
        np.argmax(own / size) == question.gold
        for size in (np.ones(len(own)), np.array(characters), np.array(n_bytes))
      ]
    )
  n = len(questions)
  acc, acc_norm, acc_bytes = (float(x) for x in np.mean(right, axis=0))
  error = lambda p: math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None
  return Accuracy(acc, acc_norm, acc_bytes, error(acc), error(acc_norm), n)


def _log_likelihoods(
  apply: perplexity.Apply,
  params: Any,
  sequences: Sequence[tuple[list[int], int]],
  length: int,
  batch: int,
  progress: Callable[[int, int], None] | None,
) -> np.ndarray:
  """Log likelihood of the last tokens of each sequence. f64[s]."""
  buckets: dict[int, list[int]] = {}
  for i, (tokens, _) in enumerate(sequences):
    size = _SHORTEST
    while size < len(tokens) - 1:
      size *= 2
    buckets.setdefault(min(size, length), []).append(i)
  found, done = np.empty(len(sequences)), 0
  one = lambda *batch: perplexity.window_nll(apply, params, *batch)
  for size, members in sorted(buckets.items()):
    windows = np.zeros((len(members), size + 1), np.int32)
    counted = np.zeros((len(members), size), bool)
    for row, i in enumerate(members):
      tokens, count = sequences[i]
      windows[row, : len(tokens)] = tokens
      counted[row, len(tokens) - 1 - count : len(tokens) - 1] = True
    said = None
    if progress is not None:
      said = lambda k, _, done=done: progress(done + k, len(sequences))
    found[members] = -perplexity.in_batches(
      one, windows, counted, perplexity.fitting(batch, size, params), said
    )
    done += len(members)
  return found
