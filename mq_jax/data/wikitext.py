"""WikiText-2's raw test split, whole, from what copies of it there are."""

import hashlib
import pathlib

# Of `wiki.test.raw` (1,290,590 bytes) of wikitext-2-raw-v1 as distributed;
# several public repositories name this sum, and so comes out what is below.
TEST_SHA256 = '173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08'

_WHOLE = 'wiki.test.raw'
_LINES, _ORDER = 'test.raw.txt', 'test.txt'


def test_text(folder: str | pathlib.Path) -> str:
  """The raw test split, byte for byte as distributed.

  Args:
    folder: Holds `wiki.test.raw`; or `test.raw.txt`, a copy that lost its
      empty lines, with `test.txt`, the tokenized split, which has the same
      lines and tells where the empty ones were.

  Raises:
    FileNotFoundError: if the folder holds neither.
    ValueError: if what comes out is another text.
  """
  folder = pathlib.Path(folder)
  whole, lines, order = (folder / n for n in (_WHOLE, _LINES, _ORDER))
  if whole.is_file():
    content = whole.read_bytes()
  elif lines.is_file() and order.is_file():
    content = _with_empty_lines(lines.read_bytes(), order.read_bytes())
  else:
    raise FileNotFoundError(
      f'{folder}: holds neither {_WHOLE} nor {_LINES} with {_ORDER}'
    )
  if hashlib.sha256(content).hexdigest() != TEST_SHA256:
    raise ValueError(
      f'{folder}: its files do not make the raw test split of WikiText-2 '
      f'(SHA-256 {TEST_SHA256[:12]}...)'
    )
  return content.decode('utf-8')


def _with_empty_lines(lines: bytes, order: bytes) -> bytes:
  full = iter(lines.replace(b'\r\n', b'\n').splitlines(keepends=True))
  return b''.join(
    next(full, b'') if line.strip() else line
    for line in order.splitlines(keepends=True)
  )
