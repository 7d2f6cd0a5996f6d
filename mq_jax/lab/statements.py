"""Gin files statement by statement, before gin itself reads them.

Gin is a way to write values down, nothing more: what a file names is looked
up first, so that a name that does not exist is reported with its file, its
line and the nearest names.
"""

import contextlib
import dataclasses
import difflib
import importlib
import inspect
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gin
from gin import config as gin_config
from gin import config_parser


class ConfigError(ValueError):
  """What the user wrote cannot be run; the message is one line for him."""


def nearest(name: str, names: Sequence[str]) -> str:
  """A hint that ends a message: names like `name`, or all when few.

  Examples:
    >>> nearest('sed', ['seed', 'text'])
    "; did you mean 'seed'?"
  """
  close = difflib.get_close_matches(str(name), names, n=3, cutoff=0.6)
  if close:
    return f'; did you mean {" or ".join(map(repr, close))}?'
  return f'; there are {", ".join(sorted(names))}' if names else ''


@contextlib.contextmanager
def clean_gin() -> Iterator[None]:
  """Empties gin's global state before and after, whatever happens."""
  gin.clear_config()
  try:
    yield
  finally:
    gin.clear_config()


class Reference(str):
  """A name that a value refers to: '@configurable' or '%macro'."""


class _Names(config_parser.ParserDelegate):
  """Collects references of a statement instead of resolving them."""

  def configurable_reference(self, scoped_configurable_name, evaluate):
    return Reference('@' + scoped_configurable_name)

  def macro(self, macro_name):
    return Reference('%' + macro_name)


def references(value: Any) -> Iterator[Reference]:
  """Names in a value of a statement."""
  if isinstance(value, Reference):
    yield value
  elif isinstance(value, Mapping):
    for item in value.items():
      yield from references(item)
  elif isinstance(value, list | tuple):
    for item in value:
      yield from references(item)


@dataclasses.dataclass(frozen=True)
class Source:
  """A gin file, or the binding of one `--set`."""

  name: str
  text: str
  is_file: bool

  def at(self, line: int, message: str) -> ConfigError:
    """An error of a line, whitespace folded."""
    where = f'{self.name}:{line}' if self.is_file else self.name
    return ConfigError(f'{where}: {" ".join(message.split())}')

  def line_of(self, line: int, words: Any) -> int:
    """The line from `line` on that quotes a word, else `line` itself."""
    lines = self.text.splitlines()
    for word in words if isinstance(words, list) else [words]:
      pattern = re.compile(f'[\'"]{re.escape(str(word))}[\'"]')
      for number in range(line, len(lines) + 1):
        if pattern.search(lines[number - 1]):
          return number
    return line


def read(path: str | pathlib.Path) -> Source:
  """A gin file; raises ConfigError if it is none."""
  try:
    return Source(str(path), pathlib.Path(path).read_text('utf-8'), True)
  except FileNotFoundError:
    raise ConfigError(f'{path}: no such config file') from None
  except (OSError, UnicodeDecodeError) as error:
    raise ConfigError(f'{path}: not a readable UTF-8 file: {error}') from error


def statements(source: Source) -> Iterator[Any]:
  """Statements of a source, as they come; raises ConfigError for syntax."""
  try:
    yield from config_parser.ConfigParser(source.text, _Names())
  except SyntaxError as error:
    line = error.lineno
    if line is None and len(error.args) > 1:
      line = error.args[1][1]
    raise source.at(line or 1, f'syntax: {error.args[0]}') from error
  except Exception as error:  # tokenize and gin raise what they like
    where = getattr(error, 'args', [None])[-1]
    line = where[0] if isinstance(where, tuple) else 1
    raise source.at(line, f'syntax: {error}') from error


def _registered() -> list[str]:
  """Short names of what can be configured, gin's own left out."""
  found = gin_config._REGISTRY  # pylint: disable=protected-access
  return [
    selector.rsplit('.', 1)[-1]
    for selector, _ in found.items()
    if not selector.startswith('gin.')
  ]


def import_named(
  source: Source, statement: config_parser.ImportStatement
) -> None:
  """Imports what a config asks for, so that its configurables are known."""
  line, module = statement.location.line_num, statement.module
  if module.startswith('__gin__'):
    raise source.at(line, 'dynamic registration is not supported')
  if statement.is_from:
    module = module.rsplit('.', 1)[0]
  try:
    importlib.import_module(module)
  except ImportError as error:
    raise source.at(line, f'import: {error}') from error


def check_known(
  source: Source, line: int, selector: str, parameter: str | None = None
) -> None:
  """Raises unless the configurable, and its parameter, exist."""
  registry = gin_config._REGISTRY  # pylint: disable=protected-access
  matches = registry.matching_selectors(selector)
  if len(matches) != 1:
    kind = 'ambiguous' if matches else 'unknown'
    hint = nearest(selector, matches or _registered())
    raise source.at(line, f'{kind} configurable {selector!r}{hint}')
  if parameter is None:
    return
  wrapped = registry[matches[0]].wrapped
  signature = inspect.signature(wrapped).parameters
  anything = any(p.kind is p.VAR_KEYWORD for p in signature.values())
  if parameter not in signature and not anything:
    hint = nearest(parameter, list(signature))
    raise source.at(line, f'{selector} has no parameter {parameter!r}{hint}')


@dataclasses.dataclass
class Found:
  """Names in the statements of a config.

  Attributes:
    bound: Where each parameter is bound, by 'compare.seed' and the like.
    macros: Names of macros that are set.
    references: Names referred to: '%macro' or '@configurable'.
  """

  bound: dict[str, tuple[Source, int]] = dataclasses.field(default_factory=dict)
  macros: dict[str, tuple[Source, int]] = dataclasses.field(
    default_factory=dict
  )
  references: set[str] = dataclasses.field(default_factory=set)


def _raise(error: ConfigError) -> None:
  raise error


def scan(
  sources: Sequence[Source],
  roots: Sequence[str] | None = ('compare',),
  problem: Callable[[ConfigError], None] = _raise,
) -> Found:
  """Where names are bound, those of included files too.

  Args:
    sources: Files and bindings.
    roots: Configurables that are run; None: whatever is bound.
    problem: Is told of names that are unknown, or that no root uses.

  Raises:
    ConfigError: the first problem, if nothing else is to be done with it.
  """
  scanner = _Scanner(roots, problem)
  for source in sources:
    scanner.walk(source)
  scanner.finish()
  return scanner.found


class _Scanner:
  """The state of a scan."""

  def __init__(self, roots, problem):
    self.found = Found()
    self._roots, self._problem = roots, problem
    self._used: list[tuple[Source, int, Reference]] = []
    self._configured: list[tuple[Source, int, str]] = []
    self._included: set[str] = set()

  @contextlib.contextmanager
  def _told(self) -> Iterator[None]:
    try:
      yield
    except ConfigError as error:
      self._problem(error)

  def walk(self, source: Source) -> None:
    """All statements of a source."""
    with self._told():  # a syntax error ends the file
      for statement in statements(source):
        with self._told():
          self._one(source, statement)

  def _one(self, source: Source, statement: Any) -> None:
    line = statement.location.line_num
    if isinstance(statement, config_parser.ImportStatement):
      import_named(source, statement)
    elif isinstance(statement, config_parser.IncludeStatement):
      self._include(source, line, statement.filename)
    elif isinstance(statement, config_parser.BlockDeclaration):
      check_known(source, line, statement.selector)
    else:
      scope, selector, parameter, value, _ = statement
      self._used += [(source, line, r) for r in references(value)]
      if not parameter:
        name = f'{scope}/{selector}' if scope else selector
        self.found.macros[name] = (source, line)
        return
      check_known(source, line, selector, parameter)
      short = selector.rsplit('.', 1)[-1]
      if self._roots is not None and short not in self._roots:
        self._configured.append((source, line, selector))
      elif scope and self._roots is not None:
        raise source.at(line, f'nothing uses scope {scope!r} of {short}')
      else:
        self.found.bound[f'{short}.{parameter}'] = (source, line)

  def _include(self, source: Source, line: int, filename: str) -> None:
    try:
      included = read(filename)
    except ConfigError as error:
      raise source.at(line, f'include: {error}') from error
    if included.name in self._included:
      raise source.at(line, f'include: {included.name} stands there twice')
    self._included.add(included.name)
    self.walk(included)

  def finish(self) -> None:
    """What needs all statements: are references known, is all used?"""
    for source, line, reference in self._used:
      with self._told():
        self._refer(source, line, reference)
    self.found.references = {str(reference) for _, _, reference in self._used}
    used = {name[1:].rsplit('/', 1)[-1] for name in self.found.references}
    for source, line, selector in self._configured:
      if selector.rsplit('.', 1)[-1] == 'sweep':
        self._problem(source.at(line, 'this is a sweep: use mq sweep'))
      elif selector not in used:
        self._problem(
          source.at(line, f'nothing uses {selector}; what is run is compare')
        )

  def _refer(self, source: Source, line: int, reference: Reference) -> None:
    kind, name = reference[0], reference[1:]
    if kind == '@':
      check_known(source, line, name.rsplit('/', 1)[-1])
      return
    known = gin_config._CONSTANTS  # pylint: disable=protected-access
    if name not in self.found.macros and name not in known:
      hint = nearest(name, sorted(self.found.macros))
      raise source.at(line, f'unknown macro %{name}{hint}')
