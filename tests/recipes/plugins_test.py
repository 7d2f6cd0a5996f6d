"""Recipes that another installed package adds by an entry point."""

import importlib
import sys

import pytest

from mq_jax import recipes

SOURCE = """
from mq_jax import recipes

@recipes.recipe
def coarse(bits=3):
  return recipes.rtn(bits=bits, group=16)

def unnamed():
  return recipes.rtn()

def nothing():
  return None

rtn = coarse
number = 3
"""

ENTRIES = """
[mq_jax.recipes]
coarse = their_recipes:coarse
rtn = their_recipes:rtn
gone = their_recipes:gone
number = their_recipes:number
unnamed = their_recipes:unnamed
nothing = their_recipes:nothing
broken = their_broken:broken
"""


def _install(folder, name, entries):
  info = folder / f'{name}-1.2.dist-info'
  info.mkdir()
  (info / 'METADATA').write_text(
    f'Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n'
  )
  (info / 'entry_points.txt').write_text(entries)


@pytest.fixture
def installed(tmp_path, monkeypatch):
  """What pip leaves of a package, in a folder on the path."""
  _install(tmp_path, 'theirs', ENTRIES)
  (tmp_path / 'their_recipes.py').write_text(SOURCE)
  (tmp_path / 'their_broken.py').write_text('import not_there\n')
  monkeypatch.syspath_prepend(tmp_path)
  importlib.invalidate_caches()
  yield tmp_path
  sys.modules.pop('their_recipes', None)


def test_is_found_by_name_and_lives_in_plans(installed):
  recipe = recipes.make('coarse', bits=2)
  assert recipe.label == 'coarse(bits=2)'
  assert recipes.from_json(recipe.to_json()) == recipe
  assert recipes.from_json({'recipe': 'coarse'}).label == 'coarse'
  with pytest.raises(ValueError, match="recipe coarse: unknown option 'bit'"):
    recipes.make('coarse', bit=2)
  with pytest.raises(ValueError, match='did you mean coarse.*known are.*gptq'):
    recipes.make('coarze')


def test_ours_come_first_and_load_nothing(installed):
  assert recipes.make('rtn', group=8).rows.group == 8
  assert 'their_recipes' not in sys.modules
  with pytest.raises(ValueError, match='known are'):
    recipes.make('foo')
  assert 'their_recipes' not in sys.modules


@pytest.mark.parametrize(
  'name, told',
  [
    ('gone', "'gone' of theirs 1.2 .their_recipes:gone. cannot be loaded"),
    ('broken', 'of theirs 1.2 .*ModuleNotFoundError: No module .*not_there'),
    ('number', 'of theirs 1.2 .* is a int; a function'),
    ('nothing', 'of theirs 1.2 .* returned a NoneType'),
    ('unnamed', "of theirs 1.2 .* makes a recipe named 'rtn'; decorate"),
  ],
)
def test_what_is_wrong_with_a_package_names_it(installed, name, told):
  with pytest.raises(ValueError, match=told) as caught:
    recipes.make(name)
  assert '\n' not in str(caught.value)


def test_two_packages_of_one_name_are_refused(installed):
  _install(
    installed, 'others', '[mq_jax.recipes]\ncoarse = other_recipes:coarse\n'
  )
  importlib.invalidate_caches()
  with pytest.raises(ValueError, match='others 1.2 and theirs 1.2; remove one'):
    recipes.make('coarse')
