"""The design-space study on a few designs."""

import json
import pathlib

import gin
import jax
import numpy as np
import pytest

from experiments import hardware_design_space as study
from mq_jax import hardware

CONFIG = pathlib.Path(__file__).parents[2] / 'configs/hardware/design_space.gin'
STEPS = 20
SMALL = f"""
steps = {STEPS}
rows = (8, 64)
cols = (32, 64)
units = (1, 4)
buffer_kib = (16, 64)
l2_kib = (64, 8192)
dram_bytes_per_cycle = (64, 256)
lambdas = (0.1, 1.0)
budgets = 2
starts = 2
checkpoints = (0, 2)
chunk = 8
"""


@pytest.fixture
def loose():
  """Adam's own constants need promotions."""
  with jax.numpy_dtype_promotion('standard'):
    yield


@pytest.fixture
def config(loose):
  yield [f'design_space.{line}' for line in SMALL.split('\n') if line]
  gin.clear_config()


def setting(**replaced):
  work = hardware.workload.model('llama-2-7b', 'decode')
  precision = hardware.precision(2, 8, outlier_blocks=0.09, ebw=2.5)
  work = hardware.Workload(work.m, work.k, work.n, work.count)
  made = study.Setting(work, precision, 16, 256.0, 1.0, 1.0, 1.0)
  return made._replace(**replaced)


def test_pareto_and_hypervolume():
  points = np.array([[1, 100], [10, 10], [10, 20], [100, 1], [50, 50.0]])
  assert sorted(study.pareto(points)) == [0, 1, 3]
  worst = np.array([100.0, 100.0])
  # In decades: a square of one decade of (10, 10); the others touch the edge.
  assert study.hypervolume(points, worst) == pytest.approx(1.0)
  assert study.hypervolume(points[:1], worst) == 0.0
  front = points[[1]]
  assert study.excess(front, 1.5 * points[[1]]) == pytest.approx(0.5)
  assert study.excess(front, 0.5 * points[[1]]) == pytest.approx(-0.5)


def test_compiled_prices_are_the_checked_ones():
  design = study.grid((4, 48), (16, 64), (1, 2), (16, 256), (64, 8192))
  prices = np.asarray(study.price_many(study.as_traced(design), setting(), 4))
  exact = study.price_exactly(design, setting())
  np.testing.assert_allclose(prices, exact, rtol=1e-4)


def test_what_holds_no_tile_is_infinite():
  design = study.grid((256,), (64,), (1,), (8, 16), (64,))
  prices = study.price_many(study.as_traced(design), setting(), 2)
  assert np.isinf(prices[0]).all() and np.isfinite(prices[1]).all()
  with pytest.raises(ValueError, match='weight_bytes'):
    study.price_exactly(design, setting())


def test_rounded_designs_are_legal():
  rng = np.random.default_rng(0)
  low, high = study.Design(4, 16, 1, 16, 64), study.Design(256, 512, 9, 64, 64)
  wild = study.Design(*np.exp(rng.uniform(1.4, 5.0, (5, 20))))
  found = study.legal(wild, setting(), low, high)
  assert found.rows.shape == (40,)
  assert (np.log2(found.cols) % 1 == 0).all()
  assert (found.buffer_bytes % 1024 == 0).all()
  study.price_exactly(found, setting())  # or it raises
  whole = study.grid((8, 64), (16, 128), (2,), (32,), (64,))
  same = study.legal(whole, setting(), low, high)
  for x, y in zip(whole, same):
    np.testing.assert_array_equal(np.tile(x, 2), y)


@pytest.mark.slow
def test_gradients_descend(loose):
  # Of the sizes of the small study, so that both compile once.
  low = np.log(np.array([8, 32, 1, 2**14, 2**16], np.float32))
  high = np.log(np.array([64, 256, 64, 2**18, 2**22], np.float32))
  starts = np.stack([(low + high) / 2] * 2)
  aims = study.aims_of((0.5, 1.0), np.array([0.1, 0.2]))
  many = setting(
    m=np.array([2048, 1]), dram=np.array([64.0, 256.0], np.float32)
  )
  path = study.descend(
    starts, aims, many, low, high, steps=STEPS, learning_rate=0.25,
    temperature=(0.5, 0.02),
  )  # fmt: skip
  path = np.asarray(path)
  assert path.shape == (2, 2, 12, 2, STEPS + 1, 5)
  assert (path >= low - 1e-5).all() and (path <= high + 1e-5).all()
  np.testing.assert_array_equal(path[..., 0, :, :], path[..., 1, :, :])
  ends = path[0, 1, :, 0][:, [0, -1]].reshape(-1, 5)
  exact = setting(m=2048)
  designs = study.Design(*np.exp(ends.T.astype(np.float64)))
  need = study.least_buffer(designs, exact)
  designs = designs._replace(
    buffer_bytes=np.maximum(designs.buffer_bytes, need + 1)
  )
  logs = np.log(study.price_exactly(designs, exact)).reshape(12, 2, 3)
  sums = (aims.weights * (logs[:, 1] - logs[:, 0])).sum(1)
  assert (sums[:6] < -0.1).all()
  # Of budgets, half are below the start's area: they are kept, about.
  areas = np.tile([0.1, 0.2], 3)
  assert (logs[6:, 1, 1] < np.log(areas) + 0.1).all()


@pytest.mark.slow
def test_study_writes_its_folder(config, tmp_path, capsys):
  out = tmp_path / 'found'
  study.main([str(CONFIG), *config, f"design_space.out = '{out}'"])
  assert 'written to' in capsys.readouterr().out
  names = {path.name for path in out.iterdir()}
  assert names == {'README.md', 'results.json', 'config.gin', 'figure.png'}
  records = json.loads((out / 'results.json').read_text())
  assert len(records['fronts']) == 4  # two phases, two bandwidths
  assert records['rates']['grid_designs'] == 2**5
  for front in records['fronts']:
    for name in ('latency', 'energy'):
      assert 0 <= front[name]['gradient']['hypervolume_ratio'] < 2
      curve = front[name]['curves']['grid']
      assert curve[-1][1] == pytest.approx(1.0)  # the whole grid
  page = (out / 'README.md').read_text()
  assert 'designs a second' in page and 'seed 0' in page
