import cache_oracles
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mq_jax import generation

draw = cache_oracles.jit(generation.draw)
filtered = cache_oracles.jit(generation.filtered)

LOGITS = np.array([0.3, 2.0, -1.0, 1.2, 2.0, 0.0, -3.0, 1.0], np.float32)


def probabilities(temperature=1.0, top_k=None, top_p=None):
  """Softmax of what is left, by sorting, in float64."""
  z = LOGITS.astype(np.float64) / temperature
  p = np.exp(z - z.max())
  order = np.argsort(-z, kind='stable')
  if top_k is not None:
    p[order[top_k:]] = 0
  p /= p.sum()
  if top_p is not None:
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= top_p]] = 0
  return p / p.sum()


CASES = [
  dict(),
  dict(temperature=0.5),
  dict(top_k=1),
  dict(top_k=3),
  dict(top_k=99),
  dict(top_p=1e-6),
  dict(top_p=0.7),
  dict(temperature=2.0, top_k=5, top_p=0.8),
]


@pytest.mark.parametrize('options', CASES)
def test_filtered_against_numpy(options):
  logits = filtered(LOGITS, generation.sampling(**options))
  found = jax.nn.softmax(logits)
  np.testing.assert_allclose(found, probabilities(**options), atol=1e-6)


@pytest.mark.parametrize('options', [CASES[1], CASES[7]])
def test_drawn_tokens_follow_the_softmax(options):
  n = 4000
  sampling = generation.sampling(**options)
  tokens = draw(jnp.broadcast_to(LOGITS, (n, 8)), sampling, jax.random.key(0))
  counts = np.bincount(tokens, minlength=8)
  expected = n * probabilities(**options)
  assert (counts[expected == 0] == 0).all()
  some = expected > 0
  # The seed is fixed: of fair draws one in a thousand would fail.
  assert stats.chisquare(counts[some], expected[some]).pvalue > 1e-3


def test_rows_draw_alone():
  logits = jnp.broadcast_to(LOGITS, (64, 8))
  key = jax.random.key(1)
  options = generation.sampling(1.0)
  many = draw(logits, options, key)
  np.testing.assert_array_equal(draw(logits[:5], options, key), many[:5])
  assert len(set(many.tolist())) > 3
  assert (draw(logits, options, jax.random.key(2)) != many).any()


def test_greedy_takes_the_first_of_the_highest():
  found = draw(jnp.asarray(LOGITS)[None], None, jax.random.key(0))
  assert found.tolist() == [1]
  assert generation.sampling(0.0) is None


@pytest.mark.parametrize(
  'options, message',
  [
    ({'temperature': -1.0}, 'temperature=-1.0'),
    ({'temperature': float('nan')}, 'temperature=nan'),
    ({'top_k': 0}, 'top_k=0'),
    ({'top_p': 0.0}, 'top_p=0.0'),
    ({'top_p': 1.1}, 'top_p=1.1'),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match=message):
    generation.sampling(**options)
