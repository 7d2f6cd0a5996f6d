"""Rows that share ReCoN units: the machine against a list of vectors, and
the closed forms against the machine."""

import collections

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mq_jax.hardware import _contention
from mq_jax.hardware.simulate import pipeline


def follow_vectors(outlier, m, units, hop, latency, depth, policy):
  """The same machine, vector by vector with its times, in plain Python."""
  rows, lanes = outlier.shape
  ports = [(r, s) for r in range(rows) for s in range(lanes)]
  queue = lambda: {port: collections.deque() for port in ports}
  front, end, way = queue(), queue(), queue()
  inside = [collections.deque() for _ in range(rows)]  # (when done, vector)
  finished = {s: [] for s in range(lanes)}
  asked, waited = {}, []
  turn, now = 0, 0

  def arrive(row, lane, vector):
    if row == rows:
      finished[lane].append(vector)
    else:
      front[row, lane].append(vector)

  while True:
    for r in range(rows):
      if inside[r] and inside[r][0][0] == now:
        vector = inside[r].popleft()[1]
        for s in range(lanes):
          end[r, s].append(vector)
          asked[r, s, vector] = now
      for s in range(lanes):
        if way[r, s] and way[r, s][0][0] == now:
          arrive(r + 1, s, way[r, s].popleft()[1])
    for s in range(lanes):
      if now < m:
        front[0, s].append(now)

    ready = []
    for r, s in ports:
      room = r == rows - 1 or len(front[r + 1, s]) + len(way[r, s]) < depth
      if end[r, s] and room:
        ready.append((r, s))
    order = list(range(len(ports)))
    if policy == 'round_robin':
      order = order[turn:] + order[:turn]
    elif policy == 'downstream':
      order.reverse()
    asking = [i for i in order if ports[i] in ready and outlier[ports[i]]]
    for i in asking[:units]:
      r, s = ports[i]
      vector = end[r, s].popleft()
      way[r, s].append((now + latency, vector))
      waited.append(now - asked[r, s, vector])
      turn = (i + 1) % len(ports)
    for r, s in ready:
      if not outlier[r, s]:
        arrive(r + 1, s, end[r, s].popleft())

    if all(len(done) == m for done in finished.values()):
      assert all(done == list(range(m)) for done in finished.values())
      return now, len(waited), sum(w > 0 for w in waited), sum(waited)
    for r in range(rows):
      here = [(r, s) for s in range(lanes)]
      stalled = any(len(inside[r]) + len(end[p]) >= hop for p in here)
      if not stalled and all(front[p] for p in here):
        vectors = {front[p].popleft() for p in here}
        assert len(vectors) == 1  # the lanes stay in step
        inside[r].append((now + hop, vectors.pop()))
    now += 1


@pytest.mark.parametrize(
  'lanes, hop, latency, policy',
  [
    (1, 2, 8, 'round_robin'),
    (2, 2, 5, 'round_robin'),
    (2, 1, 1, 'round_robin'),
    (3, 3, 33, 'round_robin'),  # two words of a delay line
    (1, 2, 8, 'downstream'),
    (2, 2, 5, 'upstream'),
  ],
)
def test_equals_following_every_vector(lanes, hop, latency, policy):
  rng = np.random.default_rng(0)
  for _ in range(12):
    outlier = rng.random((7, lanes)) < rng.random()
    m, units, depth = (int(rng.integers(1, top)) for top in (40, 6, 12))
    run = pipeline.run_tile(
      outlier,
      m,
      units,
      hop=hop,
      latency=latency,
      depth=depth,
      policy=policy,
    )
    expected = follow_vectors(outlier, m, units, hop, latency, depth, policy)
    assert tuple(map(int, run)) == expected


def test_without_outliers_nobody_waits():
  for m in (1, 2, 50):
    run = pipeline.run_tile(jnp.zeros(16, bool), m, hop=3, latency=8)
    assert tuple(map(int, run)) == (m - 1 + 3 * 16, 0, 0, 0)


@pytest.mark.parametrize('row', [0, 7, 15])
def test_one_row_with_outliers_never_waits(row):
  outlier = jnp.arange(16) == row
  run = pipeline.run_tile(outlier, 30, latency=8)
  assert tuple(map(int, run)) == (29 + 2 * 16 + 8, 30, 0, 0)


def test_as_many_units_as_rows_never_wait():
  run = pipeline.run_tile(jnp.ones(16, bool), 30, 16, latency=8)
  assert tuple(map(int, run)) == (29 + 16 * (2 + 8), 30 * 16, 0, 0)


def test_the_last_of_n_requests_waits_n_minus_1_cycles():
  # One vector, four lanes of a row at the same time.
  run = pipeline.run_tile(jnp.ones((1, 4), bool), 1, hop=2, latency=8)
  assert tuple(map(int, run)) == (2 + 3 + 8, 4, 3, 1 + 2 + 3)


@pytest.mark.parametrize('depth', [1, 3, 9])
def test_few_places_slow_a_row_down(depth):
  outlier = jnp.array([True, False])
  short, long = (
    int(pipeline.run_tile(outlier, m, latency=8, depth=depth).cycles)
    for m in (90, 180)
  )
  assert long - short == 90 * 9 / depth


def test_maps_over_masks_vectors_and_units_in_one_trace():
  rng = np.random.default_rng(1)
  outlier = jnp.asarray(rng.random((3, 16)) < 0.5)
  m, units = jnp.array([5, 20, 40]), jnp.array([1, 2, 3])
  run = jax.jit(chex.assert_max_traces(pipeline.run_tile, n=1))
  several = jax.vmap(run)(outlier, m, units)
  for i in range(3):
    one = pipeline.run_tile(outlier[i], int(m[i]), int(units[i]))
    chex.assert_trees_all_equal(type(one)(*(x[i] for x in several)), one)


@pytest.mark.parametrize(
  'arguments, message',
  [
    ({'outlier_rows': jnp.ones(4)}, r'got float32\[4\]'),
    ({'outlier_rows': jnp.ones((2, 2, 2), bool)}, 'with vmap'),
    ({'policy': 'fifo'}, "policy='fifo'"),
    ({'hop': 0}, 'hop=0'),
    ({'m': 0}, 'm=0'),
    ({'units': -1}, 'units=-1'),
    ({'depth': 0}, 'depth=0'),
  ],
)
def test_bad_input(arguments, message):
  good = {'outlier_rows': jnp.ones(4, bool), 'm': 3}
  with pytest.raises(ValueError, match=message):
    pipeline.run_tile(**{**good, **arguments})


# The closed forms, over the grid of the MicroScopiQ digest, 5.6.
VECTORS = (1, 2, 4, 8, 16, 24, 48, 96, 192)
SHARES = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9)


def masks(rows, lanes, seeds=2):
  """bool[1 + shares x seeds, rows, lanes], the first with one outlier."""
  rng = np.random.default_rng([rows, lanes])
  one = np.zeros((1, rows, lanes), bool)
  one[0, rows // 3, 0] = True
  shape = (seeds, rows, lanes)
  return np.concatenate([one, *(rng.random(shape) < p for p in SHARES)])


def run_grid(rows, lanes, hop, latency):
  """Columns m, rows, k, q, units, hop, latency; cycles; share delayed."""
  outlier = masks(rows, lanes)
  points, cycles, delayed = [], [], []
  run = jax.jit(
    jax.vmap(
      lambda o, m, u: pipeline.run_tile(o, m, u, hop=hop, latency=latency),
      in_axes=(0, None, None),
    )
  )
  k = outlier.any(axis=-1).sum(axis=-1)
  q = outlier.sum(axis=(1, 2))
  for m in VECTORS:
    for units in sorted({1, 2, 4, 8, rows // 4, rows // 2, rows}):
      done = run(jnp.asarray(outlier), m, units)
      np.testing.assert_array_equal(done.requests, q * m)
      constant = [np.full(len(k), x) for x in (m, rows, units, hop, latency)]
      points.append(np.stack([*constant[:2], k, q, *constant[2:]], axis=1))
      cycles.append(done.cycles)
      delayed.append(done.delayed / np.maximum(q * m, 1))
  return np.concatenate(points).T, *map(np.concatenate, (cycles, delayed))


@pytest.fixture(scope='module')
def grid():
  parts = [run_grid(16, 1, 2, 8), run_grid(64, 1, 2, 8)]
  return [np.concatenate(columns, axis=-1) for columns in zip(*parts)]


@pytest.mark.slow
def test_closed_form_of_cycles(grid):
  points, cycles, _ = grid
  closed = _contention.tile_cycles(*points.astype(float), xp=np)
  error = np.abs(closed / cycles - 1)
  # The issue asks for a mean of at most 5 % and 25 % at worst.
  assert error.mean() < 0.01
  assert np.quantile(error, 0.95) < 0.06
  assert error.max() < 0.25
  k = points[2]
  assert (k == 0).any() and (k == 1).any()
  np.testing.assert_array_equal(closed[k <= 1], cycles[k <= 1])
  # It is closer than the digest's form, which leaves out the ends.
  m, rows, k, q, units, hop, latency = points
  digest = np.maximum(m - 1 + hop * rows + k * latency, q * m / units)
  assert error.mean() < 0.6 * np.abs(digest / cycles - 1).mean()


@pytest.mark.slow
@pytest.mark.parametrize(
  'rows, lanes, hop, latency', [(16, 2, 2, 8), (16, 1, 1, 3), (32, 1, 4, 40)]
)
def test_closed_form_of_cycles_elsewhere(rows, lanes, hop, latency):
  points, cycles, _ = run_grid(rows, lanes, hop, latency)
  closed = _contention.tile_cycles(*points.astype(float), xp=np)
  error = np.abs(closed / cycles - 1)
  assert error.mean() < 0.02
  assert error.max() < 0.25


def test_conflict_rate(grid):
  points, _, delayed = grid
  rate = _contention.conflict_rate(*points.astype(float), xp=np)
  assert np.all((rate >= 0) & (rate <= 1))
  assert np.abs(rate - delayed).mean() < 0.03
  m, _, _, q, units, hop, latency = points
  # Nobody meets while fewer vectors are on the way than a row takes.
  alone = (m <= hop + latency) | (q <= units)
  assert not delayed[alone].any()
  assert not rate[alone].any()


def test_conflicts_grow_with_the_vectors():
  """MicroScopiQ claims < 3 %; digest 5.5: that holds for few tokens only."""
  outlier = jnp.asarray(np.random.default_rng(0).random((4, 64)) < 0.87)
  run = jax.vmap(
    lambda o, m: pipeline.run_tile(o, m, hop=4, latency=9), in_axes=(0, None)
  )

  def share(m):
    done = run(outlier, m)
    return float(np.sum(done.delayed) / np.sum(done.requests))

  assert share(4) == 0
  assert share(16) == pytest.approx(0.79, abs=0.1)
  assert share(64) == pytest.approx(0.97, abs=0.02)


def test_closed_forms_are_finite_with_finite_gradients():
  edges = [
    (1.0, 64.0, 0.0, 0.0, 1.0),
    (16.0, 64.0, 0.3, 0.3, 1.0),
    (16.0, 64.0, 64.0, 64.0, 64.0),
    (200.0, 1.0, 1.0, 1.0, 1.0),
    (1e5, 64.0, 64.0, 128.0, 1.0),
  ]
  for form in (_contention.tile_cycles, _contention.conflict_rate):
    value_and_grad = jax.value_and_grad(form, argnums=(0, 1, 2, 3, 4))
    for edge in edges:
      chex.assert_tree_all_finite(value_and_grad(*edge, 2.0, 8.0))


def test_gradients_are_finite_differences():
  points = [
    (48.0, 64.0, 30.0, 40.0, 3.0, 2.0, 8.0),
    (3.0, 64.0, 30.0, 40.0, 3.0, 2.0, 8.0),
    (60.0, 16.0, 5.0, 5.0, 2.0, 1.0, 20.0),
  ]
  for form in (_contention.tile_cycles, _contention.conflict_rate):
    for point in points:
      slopes = jax.grad(form, argnums=tuple(range(7)))(*point)
      for i, slope in enumerate(slopes):
        step = 1e-5 * point[i]
        ends = (
          form(*point[:i], point[i] + d, *point[i + 1 :], xp=np)
          for d in (step, -step)
        )
        difference = np.subtract(*ends) / (2 * step)
        np.testing.assert_allclose(slope, difference, rtol=1e-3, atol=1e-5)
