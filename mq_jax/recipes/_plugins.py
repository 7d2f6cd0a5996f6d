"""Recipes of other packages, found by their entry points."""

import inspect
from collections.abc import Callable, Container
from importlib import metadata
from typing import Any

from mq_jax.recipes._recipe import Recipe

GROUP = 'mq_jax.recipes'


def names(ours: Container[str]) -> tuple[str, ...]:
  """Names that installed packages offer and that are not ours."""
  found = {entry.name for entry in metadata.entry_points(group=GROUP)}
  return tuple(sorted(name for name in found if name not in ours))


def find(name: str) -> Callable[..., Recipe] | None:
  """The factory that a package offers by a name; None if none does.

  Raises:
    ValueError: if more than one package offers it, or the one that does can't
      be imported or offers something else; the package is named.
  """
  entries = list(metadata.entry_points(group=GROUP, name=name))
  if not entries:
    return None
  if len({entry.value for entry in entries}) > 1:
    owners = ' and '.join(sorted(map(_owner, entries)))
    raise ValueError(f'recipe {name!r} is offered by {owners}; remove one')
  entry = entries[0]
  where = f'recipe {name!r} of {_owner(entry)} ({entry.value})'
  try:
    factory = entry.load()
  except Exception as error:
    raise ValueError(
      f'{where} cannot be loaded: {type(error).__name__}: {error}'
    ) from error
  if not callable(factory):
    raise ValueError(
      f'{where} is a {type(factory).__name__}; a function that returns a '
      'mq_jax.Recipe is needed'
    )
  return _named(name, where, factory)


def _named(name: str, where: str, factory: Callable) -> Callable[..., Recipe]:
  """The factory, its result checked, and its name that of the entry."""

  def make(**options: Any) -> Recipe:
    made = factory(**options)
    if not isinstance(made, Recipe):
      raise ValueError(
        f'{where} returned a {type(made).__name__}; a mq_jax.Recipe is needed'
      )
    if made.name != name:
      # Under this name it is found again, from plans and artifacts.
      raise ValueError(
        f'{where} makes a recipe named {made.name!r}; decorate the factory '
        f'with mq_jax.recipes.recipe, and let it be named {name!r}'
      )
    return made

  make.__signature__ = inspect.signature(factory)
  return make


def _owner(entry: metadata.EntryPoint) -> str:
  if entry.dist is None:
    return 'an unknown package'
  return f'{entry.dist.name} {entry.dist.version}'
