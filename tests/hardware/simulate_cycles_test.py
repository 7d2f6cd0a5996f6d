"""Cycles of lock-step temporal arrays: against loops and against chance."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from mq_jax.hardware import _temporal
from mq_jax.hardware.simulate import temporal_cycles


def train(level, pulses):
  """Send one level pulse by pulse, as long as something is left."""
  left, cycles = abs(int(level)), 0
  while left > 0:
    left -= 2 if pulses == 'weighted' and left >= 2 else 1
    cycles += 1
  return max(cycles, 1)


def by_loops(levels, rows, cols, group, pulses):
  """[k tiles, n tiles, groups], PE by PE."""
  k, n = levels.shape
  shape = (-(-k // rows), -(-n // cols), rows * cols // group)
  cycles = np.ones(shape, int)
  for i in range(k):
    for j in range(n):
      pe = (i % rows) * cols + j % cols
      place = i // rows, j // cols, pe // group
      cycles[place] = max(cycles[place], train(levels[i, j], pulses))
  return cycles


@pytest.mark.parametrize('pulses', _temporal.PULSES)
@pytest.mark.parametrize(
  'k, n, rows, cols, group',
  [(8, 8, 4, 4, 16), (7, 9, 4, 4, 4), (7, 9, 2, 6, 3), (5, 3, 8, 8, 1)],
)
def test_equals_loops(k, n, rows, cols, group, pulses):
  rng = np.random.default_rng(0)
  p = [0.02, 0.05, 0.2, 0.46, 0.2, 0.05, 0.02]
  levels = rng.choice(np.arange(-3, 4), size=(k, n), p=p).astype(np.int8)
  cycles = temporal_cycles.step_cycles(
    levels, rows, cols, group=group, pulses=pulses
  )
  expected = by_loops(levels, rows, cols, group, pulses)
  np.testing.assert_array_equal(cycles, expected)
  layer = temporal_cycles.layer_cycles(
    levels, 5, rows, cols, group=group, pulses=pulses
  )
  assert layer == 5 * expected.max(-1).sum()


def test_every_level():
  levels = jnp.arange(-128, 128).astype(jnp.int8)
  for pulses in _temporal.PULSES:
    np.testing.assert_array_equal(
      temporal_cycles.train_cycles(levels, pulses),
      [train(level, pulses) for level in range(-128, 128)],
    )


@hypothesis.given(st.integers(0, 2**31), st.sampled_from(_temporal.PULSES))
@hypothesis.settings(max_examples=20)
def test_one_pe_alone_is_exactly_as_expected(seed, pulses):
  rng = np.random.default_rng(seed)
  levels = rng.integers(-3, 4, (4, 6)).astype(np.int8)
  cycles = temporal_cycles.step_cycles(levels, 2, 3, group=1, pulses=pulses)
  expected = _temporal.expected_step_cycles(
    *temporal_cycles.magnitude_fractions(levels), 1, pulses
  )
  np.testing.assert_allclose(np.mean(cycles), expected, rtol=1e-6)


@pytest.mark.parametrize('pulses', _temporal.PULSES)
@pytest.mark.parametrize('group', [2, 8, 64, 256])
@pytest.mark.parametrize('share', [(0.11, 0.03), (0.01, 0.002), (0.4, 0.4)])
def test_expectation_for_independent_weights(share, group, pulses):
  f2, f3 = share
  rng = np.random.default_rng(1)
  levels = rng.choice(4, (512, 512), p=[0.4, 0.6 - f2, f2 - f3, f3])
  cycles = temporal_cycles.step_cycles(
    levels.astype(np.int8), 16, 16, group=group, pulses=pulses
  )
  expected = _temporal.expected_step_cycles(f2, f3, group, pulses)
  # Five deviations of a mean over 512 x 512 / G groups, each at most 1.
  assert abs(np.mean(cycles) - expected) < 5 * np.sqrt(group) / 512


def test_f2_matters_only_without_weighted_pulses():
  slope = jax.grad(_temporal.expected_step_cycles, argnums=(0, 1))
  np.testing.assert_allclose(
    slope(0.1, 0.03, 8, 'weighted'), (0, 8 * 0.97**7), rtol=1e-6
  )
  np.testing.assert_allclose(
    slope(0.1, 0.03, 8, 'unary'), (8 * 0.9**7, 8 * 0.97**7), rtol=1e-6
  )


def test_published_range():
  # FineQ digest, 5.3: |v| = 2, 3 with .08, .03.
  figures = {
    group: _temporal.expected_step_cycles(0.11, 0.03, group)
    for group in (1, 64, 4096)
  }
  assert figures[1] == pytest.approx(1.1, abs=0.05)
  assert figures[64] == pytest.approx(2.8, abs=0.07)
  assert figures[4096] == pytest.approx(3.0)


@pytest.mark.parametrize(
  'levels, arguments, message',
  [
    (np.zeros((2, 2), np.float32), {}, r'float32\[2, 2\]'),
    (np.zeros(4, np.int8), {}, 'integer matrix'),
    (np.zeros((2, 2), np.int8), {'group': 3}, r'group=3 .* use 2 .*4'),
    (np.zeros((2, 2), np.int8), {'rows': 0}, '0 x 2'),
    (np.zeros((2, 2), np.int8), {'pulses': 'binary'}, "pulses='binary'"),
  ],
)
def test_bad_input(levels, arguments, message):
  with pytest.raises(ValueError, match=message):
    temporal_cycles.step_cycles(levels, **{'rows': 2, 'cols': 2, **arguments})
