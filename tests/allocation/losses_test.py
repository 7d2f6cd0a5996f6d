"""Losses against their definitions, in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mq_jax.allocation import losses


def apply(params, tokens):
  return params['embed'][tokens] @ params['head']


@pytest.fixture(scope='module')
def bed():
  keys = jax.random.split(jax.random.key(0), 3)
  params = {
    'embed': jax.random.normal(keys[0], (11, 8)),
    'head': jax.random.normal(keys[1], (8, 11)),
  }
  changed = jax.tree.map(lambda x: jnp.round(2 * x) / 2, params)
  inputs = jax.random.randint(keys[2], (3, 2, 5), 0, 11)
  return params, changed, inputs


def log_probs(params, tokens):
  logits = np.asarray(apply(params, tokens), np.float64)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_divergence_is_the_expected_rise_over_the_models_own_targets(bed):
  params, changed, inputs = bed
  loss = losses.divergence(apply)
  found = losses.reference(apply, params, inputs)
  assert found.log_probs.shape == (3, 2, 5, 11)
  for i in range(3):
    batch = jax.tree.map(lambda x, i=i: x[i], found)
    p, q = log_probs(params, inputs[i]), log_probs(changed, inputs[i])
    rises = p - q  # of each target
    want = np.mean(np.sum(np.exp(p) * rises, -1))
    # float16: 11 bits of log probabilities of up to 10.
    np.testing.assert_allclose(loss(changed, batch), want, atol=2e-3)
    np.testing.assert_allclose(loss(params, batch), 0.0, atol=1e-3)


def test_divergence_is_least_at_the_unquantized_model(bed):
  params, _, inputs = bed
  found = losses.reference(apply, params, inputs)
  batch = jax.tree.map(lambda x: x[0], found)
  slope = jax.grad(losses.divergence(apply))(params, batch)
  other = jax.tree.map(lambda x: 1.1 * x, params)
  steep = jax.grad(losses.divergence(apply))(other, batch)
  size = lambda tree: max(
    float(jnp.abs(x).max()) for x in jax.tree.leaves(tree)
  )
  assert size(slope) < 0.01 * size(steep)


def test_next_token_is_the_mean_of_what_follows(bed):
  params, _, inputs = bed
  windows = inputs[0]
  p = log_probs(params, windows[:, :-1])
  want = -np.take_along_axis(p, np.asarray(windows)[:, 1:, None], -1).mean()
  found = losses.next_token(apply)(params, windows)
  np.testing.assert_allclose(found, want, rtol=1e-5)


def test_both_from_one_pass(bed):
  params, changed, inputs = bed
  found = losses.reference(apply, params, inputs[:, :, :-1])
  batch = jax.tree.map(lambda x: x[0], (found, inputs[:, :, 1:]))
  value = losses.both(apply)(changed, batch)
  np.testing.assert_allclose(
    value,
    [
      losses.next_token(apply)(changed, inputs[0]),
      losses.divergence(apply)(changed, batch[0]),
    ],
    rtol=1e-5,
  )


def test_one_model_has_one_loss():
  assert losses.both(apply) is losses.both(apply)
  assert losses.divergence(apply) is losses.divergence(apply)
  assert losses.next_token(apply) is losses.next_token(apply)
