"""From run folders to one page: what `mq report` does.

A kind of folder has a module here that knows its files: `is_one(path)` tells
it from others, `read(path)` gives a `report.sources.Source`. A new kind is a
module more in `_READERS`; what is drawn of it is in `report.pages`.
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

from mq_jax.lab.files import RunError, write_whole
from mq_jax.lab.reporting import allocations, comparisons, costs, sweeps
from mq_jax.report import html, plain
from mq_jax.report.sources import Source

__all__ = ['check_target', 'read', 'targets', 'write_whole']

_READERS = (comparisons, sweeps, allocations, costs)
_KINDS = 'mq run, mq sweep, mq allocate or mq cost --out'


def read(folders: Sequence[str | os.PathLike]) -> list[Source]:
  """What folders hold, in their order; a folder given twice counts once.

  Raises:
    RunError: names the folder, or file and line, and what is wrong: no
      folder of a run, damage, records of another run, another version's.
  """
  paths = {}
  for folder in folders:
    path = pathlib.Path(folder)
    paths.setdefault(path.resolve(), path)
  # All are looked at before the first is read.
  found = [(_reader(path), path) for path in paths.values()]
  names = _names(list(paths.values()))
  return [
    dataclasses.replace(reader.read(path), name=name)
    for (reader, path), name in zip(found, names, strict=True)
  ]


def _reader(path: pathlib.Path):
  if not path.exists():
    raise RunError(f'{path}: no such folder')
  if not path.is_dir():
    raise RunError(f'{path}: is a file; mq report takes folders of runs')
  own = [reader for reader in _READERS if reader.is_one(path)]
  if len(own) > 1:
    raise RunError(f'{path}: holds files of two commands of {_KINDS}')
  if own:
    return own[0]
  inside = [
    child
    for child in sorted(path.iterdir())
    if child.is_dir() and any(reader.is_one(child) for reader in _READERS)
  ]
  hint = f'; {len(inside)} inside are: name them' if inside else ''
  raise RunError(f'{path}: not a folder of {_KINDS}{hint}')


def _names(paths: Sequence[pathlib.Path]) -> list[str]:
  """The last parts of paths, as many as tell them apart."""
  parts = [path.resolve().parts for path in paths]
  for count in range(1, max(map(len, parts), default=0) + 1):
    names = ['/'.join(own[-count:]) for own in parts]
    if len(set(names)) == len(names):
      return names
  return [str(path) for path in paths]


def check_target(path: pathlib.Path, mark: str) -> None:
  """Refuse a file that is not a report, or a place that cannot be written.

  Args:
    path: The file to write.
    mark: What reports of its kind hold near their beginning.

  Raises:
    RunError: says what is there.
  """
  if path.is_dir():
    raise RunError(f'{path}: is a folder; --out needs a file')
  if not path.parent.is_dir():
    raise RunError(f'{path}: there is no folder {path.parent}')
  if path.exists():
    with open(path, encoding='utf-8', errors='replace') as file:
      if mark not in file.read(1000):
        raise RunError(
          f'{path}: holds something else than a report; nothing was written; '
          'choose another file with --out'
        )


def targets(
  out: pathlib.Path, markdown: bool, latex: bool
) -> dict[pathlib.Path, tuple[str, object]]:
  """Files to write: what marks each as ours, and what makes it of a document.

  Raises:
    RunError: if two of them are the same.
  """
  found = {out: (html.MARK, html.page)}
  if markdown:
    found[out.with_suffix('.md')] = plain.MARKDOWN_MARK, plain.markdown
  if latex:
    found[out.with_suffix('.tex')] = plain.LATEX_MARK, plain.latex
  if len(found) != 1 + markdown + latex:
    raise RunError(f'--out {out}: is the page, so it needs another ending')
  return found
