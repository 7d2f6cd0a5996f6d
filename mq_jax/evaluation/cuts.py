"""A text as windows of tokens: the ways in which the field cuts it.

Perplexities of one model on one text differ by some percent with the cut, so
numbers are compared within one cut only:

* `text_windows`: ours. Nothing is predicted twice or left out, and a window
  begins with the token that begins texts, as the model was trained.
* `field_windows`: as GPTQ's evaluation and those that follow it.
* `field_windows` with a stride: as Hugging Face's guide to perplexity.
"""

import io
from typing import NamedTuple

import numpy as np
import tokenizers

from mq_jax.data import text as text_data


class TextWindows(NamedTuple):
  """Windows of a text, and how much text their predicted tokens stand for.

  Attributes:
    tokens: Windows; the first token of each is context only. i32[w, t + 1].
    n_bytes: UTF-8 bytes of the text that the counted tokens make up.
    counted: Which of the tokens 1..t count; None for all. bool[w, t].
  """

  tokens: np.ndarray
  n_bytes: int
  counted: np.ndarray | None = None


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
  _check(length=length, limit=limit)
  encoding = tokenizer.encode(text, add_special_tokens=False)
  tokens = text_data.windows(
    np.asarray(encoding.ids, np.int32), length, bos=bos
  )[:limit]
  first = 0 if bos is not None else 1  # without bos, token 0 is context only
  ends = _bytes_until(encoding, text)
  last = first + tokens.shape[0] * length
  return TextWindows(tokens, int(ends[last] - ends[first]))


def field_text(text: str) -> str:
  """A text as the field joins the rows of WikiText-2.

  The rows of the data set are the lines of the file with their line breaks,
  lines of white space being empty; they are joined by an empty line:
  `'\\n\\n'.join(rows)`. What was a line break becomes three.

  Source:
    The loader of `wikitext-2-raw-v1` in Hugging Face's datasets (the rows),
    read in copies; the join from memory of GPTQ's datautils.py and as in
    Hugging Face's guide to perplexity.
  """
  rows = io.StringIO(text, newline=None)
  return '\n\n'.join(row if row.strip() else '' for row in rows)


def field_windows(
  tokenizer: tokenizers.Tokenizer,
  text: str,
  context: int,
  *,
  stride: int | None = None,
  limit: int | None = None,
) -> TextWindows:
  """Cut a text into windows as published perplexities have it.

  The whole text is tokenized once, with the special tokens that the tokenizer
  itself puts around a text (Llama's: one <s> in front of all) and no others.

  Without a stride, window i holds the tokens from i * context on, `context` of
  them; what is left at the end is dropped. The first token of a window is
  context only, so a window predicts context - 1 tokens, and perplexity is exp
  of the mean over windows of the mean over their tokens, which is the mean
  over all, windows being equal. (GPTQ multiplies and divides by `context` in
  place of context - 1, which cancels.)

  With a stride, window i begins at token i * stride and holds `context` tokens,
  the last one fewer, up to the end of the text. Of a window those tokens count
  that the window before did not hold: `stride` of them, behind at least
  context - stride others. The very first token is never predicted. Here each
  counted token weighs the same; the guide's code gives the mean over the n
  counted tokens of a window the weight n - 1 from the second window on, too,
  where nothing is lost to the shift, so that its figure differs by some
  1 / stride of the difference between the first and the other windows.

  Args:
    tokenizer: From text to tokens.
    text: Tokenized as it is; see `field_text`.
    context: Tokens of a window, >= 2: the model's context.
    stride: Tokens from window to window, 1..context; None for `context`,
      without an incomplete window at the end.
    limit: Use the first `limit` windows only.

  Returns:
    Windows [w, context]. Incomplete ones are filled up behind with tokens 0,
    which do not count.

  Raises:
    ValueError: for a text shorter than one window (with a stride: than two
      tokens), or numbers out of range.

  Source:
    `llama_eval` in github.com/IST-DASLab/gptq (llama.py), read; the loop in
    huggingface.co/docs/transformers/perplexity, read in copies.
  """
  _check(context=context - 1, limit=limit, stride=stride)
  if stride is not None and stride > context:
    raise ValueError(
      f'stride={stride} is longer than a window of {context} tokens; tokens '
      'between windows would be left out'
    )
  encoding = tokenizer.encode(text)
  tokens = np.asarray(encoding.ids, np.int32)
  ends = _bytes_until(encoding, text)
  size = np.diff(ends)  # bytes of each token
  need = context if stride is None else 2
  if tokens.size < need:
    raise ValueError(
      f'text of {tokens.size} tokens is shorter than one window of {need}; '
      'give more text or a shorter window'
    )
  if stride is None:
    count = tokens.size // context
    found = tokens[: count * context].reshape(count, context)[:limit]
    size = size[: found.size].reshape(found.shape)
    return TextWindows(found, int(size[:, 1:].sum()))
  rows, counted, seen, n_bytes = [], [], 0, 0
  for begin in range(0, tokens.size, stride)[:limit]:
    end = min(begin + context, tokens.size)
    index = np.arange(begin, begin + context)
    rows.append(np.where(index < end, tokens[np.minimum(index, end - 1)], 0))
    fresh = (index >= seen) & (index < end) & (index > begin)
    counted.append(fresh)
    n_bytes += int(size[index[fresh]].sum())
    seen = end
    if end == tokens.size:
      break
  counted = np.stack(counted)[:, 1:]
  return TextWindows(np.stack(rows).astype(np.int32), n_bytes, counted)


def _check(**numbers: int | None) -> None:
  if any(n is not None and n < 1 for n in numbers.values()):
    named = ' and '.join(f'{name}={n}' for name, n in numbers.items())
    raise ValueError(f'{named} must be at least 1')


def _bytes_until(encoding: tokenizers.Encoding, text: str) -> np.ndarray:
  """UTF-8 bytes of the text that the first i tokens complete. i64[n + 1].

  Tokens that share a character all span it: it is not complete before the
  last of them. Special tokens that were added stand for no text.
  """
  points = np.frombuffer(text.encode('utf-32-le'), np.uint32)
  width = 1 + sum((points >= limit).astype(np.int64) for limit in _WIDER)
  before = np.concatenate([[0], np.cumsum(width)])  # by character
  special = np.asarray(encoding.special_tokens_mask, bool)
  offsets = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)[~special]
  begins = np.append(offsets[1:, 0], offsets[-1:, 1])
  ends = np.zeros(special.size + 1, np.int64)
  ends[1:][~special] = before[np.minimum(offsets[:, 1], begins)]
  return np.maximum.accumulate(ends)


_WIDER = (0x80, 0x800, 0x10000)  # a byte more in UTF-8 from each of these on
