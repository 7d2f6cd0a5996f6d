import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mq_jax.evaluation import agreement, perplexity


@pytest.fixture(scope='module')
def windows():
  return np.random.default_rng(0).integers(0, 96, (5, 9)).astype(np.int32)


@pytest.fixture(scope='module')
def noisy(tiny_llama):
  leaves, tree = jax.tree.flatten(tiny_llama.params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  move = lambda x, key: x + 0.05 * jax.random.normal(key, x.shape)
  return jax.tree.unflatten(tree, map(move, leaves, keys))


def log_probs(model, params, windows):
  """In float64."""
  logits = np.asarray(jax.jit(model.apply)(params, windows[:, :-1]), np.float64)
  logits -= logits.max(-1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize(
  'masked, batch',
  [
    pytest.param(False, 2, marks=pytest.mark.slow),
    (False, 5),
    (True, 2),
    pytest.param(True, 5, marks=pytest.mark.slow),
  ],
)
def test_against_numpy(tiny_llama, noisy, windows, masked, batch):
  counted = np.random.default_rng(2).random((5, 8)) < 0.6 if masked else None
  found = agreement.compare(
    tiny_llama.apply,
    noisy,
    tiny_llama.apply,
    tiny_llama.params,
    windows,
    batch=batch,
    counted=counted,
    n_bytes=100,
  )
  mask = np.ones((5, 8), bool) if counted is None else counted
  q = log_probs(tiny_llama, noisy, windows)
  p = log_probs(tiny_llama, tiny_llama.params, windows)
  divergence = (np.exp(p) * (p - q)).sum(-1)
  same = p.argmax(-1) == q.argmax(-1)
  pick = lambda x: -np.take_along_axis(x, windows[:, 1:, None], -1)[..., 0]
  assert 0 < same[mask].mean() < 1  # something is compared
  assert found.scores.tokens == found.reference.tokens == mask.sum()
  # Sums of float32 log probabilities.
  assert found.divergence == pytest.approx(divergence[mask].mean(), rel=1e-4)
  assert found.top1 == pytest.approx(same[mask].mean(), abs=1e-7)
  assert found.scores.nll == pytest.approx(pick(q)[mask].mean(), rel=1e-5)
  assert found.reference.nll == pytest.approx(pick(p)[mask].mean(), rel=1e-5)
  sums, counts = (divergence * mask).sum(-1), mask.sum(-1)
  rest = sums - sums.sum() / counts.sum() * counts
  error = np.sqrt(5 / 4 * (rest**2).sum()) / counts.sum()
  assert found.divergence_error == pytest.approx(error, rel=1e-3)


def test_error_of_equal_windows_is_that_of_a_mean():
  rng = np.random.default_rng(0)
  means = rng.normal(size=12)
  counts = np.full(12, 7)
  expected = means.std(ddof=1) / np.sqrt(12)
  assert agreement._error(means * 7, counts) == pytest.approx(expected)
  assert agreement._error(means[:1], counts[:1]) is None


def test_a_model_agrees_with_itself(tiny_llama, windows):
  itself = (tiny_llama.apply, tiny_llama.params)
  found = agreement.compare(*itself, *itself, windows)
  alone = perplexity.evaluate(*itself, windows)
  assert found.divergence == 0 and found.top1 == 1
  assert found.scores == found.reference
  assert found.scores.nll == pytest.approx(alone.nll, rel=1e-6)


def test_other_vocabularies_are_refused(tiny_llama, windows):
  other = lambda params, tokens: jnp.zeros((*tokens.shape, 7))
  with pytest.raises(ValueError, match='predicts 96 tokens, the reference 7'):
    agreement.compare(tiny_llama.apply, tiny_llama.params, other, {}, windows)
