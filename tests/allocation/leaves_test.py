"""Learned numbers: secants against means, searches against a fine grid."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mq_jax as mq
from mq_jax import allocation, plans
from mq_jax.allocation import candidates, leaves, measured

r = mq.recipes


def f(params, x):
  for name in ('a', 'b', 'c'):
    x = jnp.tanh(x @ params[name])
  return x


def loss(params, batch):
  x, y = batch
  return jnp.mean((f(params, x) - y) ** 2)


@pytest.fixture(scope='module')
def net():
  """Three layers of heavy-tailed weights: sigma and clip matter."""
  rng = np.random.default_rng(0)
  params = {
    name: jnp.asarray(rng.standard_t(3.0, (32, 32)) * scale, jnp.float32)
    for name, scale in zip('abc', (0.18, 0.12, 0.08), strict=True)
  }
  x = jnp.asarray(rng.standard_normal((4, 64, 32)), jnp.float32)
  y = jax.vmap(f, in_axes=(None, 0))(params, x)
  sites = mq.sites.find(f, params, x[0])
  statistics = mq.calibrate(f, params, list(x), sites=sites)
  return params, sites, statistics, (x, y)


def make(net, recipes):
  params, sites, statistics, _ = net
  return candidates.make(params, sites, recipes, statistics=statistics)


def stairs(x, weight):
  return x * jnp.round(weight / x)


def test_secant_is_the_value_and_the_slope_of_the_mean():
  width, at = 0.2, 0.7
  weights = np.array([0.3, -1.1, 1.9, 2.6], np.float32)
  stepped = leaves.secant(stairs, width)
  call = lambda x: stepped(x, jnp.asarray(weights))
  x = jnp.float32(at)
  np.testing.assert_array_equal(call(x), stairs(x, weights))
  found = jax.jit(jax.jacfwd(call))(x)
  np.testing.assert_array_equal(found, jax.jit(jax.jacrev(call))(x))

  def mean(at):
    grid = at + width * (np.arange(-20000, 20000) + 0.5) / 20000
    grid = grid[:, None]
    return np.mean(grid * np.round(weights.astype(np.float64) / grid), 0)

  small = 1e-2  # many cells of the grid
  want = (mean(at + small) - mean(at - small)) / (2 * small)
  np.testing.assert_allclose(found, want, rtol=0.02, atol=0.02)
  # The plain derivative sees no jump, only the level.
  plain = jax.jacfwd(lambda x: stairs(x, weights))(x)
  assert np.abs(plain - want).max() > 1.0


def test_secant_of_several_numbers_maps_and_compiles():
  def two(numbers, weight):
    value = stairs(numbers[0], weight)
    return {'value': value, 'size': jnp.sum(numbers[1] * value)}

  width = 0.1
  stepped = leaves.secant(two, width)
  rng = np.random.default_rng(0)
  weights = jnp.asarray(rng.standard_normal((3, 5)), jnp.float32)
  numbers = jnp.array([[0.5, 1.0], [0.3, 2.0], [0.9, -1.0]])
  total = lambda n, w: sum(map(jnp.sum, jax.tree.leaves(stepped(n, w))))
  plain = jax.jit(lambda n, w: sum(map(jnp.sum, jax.tree.leaves(two(n, w)))))
  found = jax.jit(jax.vmap(jax.grad(total)))(numbers, weights)
  for n, w, slope in zip(numbers, weights, found, strict=True):
    for i in range(2):
      high, low = plain(n.at[i].add(width), w), plain(n.at[i].add(-width), w)
      want = (high - low) / (2 * width)
      np.testing.assert_allclose(slope[i], want, rtol=1e-4, atol=1e-4)
  values = jax.jit(jax.vmap(stepped))(numbers, weights)
  plain = jax.jit(jax.vmap(two))(numbers, weights)
  np.testing.assert_array_equal(values['value'], plain['value'])
  # The rest is held constant.
  rest = jax.jit(jax.grad(total, 1))(numbers[0], weights[0])
  np.testing.assert_array_equal(rest, 0)


def test_secant_agrees_with_straight_through():
  """LSQ's slope of the squared error by the step, where it is meant."""
  rng = np.random.default_rng(1)
  weight = jnp.asarray(rng.standard_normal(1 << 15), jnp.float32)
  x, most = jnp.float32(0.4), 3.0
  clipped = lambda x, w: x * jnp.clip(jnp.round(w / x), -most, most)

  def straight_through(x, w):
    unit = w / x
    level = jnp.clip(jnp.round(unit), -most, most)
    inside = jnp.abs(unit) <= most
    slope = jax.lax.stop_gradient(jnp.where(inside, level - unit, level))
    value = jax.lax.stop_gradient(level * x)
    return value + slope * (x - jax.lax.stop_gradient(x))

  error = lambda q, x: jnp.mean((q(x, weight) - weight) ** 2)
  slope = lambda q: jax.jit(jax.grad(lambda x: error(q, x)))(x)
  secant, through = slope(leaves.secant(clipped, 0.05)), slope(straight_through)
  true = (error(clipped, x + 0.02) - error(clipped, x - 0.02)) / 0.04
  np.testing.assert_allclose(secant, true, rtol=0.1)
  np.testing.assert_allclose(secant, through, rtol=0.1)


def test_numbers_are_found_and_stay_in_their_range():
  recipes = [
    r.rtn(2, group=8, clip=0.9),
    r.rtn(4, group=8),
    r.microscopiq(2, compensate=False),
    r.olive(),
  ]
  found = leaves.learnable(recipes, ['clip', 'sigma'])
  assert [(x.candidate, x.option) for x in found.entries] == [
    (0, 'clip'),
    (2, 'sigma'),
    (3, 'sigma'),
  ]
  only = leaves.learnable(recipes, ['microscopiq.sigma', 'rtn(bits=2*.clip'])
  assert [x.candidate for x in only.entries] == [0, 2]
  start = found.begin(5)
  assert start.shape == (3, 5)
  shared = leaves.learnable(recipes, ['sigma'], shared=True).begin(5)
  assert shared.shape == (2, 1)
  for leaf, row in zip(found.entries, start, strict=True):
    np.testing.assert_allclose(leaf.number(row), leaf.start)
    for far in (-30.0, 30.0):
      assert leaf.low <= leaf.number(np.float64(far)) <= leaf.high
      np.testing.assert_allclose(
        leaf.number(jnp.float32(far)), leaf.number(np.float64(far)), rtol=1e-6
      )
  below = dataclasses.replace(found.entries[0], low=-np.inf, high=0.0)
  np.testing.assert_allclose(below.number(np.array(below.coordinate(-2.0))), -2)
  # The recipe with a number is what the factory makes of it.
  other = found.recipe(2, jnp.log(jnp.array([1.5])), {})
  assert other.rows == dataclasses.replace(
    recipes[2].rows, sigma=other.rows.sigma
  )
  np.testing.assert_allclose(other.rows.sigma, 2.5)
  assert found.remade(2, {'sigma': 2.5}).rows.sigma == 2.5


def test_candidates_are_those_of_quantize_matrix(net):
  params, _, statistics, _ = net
  recipes = [r.rtn(b, group=32, clip=0.8) for b in (2, 4)] + [r.rtn(3)]
  made = make(net, recipes)
  learned = leaves.learnable(recipes, ['clip'])
  raw = jnp.asarray(learned.begin(3), jnp.float32)
  raw = raw + jnp.linspace(-0.5, 0.5, 6).reshape(2, 3)
  grams = {name: s.gram for name, s in statistics.items()}

  @jax.jit
  def now_at(params, base, raw):
    return leaves.at(params, base, learned, raw, grams)

  now = now_at(params, made.candidates, raw)
  sites = made.candidates.sites
  for c, leaf in enumerate(learned.entries):
    numbers = [float(leaf.number(x)) for x in raw[c]]
    own = [r.rtn(2 * c + 2, group=32, clip=x) for x in numbers]
    plan = plans.Plan(tuple(zip(sites, own, strict=True)))
    packed = plans.compress(params, plan, statistics=statistics)
    for i, site in enumerate(sites):
      found = now.candidates.values[site.name][c]
      np.testing.assert_array_equal(found, packed[site.name].dequantize())
      error = np.asarray(found - params[site.name], np.float64)
      own = np.sum(error * (np.asarray(grams[site.name], np.float64) @ error))
      np.testing.assert_allclose(
        now.candidates.overlap[i, c, c], own, rtol=1e-4
      )
  for site in sites:
    np.testing.assert_array_equal(
      now.candidates.values[site.name][2],
      made.candidates.values[site.name][2],
    )
  np.testing.assert_array_equal(now.control, 0)  # a derivative only


@pytest.mark.slow
def test_learned_clip_comes_near_the_best_of_a_grid(net):
  params, _, statistics, batches = net
  recipes = [r.rtn(2, group=32, clip=1.0), r.rtn(4, group=32)]
  made = make(net, recipes)
  learned = leaves.learnable(recipes, ['clip'], shared=True)
  budget = {'bits': float(made.bits[:, 0].sum())}
  found = leaves.search(
    loss,
    params,
    made,
    learned,
    [budget],
    batches,
    statistics=statistics,
    steps=40,
  )
  assert (found.choices == 0).all()
  grid = [r.rtn(2, group=32, clip=float(x)) for x in np.linspace(0.4, 1.2, 33)]
  whole = np.repeat(np.arange(len(grid))[:, None], 3, axis=1)
  losses = np.asarray(
    measured.choice_losses(
      loss,
      params,
      make(net, grid).candidates,
      measured.one_hot(whole, len(grid)),
      batches,
    )
  )
  fixed = losses[np.argmin(np.abs(np.linspace(0.4, 1.2, 33) - 1.0))]
  assert found.losses[0] < 0.8 * fixed
  assert found.losses[0] < 1.06 * losses.min()
  packed = plans.compress(params, found.plans[0], statistics=statistics)
  assert plans.size(packed).bits <= budget['bits']


@pytest.fixture(scope='module')
def outliers(net):
  """Choices and thresholds of MicroScopiQ learned together."""
  params, _, statistics, batches = net
  recipes = [
    r.microscopiq(b, block=32, sigma=3.0, compensate=False) for b in (2, 4)
  ]
  made = make(net, recipes)
  learned = leaves.learnable(recipes, ['sigma'])
  low, high = made.bits.sum(0)
  # The first is met by the start's outliers only where some are given up.
  budgets = [{'bits': share * low + (1 - share) * high} for share in (1, 0.5)]
  found = leaves.search(
    loss,
    params,
    made,
    learned,
    budgets,
    batches,
    statistics=statistics,
    steps=40,
  )
  return made, learned, budgets, found


@pytest.mark.slow
def test_learned_thresholds_lower_the_loss_at_equal_bits(net, outliers):
  params, _, _, batches = net
  made, _, budgets, found = outliers
  choices = np.array(list(itertools.product(range(2), repeat=3)))
  fixed = np.asarray(
    measured.choice_losses(
      loss,
      params,
      made.candidates,
      measured.one_hot(choices, 2),
      batches,
    )
  )
  spent = made.bits[np.arange(3), choices].sum(1)
  best = [fixed[spent <= budget['bits']].min() for budget in budgets]
  assert (found.losses <= best).all()
  assert found.losses[1] < 0.9 * best[1]


@pytest.mark.slow
def test_budgets_hold_and_plans_round_trip(net, outliers):
  params, _, statistics, batches = net
  made, learned, budgets, found = outliers
  for budget, plan, choice, value in zip(
    budgets, found.plans, found.choices, found.losses, strict=True
  ):
    again = plans.from_json(
      json.loads(json.dumps(plan.to_json())), made.candidates.sites
    )
    assert again == plan
    packed = plans.compress(params, plan, statistics=statistics)
    assert plans.size(packed).bits <= budget['bits']
    other = plans.matrices(plans.compress(params, again, statistics=statistics))
    for name, matrix in plans.matrices(packed).items():
      buffers = other[name].pack().buffers
      for key, buffer in matrix.pack().buffers.items():
        np.testing.assert_array_equal(buffer, buffers[key])
    for (_, recipe), c in zip(plan.entries, choice, strict=True):
      # The same candidate, but for its numbers.
      assert recipe.rows.bits == learned.recipes[c].rows.bits
    whole = jax.jit(plans.dequantize)(packed)
    each = [loss(whole, b) for b in zip(*batches, strict=True)]
    np.testing.assert_allclose(np.mean(each), value, rtol=1e-5)
  assert any(
    recipe not in learned.recipes
    for plan in found.plans
    for _, recipe in plan.entries
  )


@pytest.mark.slow
def test_bits_are_exact_at_nodes(net, outliers):
  params, _, statistics, _ = net
  made, learned, _, _ = outliers
  bits = leaves.measure_bits(params, made, learned, statistics=statistics)
  start = jnp.asarray(learned.begin(3), jnp.float32)
  np.testing.assert_allclose(bits.at(start), made.bits, rtol=1e-6)
  raw = start.at[0].add(0.5)  # a node
  remade = leaves.remake(params, made, learned, raw, statistics=statistics)
  np.testing.assert_allclose(bits.at(raw), remade.made.bits[:, :2], rtol=1e-6)
  assert (remade.made.bits[:, 0] < made.bits[:, 0]).all()
  np.testing.assert_array_equal(remade.origin, [0, 1, 0, 1])
  # Fewer outliers, fewer bits: so says the slope.
  slope = jax.grad(lambda raw: jnp.sum(bits.at(raw)))(start + 0.1)
  assert (np.asarray(slope) <= 0).all() and (np.asarray(slope[0]) < 0).any()


@pytest.mark.parametrize(
  ('names', 'message'),
  [
    (['sigam'], r"no candidate has a number 'sigam'; nearest are \['sigma'"),
    (['rtn.sigma'], 'no candidate has a number'),
    (['block'], "'block' of microscopiq.* is not a number to be learned"),
    (['bits'], 'is not a number to be learned'),
    (['gptq.clip'], "is 'none', no number"),
    (['rtn.clip'], 'starts at 1.3, not between 0.0 and 1.25'),
    ([], 'no names given'),
  ],
)
def test_names_are_checked(names, message):
  recipes = [r.microscopiq(), r.rtn(clip=1.3), r.gptq()]
  with pytest.raises(ValueError, match=message):
    leaves.learnable(recipes, names)


def test_bad_input(net):
  params, _, _, batches = net
  recipes = [r.rtn(2, group=32, clip=0.9), r.rtn(4, group=32)]
  made = make(net, recipes)
  learned = leaves.learnable(recipes, ['clip'])
  run = lambda learned, budget: leaves.search(
    loss, params, made, learned, [budget], batches
  )
  with pytest.raises(allocation.InfeasibleError, match='smallest feasible'):
    run(learned, {'bits': 1.0})
  with pytest.raises(ValueError, match='unknown quantity'):
    run(learned, {'cycles': 1.0})
  other = leaves.learnable(recipes[:1], ['clip'])
  with pytest.raises(ValueError, match='numbers are learned of'):
    run(other, {'bits': 1e9})
  with pytest.raises(ValueError, match='width=0 is not positive'):
    leaves.learnable(recipes, ['clip'], width=0)
  foreign = dataclasses.replace(recipes[0], name='mine')
  with pytest.raises(ValueError, match='a plan could not store'):
    leaves.learnable([foreign], ['clip'])
  with pytest.raises(ValueError, match="clip='all' is not"):
    r.rtn(clip='all')
  with pytest.raises(ValueError, match='clip=0 is not a share'):
    r.gptq(clip=0)
