"""Each step against brute force."""

import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from mq_jax import clusters, formats, steps
from mq_jax.clusters import new_cluster


def test_straight_through_gradient_is_one_inside_the_range():
  step = steps.RoundInliers(4, rounding='straight_through')
  weight = jnp.array([0.31, -0.2, 0.7, 0.11])
  gradient = jax.grad(lambda w: jnp.sum(step(new_cluster(w)).value))(weight)
  np.testing.assert_allclose(gradient, np.ones(4))
  hard = steps.RoundInliers(4)
  gradient = jax.grad(lambda w: jnp.sum(hard(new_cluster(w)).value))(weight)
  np.testing.assert_allclose(gradient, np.zeros(4))


def test_detects_beyond_sigma_deviations_only():
  weight = np.random.default_rng(0).standard_t(3, 500).astype(np.float32)
  found = steps.DetectOutliers(3.0)(new_cluster(jnp.asarray(weight))).outlier
  exact = weight.astype(np.float64)
  expected = np.abs(exact - exact.mean()) > 3 * exact.std()
  np.testing.assert_array_equal(found, expected)
  assert expected.sum() > 0
  none = steps.DetectOutliers(jnp.inf)(new_cluster(jnp.asarray(weight)))
  assert not none.outlier.any()
  constant = steps.DetectOutliers(3.0)(new_cluster(jnp.full(100, 0.1)))
  assert not constant.outlier.any()


@hypothesis.given(st.integers(0, 2**32 - 1), st.integers(0, 4))
@hypothesis.settings(max_examples=40)
def test_slots_to_prune_is_the_cheapest_set(seed, count):
  cost = np.random.default_rng(seed).integers(0, 6, 8).astype(np.float32)
  chosen = np.asarray(steps.slots_to_prune(jnp.asarray(cost), count))
  assert chosen.sum() == count
  least = min(
    sum(cost[list(c)]) for c in itertools.combinations(range(8), count)
  )
  assert cost[chosen].sum() == least


def test_slots_to_prune_refuses_batches():
  with pytest.raises(ValueError, match='one axis'):
    steps.slots_to_prune(jnp.ones((2, 4)), 1)


def test_pruning_takes_as_many_inliers_as_there_are_outliers():
  key = jax.random.key(1)
  # Ten thousand micro-blocks with 0 to 8 outliers, drawn at random.
  weight = jax.random.normal(key, (10_000, 8))
  outlier = jax.random.bernoulli(
    key, jnp.linspace(0, 1, 10_000)[:, None], (10_000, 8)
  )

  def run(w, o):
    cluster = new_cluster(w)._replace(outlier=o)
    cluster = steps.KeepLargestOutliers(4)(cluster)
    return steps.PruneForOutliers()(cluster)

  done = jax.jit(jax.vmap(run))(weight, outlier)
  counts = np.asarray(outlier).sum(1)
  assert set(counts) == set(range(9))
  pruned = ~np.asarray(done.kept)
  np.testing.assert_array_equal(
    np.asarray(done.outlier).sum(1), np.minimum(counts, 4)
  )
  np.testing.assert_array_equal(pruned.sum(1), np.minimum(counts, 4))
  assert not (pruned & np.asarray(done.outlier)).any()


def test_padding_is_pruned_first():
  weight = jnp.array([5.0, 1.0, 2.0, 0.0])
  cluster = new_cluster(weight, jnp.array([1.0, 1.0, 1.0, 0.0]))
  cluster = cluster._replace(outlier=jnp.array([True, False, False, False]))
  kept = steps.PruneForOutliers()(cluster).kept
  np.testing.assert_array_equal(kept, [True, True, True, False])


@pytest.mark.parametrize('bits', [2, 3, 4])
def test_outlier_grid_and_figure_3_of_the_paper(bits):
  exponent = jnp.int32(-2)
  m = np.arange(2**bits)
  levels = (1 + m / 2**bits) * 0.25
  value, code = steps.round_outlier(jnp.asarray(-levels), exponent, bits)
  np.testing.assert_array_equal(value, -levels)
  np.testing.assert_array_equal(code['magnitude'], m)
  assert code['sign'].all()
  # Smaller than the grid: rounds up to its first level; larger saturates.
  value, _ = steps.round_outlier(jnp.array([0.01, 9.0]), exponent, bits)
  np.testing.assert_array_equal(value, [0.25, levels[-1]])
  # 2.99 and -3.50 are coded 0|10 and 1|11 under e1m2: 3.0 and -3.5.
  value, code = steps.round_outlier(jnp.array([2.99, -3.5]), jnp.int32(1), 2)
  np.testing.assert_array_equal(value, [3.0, -3.5])
  np.testing.assert_array_equal(code['magnitude'], [2, 3])


def test_exponent_range_of_the_mxscale_byte():
  for bits, (low, high) in {2: (-64, 64), 4: (-19, 19)}.items():
    assert tuple(map(int, steps.outlier_exponent_range(bits))) == (low, high)


@pytest.mark.parametrize(
  'size, bits',
  [
    # Each number once by default; the others: by -m slow.
    pytest.param(
      *pair, marks=[] if pair in ((2, 2), (8, 3), (32, 4)) else pytest.mark.slow
    )
    for pair in itertools.product([2, 8, 32], [2, 3, 4])
  ],
)
def test_split_then_merge_gives_the_values_back(size, bits):
  weight = jax.random.t(jax.random.key(bits), 2.0, (300, size))
  tx = clusters.chain(
    steps.DetectOutliers(1.0),
    steps.KeepLargestOutliers(size // 2),
    steps.PruneForOutliers(),
    steps.RoundInliers(bits),
    steps.RoundOutliers(bits),
    steps.SplitOutliers(bits),
  )
  done = jax.jit(jax.vmap(lambda w: tx(new_cluster(w))))(weight)
  done = jax.tree.map(np.asarray, done)
  assert int(done.outlier.sum()) > 50
  code = done.code
  assert int(code['element'].max()) < 2**bits
  values = jax.jit(jax.vmap(lambda *a: steps.merge_outliers(*a, bits)))(
    code['element'], code['upper'], code['lower'], code['isf'], code['osf']
  )
  np.testing.assert_array_equal(values, done.value)
  # Slots: uppers are the outliers, lowers the pruned, no slot used twice.
  for i in range(300):
    used = np.asarray(code['upper'][i] != code['lower'][i])
    upper = np.asarray(code['upper'][i])[used]
    lower = np.asarray(code['lower'][i])[used]
    assert set(upper) == set(np.flatnonzero(done.outlier[i]))
    assert set(lower) == set(np.flatnonzero(~np.asarray(done.kept[i])))


@pytest.mark.slow
def test_prescaling_changes_nothing_unless_the_byte_saturates():
  weight = 0.05 * jax.random.t(jax.random.key(0), 3.0, (200, 16))

  def run(w, prescale):
    tx = clusters.chain(
      steps.DetectOutliers(2.0),
      steps.RoundInliers(4),
      steps.RoundOutliers(4, prescale=prescale),
    )
    return tx(new_cluster(w)).value

  plain = jax.jit(jax.vmap(lambda w: run(w, False)))(weight)
  scaled = jax.jit(jax.vmap(lambda w: run(w, True)))(weight)
  np.testing.assert_array_equal(plain, scaled)
  # The byte holds -19..19. Relative to inliers of exponent isf < 0, as the
  # paper has it, small weights leave it sooner than without.
  tiny = weight * 2.0**-12
  np.testing.assert_array_equal(
    jax.jit(jax.vmap(lambda w: run(w, False)))(tiny), plain * 2.0**-12
  )
  saturated = jax.jit(jax.vmap(lambda w: run(w, True)))(tiny)
  assert not jnp.array_equal(saturated, plain * 2.0**-12)


@pytest.mark.parametrize(
  'patterns, share',
  [
    pytest.param(steps.PATTERNS_3, 1, marks=pytest.mark.slow, id='3-1'),
    pytest.param(steps.PATTERNS_3, 2, id='3-2'),
    pytest.param(steps.PATTERNS_4, 1, marks=pytest.mark.slow, id='4-1'),
    pytest.param(steps.PATTERNS_4, 2, marks=pytest.mark.slow, id='4-2'),
  ],
)
def test_pattern_of_least_error_is_that_of_brute_force(patterns, share):
  rng = np.random.default_rng(share)
  n = len(patterns[0]) * share
  weight = rng.standard_t(5, (400, n)).astype(np.float32)
  cost = rng.uniform(0.5, 2.0, (400, n)).astype(np.float32)
  scale = jnp.full(len(patterns), 0.9)
  run = lambda rule: jax.vmap(
    lambda w, c: steps.RoundToPattern(
      scale,
      threshold=4.0 if rule == 'ratio' else 2.0,
      patterns=patterns,
      rule=rule,
    )(new_cluster(w, c))
  )(jnp.asarray(weight), jnp.asarray(cost))
  done = run('mse')
  error = np.sum(cost * (weight - np.asarray(done.value)) ** 2, axis=1)
  for w, c, found in zip(weight, cost, error, strict=True):
    best = min(
      np.sum(c * (w - 0.9 * np.clip(np.round(w / 0.9), -limit, limit)) ** 2)
      for limit in (np.tile(p, share) for p in patterns)
    )
    np.testing.assert_allclose(found, best, rtol=1e-5, atol=1e-7)
  for rule in ('ratio', 'sigma'):
    other = np.asarray(run(rule).value)
    worse = np.sum(cost * (weight - other) ** 2, axis=1)
    assert np.all(error <= worse * (1 + 1e-6))
  # Legal: no more than a pattern's level, zero where it has none.
  table = np.tile(np.array(patterns), (1, share))
  levels = np.abs(np.asarray(done.code['level'], int))
  assert np.all(levels <= table[np.asarray(done.code['pattern'], int)])


def test_all_patterns_have_the_same_bits():
  for patterns in (steps.PATTERNS_3, steps.PATTERNS_4):
    width = {0: 0, 1: 2, 3: 3}
    assert len({sum(width[x] for x in p) for p in patterns}) == 1
  assert len(steps.PATTERNS_3) == 4
  assert len(steps.PATTERNS_4) == 13


def test_unknown_options_are_refused():
  cluster = new_cluster(jnp.ones(6))
  with pytest.raises(ValueError, match="rule='median'"):
    steps.RoundToPattern(jnp.ones(4), rule='median')(cluster)
  with pytest.raises(ValueError, match='multiple of the patterns'):
    steps.RoundToPattern(jnp.ones(4))(new_cluster(jnp.ones(7)))
  with pytest.raises(ValueError, match="scale='x'"):
    steps.RoundToFormat(formats.E2M1, scale='x')(cluster)
  with pytest.raises(ValueError, match="rule='max'"):
    clusters.chain(steps.RoundInliers(2), steps.RoundOutliers(2, rule='max'))(
      cluster
    )
