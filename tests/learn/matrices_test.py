"""What is learned of a matrix: soft values, penalties, gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mq_jax import plans, quantize, recipes
from mq_jax.learn import _matrices, _training

SHAPE = (24, 16)
WEIGHT = np.random.default_rng(0).standard_t(4, SHAPE).astype(np.float32)
_RNG = np.random.default_rng(1)
_X = _RNG.normal(size=(256, SHAPE[0])) @ _RNG.normal(size=(SHAPE[0],) * 2)
GRAM = jnp.asarray(_X.T @ _X / len(_X), jnp.float32)
RECIPES = {
  'rtn': recipes.rtn(bits=3, group=12),
  'awq': recipes.awq(bits=3, group=12, clip='none'),
  'microscopiq': recipes.microscopiq(bits=2, sigma=1.5, block=16),
  'fineq': recipes.fineq(compensate=True),
}
L = recipes.Learning

CHOICES = ('pattern', 'role', 'osf', 'isf')


def begin(name='rtn', weight=WEIGHT, **options):
  found = quantize.quantize_matrix(weight, RECIPES[name], hessian=GRAM)
  start, leaves = _matrices.begin(found, jnp.asarray(weight), L(**options))
  return found, start, leaves


def soft_loss(start, leaves, at=1.0):
  error = _matrices.values(start, leaves, hard=False) - WEIGHT
  loss = jnp.sum(error * (GRAM @ error))
  return loss + 3.0 * _matrices.penalty(start, leaves, jnp.float32(at))


def jittered(leaves, size=0.3):
  rng = np.random.default_rng(2)
  move = lambda x: x + size * jnp.asarray(rng.normal(size=x.shape), jnp.float32)
  return jax.tree.map(move, leaves)


@pytest.mark.parametrize('rounding', ['sigmoid', 'tanh'])
def test_soft_rounding_begins_with_the_weights_themselves(rounding):
  """gradient-ptq.md, check 1: within 1e-3 of a step where not clipped."""
  _, start, leaves = begin(rounding=rounding, near=0.4999)
  soft = _matrices.values(start, leaves, hard=False)
  step = np.asarray(start.spacing)
  # Min-max grids reach all but the ends, which are up to half a step beyond.
  near = np.abs(soft - WEIGHT) < 1e-3 * step
  assert near.mean() > 0.9
  hard = _matrices.values(start, leaves)
  assert (np.abs(hard - WEIGHT) <= 0.51 * step).all()
  np.testing.assert_allclose(soft[~near], hard[~near], atol=5e-3)


@pytest.mark.parametrize('rounding', ['sigmoid', 'tanh'])
@pytest.mark.parametrize(
  'name',
  [
    pytest.param(n, marks=[] if n in ('rtn', 'fineq') else pytest.mark.slow)
    for n in RECIPES
  ],
)
def test_gradients_of_soft_rounding_are_those_of_finite_differences(
  rounding, name
):
  _, start, leaves = begin(name, rounding=rounding, numbers=False, near=0.4)
  leaves = leaves._replace(offsets=0.7 * leaves.offsets + 0.1)
  f = jax.jit(
    lambda offsets: soft_loss(start, leaves._replace(offsets=offsets))
  )
  slope = jax.grad(f)(leaves.offsets)
  rng = np.random.default_rng(4)
  for _ in range(4):
    along = jnp.asarray(rng.normal(size=SHAPE), jnp.float32)
    small = 1e-3
    difference = (
      f(leaves.offsets + small * along) - f(leaves.offsets - small * along)
    ) / (2 * small)
    # f32: some 1e-4 of the loss over the step; a kink or two may be crossed.
    np.testing.assert_allclose(
      difference, jnp.sum(slope * along), rtol=0.03, atol=0.3
    )


def test_scales_of_soft_rounding_have_the_slopes_of_finite_differences():
  """Where nothing is rounded a scale decides only about what is clipped."""
  _, start, leaves = begin(rounding='tanh', near=0.4)
  factors = {'scale': leaves.factors['scale'] - 2.0}  # a fifth of the range
  leaves = leaves._replace(factors=factors | {'zero': leaves.factors['zero']})

  def f(factor):
    # Stored scales are rounded to float16: of the soft ones, by hand.
    codes = start.codes | {
      'scale': start.codes['scale'].astype(jnp.float32) * jnp.exp(0.1 * factor)
    }
    value = start.layout.relax(codes, start.target, *SHAPE, hard=False)
    return jnp.sum((value - WEIGHT) * (GRAM @ (value - WEIGHT)))

  at = factors['scale']
  want = jax.grad(f)(at)
  got = jax.grad(
    lambda x: soft_loss(
      start, leaves._replace(factors=leaves.factors | {'scale': x}), 0.0
    )
  )(at)
  # Stored scales are off by 2^-11.
  np.testing.assert_allclose(
    got, want, rtol=0.02, atol=0.02 * np.abs(want).max()
  )
  along = jnp.ones_like(at)
  difference = (f(at + 1e-2 * along) - f(at - 1e-2 * along)) / 2e-2
  np.testing.assert_allclose(difference, want.sum(), rtol=0.02)
  assert abs(float(want.sum())) > 0.1


@pytest.mark.parametrize('rounding', ['sigmoid', 'tanh'])
def test_penalties_wait_and_end_at_the_grid(rounding):
  _, start, leaves = begin(rounding=rounding)
  penalty = jax.jit(_matrices.penalty)
  assert penalty(start, leaves, 0.1) == 0.0
  assert penalty(start, leaves, 1.0) > 0.05
  # At h = 0 and 1, or no offset from the grid, nothing is left of it.
  far = leaves._replace(offsets=jnp.sign(leaves.offsets) * 20.0)
  if rounding == 'tanh':
    value = _matrices.values(start, leaves)
    share = jnp.clip(
      (value - start.target) / start.spacing / 0.5, -0.999, 0.999
    )
    far = leaves._replace(offsets=jnp.arctanh(share))
  assert penalty(start, far, 1.0) < 1e-3


def test_rectified_sigmoid_is_adarounds():
  """h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1), and its penalty at beta = 2."""
  _, start, leaves = begin(rounding='sigmoid')
  v = np.linspace(-6, 6, SHAPE[0] * SHAPE[1]).reshape(SHAPE).astype(np.float32)
  leaves = leaves._replace(offsets=jnp.asarray(v))
  h = np.clip(1.2 / (1 + np.exp(-v.astype(np.float64))) - 0.1, 0, 1)
  want = np.mean(1 - np.abs(2 * h - 1) ** 2)
  np.testing.assert_allclose(
    _matrices.penalty(start, leaves, jnp.float32(1.0)), want, rtol=1e-5
  )
  low = np.asarray(start.target)
  soft = _matrices.values(start, leaves, hard=False)
  step, zero = (
    np.repeat(np.asarray(start.codes[x], np.float32), 12, axis=0)
    for x in ('scale', 'zero')
  )
  want = np.clip(low + step * h, -zero * step, (7 - zero) * step)
  np.testing.assert_allclose(soft, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('rounding', ['straight', 'sigmoid', 'tanh'])
@pytest.mark.parametrize(
  'name',
  [
    pytest.param(n, marks=[] if n in ('rtn', 'fineq') else pytest.mark.slow)
    for n in RECIPES
  ],
)
def test_what_is_packed_is_what_hard_values_are(rounding, name):
  choices = CHOICES if rounding == 'straight' else ()
  found, start, leaves = begin(name, rounding=rounding, choices=choices)
  moved = jittered(leaves)
  value = jax.jit(_matrices.values)(start, moved)
  packed = _matrices.harden(found, WEIGHT, start, moved)
  np.testing.assert_array_equal(packed.dequantize(), value)
  assert packed.nbytes == found.nbytes == packed.pack().nbytes
  assert float(packed.record['moved']) > 0.05


def test_nothing_moved_is_the_start():
  for name in RECIPES:
    found, start, leaves = begin(name, choices=CHOICES)
    np.testing.assert_array_equal(
      _matrices.values(start, leaves), found.dequantize()
    )
    again = _matrices.harden(found, WEIGHT, start, leaves)
    for code, same in zip(
      jax.tree.leaves(found.pack().buffers),
      jax.tree.leaves(again.pack().buffers),
      strict=True,
    ):
      np.testing.assert_array_equal(code, same)


def test_weights_rounded_to_nearest_follow_a_learned_grid():
  """OmniQuant: smaller scales clip more, and weights go to the nearest."""
  found, start, leaves = begin('awq', rounding='nearest')
  assert leaves.offsets is None
  assert set(leaves.factors) == {'scale', 'zero', 'input_scale'}
  moved = leaves._replace(
    factors=leaves.factors
    | {'scale': leaves.factors['scale'] - 3.0}
    | {'input_scale': leaves.factors['input_scale'] + 1.0}
  )
  packed = _matrices.harden(found, WEIGHT, start, moved)
  np.testing.assert_array_equal(
    packed.dequantize(), _matrices.values(start, moved)
  )
  codes = {n: np.asarray(x, np.float32) for n, x in packed.codes.items()}
  scale = np.repeat(codes['scale'], 12, axis=0)
  zero = np.repeat(codes['zero'], 12, axis=0)
  inputs = codes['input_scale'][:, None]
  level = np.clip(np.round(WEIGHT * inputs / scale + zero), 0, 7)
  want = (level - zero) * scale / inputs
  # A tie may fall to the other side in another order of operations.
  assert np.mean(np.isclose(packed.dequantize(), want, atol=1e-5)) > 0.995


def test_zero_points_are_learned_in_whole_numbers():
  found, start, leaves = begin('rtn')
  moved = leaves._replace(
    factors=leaves.factors | {'zero': leaves.factors['zero'] + 1.3}
  )
  packed = _matrices.harden(found, WEIGHT, start, moved)
  before, after = (np.asarray(m.codes['zero']) for m in (found, packed))
  np.testing.assert_array_equal(after, np.minimum(before + 1, 7))
  np.testing.assert_array_equal(
    packed.dequantize(), _matrices.values(start, moved)
  )


@pytest.mark.parametrize('name', RECIPES)
def test_zero_weights_have_finite_gradients(name):
  for rounding in ('straight', 'sigmoid', 'tanh'):
    zero = np.zeros(SHAPE, np.float32)
    _, start, leaves = begin(
      *(name, zero),
      rounding=rounding,
      choices=CHOICES if rounding == 'straight' else (),
    )
    slopes = jax.grad(lambda leaves, start=start: soft_loss(start, leaves))(
      leaves
    )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(slopes)), rounding


def test_training_ends_on_the_grid_with_less_error():
  """gradient-ptq.md, check 1: at the end all but 1 % are up or down."""
  rng = np.random.default_rng(5)
  x = rng.normal(size=(256, SHAPE[0])) + 2 * rng.normal(size=(256, 1))
  gram = jnp.asarray(x.T @ x / len(x), jnp.float32)
  size = lambda error: jnp.sum(error * (gram @ error))
  loss = lambda params, _: size(params['w'] - WEIGHT)
  found = quantize.quantize_matrix(WEIGHT, RECIPES['rtn'])
  params = {'w': jnp.asarray(WEIGHT)}
  options = L(
    steps=2000,
    every=500,
    rounding='sigmoid',
    numbers=False,
    optimizer='adam',
    learning_rate=0.01,
  )
  packed, trace = _training.train(
    loss, params, {'w': found}, np.zeros((4, 1)), options=options
  )
  # The last soft loss is that of the hard state: nothing is left to round.
  np.testing.assert_allclose(trace.train[-1], trace.held[-1], rtol=0.02)
  error = np.asarray(packed['w'].dequantize()) - WEIGHT
  np.testing.assert_allclose(size(error), trace.held[trace.best], rtol=1e-3)
  gptq = quantize.quantize_matrix(
    WEIGHT, recipes.gptq(bits=3, group=12), hessian=gram
  )
  # Learned rounding is better than compensated, on the same grid.
  assert size(error) < size(gptq.dequantize() - WEIGHT) < trace.held[0]


def test_learning_choices_finds_better_patterns():
  """A pair's pattern, of four, by the loss on the inputs that it meets."""
  loss = lambda params, _: jnp.sum(
    (params['w'] - WEIGHT) * (GRAM @ (params['w'] - WEIGHT))
  )
  found = quantize.quantize_matrix(WEIGHT, recipes.fineq())
  options = L(steps=200, optimizer='adam', learning_rate=0.02, batch=2)
  held = {}
  for choices in ((), ('pattern',)):
    packed, trace = _training.train(
      loss,
      {'w': jnp.asarray(WEIGHT)},
      {'w': found},
      np.zeros((4, 1)),
      options=dataclasses.replace(options, choices=choices),
    )
    held[choices] = trace.held[trace.best] / trace.held[0]
    same = np.mean(
      np.asarray(packed['w'].codes['pattern'])
      == np.asarray(found.codes['pattern'])
    )
    assert (same == 1.0) != bool(choices)
  assert held[('pattern',)] < 0.95 * held[()]


def test_recipes_that_say_how_to_learn():
  for name in ('omniquant', 'omni_microscopiq', 'learned_fineq', 'autoround'):
    recipe = recipes.make(name)
    assert recipe.learning is not None
    found = quantize.quantize_matrix(
      WEIGHT, recipe.with_learning(None), hessian=GRAM
    )
    start, leaves = _matrices.begin(found, jnp.asarray(WEIGHT), recipe.learning)
    loss = lambda leaves, start=start: soft_loss(start, leaves)
    slopes = jax.grad(loss)(leaves)
    assert any(np.abs(x).max() > 0 for x in jax.tree.leaves(slopes)), name


def test_what_does_not_fit_is_refused():
  with pytest.raises(ValueError, match='undoes error compensation'):
    recipes.make('gptq', learning={'rounding': 'nearest'})
  with pytest.raises(ValueError, match="go with rounding='straight'"):
    L(choices=('role',), rounding='tanh')
  with pytest.raises(ValueError, match='no code has rôle to choose'):
    _training.train(
      lambda params, _: jnp.sum(params['w']),
      {'w': jnp.asarray(WEIGHT)},
      {'w': quantize.quantize_matrix(WEIGHT, RECIPES['fineq'])},
      np.zeros((4, 1)),
      options=L(choices=('rôle', 'pattern')),
    )
  with pytest.raises(ValueError, match='leaves nothing to learn'):
    L(rounding='nearest', numbers=False)
  with pytest.raises(ValueError, match='finds nothing to learn'):
    found = quantize.quantize_matrix(WEIGHT, recipes.none())
    _matrices.begin(found, jnp.asarray(WEIGHT), L(rounding='nearest'))


def test_batches_of_matrices_are_learned_as_each_alone():
  weights = np.stack([WEIGHT, WEIGHT[::-1]])
  each = [quantize.quantize_matrix(w, RECIPES['fineq']) for w in weights]
  stack = lambda *x: jnp.stack(x)
  found = dataclasses.replace(
    each[0],
    codes=jax.tree.map(stack, *(m.codes for m in each)),
    record=jax.tree.map(stack, *(m.record for m in each)),
    shape=weights.shape,
  )
  start, leaves = _matrices.begin(
    found, jnp.asarray(weights), L(choices=CHOICES)
  )
  moved = jittered(leaves)
  both = _matrices.values(start, moved)
  assert both.shape == weights.shape
  for i in range(2):
    one = lambda tree, i=i: jax.tree.map(lambda x: x[i], tree)
    np.testing.assert_array_equal(
      _matrices.values(one(start), one(moved)), both[i]
    )
  packed = _matrices.harden(found, weights, start, moved)
  np.testing.assert_array_equal(plans.decode(packed), both)
