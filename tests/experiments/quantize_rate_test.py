"""The benchmark on a size that takes no time."""

import json
import pathlib

import pytest

from experiments.benchmarks import quantize_rate
from mq_jax import recipes

RATES = {
  'device': 'test',
  'cores': 1,
  'load': 0.0,
  'flop_per_second': 1e9,
  'bytes_per_second': 1e9,
}


def test_operations_of_the_floor():
  gptq = quantize_rate.operations(recipes.gptq(), 6, 4)
  assert gptq == {
    'cholesky': 72,  # 6^3 / 3
    'feedback': 144,  # 6^2 4: half of 2 k^2 n
    'search': 0,
    'record': 576,
  }
  rtn = quantize_rate.operations(recipes.rtn(), 6, 4)
  assert rtn['cholesky'] == rtn['feedback'] == 0
  awq = quantize_rate.operations(recipes.awq(steps=3), 6, 4)
  assert awq['search'] == 3 * 2 * 36 * 4


@pytest.mark.slow
def test_one_row_is_measured():
  row = quantize_rate.measure('gptq', 256, RATES, repeats=1)
  assert row['program_lines'] == row['program_lines_twice'] > 100
  floor = (256**3 / 3 + 256**3) / 1e9 + row['bytes'] / 1e9
  assert row['floor_seconds'] == pytest.approx(floor)
  assert row['run_over_floor'] == pytest.approx(
    row['run_seconds'] / row['floor_seconds']
  )
  found = {'machine': RATES, 'rows': [row], 'peer': 'none'}
  json.dumps(found)
  assert 'gptq(bits=4, group=128)' in quantize_rate.markdown(found)


def test_rates_are_positive():
  rates = quantize_rate.machine(size=64, megabytes=1)
  assert rates['flop_per_second'] > 0 and rates['bytes_per_second'] > 0


@pytest.mark.slow
@pytest.mark.skipif(
  not pathlib.Path('/proc/self/clear_refs').exists(), reason='needs Linux'
)
def test_peak_counts_from_the_call():
  found = quantize_rate.peak('gptq', 128)
  assert found['unit_bytes'] == 2 * 4 * 128**2
  assert found['second_peak_bytes'] >= 0
  assert 0 < found['output_error'] < 1


def test_import_time_of_a_module():
  assert 0 < quantize_rate.import_seconds('json', repeats=1) < 5
