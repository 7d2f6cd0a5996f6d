"""The temporal array against integer products and trains drawn out."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mq_jax import layouts, quantize, recipes
from mq_jax.hardware.simulate import temporal
from mq_jax.models import bundled

# Pulses of a magnitude 0..3, cycle by cycle.
TRAINS = {
  'unary': [[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]],
  'weighted': [[0, 0], [1, 0], [2, 0], [2, 1]],
}


def expected(levels, m, pulse, group):
  """Additions, and cycles of every group, from the trains."""
  trains = np.array(TRAINS[pulse])
  ones = (trains > 0).sum(axis=1)[np.abs(levels)]
  rows, columns = group
  k, n = levels.shape
  cycles = np.array(
    [
      [
        max(1, ones[i : i + rows, j : j + columns].max())
        for j in range(0, n, columns)
      ]
      for i in range(0, k, rows)
    ]
  )
  return m * int(ones.sum()), cycles


@pytest.mark.parametrize('pulse', ['unary', 'weighted'])
def test_trains_are_worth_their_magnitude(pulse):
  assert [sum(train) for train in TRAINS[pulse]] == [0, 1, 2, 3]
  assert temporal.FRAMES[pulse] == len(TRAINS[pulse][0])


@pytest.mark.parametrize('pulse', ['unary', 'weighted'])
@hypothesis.given(
  seed=st.integers(0, 2**32 - 1),
  shape=st.sampled_from([(3, 7, 5), (2, 24, 1)]),
  group=st.sampled_from([(1, 1), (3, 4), (64, 64)]),
  share=st.floats(0, 1),
)
@hypothesis.settings(max_examples=25)
def test_equals_integer_product(pulse, seed, shape, group, share):
  rng = np.random.default_rng(seed)
  m, k, n = shape
  levels = rng.integers(-3, 4, (k, n)).astype(np.int8)
  levels[rng.random((k, n)) > share] = 0
  x = rng.integers(-(2**24), 2**24, (m, k))
  product = temporal.matmul(levels, x, pulse, group=group)
  np.testing.assert_array_equal(
    product.accumulator, x @ levels.astype(np.int64)
  )
  adds, cycles = expected(levels, m, pulse, group)
  assert product.adds == adds
  np.testing.assert_array_equal(product.cycles, cycles)


def test_mean_cycles_follow_the_closed_form():
  """FineQ digest 5.3: 1 + P(any >= 2) + P(any = 3), P = 1 - (1 - f)^G."""
  rng = np.random.default_rng(0)
  share = np.array([0.47, 0.41, 0.08, 0.04])
  signs = rng.choice([-1, 1], (512, 512))
  levels = rng.choice(4, (512, 512), p=share) * signs
  x = np.ones((1, 512), np.int32)
  some = lambda f, size: 1 - (1 - f) ** size
  for size in (1, 8, 64):
    unary = temporal.matmul(levels, x, group=(size, 1)).cycles.mean()
    three = some(share[3], size)
    want = 1 + some(share[2] + share[3], size) + three
    assert unary == pytest.approx(want, rel=0.01)
    short = temporal.matmul(levels, x, 'weighted', group=(size, 1))
    assert short.cycles.mean() == pytest.approx(1 + three, rel=0.01)


def test_fineq_layer_from_packed_bytes():
  params = bundled.load('reference').params
  weight = next(
    np.asarray(leaf, np.float32).reshape(-1, *leaf.shape[-2:])[0]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    if 'q_proj' in jax.tree_util.keystr(path)
  )
  q = quantize.quantize_matrix(weight, recipes.fineq())
  back = layouts.unpack(q.pack())
  k = weight.shape[0]
  levels = np.asarray(back.codes['level'])[:k]
  x = np.random.default_rng(0).integers(-128, 128, (4, k))
  want = x @ levels.astype(np.int64)
  for pulse in ('unary', 'weighted'):
    product = temporal.matmul(levels, x, pulse)
    np.testing.assert_array_equal(product.accumulator, want)
    assert product.cycles.max() == temporal.FRAMES[pulse]
    assert (product.adds, product.cycles.tolist()) == (
      expected(levels, 4, pulse, (64, 64))[0],
      expected(levels, 4, pulse, (64, 64))[1].tolist(),
    )
  scale = np.asarray(back.codes['scale'], np.float64)
  np.testing.assert_allclose(
    product.accumulator * scale,
    x @ np.asarray(q.dequantize(), np.float64),
    rtol=1e-5,
    atol=1e-3,
  )


def test_largest_sums_fit():
  levels = np.full((2, 1), 3, np.int8)
  top = (2**31 - 1) // 6
  for sign in (1, -1):
    x = np.full((1, 2), sign * top)
    for pulse in ('unary', 'weighted'):
      product = temporal.matmul(levels, x, pulse)
      assert product.accumulator.item() == sign * 6 * top


def test_no_multiplier_and_no_growth():
  def program(k):
    levels, x = jnp.ones((k, 4), jnp.int32), jnp.ones((2, k), jnp.int32)
    run = lambda *given: temporal._run(*given, pulse='unary', group=(2, 2))
    return str(jax.make_jaxpr(run)(levels, x))

  assert program(8).count(' = ') == program(800).count(' = ')
  words = set(program(8).replace('[', ' ').split())
  assert 'add' in words and not words & {'mul', 'dot_general'}


@pytest.mark.parametrize(
  'levels, x, options, error, message',
  [
    ([[4]], [[1]], {}, ValueError, r'levels 4\.\.4; a PE holds -3\.\.3'),
    ([[-4]], [[1]], {}, ValueError, 'PE holds'),
    ([[1.0]], [[1]], {}, TypeError, 'levels are float64'),
    ([[1]], [[1.0]], {}, TypeError, 'activations are float64'),
    ([1], [[1]], {}, ValueError, r'levels have shape \(1,\)'),
    (np.ones((0, 1), int), [[1]], {}, ValueError, 'not empty'),
    ([[1]], [[1, 2]], {}, ValueError, 'do not fit'),
    ([[1]], [[1]], {'pulse': 'rate'}, ValueError, "pulse='rate' is not one"),
    ([[1]], [[1]], {'group': (0, 1)}, ValueError, 'holds no PE'),
    ([[3], [3]], [[2**30, 2**30]], {}, ValueError, 'sums of up to'),
    ([[0]], [[2**31]], {}, ValueError, 'sums of up to'),
  ],
)
def test_refuses(levels, x, options, error, message):
  with pytest.raises(error, match=message):
    temporal.matmul(np.array(levels), np.array(x), **options)
