"""From a gin file and bindings to one frozen `Study`, or one clear error.

Gin is a way to write values down, nothing more: they are read once, before
any work, and gin's global state is left as empty as it was found. A name
that does not exist is reported with its file, its line and the nearest names.
"""

import ast
import contextlib
import dataclasses
import hashlib
import inspect
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gin

from mq_jax.lab import statements

ConfigError, nearest = statements.ConfigError, statements.nearest


@dataclasses.dataclass(frozen=True)
class Row:
  """One row of a study: a recipe by name, its options, its label."""

  label: str
  name: str
  options: tuple[tuple[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class Study:
  """A comparison of recipes on models, complete and without defaults."""

  models: tuple[str, ...]
  rows: tuple[Row, ...]
  text: str | None
  calibration_text: str | None
  windows: int
  calibration_windows: int
  batch: int
  artifact: str | None
  seed: int
  mesh: str | None = None
  generated_windows: int = 0

  def as_dict(self) -> dict[str, Any]:
    """Plain JSON data, equal for equal studies."""
    plain = json.loads(json.dumps(dataclasses.asdict(self)))
    if not self.generated_windows:
      # Studies that were run before there was the field keep their names.
      del plain['generated_windows']
    return plain

  @property
  def digest(self) -> str:
    """Eight hex digits that name this study."""
    text = json.dumps(self.as_dict(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


class FieldError(ValueError):
  """A bad value of one parameter; `word` is looked for to find its line."""

  def __init__(self, field: str, message: str, word: Any = None):
    super().__init__(message)
    # Gin raises a copy with its own text added; attributes come through.
    self.field, self.message, self.word = field, message, word


def label_of(name: str, options: Mapping[str, Any]) -> str:
  """A short label: `gptq w4 g128`, other options spelled out.

  Examples:
    >>> label_of('gptq', {'bits': 4, 'group': 128, 'symmetric': True})
    'gptq w4 g128 symmetric'
  """
  words = [name]
  for key, value in options.items():
    if key in ('bits', 'group') and isinstance(value, int):
      words.append(f'{"w" if key == "bits" else "g"}{value}')
    elif isinstance(value, bool):
      words.append(key if value else f'no {key}')
    elif key == 'activations':
      words.append(_activations_label(value))
    elif key == 'learning':
      given = value if isinstance(value, Mapping) else {}
      words.append(label_of('learned', given))
    else:
      words.append(f'{key}={value}')
  return ' '.join(words)


def _activations_label(value: Any) -> str:
  """As `Activations.label`, of options not checked yet: 'a8 mx_int'."""
  if not isinstance(value, Mapping):
    return str(value)
  rest = {k: v for k, v in value.items() if k not in ('format', 'bits')}
  words = [f'a{value["bits"]}'] if 'bits' in value else []
  return ' '.join([*words, label_of(str(value.get('format')), rest)])


def _ordered(name: Any, options: Mapping[str, Any]) -> dict[str, Any]:
  """Options in the order of the recipe's, not as they were written.

  Configs that gin writes have them sorted: a run that is resumed from its own
  would be another.
  """
  from mq_jax import activations, recipes  # late: a second of imports

  try:
    known = recipes.parameters(name)
  except (ValueError, TypeError):  # said where the row is tried
    known = ()
  found = _by(options, (*known, 'activations', 'learning'))
  for key, kind in (
    ('activations', activations.Activations),
    ('learning', recipes.Learning),
  ):
    if isinstance(found.get(key), Mapping):
      fields = [field.name for field in dataclasses.fields(kind)]
      found[key] = _by(found[key], fields)
  return found


def _by(options: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
  """Options by the order of names, others behind them by the alphabet."""
  place = {name: i for i, name in enumerate(names)}
  order = lambda key: (place.get(key, len(place)), str(key))
  return {key: options[key] for key in sorted(options, key=order)}


def _row(entry: Any) -> Row:
  """A row from its gin value: a name, or a dict with 'recipe' and options."""
  if isinstance(entry, str):
    entry = {'recipe': entry}
  if not isinstance(entry, Mapping) or 'recipe' not in entry:
    raise FieldError(
      'recipes',
      f"a row is a name or {{'recipe': name, option: value, ...}}, got "
      f'{entry!r}',
    )
  options = {k: v for k, v in entry.items() if k not in ('recipe', 'label')}
  name = entry['recipe']
  options = _ordered(name, options)
  label = entry.get('label') or label_of(name, options)
  if not isinstance(name, str) or not isinstance(label, str):
    raise FieldError('recipes', f'names and labels are text, got {entry!r}')
  try:
    json.dumps(options)
  except TypeError as error:
    raise FieldError(
      'recipes', f'{label}: options are plain data: {error}'
    ) from (error)
  return Row(label, name, tuple(options.items()))


def _check_recipe(row: Row) -> None:
  from mq_jax import recipes  # late: `mq --help` needs no jax

  try:
    recipes.make(row.name, **dict(row.options))
  except (ValueError, TypeError) as error:
    # The word is what to look for in the file: the first of these it holds.
    words = [*(k for k, _ in row.options if k in str(error)), row.name]
    raise FieldError('recipes', f'{row.label}: {error}', words) from error


def _number(field: str, value: Any, least: int) -> int:
  if isinstance(value, bool) or not isinstance(value, int) or value < least:
    raise FieldError(field, f'needs a whole number >= {least}, got {value!r}')
  return value


def _path(field: str, value: Any) -> str | None:
  if value is not None and not isinstance(value, str):
    raise FieldError(field, f'needs the path of a text file, got {value!r}')
  return value


def _mesh(value: Any) -> str | None:
  if value is None:
    return None
  if not isinstance(value, str):
    raise FieldError('mesh', f"needs the form 'data=4,model=2', got {value!r}")
  from mq_jax import sharding  # late: `mq --help` needs no jax

  try:
    sharding.read_mesh(value)
  except ValueError as error:
    raise FieldError('mesh', str(error), value) from error
  return value


def compare(
  models=gin.REQUIRED,
  recipes=gin.REQUIRED,
  text=None,
  calibration_text=None,
  windows=64,
  calibration_windows=64,
  batch=8,
  artifact=None,
  seed=0,
  mesh=None,
  generated_windows=0,
) -> Study:
  """Compare recipes on models: what `mq run` runs.

  Args:
    models: Bundled models, Hugging Face folders or artifacts.
    recipes: Rows: a recipe's name, or a dict with 'recipe', its options and
      optionally 'label'.
    text: UTF-8 file to evaluate on; None takes the docs corpus, test split.
    calibration_text: UTF-8 file to calibrate on; None takes the docs corpus,
      train split.
    windows: Evaluated windows of the model's context length.
    calibration_windows: Windows to calibrate on, drawn by `seed`.
    batch: Windows that go through the model at once.
    artifact: Label of the row whose packed artifact is kept, on the first of
      the models.
    seed: Seed of all random choices.
    mesh: Devices that share the work, as 'data=4,model=2': batches are divided
      one way, weights the other. None is one device.
    generated_windows: Windows to calibrate on beside those of the text, which
      the model itself writes (LLM-QAT, arXiv 2305.17888, has no others).

  Returns:
    The study, every name and value checked.
  """
  for field, value in (('models', models), ('recipes', recipes)):
    if not isinstance(value, list | tuple) or not value:
      raise FieldError(field, f'needs a list of at least one, got {value!r}')
  for model in models:
    if not isinstance(model, str):
      raise FieldError('models', f'names and folders are text, got {model!r}')
  rows = tuple(_row(entry) for entry in recipes)
  for field, names in (
    ('models', models),
    ('recipes', [r.label for r in rows]),
  ):
    twice = next((n for i, n in enumerate(names) if n in names[:i]), None)
    if twice is not None:
      hint = "; give one a 'label'" if field == 'recipes' else ''
      raise FieldError(field, f'{twice!r} stands there twice{hint}', twice)
  for row in rows:
    _check_recipe(row)
  labels = [row.label for row in rows]
  if artifact is not None and artifact not in labels:
    raise FieldError(
      'artifact',
      f'{artifact!r} is not the label of a row{nearest(artifact, labels)}',
      artifact,
    )
  return Study(
    models=tuple(models),
    rows=rows,
    text=_path('text', text),
    calibration_text=_path('calibration_text', calibration_text),
    windows=_number('windows', windows, 1),
    calibration_windows=_number('calibration_windows', calibration_windows, 1),
    batch=_number('batch', batch, 1),
    artifact=artifact,
    seed=_number('seed', seed, 0),
    mesh=_mesh(mesh),
    generated_windows=_number('generated_windows', generated_windows, 0),
  )


_compare = gin.configurable('compare', module='mq_jax.lab')(compare)


def sweep(
  space=gin.REQUIRED,
  sampler='grid',
  objectives=('bits_per_byte',),
  trials=None,
  at_once=16,
  seed=0,
) -> dict[str, Any]:
  """How `mq sweep` varies a study; see `mq_jax.lab.sweeping.space`.

  Args:
    space: Names of macros or of parameters of `compare`, and their values: a
      list, or a range such as ('log', 0.001, 0.1).
    sampler: 'grid', 'sobol', 'random', 'tpe' or 'nsga2'.
    objectives: Fields of a trial's results, all to be made small.
    trials: How many; a grid has its own number.
    at_once: Most settings side by side in one program.
    seed: Of the sampler.

  Returns:
    The arguments, unchecked.
  """
  return dict(locals())


_sweep = gin.configurable('sweep', module='mq_jax.lab')(sweep)


def _sources(
  path: str | pathlib.Path, bindings: Sequence[str]
) -> list[statements.Source]:
  return [statements.read(path)] + [
    statements.Source(f'--set {b!r}', b, False) for b in bindings
  ]


@contextlib.contextmanager
def _resolved(
  path: str | pathlib.Path,
  bindings: Sequence[str],
  default_text: str | None,
  roots: Sequence[str],
) -> Iterator[statements.Found]:
  """Gin with a file and bindings parsed; errors inside get their line."""
  sources = _sources(path, bindings)
  with statements.clean_gin():
    found = statements.scan(sources, roots)
    every = list(bindings)
    if default_text is not None and 'compare.text' not in found.bound:
      every.append(f'compare.text = {default_text!r}')
    try:
      gin.parse_config_files_and_bindings(
        [str(path)], every, skip_unknown=False
      )
      yield found
    except FieldError as error:
      name = error.field if '.' in error.field else f'compare.{error.field}'
      source, line = found.bound.get(name, (sources[0], 1))
      if error.word is not None:
        line = source.line_of(line, error.word)
      raise source.at(line, f'{name}: {error.message}') from None
    except ConfigError:
      raise
    except Exception as error:
      needed = ['compare.models', 'compare.recipes']
      needed += ['sweep.space'] if 'sweep' in roots else []
      missing = [
        name
        for name in needed
        if name not in found.bound and 'Required' in str(error)
      ]
      if missing:
        names = ' and '.join(missing)
        raise sources[0].at(1, f'{names} must be set') from error
      raise sources[0].at(1, str(error)) from error


def load(
  path: str | pathlib.Path,
  bindings: Sequence[str] = (),
  *,
  default_text: str | None = None,
) -> tuple[Study, str]:
  """Read a config file and bindings.

  Args:
    path: A gin file.
    bindings: Gin bindings that override it, as from `--set`.
    default_text: Evaluation text where neither binds one.

  Returns:
    The study, and the operative config as gin text that `load` reads again.

  Raises:
    ConfigError: for whatever is wrong, in one line.
  """
  with _resolved(path, bindings, default_text, ('compare',)):
    study = _compare()
    operative = gin.operative_config_str()
  return study, operative


class SweepFile:
  """A study whose values vary, as its file has it.

  Attributes:
    base: The study as the file's own bindings make it.
    options: Arguments of `sweep`, unchecked.
    operative: Both as gin text, macros resolved in none.
    macros: Names that the space may bind, beside parameters of `compare`.
  """

  def __init__(
    self,
    path: str | pathlib.Path,
    bindings: Sequence[str] = (),
    default_text: str | None = None,
  ):
    self._path, self._bindings = path, tuple(bindings)
    self._default_text = default_text
    with self._open() as found:
      self.options = _sweep()
      self.base = _compare()
      self.operative = gin.operative_config_str()
    self.macros = tuple(found.macros)
    self._found = found

  def _open(self, setting: Sequence[str] = ()):
    return _resolved(
      self._path,
      [*self._bindings, *setting],
      self._default_text,
      ('compare', 'sweep'),
    )

  def error(self, field: str, message: str, word: Any = None) -> ConfigError:
    """An error at the line that binds a parameter of `sweep`."""
    name = f'sweep.{field}'
    source, line = self._found.bound.get(name, (statements.read(self._path), 1))
    if word is not None:
      line = source.line_of(line, word)
    return source.at(line, f'{name}: {message}')

  def check_name(self, name: str, word: str) -> None:
    """Raise unless a name of the space can be bound and has an effect.

    Args:
      name: Of a macro, or 'compare.parameter'.
      word: As it stands in the file.
    """
    scope, _, parameter = name.partition('.')
    if parameter:
      known = set(inspect.signature(compare).parameters)
      if scope != 'compare' or parameter not in known - {'models', 'recipes'}:
        names = sorted(f'compare.{x}' for x in known - {'models', 'recipes'})
        hint = nearest(name, names)
        raise self.error('space', f'nothing to bind is {name!r}{hint}', word)
      return
    if name not in self.macros:
      hint = nearest(name, sorted(self.macros))
      raise self.error(
        'space', f'{name!r} is neither a macro nor compare.NAME{hint}', word
      )
    if f'%{name}' not in self._found.references:
      raise self.error('space', f'no value uses %{name}, so it changes nothing')
    source, line = self._found.macros[name]
    if not source.is_file:
      raise source.at(
        line, f'{name} is swept by sweep.space; bind that instead'
      )

  def study(self, setting: Mapping[str, Any]) -> Study:
    """The study with values bound to names of the space.

    Raises:
      ConfigError: at the line of `sweep.space`, for values it can't take.
    """
    bindings = [f'{name} = {value!r}' for name, value in setting.items()]
    try:
      with self._open(bindings):
        return _compare()
    except ConfigError as error:
      where = ', '.join(bindings)
      message = str(error).partition(': ')[2]
      raise self.error('space', f'{where}: {message}') from error


def options(assignments: Sequence[str], flag: str = '--set') -> dict[str, Any]:
  """Options from `name=value` texts, values as gin would read them.

  A bare word is text: `axis=out` and `axis='out'` are the same. Names may
  have a dot, as `memory.l2_bytes`.

  Args:
    assignments: The texts.
    flag: Of the command line, for messages.

  Raises:
    ConfigError: for a text of another form, or a name given twice.

  Examples:
    >>> options(['group=64', 'axis=out', 'prune=False'])
    {'group': 64, 'axis': 'out', 'prune': False}
  """
  found: dict[str, Any] = {}
  for assignment in assignments:
    name, equals, value = (part.strip() for part in assignment.partition('='))
    named = all(part.isidentifier() for part in name.split('.'))
    if not equals or not named or not value:
      raise ConfigError(f'{flag} {assignment!r}: needs the form option=value')
    if name in found:
      raise ConfigError(f'{flag} {assignment!r}: {name} is set twice')
    found[name] = literal(value)
  return found


def named(text: str, flag: str, key: str) -> dict[str, Any]:
  """A name with options, `NAME:option=value,...`, as a mapping.

  Args:
    text: What was written.
    flag: Of the command line, for messages.
    key: Under which the name is put.

  Examples:
    >>> named('mx_int:bits=4,smooth=0.7', '--activations', 'format')
    {'format': 'mx_int', 'bits': 4, 'smooth': 0.7}
  """
  name, _, rest = (part.strip() for part in text.partition(':'))
  if not name:
    raise ConfigError(f'{flag} {text!r}: needs a name')
  given = options(rest.split(','), flag) if rest else {}
  return {key: name} | given


def literal(text: str) -> Any:
  """A Python value, or the text itself where it is none."""
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text
