"""Activations with the outlier channels of OPT: what smoothing is worth."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mq_jax import equalization
from mq_jax.activations import Inputs, Tensor, Token

LAYERS = ['layers.11.self_attn.q_proj', 'layers.0.fc2', 'layers.0.fc1']


@pytest.fixture(scope='module', params=LAYERS)
def drawn(request, data_dir):
  """Inputs [m, k] with the channels' maxima of a layer, and a weight."""
  file = data_dir / 'opt-activation-profile' / 'profile.json'
  if not file.is_file():
    pytest.skip(f'no {file}')
  profile = json.loads(file.read_text())
  name = f'model.decoder.{request.param}'
  layer = profile['models']['opt-125m'][name]
  rng = np.random.default_rng(0)
  k = layer['channels']
  at = (np.arange(k) + 0.5) / k * 100
  largest = np.interp(
    at, profile['quantile_levels'], layer['abs_max_quantiles']
  )
  largest = rng.permutation(largest)
  x = rng.standard_normal((128, k))
  x *= largest / np.abs(x).max(0)
  w = 0.02 * rng.standard_normal((k, 32))
  return jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)


@jax.jit
def outputs(x, w, inputs):
  """Output of quantized rows and of plain ones, weights left alone."""
  return inputs(x) @ w, x @ w


@pytest.mark.parametrize('kind', ['static', 'dynamic'])
def test_smoothing_gains_at_a8_what_the_steps_say(drawn, kind):
  """An 8-bit step is that of the largest: errors are in its proportion.

  Each input is off by step^2 / 12 in the mean, its output by s_j^2 |w_j|^2
  times that, whatever the row: so the gain can be had without quantizing.
  """
  x, w = drawn
  largest, rows = np.abs(x).max(0), np.abs(w).max(1)
  scale = equalization.smoothing_scale(largest, rows, 0.5)
  power = np.sum(np.square(w), axis=1)

  def error(scale):
    seen = x / scale[None]
    quantizer = Token(8) if kind == 'dynamic' else Tensor(8)
    if kind == 'static':
      quantizer = Tensor(8, largest=jnp.max(jnp.abs(seen)))
    stored = scale.astype(jnp.float16)
    got, want = outputs(x, w, Inputs(quantizer, stored))
    step = np.abs(seen).max(1) if kind == 'dynamic' else np.abs(seen).max()
    expected = np.mean(np.square(step / 127)) / 12
    expected *= np.sum(np.square(scale) * power)
    return float(jnp.mean(jnp.sum(jnp.square(got - want), 1))), expected

  before, after = error(jnp.ones(x.shape[1])), error(scale)
  assert before[0] / after[0] == pytest.approx(before[1] / after[1], rel=0.15)
  # As expected of uniform rounding errors, where channels span many steps.
  # Without smoothing the small channels of fc2 are less than a step.
  assert after[0] == pytest.approx(after[1], rel=0.15)
  # Channels of 5 to 52 times the median; each token has its own step.
  assert before[0] / after[0] > (2.0 if kind == 'static' else 1.3)
