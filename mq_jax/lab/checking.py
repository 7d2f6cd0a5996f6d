"""Config files looked at, not run: all errors, all values, differences.

A config is of `mq run`, of `mq sweep`, or of a script: its header says
`python -m MODULE THIS_FILE`, and what that module makes configurable is what
may be bound.
"""

import contextlib
import dataclasses
import importlib
import inspect
import json
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import gin
from gin import config as gin_config

from mq_jax.lab import config, listing, statements

_LAB = ('compare', 'sweep')


def script_of(source: statements.Source) -> str | None:
  """The module that a config's header runs it by; None if it is the lab's.

  Examples:
    >>> text = '# python -m experiments.train \\\\\\n#   configs/train.gin'
    >>> script_of(statements.Source('configs/train.gin', text, True))
    'experiments.train'
  """
  lines = source.text.split('\n')
  head = '\n'.join(line for line in lines if line.startswith('#'))
  head = re.sub(r'\\\n#\s*', ' ', head)
  name = re.escape(pathlib.Path(source.name).name)
  found = re.search(rf'python -m ([\w.]+)[^\n]*\b{name}\b', head)
  return None if found is None else found[1]


@contextlib.contextmanager
def _importable(path: str, module: str) -> Iterator[None]:
  """Puts the folder that holds a module, above the config, on the path."""
  tail = pathlib.Path(*module.split('.'))
  here = pathlib.Path(path).absolute()
  for folder in (pathlib.Path.cwd(), *here.parents):
    if (folder / tail).with_suffix('.py').is_file():
      sys.path.insert(0, str(folder))
      try:
        yield
      finally:
        sys.path.remove(str(folder))
      return
  yield


def _import_script(source: statements.Source) -> None:
  """Imports the module of a config's header; raises ConfigError."""
  module = script_of(source)
  if module is None:
    return
  line = next(
    i for i, text in enumerate(source.text.split('\n'), 1) if module in text
  )
  with _importable(source.name, module):
    try:
      importlib.import_module(module)
    except ImportError as error:
      raise source.at(line, f'{module}: {error}') from error


def errors(path: str | pathlib.Path) -> list[str]:
  """All that is wrong with a config, a line each: file, line, what."""
  try:
    source = statements.read(path)
    _import_script(source)
  except config.ConfigError as error:
    return [str(error)]
  found: list[str] = []
  tell = lambda error: found.append(str(error))
  lab = script_of(source) is None
  with statements.clean_gin():
    names = statements.scan([source], _LAB if lab else None, tell)
    if found:
      return found  # gin would stop at the first of them
    try:
      gin.parse_config_file(str(path), skip_unknown=False)
      if lab:
        _check_values(source, names, tell)
      else:
        _check_required(source, names, tell)
    except Exception as error:  # gin raises what it likes
      tell(source.at(1, str(error)))
  if lab and not found and any(b.startswith('sweep.') for b in names.bound):
    found += _sweep_error(path)
  return found


def _check_values(source, names, tell) -> None:
  """Tells of every parameter of `compare` that it can't take, by itself."""
  bound = gin.get_bindings('compare')
  missing = [n for n in ('models', 'recipes') if n not in bound]
  if missing:
    said = ' and '.join(f'compare.{name}' for name in missing)
    tell(source.at(1, f'{said} must be set'))
  good = {'models': ['m'], 'recipes': ['none']}
  rows = bound.get('recipes', ['none'])
  labels_known = True
  for name, value in bound.items():
    if name == 'artifact':
      continue  # is held against the rows below
    parts = [value]
    if name == 'recipes' and isinstance(value, list | tuple) and value:
      parts = [[row] for row in value]
    for part in parts:
      if not _try(source, names, tell, {**good, name: part}):
        labels_known = labels_known and name != 'recipes'
  if labels_known:  # names given twice, and the artifact's
    more = {'artifact': bound['artifact']} if 'artifact' in bound else {}
    _try(source, names, tell, {**good, 'recipes': rows, **more})


def _try(source, names, tell, values: Mapping[str, Any]) -> bool:
  try:
    config.compare(**values)
  except config.FieldError as error:
    where, line = names.bound.get(f'compare.{error.field}', (source, 1))
    if error.word is not None:
      line = where.line_of(line, error.word)
    tell(where.at(line, f'compare.{error.field}: {error.message}'))
    return False
  return True


def _sweep_error(path: str | pathlib.Path) -> list[str]:
  from mq_jax.lab.sweeping import spec  # late: Optuna takes a second

  try:
    spec.load(str(path), ())
  except ValueError as error:
    return [str(error)]
  return []


def _check_required(source, names, tell) -> None:
  """Tells of parameters of a script's first configurable that must be set.

  That is the one that is run; it may hand parameters to the others itself.
  """
  for name in _bound_configurables(names)[:1]:
    missing = [
      parameter
      for parameter, value in _values_of(name).items()
      if value is gin.REQUIRED
    ]
    if missing:
      said = ' and '.join(f'{name}.{parameter}' for parameter in missing)
      tell(source.at(1, f'{said} must be set'))


def _bound_configurables(names: statements.Found) -> list[str]:
  """In the order of the file."""
  return list(dict.fromkeys(b.rpartition('.')[0] for b in names.bound))


def _values_of(name: str) -> dict[str, Any]:
  """What a configurable's parameters are bound to, or their defaults."""
  registry = gin_config._REGISTRY  # pylint: disable=protected-access
  wrapped = registry.get_match(name).wrapped
  bound = gin.get_bindings(name)
  found = {}
  for parameter in inspect.signature(wrapped).parameters.values():
    if parameter.name in bound:
      found[parameter.name] = bound[parameter.name]
    elif parameter.default is not parameter.empty:
      found[parameter.name] = parameter.default
  return found


def values(path: str | pathlib.Path) -> dict[str, Any]:
  """All values of a config or of a run folder, defaults too, by name.

  Args:
    path: A gin file, or a folder of a run or of an allocation.

  Raises:
    ConfigError: for the first error of the file.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    setup = path / listing.ALLOCATION
    if setup.is_file():
      return dict(_flat('', json.loads(setup.read_text('utf-8'))))
    if not (path / 'config.gin').is_file():
      raise config.ConfigError(f'{path}: holds no config.gin; is it a run?')
    path = path / 'config.gin'
  wrong = errors(path)
  if wrong:
    raise config.ConfigError(wrong[0])
  with statements.clean_gin():
    gin.parse_config_file(str(path), skip_unknown=False)
    names = statements.scan([statements.read(path)], None)
    return {
      f'{name}.{parameter}': value
      for name in _bound_configurables(names)
      for parameter, value in _values_of(name).items()
    }


def _flat(prefix: str, data: Any) -> Iterator[tuple[str, Any]]:
  if isinstance(data, Mapping) and data:
    for key, value in data.items():
      yield from _flat(f'{prefix}.{key}' if prefix else key, value)
  else:
    yield prefix, data


def as_gin(found: Mapping[str, Any]) -> str:
  """Values as gin text: long lists an entry a line.

  Examples:
    >>> print(as_gin({'compare.seed': 0}), end='')
    compare.seed = 0
  """
  lines = []
  for name, value in found.items():
    text = repr(value)
    if len(f'{name} = {text}') > 80 and isinstance(value, list | tuple):
      left, right = '[]' if isinstance(value, list) else '()'
      entries = ''.join(f'  {entry!r},\n' for entry in value)
      text = f'{left}\n{entries}{right}'
    lines.append(f'{name} = {text}\n')
  return ''.join(lines)


@dataclasses.dataclass(frozen=True)
class Difference:
  """A value, or an entry of a list, that two configs do not share; as text."""

  name: str
  left: str
  right: str


def differences(
  left: Mapping[str, Any], right: Mapping[str, Any]
) -> list[Difference]:
  """What differs between `values` of two configs; of lists, the entries.

  Examples:
    >>> differences({'a.seed': 0, 'a.rows': ['x']}, {'a.rows': ['x', 'y']})
    [Difference(name='a.seed', left='0', right='-'), \
Difference(name='a.rows', left='-', right="'y'")]
  """
  found = []
  for name in dict.fromkeys((*left, *right)):
    values_ = [side.get(name, _ABSENT) for side in (left, right)]
    if values_[0] == values_[1] and type(values_[0]) is type(values_[1]):
      continue
    if all(isinstance(v, list | tuple) for v in values_):
      a, b = ([repr(x) for x in v] for v in values_)
      only = [[x for x in a if x not in b], [x for x in b if x not in a]]
      if any(only):
        found += [Difference(name, x, '-') for x in only[0]]
        found += [Difference(name, '-', x) for x in only[1]]
        continue
    texts = ('-' if v is _ABSENT else repr(v) for v in values_)
    found.append(Difference(name, *texts))
  return found


_ABSENT = object()
