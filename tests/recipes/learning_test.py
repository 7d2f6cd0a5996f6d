"""Options of learning, as recipes and configs give them."""

import optax
import pytest

from mq_jax import recipes


def test_of_any_recipe_and_back_from_json():
  for given in (
    True,
    {'steps': 50, 'scope': 'model'},
    {'choices': ['role', 'osf']},
    recipes.Learning(seed=3),
  ):
    recipe = recipes.make('gptq', bits=3, learning=given)
    assert recipes.from_json(recipe.to_json()) == recipe
    assert recipe.learning == recipes.make('none', learning=given).learning
    assert hash(recipe.learning) == hash(
      recipes.from_json(recipe.to_json()).learning
    )
  assert recipe.label == 'gptq(bits=3, learning=block seed=3)'
  plain = recipe.with_learning(None)
  assert plain == recipes.gptq(bits=3) and 'learning' not in plain.label


def test_functions_are_taken_but_not_written_down():
  recipe = recipes.make('rtn', learning=recipes.Learning(optimizer=optax.lion))
  with pytest.raises(ValueError, match='has no name to be written down'):
    recipe.to_json()


@pytest.mark.parametrize(
  'given, match',
  [
    ({'step': 3}, "no option 'step'; did you mean steps"),
    ({'scope': 'layer'}, "scope='layer' must be one of block, model, site"),
    ({'steps': 0}, 'steps=0'),
    ({'batch': 2.5}, 'batch=2.5'),
    ({'held': 1.0}, 'held=1.0 must be between 0 and 1'),
    ({'near': 0.5}, 'near=0.5 must be between 0 and 0.5'),
    ({'learning_rate': 0}, 'learning_rate=0'),
    ({'learning_rate': float('nan')}, 'learning_rate=nan'),
    ({'patience': 0}, 'patience=0'),
    ({'seed': -1}, 'seed=-1'),
    ({'finish': -1}, 'finish=-1'),
    ({'rounding': 'up'}, "rounding='up' must be one of straight, sigmoid"),
    ({'numbers': 'no'}, "numbers='no' must be True or False"),
    ({'choices': True}, 'choices=True must be a tuple of names'),
    ({'choices': 'role', 'rounding': 'tanh'}, "go with rounding='straight'"),
    ({'anneal': -1}, 'anneal=-1 must be'),
    ('block', "'block' must be true, or a mapping"),
  ],
)
def test_bad_options_are_refused(given, match):
  with pytest.raises(ValueError, match=match):
    recipes.make('rtn', learning=given)


def test_parts_of_a_matrix_are_not_learned_apart():
  parts = [recipes.rtn(), recipes.autoround()]
  with pytest.raises(ValueError, match='give them to the whole'):
    recipes.blocks(parts)
  whole = recipes.make('blocks', parts=[recipes.rtn()] * 2, learning=True)
  assert recipes.from_json(whole.to_json()) == whole
