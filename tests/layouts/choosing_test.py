"""Choices of codes: patterns, exponents, roles of elements."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mq_jax import layouts, quantize, recipes

RECIPES = {
  'fineq': recipes.fineq(compensate=True),
  'fineq-2': recipes.fineq(scales=2, cluster=4),
  'microscopiq': recipes.microscopiq(bits=2, sigma=2.0),
  'microscopiq-4-in': recipes.microscopiq(bits=4, sigma=2.0, axis='in'),
  'unpruned': recipes.microscopiq(bits=2, sigma=2.0, prune=False),
  'blocks': recipes.blocks(
    [recipes.rtn(bits=2, group=16), recipes.fineq()], axis='columns'
  ),
}
SHAPE = (44, 40)  # no multiple of any block
SLOW = ('fineq-2', 'microscopiq-4-in', 'blocks')


@pytest.fixture(
  scope='module',
  params=[
    pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
    for name in RECIPES
  ],
)
def matrix(request):
  rng = np.random.default_rng(3)
  weight = rng.standard_t(3, SHAPE).astype(np.float32)
  x = rng.normal(size=(200, SHAPE[0])).astype(np.float32)
  found = quantize.quantize_matrix(
    weight, RECIPES[request.param], hessian=x.T @ x
  )
  return found, weight


def _target(found, weight):
  return found.layout.place(found.codes, weight, *SHAPE)


def _random_logits(found, target, seed=0):
  rng = np.random.default_rng(seed)
  choices = layouts.choices(found.layout, found.codes, target, *SHAPE)
  return {
    name: jnp.asarray(3 * rng.normal(size=c.now.shape), jnp.float32)
    for name, c in choices.items()
  }


def test_each_cell_has_one_option(matrix):
  found, weight = matrix
  choices = layouts.choices(
    found.layout, found.codes, _target(found, weight), *SHAPE
  )
  assert choices
  for name, choice in choices.items():
    np.testing.assert_array_equal(choice.now.sum(0), 1.0, err_msg=name)
    assert choice.now.shape == choice.error.shape
    assert np.isfinite(choice.error).all() and (choice.error >= 0).all()


def test_what_codes_have_settles_to_them(matrix):
  found, weight = matrix
  value = found.layout.decode(found.codes, *SHAPE)
  target = _target(found, value)
  choices = layouts.choices(found.layout, found.codes, target, *SHAPE)
  logits = {name: choice.now for name, choice in choices.items()}
  codes = layouts.settle(found.layout, found.codes, logits, target, *SHAPE)
  again = found.layout.recode(codes, target, *SHAPE)
  np.testing.assert_array_equal(found.layout.decode(again, *SHAPE), value)
  assert found.layout.nbytes(again, *SHAPE) == found.nbytes


def test_other_options_are_packed_in_as_many_bytes_to_the_same_bits(matrix):
  found, weight = matrix
  layout, target = found.layout, _target(found, weight)
  logits = _random_logits(found, target)
  codes = layouts.settle(layout, found.codes, logits, target, *SHAPE)
  value = layout.relax(codes, target, *SHAPE)
  final = layout.recode(codes, target, *SHAPE)
  np.testing.assert_array_equal(layout.decode(final, *SHAPE), value)
  assert (np.asarray(value) != layout.decode(found.codes, *SHAPE)).mean() > 0.05
  assert layout.nbytes(final, *SHAPE) == found.nbytes
  buffers = layout.pack(final, *SHAPE)
  assert sum(b.nbytes for b in buffers.values()) == found.nbytes
  again = layout.unpack(buffers, *SHAPE)
  np.testing.assert_array_equal(layout.decode(again, *SHAPE), value)


def test_shares_leave_values_and_get_slopes(matrix):
  """The slope of a share is what its option would put in the place."""
  found, weight = matrix
  layout, target = found.layout, _target(found, weight)
  logits = _random_logits(found, target, 1)
  bare = layout.relax(found.codes, target, *SHAPE)
  pull = jnp.asarray(np.random.default_rng(2).normal(size=SHAPE), jnp.float32)
  shares = jax.tree.map(lambda x: jax.nn.softmax(x, axis=0), logits)
  f = lambda s: layout.relax(found.codes, target, *SHAPE, shares=s)
  np.testing.assert_array_equal(f(shares), bare)
  slopes = jax.grad(lambda s: jnp.sum(pull * f(s)))(shares)
  for name, slope in slopes.items():
    assert np.isfinite(slope).all() and np.abs(slope).max() > 0, name


def test_slope_of_a_pattern_is_the_value_under_it():
  found = quantize.quantize_matrix(
    np.random.default_rng(5).normal(size=(12, 3)).astype(np.float32),
    recipes.fineq(),
  )
  layout, shape = found.layout, (12, 3)
  target = found.layout.decode(found.codes, *shape) * 1.1
  pull = np.random.default_rng(6).normal(size=shape).astype(np.float32)
  shares = {'pattern': jnp.full((4, 2, 3), 0.25)}
  slope = jax.grad(
    lambda s: jnp.sum(
      pull * layout.relax(found.codes, target, *shape, shares=s)
    )
  )(shares)['pattern']
  for p in range(4):
    codes = found.codes | {'pattern': jnp.full((2, 3), p, jnp.uint8)}
    value = np.asarray(layout.relax(codes, target, *shape))
    want = (pull * value).reshape(2, 6, 3).sum(1)
    np.testing.assert_allclose(slope[p], want, rtol=1e-5, atol=1e-5)


def test_the_roles_of_the_best_scores_are_taken():
  """By brute force: in each micro-block as many outliers as before."""
  weight = np.random.default_rng(7).standard_t(3, (16, 32)).astype(np.float32)
  found = quantize.quantize_matrix(
    weight, recipes.microscopiq(bits=2, sigma=1.5, block=32)
  )
  layout, shape = found.layout, weight.shape
  choices = layouts.choices(layout, found.codes, weight, *shape)
  rng = np.random.default_rng(8)
  logits = {n: jnp.asarray(c.now) for n, c in choices.items()}
  role = rng.normal(size=(3, 16, 32)).astype(np.float32)
  logits['role'] = jnp.asarray(role)
  codes = layouts.settle(layout, found.codes, logits, weight, *shape)
  upper, lower = np.asarray(codes['upper']), np.asarray(codes['lower'])
  before = np.asarray(found.codes['upper']) != np.asarray(found.codes['lower'])
  seen = set()
  for r in range(16):
    for u in range(4):
      count = before[r, u].sum()
      seen.add(int(count))
      score = role[:, r, 8 * u : 8 * u + 8]
      wide = np.argsort(-(score[1] - score[0]))[:count]
      rest = [s for s in np.argsort(-(score[2] - score[0])) if s not in wide]
      used = upper[r, u] != lower[r, u]
      assert used.sum() == count
      assert sorted(upper[r, u][used]) == sorted(wide)
      assert sorted(lower[r, u][used]) == sorted(rest[:count])
  assert {0, 1, 2} <= seen
