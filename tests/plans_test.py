"""Plans and calibration on real functions, sites of every shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mq_jax as mq


def model(params, x):
  """A transposed weight, a scan over stacked layers, a convolution."""
  x = jnp.tanh(x @ params['first'].T)

  def layer(x, w):
    return jnp.tanh(x @ w), None

  x, _ = jax.lax.scan(layer, x, params['stack'])
  image = x.reshape(x.shape[0], 4, 4, 1)
  image = jax.lax.conv_general_dilated(
    image,
    params['conv'],
    (1, 1),
    'SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )
  return image.mean((1, 2)) @ params['last'] + params['bias'][None]


@pytest.fixture(scope='module')
def case():
  keys = jax.random.split(jax.random.key(0), 5)
  params = {
    'first': jax.random.normal(keys[0], (16, 12)) / 4,
    'stack': jax.random.normal(keys[1], (3, 16, 16)) / 4,
    'conv': jax.random.normal(keys[2], (3, 3, 1, 8)) / 3,
    'last': jax.random.normal(keys[3], (8, 4))
    .astype(jnp.bfloat16)
    .astype(jnp.float32),
    'bias': jnp.ones(4),
  }
  batches = [
    jax.random.normal(key, (40, 12)) for key in jax.random.split(keys[4], 3)
  ]
  return params, batches, mq.sites.find(model, params, batches[0])


def test_statistics_are_the_gram_matrices_of_all_batches(case):
  params, batches, sites = case
  seen = []
  found = mq.calibrate(
    model, params, batches, sites=sites, progress=lambda *a: seen.append(a)
  )
  assert seen == [(1, 3), (2, 3), (3, 3)]
  x = np.concatenate(batches).astype(np.float64)
  np.testing.assert_allclose(found['first'].gram, x.T @ x, rtol=1e-5, atol=1e-4)
  np.testing.assert_allclose(found['first'].largest, np.abs(x).max(0))
  np.testing.assert_allclose(found['first'].total, x.sum(0), rtol=1e-4)
  assert found['first'].count == 120
  y = np.tanh(x @ np.asarray(params['first'], np.float64).T)
  for i in range(3):
    np.testing.assert_allclose(
      found['stack'].gram[i], y.T @ y, rtol=1e-4, atol=1e-3
    )
    y = np.tanh(y @ np.asarray(params['stack'][i], np.float64))
  assert found['conv'].gram.shape == (9, 9)
  assert found['conv'].count == 120 * 16


def test_statistics_merge(case):
  params, batches, sites = case
  whole = mq.calibrate(model, params, batches, sites=sites)
  a = mq.calibrate(model, params, batches[:1], sites=sites)
  b = mq.calibrate(model, params, batches[1:], sites=sites)
  merged = {name: mq.calibration.merge(a[name], b[name]) for name in a}
  for name in whole:
    for x, y in zip(whole[name], merged[name], strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
  'recipe',
  [
    mq.recipes.none(),
    pytest.param(mq.recipes.gptq(bits=4, group=8), marks=pytest.mark.slow),
    pytest.param(
      mq.recipes.microscopiq(bits=4, block=16), marks=pytest.mark.slow
    ),
    mq.recipes.rtn(bits=4, group=8),
  ],
  ids=lambda r: r.label,
)
def test_compress_then_dequantize_is_close_and_keeps_the_structure(
  case, recipe
):
  params, batches, sites = case
  statistics = mq.calibrate(model, params, batches, sites=sites)
  plan = mq.plans.uniform(sites, recipe)
  assert {s.name for s, _ in plan.entries} == {'first', 'stack', 'conv', 'last'}
  seen = []
  packed = mq.compress(
    params, plan, statistics=statistics, progress=lambda *a: seen.append(a)
  )
  assert seen[-1] == (6, 6)
  plain = jax.jit(mq.dequantize)(packed)
  assert jax.tree.structure(plain) == jax.tree.structure(params)
  for name, leaf in params.items():
    assert plain[name].shape == leaf.shape
    error = np.linalg.norm(plain[name] - leaf) / np.linalg.norm(leaf)
    assert error < (0.005 if recipe.name == 'none' else 0.4)
  np.testing.assert_array_equal(plain['bias'], params['bias'])
  x = batches[0]
  assert not np.array_equal(model(plain, x), model(params, x))
  assert np.abs(model(plain, x) - model(params, x)).mean() < 0.3
  assert packed['stack'].shape == (3, 16, 16)
  # Each matrix of the stack is what it would be on its own.
  alone = mq.quantize_matrix(
    params['stack'][1], recipe, hessian=statistics['stack'].gram[1]
  )
  same = np.isclose(plain['stack'][1], np.asarray(alone), atol=1e-6)
  assert same.mean() > 0.97
  size = mq.plans.size(packed)
  assert size.bits == 8 * sum(
    m.pack().nbytes for m in mq.plans.matrices(packed).values()
  )
  rows = mq.plans.records(packed)
  assert [row['status'] for row in rows] == ['ok'] * 4
  unpacked = mq.layouts.unpack(packed['stack'].pack())
  np.testing.assert_array_equal(
    np.asarray(unpacked), np.asarray(packed['stack'])
  )


def test_rules_choose_by_name_and_survive_json(case):
  _, _, sites = case
  plan = mq.plans.plan(
    sites,
    [('sta*', mq.recipes.fineq()), ('*', mq.recipes.rtn(bits=8, group=4))],
  )
  chosen = {site.name: recipe.name for site, recipe in plan.entries}
  assert chosen['stack'] == 'fineq'
  assert chosen['first'] == 'rtn'
  again = mq.plans.from_json(plan.to_json(), sites)
  assert dict(again.entries) == dict(plan.entries)
  with pytest.raises(ValueError, match='nearest names are'):
    mq.plans.plan(sites, [('fist', mq.recipes.rtn())])
  with pytest.raises(ValueError, match="no site 'fist'"):
    mq.plans.from_json({'fist': {'recipe': 'rtn'}}, sites)


def test_unusable_input_is_refused_before_work(case):
  params, batches, sites = case
  with pytest.raises(ValueError, match='no batches'):
    mq.calibrate(model, params, [], sites=sites)
  bad = [batches[0].at[0, 0].set(jnp.nan)]
  with pytest.raises(ValueError, match='first: calibration data'):
    mq.calibrate(model, params, bad, sites=sites)
  recipe = mq.recipes.gptq(bits=4, group=8)
  plan = mq.plans.uniform(sites, recipe)
  with pytest.raises(ValueError, match='has no statistics of this site'):
    mq.compress(params, plan, statistics={})
  broken = {**params, 'last': params['last'].at[0, 1].set(jnp.inf)}
  with pytest.raises(ValueError, match=r'last: weight has 1 values'):
    mq.compress(broken, plan)
  packed = mq.compress(params, mq.plans.uniform(sites, mq.recipes.none()))
  with pytest.raises(ValueError, match='quantized already'):
    mq.compress(packed, plan)
  with pytest.raises(ValueError, match='no site left'):
    mq.plans.uniform(sites, recipe, exclude=('*',))
