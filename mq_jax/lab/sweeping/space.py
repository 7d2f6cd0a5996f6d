"""The settings of a sweep: which names take which values, and who chooses.

A space maps names to values. A name is that of a macro, or 'compare.NAME';
several names with commas between them go together, value by value (zip):

    sweep.space = {
      'sigma': ('log', 2.0, 4.0, 5),          # 5 points; without, all between
      'damping': [0.003, 0.01, 0.03],
      'bits, group': [(2, 64), (3, 128)],
      'compare.seed': ('int', 0, 3),
    }

A list is a choice among its values; ('linear', low, high[, points]),
('log', low, high[, points]) and ('int', low, high[, step]) are ranges, their
ends included. Points are what a grid needs; the other samplers take all that
lies between the ends.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

# Samplers whose settings are known before the first is tried, and those that
# learn from the results of earlier ones.
DESIGNS = ('grid', 'sobol', 'random')
ADAPTIVE = ('tpe', 'nsga2')

_RANGES = ('linear', 'log', 'int')

# What one sweep may hold: beyond it is a slip of the pen.
_MOST = 100_000

Setting = dict[str, Any]


class SpaceError(ValueError):
  """A space that can't be sampled; `word` is what to look for in the file."""

  def __init__(self, message: str, word: str | None = None):
    super().__init__(message)
    self.word = word


@dataclasses.dataclass(frozen=True)
class Axis:
  """One direction of a space.

  Attributes:
    key: As it stands in the file.
    names: Bound together.
    values: A tuple of values a choice, each with a value a name; empty for a
      range.
    kind: 'choice', 'linear', 'log' or 'int'.
    low: End of a range.
    high: The other.
    points: Of a grid; of 'int' the step. None where not given.
  """

  key: str
  names: tuple[str, ...]
  kind: str
  values: tuple[tuple[Any, ...], ...] = ()
  low: float = 0.0
  high: float = 0.0
  points: int | None = None

  def grid(self) -> list[tuple[Any, ...]]:
    """All values, in order.

    Raises:
      SpaceError: for a range without points.
    """
    if self.kind == 'choice':
      return list(self.values)
    if self.kind == 'int':
      return [(i,) for i in self._whole]
    if self.points is None:
      raise SpaceError(
        f'{self.key!r}: a grid needs points, as in ({self.kind!r}, '
        f'{self.low!r}, {self.high!r}, 5)',
        self.key,
      )
    return [(self.at(x),) for x in np.linspace(0.0, 1.0, self.points)]

  @property
  def _whole(self) -> range:
    """The numbers of a range of 'int'."""
    return range(self.low, self.high + 1, self.points or 1)

  def at(self, share: float) -> Any:
    """The value at a share 0..1 of a range of real numbers."""
    if share in (0.0, 1.0):  # exactly the ends
      return self.high if share else self.low
    if self.kind == 'log':
      low, high = math.log(self.low), math.log(self.high)
      return float(math.exp(low + share * (high - low)))
    return float(self.low + share * (self.high - self.low))

  def pick(self, share: float) -> tuple[Any, ...]:
    """The values at a share 0 <= share < 1 of the axis, choices alike."""
    if self.kind in ('linear', 'log'):
      return (self.at(share),)
    if self.kind == 'int':
      return (self._whole[int(share * len(self._whole))],)
    return self.values[int(share * len(self.values))]

  def ends(self) -> list[tuple[Any, ...]]:
    """Values to be checked before any work: all of a choice, else the ends."""
    if self.kind == 'choice':
      return list(self.values)
    if self.kind == 'int':
      return [(self._whole[0],), (self._whole[-1],)]
    return [(self.low,), (self.high,)]

  def distribution(self) -> Any:
    """As Optuna has it."""
    from optuna import distributions as found

    if self.kind == 'choice':
      return found.CategoricalDistribution(
        [self._as_param(v) for v in self.values]
      )
    if self.kind == 'int':
      low, high = self._whole[0], self._whole[-1]
      return found.IntDistribution(low, high, step=self.points or 1)
    return found.FloatDistribution(self.low, self.high, log=self.kind == 'log')

  def _as_param(self, values: tuple[Any, ...]) -> Any:
    """Values as one that Optuna stores: numbers and texts as they are."""
    plain = values[0] if len(values) == 1 else None
    if isinstance(plain, str | int | float):
      return plain
    return json.dumps(values)

  def to_param(self, setting: Setting) -> Any:
    """The axis' part of a setting, as Optuna stores it."""
    values = tuple(setting[name] for name in self.names)
    return self._as_param(values) if self.kind == 'choice' else values[0]

  def from_param(self, param: Any) -> tuple[Any, ...]:
    """Undo `to_param`."""
    if self.kind != 'choice':
      return (param,)
    return next(v for v in self.values if self._as_param(v) == param)


@dataclasses.dataclass(frozen=True)
class Space:
  """The axes of a sweep."""

  axes: tuple[Axis, ...]

  @property
  def names(self) -> tuple[str, ...]:
    """All names that are bound."""
    return tuple(name for axis in self.axes for name in axis.names)

  @property
  def ranges(self) -> dict[str, Axis]:
    """Axes of one name and numbers that are drawn on a scale, by name."""
    return {a.names[0]: a for a in self.axes if a.kind != 'choice'}

  def setting(self, values: Sequence[tuple[Any, ...]]) -> Setting:
    """A setting from the values of each axis."""
    return {
      name: value
      for axis, chosen in zip(self.axes, values, strict=True)
      for name, value in zip(axis.names, chosen, strict=True)
    }

  def params(self, setting: Setting) -> dict[str, Any]:
    """A setting as Optuna stores it."""
    return {axis.key: axis.to_param(setting) for axis in self.axes}

  def from_params(self, params: Mapping[str, Any]) -> Setting:
    """Undo `params`."""
    return self.setting([a.from_param(params[a.key]) for a in self.axes])

  def distributions(self) -> dict[str, Any]:
    """Of all axes, as Optuna has them."""
    return {axis.key: axis.distribution() for axis in self.axes}

  def corners(self) -> Iterator[Setting]:
    """Settings that show what the space can do: each end of each axis alone,
    the others at their first, and the last of all together."""
    ends = [axis.ends() for axis in self.axes]
    first = [values[0] for values in ends]
    yield self.setting(first)
    for i, values in enumerate(ends):
      for value in values[1:]:
        yield self.setting([*first[:i], value, *first[i + 1 :]])
    if len(ends) > 1:
      yield self.setting([values[-1] for values in ends])

  def design(
    self, sampler: str, trials: int | None, seed: int
  ) -> list[Setting]:
    """The settings of a sampler that knows them in advance.

    More trials of the same seed begin with the same settings.

    Args:
      sampler: One of `DESIGNS`.
      trials: How many; None is all of a grid. A grid of more is cut.
      seed: Of 'sobol' (its scrambling) and 'random'.

    Raises:
      SpaceError: for a range without points in a grid, or too many settings.
    """
    if sampler == 'grid':
      parts = [axis.grid() for axis in self.axes]
      total = math.prod(map(len, parts))
      if min(total, trials or total) > _MOST:
        raise SpaceError(f'the grid has {total} settings, more than {_MOST}')
      every = itertools.islice(itertools.product(*parts), trials)
      return [self.setting(values) for values in every]
    if sampler == 'sobol':
      from scipy.stats import qmc  # late: a second of imports

      engine = qmc.Sobol(len(self.axes), scramble=True, rng=seed)
      # Powers of two are what the sequence is balanced in; scipy warns of
      # others, but a prefix is what a sweep that may grow has to take.
      shares = engine.random_base2(math.ceil(math.log2(trials)))[:trials]
    else:
      rng = np.random.default_rng(seed)
      shares = rng.random((trials, len(self.axes)))
    return [
      self.setting([a.pick(float(x)) for a, x in zip(self.axes, row)])
      for row in shares
    ]


def _axis(key: str, given: Any) -> Axis:
  """An axis from an entry of the space."""
  names = tuple(name.strip() for name in str(key).split(','))
  fail = lambda message: SpaceError(f'{key!r}: {message}', key)
  if not isinstance(key, str) or not all(names):
    raise fail('needs a name, or several with commas between them')
  if isinstance(given, tuple) and given and given[0] in _RANGES:
    if len(names) > 1:
      raise fail('several names take a list of tuples, one value a name')
    return _range(names[0], given, fail)
  if not isinstance(given, list):
    raise fail(
      f"needs a list of values, or a range such as ('log', 0.001, 0.1), "
      f'got {given!r}'
    )
  if not given:
    raise fail('the list is empty')
  values = []
  for value in given:
    one = (value,) if len(names) == 1 else value
    if not isinstance(one, list | tuple) or len(one) != len(names):
      raise fail(f'{len(names)} names take {len(names)} values, got {value!r}')
    values.append(tuple(one))
  twice = next((v for i, v in enumerate(values) if v in values[:i]), None)
  if twice is not None:
    raise fail(f'{", ".join(map(repr, twice))} stands there twice')
  try:
    json.dumps(values)
  except TypeError as error:
    raise fail(f'values are plain data: {error}') from error
  return Axis(key, names, 'choice', values=tuple(values))


def _range(name: str, given: tuple, fail) -> Axis:
  kind, *rest = given
  number = int if kind == 'int' else int | float
  ok = len(rest) in (2, 3) and all(
    isinstance(x, number) and not isinstance(x, bool) and math.isfinite(x)
    for x in rest[:2]
  )
  if not ok or not rest[0] < rest[1]:
    raise fail(
      f'a range is ({kind!r}, low, high'
      f'{", step" if kind == "int" else "[, points]"}), low < high, got '
      f'{given!r}'
    )
  low, high, *more = rest
  if kind == 'log' and low <= 0:
    raise fail(f'a logarithmic range begins above 0, got {given!r}')
  least = 1 if kind == 'int' else 2
  points = more[0] if more else None
  if points is not None and (
    isinstance(points, bool) or not isinstance(points, int) or points < least
  ):
    what = 'step' if kind == 'int' else 'number of points'
    raise fail(f'the {what} is a whole number >= {least}, got {points!r}')
  if kind != 'int':
    low, high = float(low), float(high)
  return Axis(name, (name,), kind, low=low, high=high, points=points)


def make_space(given: Any, sampler: str) -> Space:
  """A space from its value in gin.

  Args:
    given: Names to values, see the module.
    sampler: One of `DESIGNS` and `ADAPTIVE`.

  Raises:
    SpaceError: for whatever is wrong with it.
  """
  if not isinstance(given, Mapping) or not given:
    raise SpaceError(
      f"needs at least one name and its values, as in {{'sigma': [2.0, "
      f'3.0]}}, got {given!r}'
    )
  axes = tuple(_axis(key, value) for key, value in given.items())
  names = [name for axis in axes for name in axis.names]
  twice = next((n for i, n in enumerate(names) if n in names[:i]), None)
  if twice is not None:
    raise SpaceError(f'{twice!r} stands there twice', twice)
  for axis in axes:
    if sampler == 'grid':
      axis.grid()
    elif axis.kind in ('linear', 'log') and axis.points is not None:
      raise SpaceError(
        f'{axis.key!r}: points are those of a grid; leave {axis.points} out '
        f'for sampler {sampler!r}, or list the values',
        axis.key,
      )
  return Space(axes)
