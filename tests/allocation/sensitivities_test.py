"""Sensitivities, against the whole Hessian of a tiny net and NumPy loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mq_jax import sites as sites_lib
from mq_jax.allocation import fisher, hessians, sensitivities
from mq_jax.calibration import calibrate

# By first use, which is not their order in a dict
ORDER = ('up', 'mix', 'down')
COUNT = 3  # candidates


def apply(params, x):
  def layer(h, w):
    return h + jnp.tanh(h @ w), None

  h = x @ params['up'] + params['bias'][None]
  h, _ = jax.lax.scan(layer, h, params['mix'])
  return h @ params['down']


def loss(params, batch):
  x, labels = batch
  logs = jax.nn.log_softmax(apply(params, x).astype(jnp.float32))
  return -jnp.mean(jnp.take_along_axis(logs, labels[:, None], axis=1))


near = functools.partial(np.testing.assert_allclose, rtol=1e-4)


def normal(seed, *shape):
  return jnp.asarray(
    np.random.default_rng(seed).normal(size=shape), jnp.float32
  )


def flat_net(params, batch):
  """Without a scan, which takes long to compile."""
  return jnp.mean(
    jnp.tanh(jnp.tanh(batch @ params['up']) @ params['down']) ** 2
  )


@functools.cache
def flat_bed():
  params = {'up': normal(0, 3, 5), 'down': normal(1, 5, 2)}
  batch = normal(2, 12, 3)
  sites = sites_lib.find(flat_net, params, batch)
  values = {
    n: w[None] + 0.03 * normal(3, 2, *w.shape) for n, w in params.items()
  }
  return params, batch, sites, values


@functools.cache
def bed():
  """params, batch, sites, candidates, their errors, H f64[n, n], slices."""
  params = {
    'bias': normal(0, 5),
    'up': normal(1, 3, 5),
    'mix': 0.5 * normal(2, 2, 5, 5),
    'down': normal(3, 5, 4),
  }
  batch = normal(4, 12, 3), jnp.arange(12) % 4
  sites = sites_lib.find(apply, params, batch[0])
  assert tuple(site.name for site in sites) == ORDER
  values = {
    name: params[name][None]
    + 0.1 * (1 + i) * normal(5 + i, COUNT, *params[name].shape)
    for i, name in enumerate(ORDER)
  }
  sizes = [params[name].size for name in ORDER]
  ends = np.cumsum([0, *sizes])
  spans = [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]

  def flat_loss(flat, batch):
    new = {
      name: flat[span].reshape(params[name].shape)
      for name, span in zip(ORDER, spans, strict=True)
    }
    return loss(params | new, batch)

  flat = jnp.concatenate([params[name].ravel() for name in ORDER])
  H = np.asarray(jax.jit(jax.hessian(flat_loss))(flat, batch), np.float64)
  slope = jax.jit(jax.grad(flat_loss))
  alone = zip(*(np.split(x, 12) for x in batch), strict=True)
  gradients = np.stack([np.asarray(slope(flat, one)) for one in alone])
  gradients = gradients.astype(np.float64)
  errors = {
    name: np.asarray(values[name], np.float64)
    - np.asarray(params[name], np.float64)
    for name in ORDER
  }
  return params, batch, sites, values, errors, H, spans, gradients


def blocks():
  *_, H, spans, _ = bed()
  return [H[span, span] for span in spans]


def changes(candidate=0):
  """Changes by site, and all of them as one vector."""
  params, _, _, values, errors, *_ = bed()
  delta = {name: values[name][candidate] - params[name] for name in ORDER}
  return delta, np.concatenate([errors[n][candidate].ravel() for n in ORDER])


# Curvature


@functools.cache
def product():
  return jax.jit(functools.partial(hessians.hessian_vector_product, loss))


def test_product_is_that_of_the_explicit_hessian():
  params, batch, _, _, _, H, spans, _ = bed()
  v = np.random.default_rng(9).normal(size=len(H))
  vector = {'bias': jnp.zeros(5)} | {
    name: jnp.asarray(v[span], jnp.float32).reshape(params[name].shape)
    for name, span in zip(ORDER, spans, strict=True)
  }
  found = product()(params, batch, vector)
  flat = np.concatenate([found[name].ravel() for name in ORDER])
  np.testing.assert_allclose(flat, H @ v, rtol=1e-4, atol=1e-5)


DRAWS = 400


@functools.cache
def trace(draws=DRAWS, at_once=50):
  params, batch, sites, *_ = bed()
  return hessians.hutchinson_trace(
    loss,
    params,
    batch,
    sites,
    key=jax.random.key(1),
    draws=draws,
    at_once=at_once,
  )


def test_trace_is_within_its_own_error_bars():
  *_, H, spans, _ = bed()
  found = trace()
  exact = np.array([np.trace(block) for block in blocks()])
  assert np.all(np.abs(found.mean - exact) < 4 * found.error)
  # Neither too wide: the variance that the docstring states.
  stated = []
  for span in spans:
    whole, own = np.sum(H[span] ** 2), H[span, span]
    coupled = whole - np.sum(own**2)
    diagonal = np.sum(np.diag(own) ** 2)
    stated.append(2 * (np.sum(own**2) - diagonal) + coupled)
  expected = np.sqrt(np.array(stated) / DRAWS)
  np.testing.assert_allclose(found.error, expected, rtol=0.2)


@pytest.mark.parametrize(('draws', 'at_once'), [(7, None), (DRAWS, 50)])
def test_trace_from_draws_side_by_side_is_that_of_a_loop(draws, at_once):
  params, batch, sites, *_, spans, _ = bed()
  found = trace(draws, at_once)
  samples = []
  for each in jax.random.split(jax.random.key(1), draws)[:7]:
    signs = jax.random.rademacher(each, (spans[-1].stop,), jnp.float32)
    v = {'bias': jnp.zeros(5)} | {
      name: signs[span].reshape(params[name].shape)
      for name, span in zip(ORDER, spans, strict=True)
    }
    Hv = product()(params, batch, v)
    samples.append([float(jnp.sum(v[name] * Hv[name])) for name in ORDER])
  samples = np.array(samples)
  for s in range(1, 8):
    near(found.means[s - 1], samples[:s].mean(0), atol=1e-5)
    if s > 1:
      error = samples[:s].std(0, ddof=1) / np.sqrt(s)
      near(found.errors[s - 1], error, rtol=1e-3, atol=1e-5)
  assert np.all(np.isinf(found.errors[0]))
  np.testing.assert_array_equal(found.mean, found.means[-1])
  np.testing.assert_array_equal(found.error, found.errors[-1])


@pytest.mark.parametrize('seed', [0, 1, 2])
def test_top_eigenvalue_is_that_of_the_block(seed):
  params, batch, sites, *_ = bed()
  found = hessians.top_eigenvalue(
    loss, params, batch, sites, key=jax.random.key(seed)
  )
  for i, block in enumerate(blocks()):
    values = np.linalg.eigvalsh(block)
    top = values[np.argmax(np.abs(values))]
    np.testing.assert_allclose(found.magnitude[i], abs(top), rtol=0.01)
    np.testing.assert_allclose(found.rayleigh[i], top, rtol=0.01)
  assert np.all(found.converged) and np.all(found.products < 100)


def linear(params, batch):
  return jnp.sum(params['w'] @ batch)


def saddle(params, batch):
  w = params['w'][:, 0]
  return 0.5 * jnp.sum(batch[:, 0] * w**2) + 0.0 * jnp.sum(params['w'] @ batch)


@pytest.mark.parametrize(
  ('diagonal', 'magnitude', 'rayleigh'),
  [
    ((-3.0, 1.0, 2.0), 3.0, -3.0),
    ((2.0, -2.0, 0.0), 2.0, None),  # the quotient settles anywhere between
    ((1e-12, 2e-13, 0.0), 1e-12, 1e-12),
    ((0.0, 0.0, 0.0), 0.0, 0.0),
  ],
)
def test_top_eigenvalue_of_either_sign_and_any_size(
  diagonal, magnitude, rayleigh
):
  params = {'w': jnp.ones((3, 3))}
  batch = jnp.asarray(diagonal, jnp.float32)[:, None]
  sites = sites_lib.find(saddle, params, batch)[:1]
  found = hessians.top_eigenvalue(
    saddle, params, batch, sites, key=jax.random.key(0), tolerance=1e-4
  )
  assert 1 < int(found.products[0]) < 100
  np.testing.assert_allclose(found.magnitude, [magnitude], rtol=2e-3)
  if rayleigh is not None:
    np.testing.assert_allclose(found.rayleigh, [rayleigh], rtol=2e-3)
  assert bool(found.converged[0])


def test_one_product_is_not_said_to_converge():
  params, batch = {'w': jnp.eye(3)}, jnp.ones((3, 1))
  sites = sites_lib.find(saddle, params, batch)[:1]
  found = hessians.top_eigenvalue(
    saddle, params, batch, sites, key=jax.random.key(0), iterations=1
  )
  assert not np.any(found.converged)
  np.testing.assert_array_equal(found.products, 1)


def test_a_linear_loss_has_no_curvature():
  params, batch = {'w': jnp.ones((2, 3))}, jnp.ones((3, 1))
  sites = sites_lib.find(linear, params, batch)
  key = jax.random.key(0)
  trace = hessians.hutchinson_trace(linear, params, batch, sites, key=key)
  top = hessians.top_eigenvalue(linear, params, batch, sites, key=key)
  assert float(trace.mean[0]) == 0 and float(trace.error[0]) == 0
  assert float(top.magnitude[0]) == 0 and bool(top.converged[0])


def test_interactions_are_those_of_the_explicit_hessian():
  params, batch, sites, *_, H, spans, _ = bed()
  delta, flat = changes()
  row = hessians.row_interaction(loss, params, batch, sites, delta)
  pairs = hessians.pairwise_interaction(loss, params, batch, sites, delta)
  expected = np.array(
    [[flat[a] @ H[a, b] @ flat[b] for b in spans] for a in spans]
  )
  near(pairs, expected, atol=1e-6)
  near(row, expected.sum(axis=1), atol=1e-6)
  np.testing.assert_array_equal(pairs, pairs.T)


def test_pair_table_holds_every_choice():
  params, batch, sites, values, errors, H, spans, _ = bed()
  table = hessians.pair_table(loss, params, batch, sites, values)
  assert table.shape == (3, COUNT, 3, COUNT)
  for i, a in enumerate(ORDER):
    for j, b in enumerate(ORDER):
      block = H[spans[i], spans[j]]
      left = errors[a].reshape(COUNT, -1)
      right = errors[b].reshape(COUNT, -1)
      np.testing.assert_allclose(
        table[i, :, j], left @ block @ right.T, rtol=1e-4, atol=1e-6
      )
  pairs = hessians.pairwise_interaction(
    loss, params, batch, sites, changes(1)[0]
  )
  np.testing.assert_allclose(table[:, 1, :, 1], pairs, rtol=1e-4, atol=1e-6)


def test_second_order_predicts_a_change_of_the_loss():
  params, batch, sites, values = flat_bed()
  value = lambda choice: float(
    flat_net({name: values[name][choice] for name in values}, batch)
  )
  change = value(0) - float(flat_net(params, batch))
  gradient = fisher.site_gradient(flat_net, params, batch, sites)
  table = sensitivities.first_order_table(params, sites, values, gradient)
  pairs = hessians.pair_table(flat_net, params, batch, sites, values)
  first = float(jnp.sum(table[:, 0]))
  second = first + 0.5 * float(jnp.sum(pairs[:, 0, :, 0]))
  assert abs(second - change) < 0.2 * abs(first - change)


def test_sites_may_be_some_of_all_in_any_order():
  params, batch, sites, *_, H, spans, _ = bed()
  delta, flat = changes()
  found = hessians.row_interaction(
    loss, params, batch, [sites[2], sites[1]], delta
  )
  chosen = np.zeros(len(H), bool)
  chosen[spans[1]] = chosen[spans[2]] = True
  product = flat * (H @ np.where(chosen, flat, 0.0))
  near(found, [product[spans[2]].sum(), product[spans[1]].sum()], atol=1e-6)


# Fisher


def test_fisher_is_that_of_a_loop_over_examples():
  params, batch, sites, *_, spans, gradients = bed()
  diagonal = fisher.fisher_diagonal(loss, params, batch, sites)
  trace = fisher.fisher_trace(loss, params, batch, sites)
  whole = fisher.site_gradient(loss, params, batch, sites)
  for i, name in enumerate(ORDER):
    mine = gradients[:, spans[i]]
    norms = np.sum(mine**2, axis=1)
    near(diagonal[name].ravel(), np.mean(mine**2, axis=0), atol=1e-7)
    near(trace.mean[i], norms.mean())
    near(trace.error[i], norms.std(ddof=1) / np.sqrt(len(norms)))
    near(trace.mean[i], jnp.sum(diagonal[name]))
    near(whole[name].ravel(), mine.mean(axis=0), atol=1e-6)


# Tables


def table_of(measure):
  """f64[l, c] by a loop; measure(index, weight, error), both flat."""
  params, _, _, _, errors, *_ = bed()
  weight = lambda n: np.asarray(params[n], np.float64).ravel()
  return [
    [measure(i, weight(n), error.ravel()) for error in errors[n]]
    for i, n in enumerate(ORDER)
  ]


def test_weight_mse_table():
  params, _, sites, values, *_ = bed()
  run = functools.partial(sensitivities.weight_mse_table, params, sites, values)
  near(run(), table_of(lambda i, w, e: np.sum(e**2)))
  near(
    run(relative=True), table_of(lambda i, w, e: np.sum(e**2) / np.sum(w**2))
  )


def test_hessian_tables():
  params, _, sites, values, *_ = bed()
  numbers = jnp.array([2.0, -3.0, 0.5])
  sizes = [15, 50, 20]
  near(
    sensitivities.trace_table(params, sites, values, numbers),
    table_of(lambda i, w, e: max(numbers[i], 0) / sizes[i] * np.sum(e**2)),
  )
  near(
    sensitivities.eigenvalue_table(params, sites, values, numbers),
    table_of(lambda i, w, e: abs(numbers[i]) / sizes[i] * np.sum(e**2)),
  )
  same = hessians.Estimate(numbers, numbers, numbers[None], numbers[None])
  np.testing.assert_array_equal(
    sensitivities.trace_table(params, sites, values, same),
    sensitivities.trace_table(params, sites, values, numbers),
  )
  top = hessians.Eigenvalues(abs(numbers), numbers, numbers, numbers)
  np.testing.assert_array_equal(
    sensitivities.eigenvalue_table(params, sites, values, top),
    sensitivities.eigenvalue_table(params, sites, values, numbers),
  )


def test_gradient_tables():
  params, batch, sites, values, *_, spans, gradients = bed()
  mean = gradients.mean(axis=0)
  diagonal = np.mean(gradients**2, axis=0)
  near(
    sensitivities.fisher_table(
      params, sites, values, fisher.fisher_diagonal(loss, params, batch, sites)
    ),
    table_of(lambda i, w, e: np.sum(diagonal[spans[i]] * e**2)),
  )
  gradient = fisher.site_gradient(loss, params, batch, sites)
  near(
    sensitivities.gradient_error_table(params, sites, values, gradient),
    table_of(lambda i, w, e: np.sum(mean[spans[i]] ** 2 * e**2)),
  )
  near(
    sensitivities.first_order_table(params, sites, values, gradient),
    table_of(lambda i, w, e: np.sum(mean[spans[i]] * e)),
    atol=1e-6,
  )


def test_output_sqnr_table():
  params, batch, sites, values, errors, *_ = bed()
  x = np.asarray(batch[0], np.float64)
  statistics = calibrate(apply, params, [batch[0]], sites=sites)
  found = sensitivities.output_sqnr_table(params, sites, values, statistics)
  # The inputs of each matmul, by hand
  p = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
  h = x @ p['up'] + p['bias']
  inputs = [h]
  for w in p['mix']:
    h = h + np.tanh(h @ w)
    inputs.append(h)
  ratio = lambda x, w, e: np.sum((x @ e) ** 2) / np.sum((x @ w) ** 2)
  for c in range(COUNT):
    near(found[0, c], ratio(x, p['up'], errors['up'][c]))
    near(found[2, c], ratio(inputs[-1], p['down'], errors['down'][c]))
    stacked = zip(inputs[:2], p['mix'], errors['mix'][c], strict=True)
    near(found[1, c], sum(ratio(*each) for each in stacked))
  grams = {name: found.gram for name, found in statistics.items()}
  np.testing.assert_array_equal(
    sensitivities.output_sqnr_table(params, sites, values, grams), found
  )


def test_an_exact_candidate_costs_nothing():
  params, batch, sites, *_ = bed()
  values = {name: params[name][None] for name in ORDER}
  gradient = fisher.site_gradient(loss, params, batch, sites)
  statistics = calibrate(apply, params, [batch[0]], sites=sites)
  ones = jnp.ones(3)
  s = sensitivities
  for table in (
    s.weight_mse_table(params, sites, values, relative=True),
    s.output_sqnr_table(params, sites, values, statistics),
    s.trace_table(params, sites, values, ones),
    s.fisher_table(params, sites, values, gradient),
  ):
    np.testing.assert_array_equal(table, np.zeros((3, 1)))


# All of it


def test_under_jit_with_parameters_traced():
  params, batch, sites, values = flat_bed()
  key = jax.random.key(3)

  def run(params, batch, values, key):
    trace = hessians.hutchinson_trace(
      flat_net, params, batch, sites, key=key, draws=5
    )
    diagonal = fisher.fisher_diagonal(flat_net, params, batch, sites)
    return (
      sensitivities.trace_table(params, sites, values, trace),
      sensitivities.fisher_table(params, sites, values, diagonal),
    )

  arguments = params, batch, values, key
  jax.tree.map(near, jax.jit(run)(*arguments), run(*arguments))


def test_compiled_once_for_a_loss():
  params, batch, sites, _ = flat_bed()
  traced = []

  def counted(params, batch):
    traced.append(1)
    return flat_net(params, batch)

  for seed in range(3):
    scaled = jax.tree.map(lambda x, s=seed: x * (1.0 + s), params)
    hessians.row_interaction(counted, scaled, batch, list(sites), scaled)
  assert len(traced) == 1


def test_parameters_of_fewer_bits_are_summed_in_float32():
  params, batch, sites, values = flat_bed()
  half = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
  run = lambda params, batch: hessians.row_interaction(
    flat_net, params, batch, sites, params
  )
  rough, exact = run(half(params), half(batch)), run(params, batch)
  assert rough.dtype == jnp.float32
  np.testing.assert_allclose(rough, exact, rtol=0.1, atol=0.02)
  table = sensitivities.weight_mse_table(half(params), sites, half(values))
  assert table.dtype == jnp.float32
  whole = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), half(tree))
  near(
    table, sensitivities.weight_mse_table(whole(params), sites, whole(values))
  )


# Refusals


def test_refusals():
  params, batch, sites, values, *_ = bed()
  key, ones = jax.random.key(0), jnp.ones(3)
  trace = functools.partial(hessians.hutchinson_trace, loss)
  with pytest.raises(ValueError, match='draws=0 must be at least 1'):
    trace(params, batch, sites, key=key, draws=0)
  with pytest.raises(ValueError, match='no sites'):
    trace(params, batch, [], key=key)
  with pytest.raises(ValueError, match='up: has the parameter or name of'):
    trace(params, batch, [sites[0], sites[0]], key=key)
  whole = params | {'mix': params['mix'].astype(jnp.int32)}
  with pytest.raises(ValueError, match='mix: parameter has dtype int32'):
    trace(whole, batch, sites, key=key)
  without = {name: values[name] for name in ('up', 'down')}
  with pytest.raises(ValueError, match='mix: values has nothing'):
    sensitivities.weight_mse_table(params, sites, without)
  with pytest.raises(ValueError, match=r'mix: values has shape \(2, 2, 5, 5\)'):
    sensitivities.weight_mse_table(
      params, sites, values | {'mix': values['mix'][:2]}
    )
  with pytest.raises(ValueError, match=r'\(2,\) numbers for 3 sites'):
    sensitivities.trace_table(params, sites, values, ones[:2])
  with pytest.raises(ValueError, match='up: there are no statistics'):
    sensitivities.output_sqnr_table(params, sites, values, {})
  with pytest.raises(ValueError, match='up: gram has shape'):
    sensitivities.output_sqnr_table(params, sites, values, {'up': ones})
  with pytest.raises(ValueError, match='down: delta has shape'):
    delta = changes()[0]
    hessians.row_interaction(loss, params, batch, sites, delta | {'down': ones})
  with pytest.raises(ValueError, match='the same number of examples'):
    fisher.fisher_diagonal(loss, params, (batch[0], batch[1][:3]), sites)
