"""Recipes by name, and what is wrong with their options."""

import pytest

from mq_jax import recipes


def test_names_and_options_are_checked():
  with pytest.raises(ValueError, match='did you mean microscopiq'):
    recipes.make('microscopic')
  with pytest.raises(ValueError, match='unknown option.*group'):
    recipes.make('gptq', grupo=32)
  for name, options in (
    ('rtn', {'bits': 9}),
    ('rtn', {'bits': 2.5}),
    ('gptq', {'group': 0}),
    ('olive', {'bits': 3}),
    ('gobo', {'bits': 1}),
    ('microscopiq', {'bits': 5}),
    ('microscopiq', {'micro_block': 6}),
    ('microscopiq', {'micro_block': 512, 'block': 512}),
    ('microscopiq', {'block': 100}),
    ('microscopiq', {'sigma': 0.0}),
    ('microscopiq', {'axis': 'k'}),
    ('fineq', {'rule': 'max'}),
    ('fineq', {'cluster': 5}),
  ):
    with pytest.raises(ValueError, match=name):
      recipes.make(name, **options)
  assert recipes.make('gptq', bits=3).label == 'gptq(bits=3)'
  assert recipes.gptq(3).label == 'gptq(bits=3)'
