"""Recipes by block: each as if it were alone, all of them in one matrix."""

import doctest
import importlib
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mq_jax as mq
from mq_jax import hardware as hw
from mq_jax import plans, quantize, recipes
from mq_jax.compensation import Status

# Everything is cut into three: few shapes, few compilations.
K, N = 36, 15
GPTQ = recipes.gptq(bits=3, group=6)
RTN = recipes.rtn(bits=2, group=6)


def normal(*shape, seed=0):
  # Not by jax: each shape would cost seconds to compile.
  drawn = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(drawn.astype(np.float32))


@pytest.fixture(scope='module')
def data():
  x = np.asarray(normal(200, K)) * np.linspace(0.2, 3.0, K, dtype=np.float32)
  x = x + x[:, ::-1]
  return normal(K, N, seed=1), jnp.asarray(x.T @ x)


def block(array, axis, span):
  return array[span] if axis == 'rows' else array[:, span]


@pytest.mark.parametrize('axis', ['rows', 'columns'])
def test_a_block_is_what_it_is_alone(data, axis):
  weight, hessian = data
  parts = (recipes.none(), GPTQ, RTN)
  recipe = recipes.blocks(parts, axis)
  whole = quantize.quantize_matrix(weight, recipe, hessian=hessian)
  spans = mq.layouts.blocks.spans(K if axis == 'rows' else N, 3)
  for part, span, found in zip(
    parts, spans, quantize.split(whole), strict=True
  ):
    H = hessian[span, span] if axis == 'rows' else hessian
    codes, _ = quantize._quantize_batch(
      block(weight, axis, span),
      H,
      part.rows,
      part.compensation,
      part.input_scales,
    )
    assert found.layout == quantize.layout_of(part)
    chex.assert_trees_all_equal(codes, found.codes)
    np.testing.assert_array_equal(
      block(np.asarray(whole), axis, span), np.asarray(found)
    )


@pytest.mark.parametrize('axis', ['rows', 'columns'])
def test_another_recipe_changes_its_own_block_only(data, axis):
  weight, hessian = data
  quantized = lambda parts: np.asarray(
    quantize.quantize_matrix(
      weight, recipes.blocks(parts, axis), hessian=hessian
    )
  )
  spans = mq.layouts.blocks.spans(K if axis == 'rows' else N, 3)
  plain = quantized([GPTQ, GPTQ, GPTQ])
  changed = quantized([GPTQ, recipes.gptq(bits=2, group=6), GPTQ])
  for i, span in enumerate(spans):
    same = block(plain, axis, span) == block(changed, axis, span)
    assert same.all() if i != 1 else not same.all()


def test_columns_lose_no_compensation_and_rows_do(data):
  weight, hessian = data
  whole = quantize.quantize_matrix(weight, GPTQ, hessian=hessian)
  columns, rows = (
    quantize.quantize_matrix(
      weight, recipes.blocks([GPTQ] * 3, axis), hessian=hessian
    )
    for axis in ('columns', 'rows')
  )
  same = np.isclose(np.asarray(columns), np.asarray(whole), atol=1e-6)
  assert same.mean() > 0.97
  plain = quantize.quantize_matrix(weight, recipes.rtn(bits=3, group=6))
  e = weight - plain.dequantize()
  alone = jnp.sum(e * (hessian @ e)) / jnp.sum(weight * (hessian @ weight))
  errors = [q.record['output_error'] for q in (whole, rows)]
  assert errors[0] < errors[1] < alone


def test_groups_that_do_not_straddle_are_those_of_the_whole(data):
  weight, _ = data
  whole = quantize.quantize_matrix(weight, RTN)
  for recipe, count in (
    (recipes.blocks([RTN] * 3), 3),
    (recipes.blocks([RTN, recipes.blocks([RTN] * 3, 'columns'), RTN]), 5),
  ):
    cut = quantize.quantize_matrix(weight, recipe)
    np.testing.assert_array_equal(np.asarray(cut), np.asarray(whole))
    # Bytes are whole for each block, of levels and of zero points.
    assert whole.nbytes <= cut.nbytes <= whole.nbytes + 2 * count


FINEQ = recipes.fineq(scale='absmax')


def test_the_record_tells_the_worst_status_and_adds_counts(data):
  weight, hessian = data
  recipe = recipes.blocks([FINEQ, RTN, FINEQ])
  q = quantize.quantize_matrix(weight, recipe)
  counts = [
    int(quantize.quantize_matrix(weight[i : i + 12], FINEQ).record['outliers'])
    for i in (0, 24)
  ]
  assert min(counts) > 0
  assert q.record['outliers'] == sum(counts)
  assert q.status is Status.ok
  mixed = recipes.blocks([RTN, RTN, GPTQ])
  assert mixed.calibrated and not recipe.calibrated
  assert quantize.quantize_matrix(weight, mixed).status is Status.no_hessian
  broken = jnp.diag(jnp.where(jnp.arange(K) < 20, 1.0, -1.0))
  mixed = recipes.blocks([GPTQ, GPTQ, RTN])
  q = quantize.quantize_matrix(weight, mixed, hessian=broken)
  assert q.status is Status.factorization_failed


def test_json_label_and_equality():
  data = {
    'recipe': 'blocks',
    'parts': [
      {'recipe': 'rtn', 'bits': 2, 'group': 6},
      {'recipe': 'rtn', 'bits': 2, 'group': 6},
      {
        'recipe': 'blocks',
        'parts': [{'recipe': 'none'}, {'recipe': 'gptq'}],
        'axis': 'columns',
        'sizes': [1, 13],
      },
    ],
    'axis': 'rows',
  }
  made = recipes.from_json(json.loads(json.dumps(data)))
  assert made.to_json() == data
  tile = recipes.blocks([recipes.none(), recipes.gptq()], 'columns', (1, 13))
  same = recipes.blocks((RTN, RTN, tile))
  assert made == same and hash(made) == hash(same)
  assert made.label == (
    'blocks(parts=[2 x rtn(bits=2, group=6), blocks(parts=[none, gptq], '
    'axis=columns, sizes=[1, 13])], axis=rows)'
  )
  module = importlib.import_module('mq_jax.recipes.blocks')
  assert doctest.testmod(module).failed == 0
  module = importlib.import_module('mq_jax.layouts.blocks')
  assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize(
  'options, words',
  [
    ({'parts': []}, '0 parts'),
    ({'parts': 'rtn'}, 'not a list'),
    ({'parts': {'recipe': 'rtn'}}, 'not a list'),
    ({'parts': ['rtn']}, 'a recipe is'),
    ({'parts': [{'bits': 3}]}, 'a recipe is'),
    ({'parts': [{'recipe': 'rtm'}]}, 'did you mean rtn'),
    ({'parts': [{'recipe': 'rtn', 'bit': 3}]}, 'unknown option'),
    ({'parts': [RTN], 'axis': 'k'}, "axis='k'"),
    ({'parts': [RTN, RTN], 'sizes': [3]}, '2 parts of sizes'),
    ({'parts': [RTN], 'sizes': [0]}, '1 parts of sizes'),
    ({'parts': [RTN], 'sizes': [1.5]}, 'whole number'),
    ({'parts': [RTN], 'sizes': 36}, 'recipe blocks'),
    ({}, "recipe blocks: .*'parts'"),
  ],
)
def test_wrong_options_are_refused(options, words):
  with pytest.raises(ValueError, match=words):
    recipes.from_json({'recipe': 'blocks', **options})


def test_hardware_sees_the_widest_block_and_exact_bits(data):
  weight, _ = data
  q = quantize.quantize_matrix(weight, recipes.blocks([FINEQ, RTN, RTN]))
  bits = hw.of_matrix(q, activation_bits=4)
  assert (bits.weight_bits, bits.activation_bits) == (3, 4)
  assert bits.ebw == q.ebw
  fineq, integer, _ = map(hw.of_matrix, quantize.split(q))
  assert fineq.two > 0
  np.testing.assert_allclose(bits.two, fineq.two / 3)
  np.testing.assert_allclose(
    bits.mean_magnitude,
    (fineq.mean_magnitude + 2 * integer.mean_magnitude) / 3,
  )


def model(params, x):
  def layer(x, w):
    return jnp.tanh(x @ w), None

  x, _ = jax.lax.scan(layer, x, params['stack'])
  return x @ params['last'].T


def test_compress_of_stacked_and_transposed_parameters():
  exact = np.asarray(normal(5, 12)).astype(jnp.bfloat16).astype(np.float32)
  params = {
    'stack': normal(3, 12, 12, seed=1) / 4,
    'last': jnp.asarray(exact),
  }
  x = normal(40, 12, seed=2)
  sites = mq.sites.find(model, params, x)
  # Hessians themselves do; calibration is tested elsewhere.
  hessian = x.T @ x
  statistics = {'stack': jnp.stack([hessian] * 3), 'last': hessian}
  recipe = recipes.blocks([RTN, RTN, recipes.none()])
  plan = plans.uniform(sites, recipe)
  assert plans.from_json(json.loads(json.dumps(plan.to_json())), sites) == plan
  packed = mq.compress(params, plan, statistics=statistics)
  plain = jax.jit(mq.dequantize)(packed)
  assert plain['last'].shape == (5, 12)
  # Rows are inputs: the second axis of the transposed parameter.
  np.testing.assert_array_equal(plain['last'][:, 8:], params['last'][:, 8:])
  assert np.any(np.asarray(plain['last'] != params['last'])[:, :4])
  assert packed['stack'].record['weight_mse'].shape == (3,)
  again = mq.layouts.unpack(packed['stack'].pack())
  np.testing.assert_array_equal(np.asarray(again), np.asarray(packed['stack']))
  assert [row['status'] for row in plans.records(packed)] == ['ok', 'ok']
  size = plans.size(packed)
  assert size.bits == 8 * sum(
    m.pack().nbytes for m in plans.matrices(packed).values()
  )
  many = plans.uniform(sites, recipes.blocks([RTN] * 13))
  with pytest.raises(ValueError, match='^(stack|last): .*13 blocks'):
    mq.compress(params, many, statistics=statistics)
  with pytest.raises(ValueError, match='quantize_matrix: .*13 blocks'):
    quantize.quantize_matrix(params['last'].T, recipes.blocks([RTN] * 13))
