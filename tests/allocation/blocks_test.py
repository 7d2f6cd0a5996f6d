"""Allocation to blocks of matrices: exact tables, packed plans, the search."""

import itertools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mq_jax as mq
from mq_jax import allocation, plans, quantize
from mq_jax.allocation import candidates, measured, search

AXES = ('rows', 'columns')
D, BLOCKS = 16, 2
RECIPES = (
  mq.recipes.rtn(bits=2, group=8),
  mq.recipes.gptq(bits=3, group=8),
  mq.recipes.rtn(bits=5, group=8),
)


def normal(*shape, seed=0):
  drawn = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(drawn.astype(np.float32))


def f(params, x):
  return jnp.tanh(x @ params['a'].T) @ params['b']


def loss(params, batch):
  x, y = batch
  return jnp.mean((f(params, x) - y) ** 2)


@pytest.fixture(scope='module')
def bed():
  params = {'a': normal(D, D, seed=1) / 2, 'b': normal(D, D, seed=2) / 4}
  x = normal(3, 64, D, seed=3) * jnp.linspace(0.1, 2.0, D)[None, None]
  x = x + x[..., ::-1]
  y = jax.vmap(f, in_axes=(None, 0))(params, x)
  sites = mq.sites.find(f, params, x[0])
  statistics = mq.calibrate(f, params, list(x), sites=sites)

  def make(recipes=RECIPES, **options):
    return candidates.make(
      params, sites, recipes, statistics=statistics, **options
    )

  made = {axis: make(blocks=BLOCKS, axis=axis) for axis in AXES}
  return params, statistics, (x, y), made, make


@pytest.fixture(params=AXES)
def axis(request):
  return request.param


CHOICES = np.array(list(itertools.product(range(3), repeat=4)))


def all_losses(bed, axis):
  params, _, batches, made, _ = bed
  found = measured.choice_losses(
    loss, params, made[axis].candidates, measured.one_hot(CHOICES, 3), batches
  )
  return np.asarray(found, np.float64)


def problem_of(made, sensitivity, **options):
  return allocation.make_problem(
    sensitivity,
    {'bits': made.bits},
    {},
    sites=made.candidates.names,
    candidates=made.candidates.labels,
    **options,
  )


def cut(array, axis, i):
  half = slice(8 * i, 8 * i + 8)
  return array[..., half, :] if axis == 'rows' else array[..., half]


@pytest.mark.parametrize(
  'axis', [pytest.param('rows', marks=pytest.mark.slow), 'columns']
)
def test_rows_of_the_problem_are_blocks(bed, axis):
  params, statistics, _, made, _ = bed
  found = made[axis].candidates
  assert found.names == tuple(
    f'{name}[{axis} {span}]' for name in 'ab' for span in ('0:8', '8:16')
  )
  assert made[axis].bits.shape == (4, 3)
  # The parameter of `a` is transposed: rows are inputs in any case.
  for l, site in enumerate(found.sites):
    weight = site.matrix(params[site.name])
    gram = statistics[site.name].gram
    for c in (0, 2):
      recipe = RECIPES[c]
      value = site.matrix(found.values[site.name][c])
      for i in range(BLOCKS):
        H = cut(gram[8 * i : 8 * i + 8], 'columns', i)
        alone = quantize.quantize_matrix(
          cut(weight, axis, i), recipe, hessian=H if axis == 'rows' else gram
        )
        np.testing.assert_allclose(
          cut(value, axis, i), np.asarray(alone), atol=1e-6
        )
        bits = made[axis].bits[2 * l + i, c]
        assert bits == 8 * alone.pack().nbytes


def test_overlap_leaves_out_what_independent_blocks_do_not_share(bed, axis):
  """1/2 gamma tr(Cov A) is the mean excess of all choices, enumerated."""
  params, statistics, _, made, _ = bed
  found = made[axis].candidates
  site = found.sites[0]
  gram = np.asarray(statistics[site.name].gram, np.float64)
  stack = np.stack([site.matrix(x) for x in found.values[site.name]])
  rng = np.random.default_rng(0)
  p = rng.dirichlet(np.ones(3), BLOCKS)
  whole, weights = [], []
  for c in itertools.product(range(3), repeat=BLOCKS):
    value = np.array(stack[0], np.float64)
    for i in range(BLOCKS):
      cut(value, axis, i)[:] = cut(stack[c[i]], axis, i)
    whole.append(value)
    weights.append(p[0, c[0]] * p[1, c[1]])
  mean = np.tensordot(weights, whole, axes=1)
  excess = sum(
    w * np.sum((x - mean) * (gram @ (x - mean)))
    for w, x in zip(weights, whole, strict=True)
  )
  overlap = np.asarray(found.overlap[:BLOCKS], np.float64)
  sizes = np.diagonal(overlap, axis1=1, axis2=2)
  spread = np.sum(p * sizes) - np.einsum('lc,lcd,ld->', p, overlap, p)
  np.testing.assert_allclose(spread, excess, rtol=1e-3)


def test_mixed_at_whole_choices_is_what_is_assembled(bed, axis):
  params, _, _, made, _ = bed
  for choice in ((0, 1, 2, 1), (2, 2, 0, 1)):
    packed = candidates.assemble(made[axis], params, choice)
    plain = plans.dequantize(packed)
    p = measured.one_hot(np.array(choice), 3)
    mixed = candidates.mixed(params, made[axis].candidates, p)
    for name in 'ab':
      np.testing.assert_array_equal(mixed[name], plain[name])
    cost = made[axis].bits[np.arange(4), choice].sum()
    assert plans.size(packed).bits == cost
    assert cost == 8 * sum(
      m.pack().nbytes for m in plans.matrices(packed).values()
    )


def test_mixed_is_linear_block_by_block(bed, axis):
  params, _, _, made, _ = bed
  rng = np.random.default_rng(1)
  p = np.float32(rng.dirichlet(np.ones(4), 4)[:, :3])  # the rest: original
  mixed = candidates.mixed(params, made[axis].candidates, jnp.asarray(p))
  for l, site in enumerate(made[axis].candidates.sites):
    original = site.matrix(params[site.name])
    stack = jax.vmap(site.matrix)(made[axis].candidates.values[site.name])
    for i in range(BLOCKS):
      row = p[2 * l + i]
      want = np.tensordot(row, cut(stack, axis, i), axes=1)
      want = want + (1 - row.sum()) * cut(original, axis, i)
      np.testing.assert_allclose(
        cut(site.matrix(mixed[site.name]), axis, i), want, atol=1e-6
      )


def test_a_plan_carried_out_is_what_was_assembled_to_the_bit(bed, axis):
  params, statistics, _, made, _ = bed
  choice = (1, 0, 2, 1)
  plan = candidates.plan_of(made[axis], RECIPES, choice)
  text = json.dumps(plan.to_json())
  again = plans.from_json(json.loads(text), made[axis].candidates.sites)
  assert again == plan
  carried = plans.matrices(mq.compress(params, again, statistics=statistics))
  packed = plans.matrices(candidates.assemble(made[axis], params, choice))
  assert carried.keys() == packed.keys() == {'a', 'b'}
  for name, matrix in packed.items():
    other = carried[name]
    assert matrix.layout == other.layout and matrix.site == other.site
    assert matrix.recipe == other.recipe and matrix.shape == other.shape
    assert matrix.status is other.status
    chex.assert_trees_all_equal(matrix.codes, other.codes)
    np.testing.assert_allclose(
      matrix.record['weight_mse'], other.record['weight_mse'], rtol=1e-5
    )


def test_allocation_of_blocks_is_that_of_enumeration(bed, axis):
  """And never worse than one candidate a site, the same choice for blocks."""
  params, _, batches, made, _ = bed
  made = made[axis]
  table = measured.one_site_table(loss, params, made.candidates, batches)
  assert table.shape == (4, 3)
  problem = problem_of(made, table)
  names = made.candidates.names
  tied = problem_of(made, table, ties=(names[:2], names[2:]))
  rows = np.arange(4)
  bits = made.bits[rows, CHOICES].sum(1)
  totals = table[rows, CHOICES].sum(1)
  better = 0
  for budget in np.quantile(bits, (0.1, 0.3, 0.5, 0.7, 0.9)):
    under = problem.with_budget(bits=budget)
    choice = allocation.integer_program(under)
    assert allocation.feasible(under, choice)
    value = allocation.evaluate(under, choice)['sensitivity']
    np.testing.assert_allclose(value, totals[bits <= budget].min(), rtol=1e-9)
    brute = allocation.brute_force(under)
    np.testing.assert_allclose(
      allocation.evaluate(under, brute)['sensitivity'], value, rtol=1e-9
    )
    sites = tied.with_budget(bits=budget)
    coarse = allocation.integer_program(sites)
    assert coarse[0] == coarse[1] and coarse[2] == coarse[3]
    coarse = allocation.evaluate(sites, coarse)['sensitivity']
    assert value <= coarse + 1e-12
    better += value < coarse - 1e-12
  assert better > 0


@pytest.mark.slow
def test_search_over_blocks_is_near_the_best_of_all(bed, axis='rows'):
  params, _, batches, made, _ = bed
  made = made[axis]
  problem = problem_of(made, np.zeros((4, 3)))
  bits = made.bits[np.arange(4), CHOICES].sum(1)
  budgets = [{'bits': b} for b in np.quantile(bits, (0.3, 0.7))]
  found = search.front(
    loss, params, made.candidates, problem, budgets, batches, steps=16
  )
  losses = all_losses(bed, axis)
  for budget, choice, value in zip(
    budgets, found.choices, found.losses, strict=True
  ):
    packed = candidates.assemble(made, params, choice)
    assert plans.size(packed).bits <= budget['bits']
    assert value <= 1.1 * losses[bits <= budget['bits']].min()


def test_one_block_is_the_whole_site(bed):
  params, _, _, _, make = bed
  coarse, fine = RECIPES[0], RECIPES[2]
  whole = make([coarse, fine])
  again = make([coarse, fine], blocks=1, axis='columns')
  assert whole.candidates.names == ('a', 'b')
  for name in 'ab':
    np.testing.assert_array_equal(
      whole.candidates.values[name], again.candidates.values[name]
    )
  np.testing.assert_array_equal(whole.bits, again.bits)
  plan = candidates.plan_of(whole, [coarse, fine], (1, 0))
  assert [recipe for _, recipe in plan.entries] == [fine, coarse]
  packed = candidates.assemble(whole, params, (1, 0))
  assert 'output_error' in packed['a'].record


def test_bad_input(bed):
  params, _, batches, made, make = bed
  for options, words in (
    ({'blocks': 0}, 'blocks=0'),
    ({'blocks': 2.0}, 'blocks=2.0'),
    ({'blocks': 2, 'axis': 'k'}, "axis='k'"),
    ({'blocks': 17}, '^[ab]: .*17 blocks'),
  ):
    with pytest.raises(ValueError, match=words):
      make(**options)
  found = made['rows']
  with pytest.raises(ValueError, match=r'\(4,\) is needed'):
    candidates.assemble(found, params, (0, 1))
  with pytest.raises(ValueError, match=r'\(4, 3\) are needed'):
    candidates.mixed(params, found.candidates, jnp.zeros((2, 3)))
  broken = jax.tree.map(lambda x: x * jnp.nan, batches)
  with pytest.raises(ValueError, match=r'at a\[rows 0:8\] is not finite'):
    measured.one_site_table(loss, params, found.candidates, broken)
