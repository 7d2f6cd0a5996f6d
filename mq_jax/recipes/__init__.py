"""Published systems as compositions: one file each.

A factory takes plain options and returns a `Recipe`; `make` does so by name.

An installed package adds recipes of its own to the names that `make`, plans
and the `mq` command know, by an entry point in its pyproject.toml:

[project.entry-points.'mq_jax.recipes']
ternary = 'my_package.recipes:ternary'
"""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from mq_jax import activations as activations_lib
from mq_jax.recipes import _learning, _plugins
from mq_jax.recipes._learning import Learning
from mq_jax.recipes._recipe import Recipe, Rows, recipe
from mq_jax.recipes.autoround import autoround
from mq_jax.recipes.awq import awq
from mq_jax.recipes.balanced import balanced
from mq_jax.recipes.blocks import BlockParts, blocks
from mq_jax.recipes.fineq import fineq
from mq_jax.recipes.gobo import gobo
from mq_jax.recipes.gptq import gptq
from mq_jax.recipes.learned_fineq import learned_fineq
from mq_jax.recipes.microscopiq import microscopiq
from mq_jax.recipes.none import none
from mq_jax.recipes.olive import olive
from mq_jax.recipes.omni_microscopiq import omni_microscopiq
from mq_jax.recipes.omniquant import omniquant
from mq_jax.recipes.rtn import rtn

_FACTORIES = {
  'autoround': autoround,
  'awq': awq,
  'balanced': balanced,
  'blocks': blocks,
  'fineq': fineq,
  'gobo': gobo,
  'gptq': gptq,
  'learned_fineq': learned_fineq,
  'microscopiq': microscopiq,
  'none': none,
  'olive': olive,
  'omni_microscopiq': omni_microscopiq,
  'omniquant': omniquant,
  'rtn': rtn,
}

NAMES = tuple(_FACTORIES)


def _unknown(kind: str, name: str, known) -> ValueError:
  near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
  hint = f'did you mean {" or ".join(near)}? ' if near else ''
  return ValueError(f'{kind} {name!r}; {hint}known are {", ".join(known)}')


def _factory(name: str):
  found = _FACTORIES.get(name) or _plugins.find(name)
  if found is None:
    raise _unknown('unknown recipe', name, (*NAMES, *_plugins.names(NAMES)))
  return found


def parameters(name: str) -> tuple[str, ...]:
  """Names of the options of a recipe's factory, in its order.

  Raises:
    ValueError: for an unknown name, with the nearest ones.
  """
  return tuple(inspect.signature(_factory(name)).parameters)


def make(
  name: str, *, activations: Any = None, learning: Any = None, **options: Any
) -> Recipe:
  """A recipe by name, with the options of its factory.

  Names of other packages are looked up when none of ours fits; ours can't be
  replaced.

  Args:
    name: Of a recipe.
    activations: What is done to the inputs of the weights, of any recipe: an
      `mq_jax.activations.Activations`, or its name or mapping as
      `mq_jax.activations.from_json` reads it.
    learning: How the codes are learned (`mq_jax.learn`), of any recipe: a
      `Learning`, a mapping of its options, or True for the defaults.
    **options: Of the recipe's factory.

  Raises:
    ValueError: for an unknown name or option (with the nearest ones), an
      option out of range, or a package whose recipe can't be loaded.

  Examples:
    >>> make('gptq', bits=3).label
    'gptq(bits=3)'
    >>> make('gptq', bits=3, activations={'format': 'mx_int', 'bits': 8}).label
    'gptq(bits=3, activations=a8 mx_int)'
  """
  factory = _factory(name)
  known = parameters(name)
  for option in options:
    if option not in known:
      raise _unknown(
        f'recipe {name}: unknown option',
        option,
        (*known, 'activations', 'learning'),
      )
  made = factory(**options)
  if learning is not None:
    made = made.with_learning(_learning.from_json(learning))
  if activations is None:
    return made
  return made.with_activations(activations_lib.from_json(activations))


def from_json(data: Mapping[str, Any]) -> Recipe:
  """Undo `Recipe.to_json`: a mapping of 'recipe', a name, and its options.

  Raises:
    ValueError: for anything else, and whatever `make` refuses.
  """
  name = data.get('recipe') if isinstance(data, Mapping) else None
  if not isinstance(name, str):
    raise ValueError(
      f"a recipe is {{'recipe': name, option: value, ...}}, got {data!r:.60}"
    )
  try:
    return make(name, **{k: x for k, x in data.items() if k != 'recipe'})
  except TypeError as error:  # of a kind or number of options
    raise ValueError(f'recipe {name}: {error}') from error


__all__ = [
  'BlockParts',
  'Learning',
  'NAMES',
  'Recipe',
  'Rows',
  'autoround',
  'awq',
  'balanced',
  'blocks',
  'fineq',
  'from_json',
  'gobo',
  'gptq',
  'learned_fineq',
  'make',
  'microscopiq',
  'none',
  'olive',
  'omni_microscopiq',
  'omniquant',
  'parameters',
  'recipe',
  'rtn',
]
