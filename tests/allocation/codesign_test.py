"""Co-design on small spaces, against every accelerator times every plan."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mq_jax import allocation, hardware
from mq_jax.allocation import codesign
from mq_jax.hardware._rules import Rules

CANDIDATES = hardware.precision(
  np.array([2, 2, 4]),
  8,
  ebw=np.array([2.3, 2.9, 4.4]),
  outlier_blocks=np.array([0.03, 0.2, 0.05]),
)
SIZES = [16, 16, 16, 16], [256, 256, 256, 512], [256, 512, 512, 256]
WORK = hardware.workload.gemm(*SIZES)
VALUES = {'rows': (4, 8, 16), 'cols': (8, 32), 'recon_units': (1, 4, 8)}
TABLE = np.array([
  [1.2, 1.0, 0.1], [0.5, 0.35, 0.02], [2.2, 1.5, 0.3], [0.9, 0.85, 0.05],
])  # fmt: skip


@pytest.fixture(autouse=True)
def loose():
  """Adam's own constants need promotions."""
  with jax.numpy_dtype_promotion('standard'):
    yield


def _space(values=None, banks=6):
  return codesign.microscopiq(
    values or VALUES, CANDIDATES, sram_bytes=32 * 1024, banks=banks,
    area_scale=10.8,
  )  # fmt: skip


SPACE = _space()  # one, so that programs are compiled once


def _task(area=25_000.0, cycles=40_000.0, space=SPACE, **others):
  budget = {'area_um2': area, 'cycles': cycles}
  budget |= others.pop('budget', {})
  return codesign.make_task(space, TABLE, WORK, CANDIDATES, budget, **others)


def _accelerator(numbers, bank=32 * 1024 / 6):
  """Made again from the numbers, without `codesign`."""
  return hardware.accelerators.microscopiq(
    numbers['rows'],
    numbers['cols'],
    numbers['recon_units'],
    area_scale=10.8,
    memory=hardware.accelerators.Memory(
      weight_bytes=bank * numbers['weight'] / 2,
      input_bytes=bank * numbers['input'] / 2,
      output_bytes=bank * numbers['output'] / 2,
      l2_bytes=bank * numbers['l2'],
    ),
  )


def _tables(numbers):
  """Cycles, pJ f64[l, c] and um2 of one accelerator, by `hardware.cost`.

  None where a tile does not fit.
  """
  work = hardware.Workload(*(np.reshape(x, (-1, 1)) for x in SIZES))
  try:
    cost = hardware.cost(_accelerator(numbers), work, CANDIDATES)
  except ValueError:
    return None
  area = float(cost.area_um2.total[0, 0])
  return cost.total_cycles, cost.energy_pj.total, area


def _brute_force(task):
  """Least loss over all accelerators and all 3^4 plans."""
  plans = np.array(list(itertools.product(range(3), repeat=4)))
  rows = np.arange(4)
  best = np.inf
  for row in zip(*task.space.grid().values()):
    found = _tables(dict(zip(task.space.names, map(float, row))))
    if found is None or found[2] > task.area:
      continue
    fits = np.ones(len(plans), bool)
    for name, table in zip(('cycles', 'energy_pj'), found):
      fits &= table[rows, plans].sum(1) <= task.budget.get(name, np.inf)
    losses = TABLE[rows, plans].sum(1)
    best = min(best, losses[fits].min(initial=np.inf))
  return best


# All of the same quantities, so that searches share a program.
LEVELS = [
  {'area_um2': 16_000.0, 'cycles': 80_000.0, 'energy_pj': 1e12},
  {'area_um2': 20_000.0, 'cycles': 40_000.0, 'energy_pj': 1e12},
  {'area_um2': 20_000.0, 'cycles': 45_000.0, 'energy_pj': 7e6},
]


@pytest.mark.parametrize('budget', LEVELS)
def test_best_of_a_grid_is_that_of_brute_force(budget):
  task = codesign.make_task(SPACE, TABLE, WORK, CANDIDATES, budget)
  want = _brute_force(task)
  grid = task.space.grid()
  found = codesign.best(task, grid, gap=0.0)
  assert found.loss == pytest.approx(want, rel=1e-12)
  assert found.evaluations == len(grid['rows']) == 18 * 10
  assert found.plans < 40  # the others were passed over


@pytest.mark.slow
@pytest.mark.parametrize('budget', LEVELS)
def test_search_keeps_budgets_and_finds_the_best(budget):
  task = codesign.make_task(SPACE, TABLE, WORK, CANDIDATES, budget)
  found = codesign.search(task, key=jax.random.key(0))
  cycles, energy, area = _tables(found.numbers)
  rows = np.arange(4)
  spent = {
    'cycles': cycles[rows, found.choice].sum(),
    'energy_pj': energy[rows, found.choice].sum(),
    'area_um2': area,
  }
  for name, most in budget.items():
    assert spent[name] <= most * (1 + 1e-12), name
    assert found.totals[name] == pytest.approx(spent[name], rel=1e-12)
  want = codesign.best(task, task.space.grid(), gap=0.0)
  assert found.loss == pytest.approx(want.loss, rel=1e-9)
  assert found.loss == TABLE[rows, found.choice].sum()
  for name, values in VALUES.items():
    assert found.numbers[name] in values
  assert sum(found.numbers[name] for name in SPACE.split) == 6


@pytest.mark.slow
def test_another_loss_than_the_table():
  """Half the table's loss, squared: the same order of plans."""
  table = jnp.asarray(TABLE, jnp.float32)
  loss = lambda p: jnp.sum(p * table) ** 2 / 2
  task = _task(16_000.0, 80_000.0, loss=loss)
  found = codesign.search(task, key=jax.random.key(0), starts=2)
  assert found.totals['cycles'] <= 80_000.0
  sums = TABLE[np.arange(4), found.choice].sum()
  assert found.loss == pytest.approx(sums**2 / 2, rel=1e-5)
  best = codesign.best(task, task.space.grid())
  assert sums <= 1.3 * best.loss


def test_tables_are_the_exact_costs_and_infinite_where_no_tile_fits():
  task = _task(budget={'energy_pj': 1e9})
  values = {'rows': (8, 64), 'cols': (8, 64), 'recon_units': (2,)}
  grid = _space(values).grid()
  priced = codesign.tables(task, grid)
  missing = 0
  for d in range(0, len(grid['rows']), 3):
    want = _tables({name: float(x[d]) for name, x in grid.items()})
    if want is None:
      missing += 1
      assert np.isinf(priced.area_um2[d]) and np.isinf(priced.cost[:, d]).all()
      continue
    np.testing.assert_allclose(
      priced.cost[:, d][:, task.index], np.stack(want[:2]), rtol=1e-12
    )
    np.testing.assert_allclose(priced.area_um2[d], want[2], rtol=1e-12)
  assert 0 < missing < len(grid['rows']) / 3


def test_learned_numbers_fit_and_have_true_gradients():
  raw = {
    'values': jnp.array([1.5, 0.5, 0.8]),
    'split': jnp.array([0.3, -0.2, 0.1, 0.0]),
  }

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def log_cycles(raw, area):
    numbers = codesign.decode(SPACE, raw, area)
    found = hardware.relaxed_cost(
      SPACE.make(numbers), WORK, hardware.precision(4, 8, outlier_blocks=0.2),
      temperature=0.3,
    )  # fmt: skip
    return jnp.log(jnp.sum(found.total_cycles)), numbers

  with jax.numpy_dtype_promotion('strict'):
    for area in (1e6, 15_500.0):  # free, and shrunk
      (_, numbers), slope = log_cycles(raw, area)
      numbers = {name: float(x) for name, x in numbers.items()}
      assert SPACE.make(numbers).area(Rules()).total <= area * (1 + 1e-4)
      assert sum(numbers[x] for x in SPACE.split) == pytest.approx(6)
      for name, at in (('values', 0), ('values', 2), ('split', 1)):
        step = jnp.zeros_like(raw[name]).at[at].set(0.02)
        ends = [
          log_cycles(raw | {name: raw[name] + sign * step}, area)[0][0]
          for sign in (1, -1)
        ]
        want = (ends[0] - ends[1]) / 0.04
        assert np.isfinite(slope[name][at])
        np.testing.assert_allclose(slope[name][at], want, rtol=0.05, atol=2e-3)


def test_rounded_ones_are_allowed_and_near():
  numbers = {
    'rows': 11.0, 'cols': 15.0, 'recon_units': 4.0, 'weight': 1.3,
    'input': 2.4, 'output': 1.1, 'l2': 1.2,
  }  # fmt: skip
  found = codesign.rounded(SPACE, numbers)
  rows = np.stack([found[name] for name in SPACE.names], 1)
  assert set(found['cols']) == {8, 32}
  for name, values in VALUES.items():
    assert set(found[name]) <= set(values)
  assert (rows[:, 3:].sum(1) == 6).all() and (rows[:, 3:] >= 1).all()
  near = codesign.neighbours(SPACE, {name: x[0] for name, x in found.items()})
  rows = np.stack([near[name] for name in SPACE.names], 1)
  assert (rows[:, 3:].sum(1) == 6).all() and (rows[:, 3:] >= 1).all()
  assert len(np.unique(rows, axis=0)) == len(rows)


@pytest.mark.parametrize(
  'change, message',
  [
    (lambda: _task(budget={'watts': 3.0}), r"budget of \['watts'\].*cycles"),
    (
      lambda: codesign.make_task(
        SPACE, TABLE, WORK, CANDIDATES, {'area_um2': 1.0}
      ),
      'one but the area is needed',
    ),
    (lambda: _task(cycles=-1.0), 'cycles = -1.0; not > 0'),
    (
      lambda: codesign.make_task(
        SPACE, TABLE[:3], WORK, CANDIDATES, {'cycles': 1.0}
      ),
      r'shape \(3, 3\); needed is \[4, candidates\]',
    ),
    (
      lambda: codesign.make_task(
        SPACE, TABLE[:, :2], WORK, CANDIDATES, {'cycles': 1.0}
      ),
      'candidates of shapes',
    ),
    (lambda: _space({'rows': (4,), 'wires': (1,)}), "'wires'.*needed are"),
    (
      lambda: _space(VALUES | {'rows': (8, 4)}),
      r'values of rows are \(8, 4\).*ascending',
    ),
    (lambda: _space(banks=3), '3 units for the parts'),
    (
      lambda: codesign.tables(_task(), {'rows': [8]}),
      r"numbers \['rows'\]; needed are \['cols'",
    ),
  ],
)
def test_bad_input_is_named(change, message):
  with pytest.raises(ValueError, match=message):
    change()


@pytest.mark.slow
def test_budgets_out_of_reach_are_named():
  with pytest.raises(allocation.InfeasibleError, match='smallest accelerator'):
    codesign.search(_task(area=9_000.0), key=jax.random.key(0))
  with pytest.raises(allocation.InfeasibleError, match='misses one by a fac'):
    codesign.search(
      _task(20_000.0, 500.0, budget={'energy_pj': 1e12}), key=jax.random.key(0)
    )
