"""Cutting, joining, lifting: against plain loops."""

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from mq_jax import clusters, steps


@hypothesis.given(
  shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
  size=st.integers(1, 7),
  axis=st.sampled_from([0, 1, -1]),
)
@hypothesis.settings(max_examples=12)  # each compiles
def test_join_undoes_cut(shape, size, axis):
  array = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
  cut = clusters.cut(array, size, axis)
  assert cut.shape[-1] == size
  length = shape[axis]
  assert cut.shape[-2] == clusters.number_of_clusters(length, size)
  chex.assert_trees_all_equal(clusters.join(cut, length, axis), array)


@pytest.mark.parametrize('axis', [0, pytest.param(1, marks=pytest.mark.slow)])
def test_lift_equals_a_loop_and_padding_changes_nothing(axis):
  weight = jax.random.normal(jax.random.key(0), (10, 6))
  step = steps.RoundToNearest(bits=3)
  values, codes = clusters.lift(step, size=4, axis=axis)(weight)
  columns = np.asarray(weight if axis == 1 else weight.T)
  expected = np.zeros_like(columns)
  for i, column in enumerate(columns):
    for start in range(0, len(column), 4):
      part = column[start : start + 4]  # the last one short, not padded
      done = step(clusters.new_cluster(jnp.asarray(part)))
      expected[i, start : start + 4] = done.value
  expected = expected if axis == 1 else expected.T
  # Compiled as a whole, XLA may divide by a reciprocal: an ulp.
  np.testing.assert_allclose(values, expected, rtol=1e-6)
  assert codes['scale'].shape == (
    columns.shape[0],
    clusters.number_of_clusters(columns.shape[1], 4),
  )


def test_lift_sweeps_leaves_by_vmap_with_one_trace():
  weight = jax.random.normal(jax.random.key(0), (8, 4))

  @chex.assert_max_traces(n=1)
  def run(step):
    return clusters.lift(step, size=4)(weight)[0]

  bits = jnp.array([2.0, 3.0, 4.0])
  swept = jax.jit(jax.vmap(run))(steps.RoundToNearest(bits, jnp.ones(3)))
  for i, b in enumerate((2, 3, 4)):
    alone = clusters.lift(steps.RoundToNearest(b), size=4)(weight)[0]
    np.testing.assert_allclose(swept[i], alone, rtol=1e-6)


def test_chain_is_a_loop_over_its_steps():
  weight = jax.random.normal(jax.random.key(1), (16,))
  parts = (steps.Clip(0.5), steps.RoundToNearest(4))
  cluster = clusters.new_cluster(weight)
  for step in parts:
    cluster = step(cluster)
  chex.assert_trees_all_equal(
    clusters.chain(*parts)(clusters.new_cluster(weight)), cluster
  )
  assert clusters.chain(*parts) == clusters.chain(*parts)
  assert hash(clusters.chain(*parts)) == hash(clusters.chain(*parts))


def test_plain_functions_are_steps():
  halve = lambda c: c._replace(weight=c.weight / 2)
  tx = clusters.chain(halve, lambda c: c._replace(value=c.weight))
  values, _ = clusters.lift(tx, size=2)(jnp.ones((4, 3)))
  np.testing.assert_array_equal(values, np.full((4, 3), 0.5))


def test_within_equals_the_step_on_each_part():
  weight = jax.random.normal(jax.random.key(2), (12,))
  whole = clusters.within(steps.RoundToNearest(3), 4)(
    clusters.new_cluster(weight)
  )
  for i in range(3):
    part = steps.RoundToNearest(3)(
      clusters.new_cluster(weight[4 * i : 4 * i + 4])
    )
    mine = slice(4 * i, 4 * i + 4)
    np.testing.assert_allclose(whole.value[mine], part.value, rtol=1e-6)
    np.testing.assert_allclose(
      whole.code['scale'][i], part.code['scale'], rtol=1e-6
    )
  assert whole.code['level'].shape == (12,)


def test_keys_differ_by_cluster_and_step():
  draw = lambda c: c._replace(
    value=c.value + jax.random.uniform(c.key, c.weight.shape)
  )
  tx = clusters.lift(clusters.chain(draw, draw), size=4)
  values, _ = tx(jnp.zeros((8, 3)), key=jax.random.key(0))
  assert np.unique(np.asarray(values)).size == values.size
  again, _ = tx(jnp.zeros((8, 3)), key=jax.random.key(0))
  chex.assert_trees_all_equal(values, again)


def test_stochastic_rounding_is_unbiased_through_lift():
  step = steps.RoundToNearest(bits=3, rounding='stochastic')
  weight = jnp.tile(jnp.array([[1.0], [0.21]]), (1, 4000))
  values, _ = clusters.lift(step, size=2)(weight, key=jax.random.key(3))
  # A step is 1/3; the mean of n draws deviates by less than 1/6/sqrt(n).
  assert abs(float(values[1].mean()) - 0.21) < 5 / 6 / np.sqrt(4000)


def test_errors_name_what_was_found():
  with pytest.raises(ValueError, match='one axis'):
    clusters.new_cluster(jnp.ones((2, 2)))
  with pytest.raises(ValueError, match='axis=2'):
    clusters.lift(steps.Clip(), size=2, axis=2)(jnp.ones((2, 2)))
  with pytest.raises(ValueError, match='not a multiple of 4'):
    clusters.within(steps.Clip(), 4)(clusters.new_cluster(jnp.ones(6)))
  with pytest.raises(ValueError, match='size=0'):
    clusters.lift(steps.Clip(), size=0)(jnp.ones((2, 2)))
