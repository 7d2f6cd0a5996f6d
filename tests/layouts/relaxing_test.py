"""Weights moved on the grid that their codes leave them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mq_jax import quantize, recipes

RECIPES = {
  'integer': recipes.rtn(bits=3, group=16),
  'symmetric': recipes.rtn(bits=4, group=24, symmetric=True),
  'awq': recipes.awq(bits=3, group=16),
  'microscopiq': recipes.microscopiq(bits=2, sigma=2.0),
  'microscopiq-4-in': recipes.microscopiq(bits=4, sigma=2.0, axis='in'),
  'unpruned': recipes.microscopiq(bits=2, sigma=2.0, prune=False),
  'fineq': recipes.fineq(),
  'olive': recipes.olive(bits=4),
  'olive-2': recipes.olive(bits=2),
  'gobo': recipes.gobo(bits=3),
  'balanced': recipes.balanced(levels=5, group=24),
  'none': recipes.none(),
  'blocks': recipes.blocks(
    [recipes.rtn(bits=2, group=16), recipes.fineq()], axis='columns'
  ),
}
SHAPE = (44, 40)  # no multiple of any block


SLOW = ('symmetric', 'microscopiq-4-in', 'unpruned', 'olive-2', 'blocks')


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


def _methods(found):
  bind = lambda f: lambda codes, *target: f(codes, *target, *SHAPE)
  names = ('decode', 'place', 'relax', 'recode', 'spacing')
  return (jax.jit(bind(getattr(found.layout, name))) for name in names)


def test_values_stay_where_they_are(matrix):
  found, _ = matrix
  decode, place, relax, recode, _ = _methods(found)
  value = decode(found.codes)
  target = place(found.codes, value)
  np.testing.assert_array_equal(decode(recode(found.codes, target)), value)
  np.testing.assert_array_equal(relax(found.codes, target), value)


def test_what_is_relaxed_is_what_is_packed(matrix):
  """Far moves too: the same bits from training to the file and back."""
  found, weight = matrix
  decode, place, relax, recode, spacing = _methods(found)
  rng = np.random.default_rng(4)
  step = np.asarray(spacing(found.codes))
  moved = place(found.codes, weight)
  moved += 3 * step * rng.normal(size=SHAPE).astype(np.float32)
  codes = recode(found.codes, moved)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), codes) == jax.tree.map(
    lambda x: (x.shape, x.dtype), found.codes
  )
  value = decode(codes)
  np.testing.assert_array_equal(relax(found.codes, moved), value)
  assert (np.asarray(value) != np.asarray(decode(found.codes))).mean() > 0.2
  layout = found.layout
  assert layout.nbytes(codes, *SHAPE) == found.nbytes
  buffers = layout.pack(codes, *SHAPE)
  assert sum(b.nbytes for b in buffers.values()) == found.nbytes
  again = layout.unpack(buffers, *SHAPE)
  np.testing.assert_array_equal(decode(again), value)


def test_the_nearest_place_is_taken(matrix):
  """No other target comes nearer; `weight` among them, and its neighbours."""
  found, weight = matrix
  decode, place, relax, _, spacing = _methods(found)
  target = place(found.codes, weight)
  step = np.asarray(spacing(found.codes))
  inner = lambda t: np.asarray(place(found.codes, relax(found.codes, t)))
  error = np.abs(inner(target) - target)
  for move in (-1.5, -0.7, 0.7, 1.5):
    other = np.abs(inner(target + move * step) - target)
    # What float32 makes of scales: some ulps.
    assert (error <= other + 1e-5 * (1 + np.abs(target))).all()


def test_gradients_pass_within_the_range_and_are_finite(matrix):
  found, weight = matrix
  decode, place, relax, _, _ = _methods(found)
  target = place(found.codes, weight)
  slopes = jax.jit(jax.grad(lambda t: relax(found.codes, t).sum()))(target)
  assert np.isfinite(slopes).all()
  inner = jax.grad(lambda t: place(found.codes, t).sum())(jnp.asarray(weight))
  # Rounded straight through: where it is not clipped or frozen, 1 of what
  # `place` multiplies by.
  passed = np.isclose(slopes * inner, 1.0, rtol=1e-4)
  assert passed.mean() > 0.5
  assert (passed | np.isclose(slopes, 0.0)).all()


def test_scales_have_the_gradients_of_lsq():
  """v = s round(t / s): dv/ds = round(p) - p inside, the level when clipped."""
  rng = np.random.default_rng(5)
  weight = rng.normal(size=(16, 4)).astype(np.float32)
  found = quantize.quantize_matrix(
    weight, recipes.rtn(bits=2, group=16, symmetric=True, clip=0.6)
  )
  scale = found.codes['scale'].astype(jnp.float32)
  f = lambda s: found.layout.relax(found.codes | {'scale': s}, weight, 16, 4)
  slope = jax.jacobian(f)(scale)  # [16, 4, 1, 4]
  p = weight / np.asarray(scale)
  want = np.where((p < -2) | (p > 1), np.clip(p, -2, 1), np.round(p) - p)
  assert ((p < -2) | (p > 1)).any()
  got = np.stack([slope[:, j, 0, j] for j in range(4)], axis=1)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_all_zero_weights_have_finite_gradients():
  for name in ('integer', 'microscopiq', 'fineq', 'olive'):
    found = quantize.quantize_matrix(np.zeros(SHAPE, np.float32), RECIPES[name])
    real = {
      n: found.codes[n].astype(jnp.float32)
      for n in found.layout.learned(found.codes)
    }
    f = lambda real, t, found=found: found.layout.relax(
      found.codes | real, t, *SHAPE
    ).sum()
    slopes = jax.jit(jax.grad(f, (0, 1)))(real, jnp.zeros(SHAPE))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(slopes)), name


def test_learned_codes_move_values(matrix):
  found, weight = matrix
  target = found.layout.place(found.codes, weight, *SHAPE)
  for name in found.layout.learned(found.codes):
    real = found.codes[name].astype(jnp.float32)
    f = lambda x, name=name: jnp.sum(
      found.layout.relax(found.codes | {name: x}, target, *SHAPE) ** 2
    )
    slope = jax.jit(jax.grad(f))(real)
    assert np.isfinite(slope).all() and np.abs(slope).max() > 0, name


def test_small_negative_outliers_of_olive_are_no_victims():
  """At 2 bits -2 has no code: it is that of a victim, and would read as 0."""
  weight = np.random.default_rng(3).standard_t(3, SHAPE).astype(np.float32)
  found = quantize.quantize_matrix(weight, RECIPES['olive-2'])
  code = np.asarray(found.codes['code']).reshape(-1, 2, SHAPE[1])
  assert not (code == 2).all(axis=1).any()
