"""The docs corpus: English that lies on every machine which runs mq_jax.

Docstrings of the installed numpy, scipy, jax, flax and optax, read by `ast`
(nothing is imported), one document a module, split by a hash of the module's
path. Its exact text follows the installed versions, which a run records.
"""

import ast
import functools
import hashlib
import importlib.util
import inspect
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

PACKAGES = ('numpy', 'scipy', 'jax', 'flax', 'optax')
SPLITS = ('train', 'valid', 'test')

# Shares of modules in 256ths; the rest is for training.
_VALID, _TEST = 10, 13


class Document(NamedTuple):
  """One module's docstrings: `path` like 'numpy/linalg/_linalg.py'."""

  path: str
  text: str


def split_of(path: str) -> str:
  """The split that a module path belongs to, by its hash alone."""
  bucket = hashlib.sha256(path.encode()).digest()[0]
  if bucket < _VALID:
    return 'valid'
  return 'test' if bucket < _VALID + _TEST else 'train'


def docstrings(source: str) -> Iterator[str]:
  """Cleaned docstrings of a module's source, outer ones first."""
  scopes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
  queue = [ast.parse(source)]
  for node in queue:  # grows as it goes: breadth first, statements only
    if isinstance(node, scopes):
      text = ast.get_docstring(node, clean=False)
      if text:
        yield inspect.cleandoc(text)
    for field in ('body', 'orelse', 'handlers', 'finalbody'):
      children = getattr(node, field, ())
      if isinstance(children, list):
        queue.extend(children)


def _modules(split: str) -> list[tuple[str, pathlib.Path]]:
  """Path and file of each module of a split, in order of their hash."""
  found = []
  for package in PACKAGES:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
      raise ModuleNotFoundError(
        f'docs corpus: {package} is not installed; it needs {PACKAGES}'
      )
    root = pathlib.Path(spec.origin).parent
    for path in root.rglob('*.py'):
      relative = path.relative_to(root.parent)
      if not {'tests', 'test', '_vendor', 'testing'} & set(relative.parts):
        found.append((relative.as_posix(), path))
  order = lambda entry: hashlib.sha256(entry[0].encode()).digest()
  return sorted((e for e in found if split_of(e[0]) == split), key=order)


def _key(paragraph: str) -> bytes:
  return hashlib.sha256(' '.join(paragraph.split()).encode()).digest()


@functools.cache
def _held_out(split: str) -> frozenset[bytes]:
  """Paragraphs that `split` may not repeat: those of the splits after it."""
  later = SPLITS[SPLITS.index(split) + 1 :]
  return frozenset(
    _key(paragraph)
    for name in later
    for _, file in _modules(name)
    for text in _read(file)
    for paragraph in text.split('\n\n')
  )


def _read(file: pathlib.Path) -> list[str]:
  try:
    return list(docstrings(file.read_text(encoding='utf-8')))
  except (SyntaxError, UnicodeDecodeError):
    return []  # templates and files for other Python versions


def documents(split: str) -> Iterator[Document]:
  """Documents of a split, in an order fixed by hashes (a random mixture).

  Libraries quote each other's documentation. Each paragraph is given once in
  a split, and never in an earlier split when a later one holds it: what is
  tested on was not trained on.

  Args:
    split: 'train', 'valid' or 'test'.

  Yields:
    One document a module that has docstrings; files are read as needed.

  Raises:
    ValueError: for an unknown split.
    ModuleNotFoundError: if one of `PACKAGES` is missing.
  """
  if split not in SPLITS:
    raise ValueError(f'docs corpus: split {split!r} is not one of {SPLITS}')
  seen = set(_held_out(split))
  for path, file in _modules(split):
    kept = []
    for text in _read(file):
      for paragraph in text.split('\n\n'):
        key = _key(paragraph)
        if key not in seen:
          seen.add(key)
          kept.append(paragraph)
    if kept:
      yield Document(path, '\n\n'.join(kept) + '\n')


def docs_text(split: str, characters: int | None = None) -> str:
  """The first `characters` (default: all) of a split as one text."""
  pieces, length = [], 0
  for document in documents(split):
    pieces.append(document.text)
    length += len(document.text)
    if characters is not None and length >= characters:
      break
  return '\n'.join(pieces)[:characters]
