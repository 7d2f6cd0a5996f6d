"""The study of learned rounding, on the tiny model."""

import json

import numpy as np
import pytest

from experiments import gradient_ptq
from mq_jax import learn, recipes
from mq_jax.lab import opening


@pytest.fixture(scope='module')
def bench(tiny):
  return gradient_ptq.Bench(
    opening.open_any(tiny), recipes.rtn(bits=3, group=16)
  )


def test_errors_are_those_of_windows_that_nothing_saw(bench):
  tokens = bench.windows('random', 12, 16, 0)
  test = bench.windows('random', 6, 16, 1)
  options = learn.Learning(steps=20, every=10, batch=4, learning_rate=0.01)
  nearest, after = bench.errors(options, tokens, test)
  assert 0 < after < nearest
  # Without steps that matter nothing is another.
  still = learn.Learning(steps=1, every=1, batch=4, learning_rate=1e-9)
  same, unchanged = bench.errors(still, tokens, test)
  assert same == nearest == pytest.approx(unchanged, rel=1e-5)


@pytest.mark.slow
def test_windows_are_of_a_kind_and_of_a_seed(bench):
  windows = bench.windows('random', 5, 16, 3)
  np.testing.assert_array_equal(windows, bench.windows('random', 5, 16, 3))
  assert windows.shape == (5, 16)
  assert 0 <= windows.min() and windows.max() < bench.model.config.vocab_size
  plain, mixed = (bench.windows(k, 5, 16, 3) for k in ('text', 'shuffled'))
  assert (plain != mixed).any()
  np.testing.assert_array_equal(np.sort(plain), np.sort(mixed))
  with pytest.raises(ValueError, match="text='noise' is not one of"):
    bench.windows('noise', 5, 16, 0)
  with pytest.raises(ValueError, match='windows asked for; the text has'):
    bench.windows('text', 10**6, 16, 0)


@pytest.mark.slow
def test_the_page_has_a_row_for_each_setting(tiny, tmp_path):
  out = tmp_path / 'page'
  gradient_ptq.gradient_ptq(
    config='x.gin',
    out=str(out),
    model=str(tiny),
    recipe={'recipe': 'rtn', 'bits': 3, 'group': 16},
    base={'text': 'random', 'windows': 8, 'steps': 2, 'every': 1, 'batch': 2},
    axes={
      'loss': {'mse': {'loss': 'mse'}, 'l1': {'loss': 'l1'}},
      'data': {'few': {'windows': 4}},
    },
    seeds=(0, 1),
    tokens=8,
    test_windows=2,
  )
  page = (out / 'README.md').read_text()
  assert '| loss | l1 |' in page and '| data | few |' in page
  records = json.loads((out / 'results.json').read_text())
  assert len(records) == 3 and all(r['left'] > 0 for r in records)
  assert (out / 'figure.png').stat().st_size
