"""Transforms at sites of every shape: nothing lost, and seen by all."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mq_jax as mq
from mq_jax import activations, equalization
from mq_jax.activations import MXInt, Token
from mq_jax.models import decoder

# Exact but for float32: 16 bits of weight are bfloat16, so weights are such.
LOUD = np.where(np.arange(16) == 3, 16.0, 1.0).astype(np.float32)


def model(params, x):
  """A matmul [b, t, k] by a transposed weight, a scan over stacked layers,
  experts, a strided convolution with feature groups, a matmul on the left."""
  x = jnp.einsum('btk,nk->btn', x, params['first'])

  def layer(x, w):
    return jnp.tanh(x @ w) * LOUD[None, None], None

  x, _ = jax.lax.scan(layer, x, params['stack'])
  routed = jnp.stack([x, -2.0 * x])  # [experts, b, t, k]
  x = jnp.einsum('ebtk,ekn->ebtn', routed, params['experts']).sum(0)
  image = x.reshape(x.shape[0], 4, 4, 4)
  image = jax.lax.conv_general_dilated(
    image,
    params['conv'],
    (2, 1),
    'SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=2,
  )
  flat = image.reshape(x.shape[0], -1)
  return jnp.einsum('kn,bk->nb', params['last'], flat)


@pytest.fixture(scope='module')
def case():
  rng = np.random.default_rng(0)

  def draw(*shape):
    x = rng.standard_normal(shape).astype(np.float32) / 4
    return jnp.asarray(x).astype(jnp.bfloat16).astype(jnp.float32)

  params = {
    'first': draw(16, 12),
    'stack': draw(3, 16, 16),
    'experts': draw(2, 16, 16),
    'conv': draw(3, 3, 2, 6),
    'last': draw(48, 5),
  }
  x = jnp.asarray(rng.standard_normal((8, 4, 12)), jnp.float32)
  sites = mq.sites.find(model, params, x)
  assert [s.name for s in sites] == [
    'first',
    'stack',
    'experts',
    'conv',
    'last',
  ]
  return params, x, sites, mq.calibrate(model, params, [x], sites=sites)


def plan_of(sites, recipe='none', **spec):
  options = {'bits': 8, 'group': 4} if recipe != 'none' else {}
  made = mq.recipes.make(recipe, activations=spec, **options)
  return mq.plans.uniform(sites, made)


SMOOTH = {'format': 'none', 'smooth': 0.7}
BOTH = {'format': 'none', 'smooth': 0.5, 'rotate': True, 'seed': 5}


def test_transforms_leave_the_function_as_it_is(case):
  """At every site x' W' = x W, and the Gram matrix is that of x'."""
  params, _, sites, statistics = case
  plan = plan_of(sites, **BOTH)
  inputs = activations.choose(params, plan.entries, statistics)
  rng = np.random.default_rng(1)
  rows = {
    site.name: rng.standard_normal((*site.matrix_shape[:-2], 50, site.k))
    for site in sites
  }
  rows = jax.tree.map(lambda x: x.astype(np.float32), rows)

  @jax.jit
  def both(params, rows):
    found = {}
    for site in sites:
      X, leaf, mine = rows[site.name], params[site.name], inputs[site.name]
      gram = lambda x: jnp.swapaxes(x, -1, -2) @ x
      W, H = activations.as_seen(mine, site, leaf, gram(X))
      see = functools.partial(_seen, mine, site)
      seen = jax.vmap(see)(X) if site.repeats > 1 else see(X)
      pairs = (seen @ W, X @ site.matrix(leaf)), (H, gram(seen)), (seen, X)
      found[site.name] = pairs
    return found

  for site in sites:
    product, gram, seen = both(params, rows)[site.name]
    np.testing.assert_allclose(*product, atol=5e-5, err_msg=site.name)
    bound = 1e-5 * np.abs(gram[1]).max()
    np.testing.assert_allclose(*gram, atol=bound, err_msg=site.name)
    assert np.abs(seen[0] - seen[1]).max() > 0.1
  features = [activations.features_of(site) for site in sites]
  assert features == [12, 16, 16, 2, 48]


def _seen(inputs, site, rows):
  runs = rows.reshape(*rows.shape[:-2], -1, activations.features_of(site))
  return inputs.seen(runs).reshape(rows.shape)


def test_packed_weights_decode_to_the_models_own_basis(case):
  params, x, sites, statistics = case
  some = [site for site in sites if site.name == 'conv']
  packed = mq.compress(params, plan_of(some, **BOTH), statistics=statistics)
  plain = mq.dequantize(packed)
  for site in some:
    matrix = packed[site.name]
    # bfloat16 has 8 bits: 2^-9 of the largest of a transformed column.
    bound = np.abs(params[site.name]).max() / 60
    np.testing.assert_allclose(plain[site.name], params[site.name], atol=bound)
    again = mq.layouts.unpack(matrix.pack())
    np.testing.assert_array_equal(np.asarray(again), np.asarray(matrix))
    extra = 16 * site.k + 8 * -(-activations.features_of(site) // 8)
    each = matrix.size // (site.k * site.n)
    assert 8 * matrix.nbytes == 16 * matrix.size + each * extra
  # Nothing is done to inputs without a quantizer.
  f, given = mq.plans.runnable(model, packed)
  assert f is model


def test_each_site_sees_its_quantized_inputs(case):
  """The rewritten function against one written out by hand."""
  params, x, sites, statistics = case
  spec = {'format': 'token', 'bits': 3, 'smooth': 0.5, 'rotate': True}
  plan = plan_of(sites, **spec)
  inputs = activations.choose(params, plan.entries, statistics)
  want = jax.jit(written_out)(params, inputs, x)
  got = jax.jit(activations.quantize_inputs(model))((params, inputs), x)
  # A value in the middle of two levels may go either way.
  assert np.mean(np.abs(got - want) > 1e-3) <= 0.1
  assert np.abs(got - model(params, x)).max() > 0.1


def written_out(plain, inputs, x):
  q = lambda name, x: inputs[name](x.reshape(-1, x.shape[-1])).reshape(x.shape)
  h = jnp.einsum('btk,nk->btn', q('first', x), plain['first'])
  for w in plain['stack']:
    h = jnp.tanh(q('stack', h) @ w) * LOUD[None, None]
  routed = jnp.stack([h, -2.0 * h]).reshape(2, -1, 16)
  routed = inputs['experts'](routed)
  h = jnp.einsum('emk,ekn->emn', routed, plain['experts']).sum(0)
  image = h.reshape(8 * 16, 2, 2)  # positions, feature groups, channels
  image = jnp.stack([image[:, 0], image[:, 1]])
  image = inputs['conv'](image)
  image = jnp.stack([image[0], image[1]], 1).reshape(8, 4, 4, 4)
  image = jax.lax.conv_general_dilated(
    image, plain['conv'], (2, 1), 'SAME', feature_group_count=2,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )  # fmt: skip
  h = image.reshape(8, -1)
  return jnp.einsum('kn,bk->nb', plain['last'], q('last', h))


@pytest.mark.slow
def test_what_is_calibrated_is_what_is_seen(case):
  params, x, sites, statistics = case
  some = [site for site in sites if site.name in ('first', 'conv')]
  spec = {'format': 'mx_int', 'bits': 3, 'group': 8, 'rotate': True}
  plan = plan_of(some, 'gptq', **spec, sees='quantized')
  with pytest.raises(ValueError, match='activations.prepare'):
    mq.compress(params, plan, statistics=statistics)
  done = activations.prepare(model, params, plan.entries, [x], statistics)
  rows = np.asarray(x).reshape(-1, 12)
  quantized = np.asarray(done.inputs['first'](jnp.asarray(rows)))
  np.testing.assert_allclose(
    done.statistics['first'].gram, quantized.T @ quantized, rtol=1e-3, atol=1e-3
  )
  assert np.abs(quantized - rows).max() > 0.05
  conv = statistics['conv'].gram, done.statistics['conv'].gram
  assert conv[0].shape == conv[1].shape and not np.allclose(*conv)


@pytest.mark.slow
def test_gradients_reach_inputs_scales_and_parameters(case):
  params, x, sites, statistics = case
  plan = plan_of(sites, format='tensor', bits=8, smooth=0.5)
  inputs = activations.choose(params, plan.entries, statistics)
  f = activations.quantize_inputs(model)
  largest = {n: i.quantizer.largest for n, i in inputs.items()}
  assert largest['experts'].shape == (2,)  # one for each expert
  assert largest['stack'].shape == ()  # one for all that a scan runs through

  def loss(plain, largest):
    mine = {
      n: dataclasses.replace(
        i, quantizer=dataclasses.replace(i.quantizer, largest=largest[n])
      )
      for n, i in inputs.items()
    }
    return jnp.sum(jnp.square(f((plain, mine), x)))

  found = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, largest)
  for leaf in jax.tree.leaves(found):
    assert np.all(np.isfinite(leaf)) and np.abs(leaf).max() > 0


@pytest.mark.slow
def test_search_takes_the_exponent_of_least_output_error(case):
  params, x, sites, statistics = case
  only = [s for s in sites if s.name == 'experts']
  spec = {'format': 'token', 'bits': 4}
  rows = activations.sample_rows(model, params, x, only)
  X = rows['experts']
  W = params['experts']

  def error(**options):
    plan = plan_of(only, 'rtn', **spec, **options)
    inputs = activations.choose(params, plan.entries, statistics, rows)
    packed = mq.compress(params, plan, statistics=statistics, inputs=inputs)
    product = inputs['experts'](X) @ packed['experts'].dequantize()
    return float(jnp.sum(jnp.square(product - X @ W)))

  fixed = [error(smooth=i / 10) for i in range(11)]
  searched = error(smooth='search')
  # 1e-3: the search rounds weights without their float16 record.
  assert searched <= 1.001 * min(*fixed, error())
  assert searched < 0.9 * max(fixed)


def test_folding_is_exact_and_takes_scales_to_producers(tiny_llama):
  pairs = decoder.channel_pairs(tiny_llama.config)
  pairs = [p for kind, ps in pairs.items() if kind != 'key' for p in ps]
  tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
  f, params = tiny_llama.apply, tiny_llama.params
  sites = mq.sites.find(f, params, tokens)
  statistics = mq.calibrate(f, params, [tokens], sites=sites)
  plan = plan_of(sites, format='token', smooth=0.7, fold=True)
  with pytest.raises(ValueError, match='call mq_jax.activations.fold first'):
    activations.choose(params, plan.entries, statistics)
  folded = activations.fold(params, pairs, plan.entries, statistics)
  run = jax.jit(f)
  np.testing.assert_allclose(
    run(folded.params, tokens), run(params, tokens), rtol=2e-4, atol=2e-4
  )
  for _, recipe in folded.entries:  # all have a producer in a Llama
    assert recipe.activations == activations.Activations(Token())
  new = mq.calibrate(f, folded.params, [tokens], sites=sites)
  for site, _ in folded.entries:
    # v_proj and up_proj give other channels, but are given the same.
    for a, b in zip(folded.statistics[site.name], new[site.name]):
      np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(b).max())
  q, k = (
    ('layers', 0, 'self_attn', name, 'kernel') for name in ('q_proj', 'k_proj')
  )
  name = '/'.join(map(str, q))
  scale = equalization.smoothing_scale(
    statistics[name].largest,
    np.maximum(*(np.abs(equalization._get(params, p)).max(1) for p in (q, k))),
    0.7,
  )
  # v_proj may have the largest weight of a row, never a smaller scale.
  ratio = statistics[name].largest / new[name].largest
  assert np.all(ratio <= scale * 1.001) and np.any(ratio > 1.5 * ratio.min())


def test_taps_of_a_convolution_fold_into_one_factor_a_channel():
  """A 3 x 3 kernel behind relu: exact, and as its statistics say."""
  rng = np.random.default_rng(0)
  draw = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)
  params = {'up': draw(5, 4), 'bias': draw(4), 'conv': draw(3, 3, 4, 2)}

  def f(params, x):
    x = jax.nn.relu(x @ params['up'] + params['bias'][None, None, None])
    return jax.lax.conv_general_dilated(
      x, params['conv'], (1, 1), 'SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )  # fmt: skip

  x = draw(2, 6, 6, 5)
  sites = mq.sites.find(f, params, x)
  statistics = mq.calibrate(f, params, [x], sites=sites)
  pair = equalization.ChannelPair(
    4, ((('up',), 1), (('bias',), 0)), ((('conv',), 2),)
  )
  plan = plan_of(sites, format='token', smooth=0.5, fold=True)
  folded = activations.fold(params, [pair], plan.entries, statistics)
  np.testing.assert_allclose(
    f(folded.params, x), f(params, x), rtol=1e-4, atol=1e-4
  )
  new = mq.calibrate(f, folded.params, [x], sites=sites)['conv']
  old = folded.statistics['conv']
  np.testing.assert_allclose(new.largest, old.largest, rtol=1e-4)
  assert np.abs(new.largest / statistics['conv'].largest - 1).max() > 0.05
  asked = {s.name: r.activations for s, r in folded.entries}
  assert asked['conv'].smooth is None and not asked['conv'].fold
  assert asked['up'].smooth == 0.5 and not asked['up'].fold  # nothing before


def test_what_can_not_be_done_is_refused_by_name(case):
  params, x, sites, statistics = case
  choose = lambda plan, *more: activations.choose(params, plan.entries, *more)
  with pytest.raises(ValueError, match='first: none.*no calibration'):
    choose(plan_of(sites, format='token', smooth=0.5))
  with pytest.raises(ValueError, match='a static scale needs'):
    choose(plan_of(sites, format='tensor'))
  with pytest.raises(ValueError, match='needs rows of the inputs'):
    choose(plan_of(sites, format='token', smooth='search'), statistics)
  awq = mq.recipes.make('awq', bits=4, activations=SMOOTH)
  with pytest.raises(ValueError, match='scales inputs itself'):
    choose(mq.plans.uniform(sites, awq), statistics)
  awq = mq.recipes.make('awq', bits=4, activations='token')
  with pytest.raises(ValueError, match='stack: awq.*can not follow'):
    choose(mq.plans.uniform(sites, awq), statistics)
  parts = [{'recipe': 'rtn', 'activations': 'token'}]
  with pytest.raises(ValueError, match='give them to the whole'):
    mq.recipes.make('blocks', parts=parts, activations='token')
  twice = lambda p, x: (x @ p) @ p
  only = mq.sites.find(twice, jnp.eye(4), jnp.ones((2, 4)))
  found = mq.calibrate(twice, jnp.eye(4), [jnp.ones((2, 4))], sites=only)
  plan = plan_of(only, format='token', smooth=0.5)
  with pytest.raises(ValueError, match='used more than once'):
    activations.choose(jnp.eye(4), plan.entries, found)
  g = activations.quantize_inputs(twice)
  with pytest.raises(ValueError, match="no site 'other'"):
    g((jnp.eye(4), {'other': activations.Inputs(Token())}), jnp.ones((2, 4)))


def test_a_layout_that_scales_inputs_scales_what_is_quantized(case):
  """AWQ's scales, which no plan chose: x / s is what is rounded."""
  _, x, sites, _ = case
  scale = jnp.asarray(2.0 ** np.arange(-6, 6), jnp.float16)
  matrix = mq.QuantizedMatrix(
    {'value': jnp.ones((12, 16), jnp.bfloat16), 'input_scale': scale},
    {},
    mq.layouts.InputScaled(mq.layouts.Dense()),
    (12, 16),
    site=sites[0],
    inputs=Token(4),
  )
  rows = x.reshape(-1, 12)
  wide = scale.astype(jnp.float32)[None]
  want = Token(4)(rows / wide) * wide
  np.testing.assert_array_equal(activations.of_matrix(matrix)(rows), want)
  assert np.abs(want - Token(4)(rows)).max() > 0.1


def test_plans_with_activations_survive_json(case):
  _, _, sites, _ = case
  plan = plan_of(sites, 'gptq', format='mx_int', bits=4, smooth=0.7)
  data = plan.to_json()
  assert data['first']['activations'] == {
    'format': 'mx_int',
    'bits': 4,
    'smooth': 0.7,
  }
  again = mq.plans.from_json(data, sites)
  assert dict(again.entries) == dict(plan.entries)
  data['first']['activations']['smoth'] = 1
  with pytest.raises(ValueError, match='first: .*smoth'):
    mq.plans.from_json(data, sites)


def test_half_precision_keeps_its_dtype():
  f = lambda w, x: x @ w
  w, x = jnp.eye(4, dtype=jnp.bfloat16), jnp.ones((2, 4), jnp.bfloat16)
  (site,) = mq.sites.find(f, w, x)
  g = jax.jit(activations.quantize_inputs(f))
  out = g((w, {site.name: activations.Inputs(MXInt(8, 4))}), x)
  assert out.dtype == jnp.bfloat16
