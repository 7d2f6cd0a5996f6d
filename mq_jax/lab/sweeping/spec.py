"""From a gin file to one checked `Sweep`: a study, its space, who samples."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from mq_jax.lab import config
from mq_jax.lab.sweeping import space as space_lib

# Fields of a result that may be made small.
OBJECTIVES = (
  'bits_per_byte',
  'nll',
  'perplexity',
  'ebw',
  'ebw_paper',
  'weight_mse',
  'output_error',
)

# More settings than this are checked by the ends of the axes only: reading a
# config takes some milliseconds.
_CHECKED = 1024


class Sweep:
  """A sweep, complete and checked; made by `load`.

  Attributes:
    file: The study and its bindings.
    space: What varies.
    sampler: Who chooses.
    objectives: Fields of a trial's result, made small.
    trials: How many in all.
    at_once: Most settings in one program.
    seed: Of the sampler.
    design: All settings, where the sampler knows them in advance.
    corners: Settings that show what the space can do.
  """

  def __init__(self, file: config.SweepFile, trials: int | None):
    self.file = file
    given = dict(file.options)
    if trials is not None:
      given['trials'] = trials
    self.sampler = self._sampler(given['sampler'])
    self.objectives = self._objectives(given['objectives'])
    for field, least in (('at_once', 1), ('seed', 0)):
      setattr(self, field, self._number(field, given[field], least))
    count = given['trials']
    if count is not None:
      count = self._number('trials', count, 1)
    elif self.sampler != 'grid':
      raise file.error(
        'trials', f'must be set for sampler {self.sampler!r} (or --trials N)'
      )
    if file.base.artifact is not None:
      raise config.ConfigError(
        'compare.artifact: a sweep keeps no artifact; leave it out, and mq '
        'quantize with the setting you choose'
      )
    try:
      self.space = space_lib.make_space(given['space'], self.sampler)
      for axis in self.space.axes:
        for name in axis.names:
          file.check_name(name, axis.key)
      self.design: list[space_lib.Setting] | None = None
      if self.sampler in space_lib.DESIGNS:
        self.design = self.space.design(self.sampler, count, self.seed)
        count = len(self.design)
    except space_lib.SpaceError as error:
      raise file.error('space', str(error), error.word) from error
    self.trials = count
    self.corners = list(self.space.corners())
    every = self.corners
    if self.design is not None and len(self.design) <= _CHECKED:
      every = [*every, *self.design]
    for setting in every:
      self.study(setting)  # raises for values that a recipe refuses

  def study(self, setting: Mapping[str, Any]) -> config.Study:
    """The study of a setting."""
    return self.file.study(setting)

  def as_dict(self) -> dict[str, Any]:
    """What tells sweeps apart; the number of trials does not: it may grow."""
    given = self.file.options
    data = {
      'study': self.file.base.as_dict(),
      'space': [dataclasses.asdict(axis) for axis in self.space.axes],
      'rows': [
        [self.study(setting).as_dict(), setting] for setting in self.corners
      ],
      'sampler': self.sampler,
      'objectives': list(self.objectives),
      'at_once': self.at_once,
      'seed': given['seed'],
    }
    return json.loads(json.dumps(data))

  @property
  def digest(self) -> str:
    """Eight hex digits that name this sweep."""
    text = json.dumps(self.as_dict(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]

  def _sampler(self, name: Any) -> str:
    known = (*space_lib.DESIGNS, *space_lib.ADAPTIVE)
    if name not in known:
      raise self.file.error(
        'sampler', f'{name!r} is none{config.nearest(name, known)}', name
      )
    return name

  def _objectives(self, given: Any) -> tuple[str, ...]:
    names = (given,) if isinstance(given, str) else given
    if not isinstance(names, list | tuple) or not names:
      raise self.file.error('objectives', f'needs names, got {given!r}')
    for i, name in enumerate(names):
      if name not in OBJECTIVES:
        hint = config.nearest(name, OBJECTIVES)
        raise self.file.error(
          'objectives', f'{name!r} is no field of a result{hint}', name
        )
      if name in names[:i]:
        raise self.file.error('objectives', f'{name!r} stands there twice')
    return tuple(names)

  def _number(self, field: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
      raise self.file.error(
        field, f'needs a whole number >= {least}, got {value!r}'
      )
    return value


def load(
  path: str | pathlib.Path,
  bindings: Sequence[str] = (),
  *,
  trials: int | None = None,
  default_text: str | None = None,
) -> Sweep:
  """Read a sweep from a gin file and bindings.

  Every setting that is known in advance is made, and the ends of all ranges.

  Args:
    path: A gin file that binds `compare` and `sweep`.
    bindings: Gin bindings that override it, as from `--set`.
    trials: In place of the file's.
    default_text: Evaluation text where neither binds one.

  Raises:
    ConfigError: for whatever is wrong, in one line.
  """
  return Sweep(config.SweepFile(path, bindings, default_text), trials)
