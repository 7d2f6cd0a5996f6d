"""Search on the loss of a small model, against enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mq_jax as mq
from mq_jax import allocation, plans
from mq_jax.allocation import candidates, gradient, measured, search


def f(params, x):
  for name in ('a', 'b', 'c'):
    x = jnp.tanh(x @ params[name])
  return x


def loss(params, batch):
  x, y = batch
  return jnp.mean((f(params, x) - y) ** 2)


@pytest.fixture(scope='module')
def bed():
  keys = jax.random.split(jax.random.key(0), 5)
  params = {
    name: jax.random.normal(key, (24, 24)) / 24**0.5 * scale
    for name, key, scale in zip('abc', keys, (1.5, 1.0, 0.7), strict=False)
  }
  x = jax.random.normal(keys[3], (4, 64, 24))
  y = jax.vmap(f, in_axes=(None, 0))(params, x)
  sites = mq.sites.find(f, params, x[0])
  statistics = mq.calibrate(f, params, list(x), sites=sites)
  recipes = [mq.recipes.rtn(bits=b, group=24) for b in (2, 3, 4)]
  made = candidates.make(params, sites, recipes, statistics=statistics)
  batches = (x, y)
  table = measured.one_site_table(loss, params, made.candidates, batches)
  problem = allocation.make_problem(
    table,
    {'bits': made.bits},
    {},
    sites=[s.name for s in sites],
    candidates=made.candidates.labels,
  )
  return params, made, recipes, batches, problem


def test_candidates_are_the_packed_matrices(bed):
  params, made, recipes, _, _ = bed
  for i, recipe in enumerate(recipes):
    for j, site in enumerate(made.candidates.sites):
      q = mq.quantize_matrix(params[site.name], recipe)
      np.testing.assert_array_equal(
        made.candidates.values[site.name][i], q.dequantize()
      )
      assert made.bits[j, i] == 8 * q.pack().nbytes


def test_overlap_is_the_error_under_the_gram_matrix(bed):
  params, made, _, batches, _ = bed
  rows = np.asarray(batches[0].reshape(-1, 24), np.float64)
  values = np.asarray(made.candidates.values['a'], np.float64)
  errors = values - np.asarray(params['a'], np.float64)
  for c, d in itertools.product(range(3), repeat=2):
    want = np.sum((rows @ errors[c]) * (rows @ errors[d]))
    found = made.candidates.overlap[0, c, d]
    np.testing.assert_allclose(found, want, rtol=1e-3)


def test_one_site_table_is_a_loop(bed):
  params, made, _, batches, problem = bed
  each = lambda p: np.mean(
    [float(loss(p, b)) for b in zip(*batches, strict=True)]
  )
  plain = each(params)
  for i, site in enumerate(made.candidates.sites):
    for j in range(3):
      changed = dict(
        params, **{site.name: made.candidates.values[site.name][j]}
      )
      np.testing.assert_allclose(
        problem.sensitivity[i, j], each(changed) - plain, rtol=1e-4, atol=1e-7
      )


def test_mixing_is_exact_at_whole_choices(bed):
  params, made, _, _, _ = bed
  for choice in ((0, 1, 2), (2, 2, 0)):
    p = measured.one_hot(np.array(choice), 3)
    mixed = candidates.mixed(params, made.candidates, p)
    whole = plans.dequantize(candidates.assemble(made, params, choice))
    for name in 'abc':
      np.testing.assert_array_equal(mixed[name], whole[name])


@pytest.mark.slow
def test_correction_predicts_the_expected_loss(bed):
  """Of independent choices, enumerated; the mean of weights underrates it."""
  params, made, _, batches, _ = bed
  gamma = measured.curvature(loss, params, made.candidates, batches)
  expected = search.corrected(loss, params, made.candidates, gamma)
  rng = np.random.default_rng(1)
  p = jnp.asarray(rng.dirichlet(np.ones(3), 3), jnp.float32)
  choices = np.array(list(itertools.product(range(3), repeat=3)))
  losses = np.asarray(
    measured.choice_losses(
      loss, params, made.candidates, measured.one_hot(choices, 3), batches
    )
  )
  weights = np.prod(np.asarray(p)[np.arange(3), choices], axis=1)
  truth = float(np.sum(weights * losses))
  mean = lambda g: np.mean(
    [float(g(p, (), b)) for b in zip(*batches, strict=True)]
  )
  plain = mean(
    lambda p, _, b: loss(candidates.mixed(params, made.candidates, p), b)
  )
  corrected = mean(expected)
  assert plain < truth
  assert abs(corrected - truth) < 0.35 * abs(plain - truth)
  # At whole choices there is nothing to correct.
  hot = measured.one_hot(np.array([0, 2, 1]), 3)
  batch = jax.tree.map(lambda x: x[0], batches)
  np.testing.assert_allclose(
    expected(hot, (), batch),
    loss(candidates.mixed(params, made.candidates, hot), batch),
    rtol=1e-5,
  )


def test_search_is_near_the_best_of_all_choices(bed):
  params, made, recipes, batches, problem = bed
  total = made.bits.max(1).sum()
  budgets = [{'bits': share * total} for share in (0.65, 0.75, 0.9)]
  found = search.front(
    loss, params, made.candidates, problem, budgets, batches, steps=30
  )
  choices = np.array(list(itertools.product(range(3), repeat=3)))
  losses = np.asarray(
    measured.choice_losses(
      loss, params, made.candidates, measured.one_hot(choices, 3), batches
    )
  )
  for budget, choice, value in zip(
    budgets, found.choices, found.losses, strict=True
  ):
    under = problem.with_budget(**budget)
    assert allocation.feasible(under, choice)
    allowed = [allocation.feasible(under, c) for c in choices]
    assert value <= 1.1 * losses[allowed].min()
    packed = candidates.assemble(made, params, choice)
    assert plans.size(packed).bits <= budget['bits']
    plan = candidates.plan_of(made, recipes, choice)
    assert plans.from_json(plan.to_json(), made.candidates.sites) == plan


def test_bad_input(bed):
  params, made, recipes, batches, problem = bed
  with pytest.raises(allocation.InfeasibleError, match='smallest feasible'):
    search.front(
      loss, params, made.candidates, problem, [{'bits': 1.0}], batches
    )
  with pytest.raises(ValueError, match='no label twice'):
    candidates.make(params, made.candidates.sites, [recipes[0]] * 2)
  broken = jax.tree.map(lambda x: x * jnp.nan, batches)
  with pytest.raises(ValueError, match='not finite'):
    measured.one_site_table(loss, params, made.candidates, broken)
  gamma = jnp.ones(3)
  with pytest.raises(FloatingPointError, match='step 0'):
    search.front(
      loss,
      params,
      made.candidates,
      problem,
      [{'bits': 1e9}],
      broken,
      gamma=gamma,
      steps=2,
    )


def test_an_interrupted_search_goes_on_to_the_same_bits(bed):
  params, made, _, batches, problem = bed
  total = made.bits.max(1).sum()
  budgets = [{'bits': 0.65 * total}, {'bits': 0.9 * total}]
  arguments = (loss, params, made.candidates, problem, budgets, batches)
  options = {'steps': 12, 'schedule': gradient.Schedule(gumbel=True)}
  states, done = [], []
  whole = search.front(
    *arguments,
    **options,
    save=states.append,
    progress=lambda i, n: done.append((i, n)),
  )
  steps = [(6, 48), (12, 48), (18, 48), (24, 48)]
  assert done == [*steps, (36, 48), (48, 48)]
  for state in states:
    again = search.front(*arguments, **options, state=state)
    np.testing.assert_array_equal(again.choices, whole.choices)
    np.testing.assert_array_equal(
      again.state.relaxations.probabilities,
      whole.state.relaxations.probabilities,
    )
    np.testing.assert_array_equal(again.state.losses, whole.state.losses)


def test_a_state_saved_before_the_loss_diverged_is_good(bed):
  params, made, _, batches, problem = bed
  x, y = batches
  late = (jnp.concatenate([x, x * jnp.nan]), jnp.concatenate([y, y]))
  states = []
  with pytest.raises(FloatingPointError, match='step 8'):
    search.front(
      loss,
      params,
      made.candidates,
      problem,
      [{'bits': 1e9}],
      jax.tree.map(lambda a: jnp.repeat(a, 2, axis=0), late),
      gamma=jnp.ones(3),
      steps=20,
      save=states.append,
    )
  assert states and np.isfinite(states[-1].relaxations.probabilities).all()


@pytest.mark.slow
def test_a_sharded_data_axis_changes_rounding_only(bed):
  params, made, _, batches, problem = bed
  mesh = jax.make_mesh((2,), ('data',))
  over = jax.NamedSharding(mesh, jax.P(None, 'data'))
  whole = jax.NamedSharding(mesh, jax.P())
  budgets = [{'bits': 0.75 * made.bits.max(1).sum()}]
  run = lambda params, candidates, batches: search.front(
    loss, params, candidates, problem, budgets, batches, steps=8
  )
  alone = run(params, made.candidates, batches)
  shared = run(
    jax.device_put(params, whole),
    jax.device_put(made.candidates, whole),
    jax.device_put(batches, over),
  )
  np.testing.assert_array_equal(shared.choices, alone.choices)
  np.testing.assert_allclose(shared.state.losses, alone.state.losses, rtol=1e-4)


@pytest.mark.slow
def test_the_expected_loss_can_be_computed_again(bed):
  """Under remat, jit and vmap; its slopes are those of finite differences."""
  params, made, _, batches, _ = bed
  gamma = jnp.ones(3)
  expected = search.corrected(loss, params, made.candidates, gamma)
  batch = jax.tree.map(lambda x: x[0], batches)
  rng = np.random.default_rng(2)
  p = jnp.asarray(rng.dirichlet(np.ones(3), (2, 3)), jnp.float32)
  slope = jax.vmap(jax.grad(lambda p: expected(p, (), batch)))
  again = jax.vmap(jax.grad(jax.checkpoint(lambda p: expected(p, (), batch))))
  np.testing.assert_allclose(jax.jit(again)(p), slope(p), rtol=1e-5, atol=1e-7)
  for i in range(2):
    step = jnp.asarray(rng.normal(size=(3, 3)), jnp.float32)
    value = lambda t, i=i, step=step: expected(p[i] + t * step, (), batch)
    want = (value(1e-2) - value(-1e-2)) / 2e-2
    np.testing.assert_allclose(
      jnp.sum(slope(p)[i] * step), want, rtol=2e-2, atol=1e-4
    )


def test_descent_sees_what_sums_over_sites_do_not():
  """Sites whose errors cancel: only together are they good."""
  rng = np.random.default_rng(3)
  e = rng.normal(size=(6, 3))
  measure = lambda c: float(np.sum(e[np.arange(6), c]) ** 2)
  slope = lambda c: (
    2 * np.sum(e[np.arange(6), c]) * e + (e - e[np.arange(6), c][:, None]) ** 2
  )
  problem = allocation.make_problem(
    np.zeros((6, 3)), {'bits': np.tile([2.0, 3.0, 4.0], (6, 1))}, {'bits': 18}
  )
  choices = np.array(list(itertools.product(range(3), repeat=6)))
  kept = choices[choices.sum(1) + 12 <= 18]
  values = np.sort([measure(c) for c in kept])
  start = np.ones(6, np.int64)
  found, value = search.descend(
    problem, start, measure(start), slope, measure, rounds=20
  )
  assert allocation.feasible(problem, found)
  assert value == measure(found) < measure(start)
  assert value <= np.quantile(values, 0.05)


def test_descent_keeps_ties_and_stops_where_nothing_is_better():
  table = np.array([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
  problem = allocation.make_problem(
    table, {'bits': np.tile([4.0, 2.0], (3, 1))}, {'bits': 10}, ties=[[0, 1]]
  )
  measure = lambda c: float(table[np.arange(3), c].sum())
  start = np.array([1, 1, 0])
  found, value = search.descend(
    problem, start, measure(start), lambda c: table, measure
  )
  np.testing.assert_array_equal(found, [0, 0, 1])
  assert value == 0.0
  again, value = search.descend(
    problem, found, value, lambda c: table, measure, rounds=1
  )
  np.testing.assert_array_equal(again, found)


@pytest.mark.slow
def test_a_step_takes_one_copy_of_the_weights_more_than_a_gradient():
  """So that all takes candidates + 2: with the original, and the mixture."""
  keys = jax.random.split(jax.random.key(0), 4)
  params = {
    name: jax.random.normal(key, (256, 256)) / 16
    for name, key in zip('abc', keys, strict=False)
  }
  x = jax.random.normal(keys[3], (1, 8, 256))
  y = jax.vmap(f, in_axes=(None, 0))(params, x)
  sites = mq.sites.find(f, params, x[0])
  recipes = [mq.recipes.rtn(bits=b, group=64) for b in (2, 3, 4, 5, 6)]
  made = candidates.make(params, sites, recipes)
  plain = jax.jit(jax.value_and_grad(loss)).lower(params, (x[0], y[0]))
  relaxed = search._advance.lower(
    loss,
    params,
    made.candidates,
    jnp.ones(3),
    jnp.asarray(made.bits[None], jnp.float32),
    jnp.asarray([made.bits[:, 2].sum()], jnp.float32),
    jnp.ones((3, 5), bool),
    jnp.arange(3),
    (x, y),
    gradient.begin(jnp.ones((3, 5), bool), 1, key=jax.random.key(0)),
    gradient.Schedule(),
    steps=1,
  )
  temporary = lambda x: x.compile().memory_analysis().temp_size_in_bytes
  weights = sum(x.nbytes for x in jax.tree.leaves(params))
  # Gradients of the plain weights are outputs, not temporary.
  allowed = temporary(plain) + weights + 1.2 * weights
  assert temporary(relaxed) < allowed
