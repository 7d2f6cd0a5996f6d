"""Text files and windows of tokens."""

import gzip
import pathlib
import zlib

import numpy as np


def read_text(path: str | pathlib.Path) -> str:
  """A UTF-8 text file (gzip if its name ends in .gz), never empty.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is empty, not UTF-8, or not gzip despite its name.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'text file {path}: no such file')
  raw = path.read_bytes()
  if path.suffix == '.gz':
    try:
      raw = gzip.decompress(raw)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
      raise ValueError(f'text file {path}: not a whole gzip file') from error
  try:
    text = raw.decode('utf-8')
  except UnicodeDecodeError as error:
    raise ValueError(
      f'text file {path}: not UTF-8; byte {raw[error.start]:#04x} at offset '
      f'{error.start}; convert it first (iconv -t UTF-8)'
    ) from error
  if not text.strip():
    raise ValueError(f'text file {path}: holds no text')
  return text


def windows(
  tokens: np.ndarray, length: int, *, bos: int | None = None
) -> np.ndarray:
  """Cut a token stream into whole windows, each begun by `bos`.

  A window predicts its tokens 1..length, so no token is predicted twice;
  without `bos` the first token of a window is context only.

  Args:
    tokens: Token ids. Shape [n].
    length: Tokens predicted by a window, >= 1.
    bos: Id put before each window; None takes the preceding token instead.

  Returns:
    Windows i32[w, length + 1]; the last incomplete window is dropped.

  Raises:
    ValueError: if the stream is shorter than one window.
  """
  tokens = np.asarray(tokens, np.int32)
  context = 0 if bos is not None else 1
  count = (tokens.size - context) // length
  if count < 1:
    raise ValueError(
      f'text of {tokens.size} tokens is shorter than one window of '
      f'{length + context}; give more text or a shorter window'
    )
  body = tokens[context : context + count * length].reshape(count, length)
  if bos is not None:
    first = np.full(count, bos, np.int32)
  else:
    first = tokens[: count * length : length]
  return np.concatenate([first[:, None], body], axis=1)
