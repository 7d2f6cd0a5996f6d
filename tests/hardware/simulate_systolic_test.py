"""The systolic machines against numpy's product and published fold times."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mq_jax.hardware.simulate import systolic


def tiles(length, size):
  return -(-length // size)


def operands(seed, m, k, n):
  rng = np.random.default_rng(seed)
  x = rng.integers(-128, 128, (m, k)).astype(np.int8)
  w = rng.integers(-8, 8, (k, n)).astype(np.int8)
  return x, w, x.astype(np.int64) @ w.astype(np.int64)


# m, k, n, rows, cols: ragged, one vector, one PE, wide, all in one fold.
GRID = [
  (5, 7, 6, 3, 4),
  (1, 9, 4, 4, 2),
  (3, 2, 3, 1, 1),
  (2, 3, 9, 1, 4),
  (6, 4, 5, 8, 8),
]
# Each of them, and each dataflow twice, by default; the others: by -m slow.
QUICK = {
  *(('ws', GRID[0]), ('ws', GRID[2]), ('os', GRID[1]), ('os', GRID[4])),
  *(('is', GRID[0]), ('is', GRID[3])),
}


@pytest.mark.parametrize(
  'dataflow, m, k, n, rows, cols',
  [
    pytest.param(
      flow, *sizes, marks=[] if (flow, sizes) in QUICK else pytest.mark.slow
    )
    for flow in systolic.DATAFLOWS
    for sizes in GRID
  ],
)
def test_product_and_cycles(dataflow, m, k, n, rows, cols):
  x, w, expected = operands(0, m, k, n)
  run = systolic.matmul(x, w, rows, cols, dataflow=dataflow)
  np.testing.assert_array_equal(run.product, expected)
  # hardware-models.md, 1.1 and 1.2.
  folds, fold = {
    'ws': (tiles(k, rows) * tiles(n, cols), 2 * rows + cols + m - 2),
    'os': (tiles(m, rows) * tiles(n, cols), rows + cols + k - 2),
    'is': (tiles(k, rows) * tiles(m, cols), 2 * rows + cols + n - 2),
  }[dataflow]
  np.testing.assert_array_equal(run.fold_cycles, [fold] * folds)
  assert run.cycles == folds * fold


@pytest.mark.parametrize('m, k, n, rows, cols', GRID[:2])
def test_outputs_shifted_out_take_as_many_cycles_more_as_rows(
  m, k, n, rows, cols
):
  x, w, expected = operands(1, m, k, n)
  run = systolic.matmul(x, w, rows, cols, dataflow='os', drain='shifted')
  np.testing.assert_array_equal(run.product, expected)
  assert set(run.fold_cycles.tolist()) == {2 * rows + cols + k - 2}


@pytest.mark.parametrize(
  'm, k, n, rows, cols',
  [(5, 7, 6, 3, 4), (4, 9, 5, 4, 2), (1, 9, 5, 4, 2), (3, 2, 3, 1, 1)],
)
def test_double_buffered_weights(m, k, n, rows, cols):
  x, w, expected = operands(2, m, k, n)
  run = systolic.matmul(x, w, rows, cols, double_buffered=True)
  np.testing.assert_array_equal(run.product, expected)
  folds = tiles(k, rows) * tiles(n, cols)
  # hardware-models.md, 1.4. With fewer vectors than rows it counts a load
  # behind the last tile, which the machine does not wait for.
  published = rows + folds * max(m, rows) + (rows - 1) + (cols - 1)
  assert run.cycles == published - max(rows - m, 0)


def test_double_buffered_inputs():
  x, w, expected = operands(3, 5, 6, 4)
  run = systolic.matmul(x, w, 2, 3, dataflow='is', double_buffered=True)
  np.testing.assert_array_equal(run.product, expected)
  assert run.cycles == 2 + 3 * 2 * 4 + 1 + 2


def test_values_do_not_matter():
  x, w, _ = operands(4, 5, 7, 6)
  run = systolic.matmul(x, w, 3, 4)
  nothing = systolic.matmul(0 * x, 0 * w, 3, 4)
  assert run.cycles == nothing.cycles
  assert not nothing.product.any()


def test_runs_inside_jit_and_vmap():
  x, w, expected = operands(5, 5, 7, 6)
  both = jnp.stack([x, x // 2])
  run = jax.jit(jax.vmap(lambda x: systolic.matmul(x, w, 3, 4)))(both)
  np.testing.assert_array_equal(
    run.product, [expected, (x // 2) @ w.astype(int)]
  )
  assert run.cycles[0] == run.cycles[1]


def test_accumulates_in_32_bits():
  x = np.full((1, 300), -128, np.int8)
  run = systolic.matmul(x, x.T, 300, 1)
  assert run.product == 300 * 128 * 128


@pytest.mark.parametrize(
  'arguments, message',
  [
    ({'dataflow': 'rs'}, "dataflow='rs' is none of"),
    ({'drain': 'no'}, "drain='no' is none of"),
    ({'dataflow': 'os', 'double_buffered': True}, "drain='overlapped'"),
    ({'rows': 0}, 'at least 1'),
    ({'x': np.zeros((2, 3), np.int8)}, r'int8\[2, 3\]'),
    ({'x': np.zeros((2, 4), np.float32)}, 'must be integers'),
    ({'x': np.zeros((0, 4), np.int8)}, 'nothing to do'),
  ],
)
def test_bad_input(arguments, message):
  good = {'x': np.ones((2, 4), np.int8), 'w': np.ones((4, 2), np.int8)}
  with pytest.raises(ValueError, match=message):
    systolic.matmul(**{**good, 'rows': 2, 'cols': 2, **arguments})
