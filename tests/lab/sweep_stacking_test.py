"""Settings side by side are what they are alone, by one program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mq_jax import quantize, recipes
from mq_jax.lab.sweeping import stacking


def problem(k=24, n=32):
  rng = np.random.default_rng(0)
  weight = rng.standard_t(5, (k, n)).astype(np.float32)
  inputs = rng.standard_normal((96, k)).astype(np.float32)
  return jnp.asarray(weight), jnp.asarray(inputs.T @ inputs)


def test_stacked_settings_are_separate_runs_in_one_program():
  weight, hessian = problem()
  given = [
    recipes.gptq(bits=b, group=8, clip=c, damping=d)
    for b in (2, 3)
    for c in (0.7, 1.0)
    for d in (0.01, 0.1)
  ]
  (vary,) = stacking.varying(given).values()
  before = stacking.programs()
  found = [
    stacking.quantize_stacked(
      weight, given[i : i + 4], hessian, vary=vary, size=4
    )
    for i in (0, 4)
  ]
  # Fewer than the program is made for fill it up.
  few, _ = stacking.quantize_stacked(
    weight, given[:3], hessian, vary=vary, size=4
  )
  assert stacking.programs() == before + 1
  np.testing.assert_array_equal(few['level'][:3], found[0][0]['level'][:3])
  levels = set()
  for i, recipe in enumerate(given):
    codes, record = found[i // 4]
    alone_codes, alone = quantize.quantize_batch(weight, recipe, hessian)
    same = np.asarray(codes['level'][i % 4] == alone_codes['level'])
    assert same.mean() > 0.99
    np.testing.assert_allclose(
      record['output_error'][i % 4], alone['output_error'], rtol=1e-2
    )
    levels.add(np.asarray(codes['level'][i % 4]).tobytes())
  assert len(levels) == len(given)  # each number had its effect


def test_what_does_not_vary_is_not_repeated():
  given = [recipes.gptq(bits=2, clip=c) for c in (0.7, 0.8)]
  (vary,) = stacking.varying(given).values()
  recipe, axes = stacking.stack(given, vary, 3)
  leaves = jax.tree.leaves(recipe)
  assert axes.count(0) == 1
  assert [np.shape(x) for x, a in zip(leaves, axes) if a == 0] == [(3,)]
  assert recipe.compensation.damping == 0.01


def test_what_changes_the_program_is_a_structure_of_its_own():
  given = [
    recipes.microscopiq(sigma=2.0),
    recipes.microscopiq(sigma=3.0, bits=4),
    recipes.microscopiq(sigma=3.0, order='activation'),
    recipes.microscopiq(block=64),
  ]
  keys = [stacking.structure(recipe) for recipe in given]
  assert keys[0] == keys[1] and len(set(keys)) == 3
  sizes = {len(vary) for vary in stacking.varying(given).values()}
  assert sizes == {0, 2}  # sigma and bits where two differ


@pytest.mark.parametrize('limit, expected', [(64, 4), (3, 3)])
def test_memory_bounds_how_many_are_side_by_side(monkeypatch, limit, expected):
  import mq_jax as mq

  params = {'a': jnp.ones((8, 16)), 'b': jnp.ones((4, 4))}
  f = lambda p, x: jnp.tanh(x @ p['a'])[:, :4] @ p['b']
  found = mq.sites.find(f, params, jnp.ones((2, 8)))
  # The larger takes 8 (16 + 8) numbers with its Hessian.
  monkeypatch.setattr(stacking, 'IN_PROGRAM', 4 * 8 * 24 + 5)
  recipe = recipes.rtn(2, 4)
  assert stacking.most_at_once(params, found, recipe, limit) == expected
  monkeypatch.setattr(stacking, 'WAITING', 2 * (128 + 16))
  assert stacking.most_at_once(params, found, recipe, limit) == 2
  monkeypatch.setattr(stacking, 'WAITING', 1)
  assert stacking.most_at_once(params, found, recipe, limit) == 1
