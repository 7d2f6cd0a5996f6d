"""Which numbers of which recipes are learned, and in what coordinates."""

import dataclasses
import difflib
import fnmatch
import inspect
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax import recipes as recipes_lib
from mq_jax.recipes import Recipe

# Where an option may go, ends excluded. A clip beyond 1 gains nothing, but a
# coordinate must not end where many recipes start; within one sigma a third
# of the weights would be outliers, more than MicroScopiQ has room for.
RANGES = {
  'clip': (0.0, 1.25),
  'sigma': (1.0, math.inf),
  'threshold': (0.0, math.inf),
  'log_probability': (-math.inf, math.inf),
  'damping': (0.0, 1.0),
}


@dataclasses.dataclass(frozen=True)
class Leaf:
  """A number that is learned.

  Its coordinate is unbounded: the logarithm of the distance to the one end of
  its range, the logit between two, the number itself without any.

  Attributes:
    candidate: Number of the recipe.
    option: Of the recipe's factory.
    index: Of the leaf among those of the recipe.
    start: Value in the recipe.
    low: End of its range, which it does not reach.
    high: The other.
  """

  candidate: int
  option: str
  index: int
  start: float
  low: float
  high: float

  def number(self, raw):
    """The number at a coordinate; numpy's for numpy's, jax's for jax's."""
    xp = jnp if isinstance(raw, jax.Array) else np
    low, high = self.low, self.high
    if math.isinf(low) and math.isinf(high):
      return raw
    if math.isinf(high):
      return low + xp.exp(raw)
    if math.isinf(low):
      return high - xp.exp(raw)
    return low + (high - low) / (1.0 + xp.exp(-raw))

  def coordinate(self, number: float) -> float:
    """Undo `number`."""
    low, high = self.low, self.high
    if math.isinf(low) and math.isinf(high):
      return number
    if math.isinf(high):
      return math.log(number - low)
    if math.isinf(low):
      return math.log(high - number)
    return math.log((number - low) / (high - number))


@dataclasses.dataclass(frozen=True)
class Leaves:
  """The numbers of recipes that are learned; hashable, so may be static.

  Attributes:
    recipes: The candidates as they are at the start.
    entries: The numbers, e of them.
    shared: One value of each number for all sites, or one a site.
    width: Half of the interval of the secants, in coordinates: a share of the
      distance to the end of a number with one.
  """

  recipes: tuple[Recipe, ...]
  entries: tuple[Leaf, ...]
  shared: bool = False
  width: float = 0.2

  def begin(self, sites: int = 1) -> np.ndarray:
    """Coordinates of the start, f64[e, sites], or f64[e, 1] where shared."""
    start = [[leaf.coordinate(leaf.start)] for leaf in self.entries]
    return np.repeat(np.array(start), 1 if self.shared else sites, axis=1)

  def numbers(self, raw: np.ndarray) -> dict[str, np.ndarray]:
    """The numbers by 'label.option', from coordinates f[e, ...]."""
    return {
      f'{self.recipes[leaf.candidate].label}.{leaf.option}': np.asarray(
        leaf.number(row)
      )
      for leaf, row in zip(self.entries, raw, strict=True)
    }

  def recipe(
    self, candidate: int, raw: jax.Array, other: Mapping[int, jax.Array]
  ) -> Recipe:
    """A recipe at coordinates f32[its numbers], which may be traced.

    Args:
      candidate: Its number.
      raw: Coordinates of what it learns.
      other: Leaves to be replaced, by index: those of a recipe that differs
        in numbers only.
    """
    parts, tree = jax.tree.flatten(self.recipes[candidate])
    for index, x in other.items():
      parts[index] = x
    mine = [leaf for leaf in self.entries if leaf.candidate == candidate]
    for leaf, x in zip(mine, raw, strict=True):
      parts[leaf.index] = leaf.number(x)
    return jax.tree.unflatten(tree, parts)

  def remade(self, candidate: int, numbers: Mapping[str, float]) -> Recipe:
    """A recipe as its factory makes it with other numbers."""
    return _remade(self.recipes[candidate], numbers)


def _remade(recipe: Recipe, numbers: Mapping[str, float]) -> Recipe:
  return recipes_lib.make(recipe.name, **{**dict(recipe.options), **numbers})


def _options(recipe: Recipe) -> dict:
  """Options of a recipe's factory, given and default."""
  if recipe.name not in recipes_lib.NAMES:
    raise ValueError(
      f'learnable: recipe {recipe.label!r} is not one of '
      f'{", ".join(recipes_lib.NAMES)}, so a plan could not store its numbers'
    )
  factory = getattr(recipes_lib, recipe.name)
  known = inspect.signature(factory).parameters.values()
  return {p.name: p.default for p in known} | dict(recipe.options)


def _is_number(value) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _index(recipe: Recipe, option: str, value: float, ends) -> int:
  """Which leaf of a recipe is an option: the one that changes with it."""
  what = f'learnable: {option!r} of {recipe.label}'
  low, high = ends
  # Another value nearby and within the range.
  probe = value + 0.01 * min(high - value, value - low, 1.0)
  bare = lambda r: jax.tree.flatten(dataclasses.replace(r, options=()))
  try:
    other, other_tree = bare(_remade(recipe, {option: probe}))
  except (ValueError, TypeError) as error:
    raise ValueError(f'{what} is not a number to be learned: {error}') from None
  parts, tree = bare(recipe)
  if tree != other_tree:
    raise ValueError(f'{what} is static: it decides the program')
  pairs = zip(parts, other, strict=True)
  changed = [i for i, (a, b) in enumerate(pairs) if a != b]
  if len(changed) != 1 or other[changed[0]] != probe:
    raise ValueError(f'{what} is not one of its numbers as it stands')
  return changed[0]


def learnable(
  recipes: Sequence[Recipe],
  names: Sequence[str],
  *,
  shared: bool = False,
  ranges: Mapping[str, tuple[float, float]] | None = None,
  width: float = 0.2,
) -> Leaves:
  """Choose the numbers of candidates that are learned.

  Args:
    recipes: The candidates.
    names: Options of their factories: 'sigma' of all recipes in which it is a
      number, or 'microscopiq.sigma' of those whose name or label is, or
      matches, what comes before the last dot.
    shared: One value for all sites, or one a site.
    ranges: Ends of options, excluded, which may be infinite; for options that
      `RANGES` lacks, or in place of it.
    width: Half of the interval of the secants, see `Leaves`.

  Raises:
    ValueError: for names that match nothing (with the nearest), options that
      are static or whole, and starts outside of the range.

  Examples:
    >>> from mq_jax import recipes
    >>> found = learnable([recipes.rtn(2, clip=0.9), recipes.rtn(4)], ['clip'])
    >>> [(leaf.candidate, leaf.start) for leaf in found.entries]
    [(0, 0.9)]
  """
  recipes = tuple(recipes)
  if not width > 0:
    raise ValueError(f'learnable: width={width!r} is not positive')
  allowed = RANGES | dict(ranges or {})
  options = [_options(recipe) for recipe in recipes]
  entries: dict[tuple[int, str], Leaf] = {}
  for name in names:
    option = name.rpartition('.')[2]
    for c in _found(name, recipes, options, allowed):
      start = float(options[c][option])
      low, high = allowed.get(option, (-math.inf, math.inf))
      if not low < start < high:
        raise ValueError(
          f'learnable: {option!r} of {recipes[c].label} starts at {start}, '
          f'not between {low} and {high}'
        )
      index = _index(recipes[c], option, start, (low, high))
      if option not in allowed:
        raise ValueError(
          f'learnable: the range of {option!r} is not known; give '
          f'ranges={{{option!r}: (low, high)}}'
        )
      entries[c, option] = Leaf(c, option, index, start, low, high)
  if not entries:
    raise ValueError('learnable: no names given')
  return Leaves(
    recipes, tuple(v for _, v in sorted(entries.items())), shared, width
  )


def _found(name, recipes, options, allowed) -> list[int]:
  """Recipes in which a name is a number."""
  pattern, _, option = name.rpartition('.')
  having = [
    c
    for c, recipe in enumerate(recipes)
    if option in options[c] and (not pattern or _matches(recipe, pattern))
  ]
  found = [c for c in having if _is_number(options[c][option])]
  if found:
    return found
  if having:
    c = having[0]
    value = options[c][option]
    raise ValueError(
      f'learnable: {option!r} of {recipes[c].label} is {value!r}, no number '
      'to start from'
    )
  full = {
    f'{recipe.name}.{o}'
    for recipe, own in zip(recipes, options, strict=True)
    for o, value in own.items()
    if o in allowed and _is_number(value)
  }
  known = sorted(full | {x.rpartition('.')[2] for x in full})
  near = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
  raise ValueError(
    f'learnable: no candidate has a number {name!r}; nearest are {near}'
  )


def _matches(recipe: Recipe, pattern: str) -> bool:
  return any(
    text == pattern or fnmatch.fnmatchcase(text, pattern)
    for text in (recipe.name, recipe.label)
  )
