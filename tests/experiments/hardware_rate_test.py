"""The benchmark on sizes that take no time."""

import json

import jax
import numpy as np
import pytest
from rich import console

from experiments.benchmarks import hardware_rate
from mq_jax import hardware


@pytest.fixture(scope='module')
def rates():
  return hardware_rate.measure(200, repeats=1)


def test_rates_are_measured_and_finite(rates):
  for name in ('forward', 'gradient'):
    assert rates[f'{name}_points_per_s'] == pytest.approx(
      200 / rates[f'{name}_s']
    )
    assert rates[f'{name}_compile_s'] > 0 and rates[f'{name}_finite']
  json.dumps(rates)
  console.Console(file=None, quiet=True).print(hardware_rate.rich_table(rates))


def test_what_is_measured_is_the_model():
  grid = hardware_rate.designs(3)
  cycles, pj, um2 = jax.jit(jax.vmap(hardware_rate.forward))(grid)
  for i in range(3):
    one = {name: float(x[i]) for name, x in grid.items()}
    accelerator = hardware.accelerators.microscopiq(
      one['rows'],
      one['cols'],
      one['units'],
      memory=hardware.accelerators.buffers(
        one['rows'], dram_bytes_per_cycle=one['bandwidth']
      ),
    )
    bits = hardware.precision(
      2, 8, output_bits=16, ebw=2.4, outlier_blocks=one['outliers']
    )
    work = hardware.workload.gemm(2048, 4096, 4096)
    want = hardware.cost(accelerator, work, bits)
    np.testing.assert_allclose(cycles[i], want.total_cycles, rtol=1e-5)
    np.testing.assert_allclose(pj[i], want.energy_pj.total, rtol=1e-5)
    np.testing.assert_allclose(um2[i], want.area_um2.total, rtol=1e-5)


def test_gradients_say_what_designers_know():
  grid = hardware_rate.designs(50)
  found = jax.jit(jax.vmap(jax.grad(hardware_rate.loss)))(grid)
  assert set(found) == {'rows', 'cols', 'units', 'bandwidth', 'outliers'}
  assert (np.asarray(found['bandwidth']) <= 0).all()
  assert (np.asarray(found['outliers']) >= 0).all()


def test_a_model_on_many_accelerators():
  # More than a chunk, and not a whole number of them.
  found = hardware_rate.measure_model(70, repeats=1)
  assert found['llama_2_7b_224_sites_70_accelerators_s'] > 0
  assert found['llama_2_7b_peak_rss_bytes'] > 0


@pytest.mark.slow
def test_the_simulator_is_timed_and_exact():
  found = hardware_rate.measure_simulator(size=48, tokens=2)
  assert found['simulator_exact'] and found['simulator_48_2_tokens_s'] > 0


def test_no_peer_is_said():
  assert hardware_rate.peer('/no/such/python').startswith('skipped: ')


def test_missed_targets_are_named():
  found = {'forward_points_per_s': 1e3, hardware_rate.LLAMA: 9.0}
  assert hardware_rate.missed(found) == [
    'forward_points_per_s 1e+03, at least 1e+07',
    f'{hardware_rate.LLAMA} 9, at most 5',
  ]
