"""A study in a size that takes seconds: does everything in it run?"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from mq_jax import recipes
from mq_jax.lab import config

_WINDOWS = 2
_STEPS = 2  # of learning
_FALLBACK = 'reference'


def tiny(study: config.Study) -> tuple[config.Study, tuple[str, ...]]:
  """A study of the same kind on one model and two windows.

  Rows that bring nothing new are left out: those whose recipe, names of
  options and words given to them are all in earlier rows. Other numbers are
  seldom other programs.

  Args:
    study: Any study. Of its models the first is kept, or the reference model
      where that is not there; texts that are not there are left out.

  Returns:
    The small study, and what was changed, in words.
  """
  said = []
  model = study.models[0]
  if not (_bundled(model) or os.path.exists(model)):
    said.append(f'{model} is not there: {_FALLBACK} instead')
    model = _FALLBACK
  texts = {}
  for field in ('text', 'calibration_text'):
    path = texts[field] = getattr(study, field)
    if path is not None and not os.path.exists(path):
      said.append(f'{path} is not there: the docs corpus instead')
      texts[field] = None
  rows = _cover(study.rows)
  said.append(
    f'{len(rows)} of {len(study.rows)} rows on {model}, {_WINDOWS} windows'
  )
  labels = [row.label for row in rows]
  small = dataclasses.replace(
    study,
    models=(model,),
    rows=tuple(map(_short, rows)),
    windows=min(study.windows, _WINDOWS),
    calibration_windows=min(study.calibration_windows, _WINDOWS),
    generated_windows=min(study.generated_windows, _WINDOWS),
    batch=min(study.batch, _WINDOWS),
    mesh=None,
    artifact=study.artifact if study.artifact in labels else None,
    **texts,
  )
  return small, tuple(said)


def _bundled(model: str) -> bool:
  from mq_jax.models import bundled  # late: a second of imports

  return model in bundled.names()


def _short(row: config.Row) -> config.Row:
  """A row that learns, in few steps."""
  options = dict(row.options)
  made = recipes.make(row.name, **options).learning
  if made is None:
    return row
  few = {
    'steps': min(made.steps, _STEPS),
    'finish': min(made.finish, _STEPS),
    'batch': 1,
  }
  options['learning'] = dataclasses.replace(made, **few).to_json()
  return dataclasses.replace(row, options=tuple(options.items()))


def _cover(rows: Sequence[config.Row]) -> tuple[config.Row, ...]:
  """The rows that bring a recipe, an option, or a word that is new."""
  seen: set[Any] = set()
  kept = []
  for row in rows:
    brings = {(row.name,)}
    for name, value in row.options:
      word = value if isinstance(value, str | bool) else None
      brings.add((row.name, name, word))
    if not brings <= seen:
      kept.append(row)
      seen |= brings
  return tuple(kept)


def operative(study: config.Study) -> str:
  """Gin text of a study, as `config.load` reads it."""
  rows = [
    {'recipe': row.name, 'label': row.label, **dict(row.options)}
    for row in study.rows
  ]
  values = {
    field.name: getattr(study, field.name)
    for field in dataclasses.fields(study)
    if field.name != 'rows'
  }
  values['models'] = list(study.models)
  lines = [f'compare.{name} = {value!r}' for name, value in values.items()]
  entries = ''.join(f'  {row!r},\n' for row in rows)
  return '\n'.join([*lines, f'compare.recipes = [\n{entries}]']) + '\n'
