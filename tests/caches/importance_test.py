import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mq_jax.caches import importance

N = 9
# Few values, so that there are ties.
scores = st.lists(st.integers(0, 4), min_size=N, max_size=N)
masks = st.lists(st.booleans(), min_size=N, max_size=N)
f32 = lambda x: jnp.asarray(x, jnp.float32)


@given(scores, masks, st.integers(0, N + 1))
@settings(max_examples=30)
def test_rank_mask_takes_the_first_of_the_highest(values, among, count):
  found = importance.rank_mask(f32(values), count, jnp.asarray(among))
  order = sorted(np.flatnonzero(among), key=lambda i: -values[i])
  expected = np.zeros(N, bool)
  expected[order[:count]] = True
  np.testing.assert_array_equal(found, expected)


@given(scores, st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]))
@settings(max_examples=30)
def test_mass_count_is_the_smallest_that_holds_the_share(values, share):
  count = int(importance.mass_count(f32(values), share))
  ordered = np.sort(values)[::-1]
  total = sum(values)
  if total == 0:
    assert count == 0
    return
  # Halves and tenths of small whole numbers: compared with a hair's room.
  enough = [
    m for m in range(1, N + 1) if ordered[:m].sum() >= share * total - 1e-5
  ]
  assert count == enough[0]


@given(scores, masks, st.integers(0, N + 1))
@settings(max_examples=30)
def test_spread_mask_takes_every_so_many(values, among, count):
  found = importance.spread_mask(f32(values), count, jnp.asarray(among))
  order = sorted(np.flatnonzero(among), key=lambda i: values[i])
  m = len(order)
  assert int(found.sum()) == min(count, m)
  assert not (np.asarray(found) & ~np.asarray(among)).any()
  places = np.flatnonzero([bool(found[i]) for i in order])
  if len(places) > 1:  # gaps differ by at most one
    assert np.ptp(np.diff(places)) <= 1


def test_counts_may_be_traced_and_rows_differ():
  values = f32([[1, 2, 3], [3, 2, 1]])
  run = jax.jit(importance.rank_mask)
  found = run(values, jnp.array([[1], [2]]))
  assert found.tolist() == [[False, False, True], [True, True, False]]


def test_mean_score():
  found = importance.mean_score(f32([6, 0, 3]), f32([3, 0, 1]))
  assert found.tolist() == [2, 0, 3]


@pytest.mark.parametrize('share', [0.1, 0.2, 0.3, 0.7])
def test_share_of_whole_products_is_exact(share):
  counts = jnp.arange(0, 2000, 10)
  found = importance.share_of(share, counts)
  np.testing.assert_array_equal(found, np.arange(200) * round(10 * share))
