import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from evaluation import rounded
from hypothesis import given
from hypothesis import strategies as st

from mq_jax import sharding
from mq_jax.evaluation import cuts, perplexity


@pytest.fixture(scope='module')
def windows():
  return np.random.default_rng(0).integers(0, 96, (7, 13)).astype(np.int32)


@pytest.fixture(scope='module')
def stories(babyllama, data_dir):
  """Each story cut at 255 tokens after <s>, as the README of babyllama has."""
  path = data_dir / 'tinystories-sample/tinystories_dev.txt'
  texts = path.read_text(encoding='utf-8').split('<|endoftext|>')
  encode = lambda s: babyllama.tokenizer.encode(s, add_special_tokens=False).ids
  return np.array([[1] + encode(s.strip())[:255] for s in texts if s.strip()])


def oracle(logits, targets):
  """Mean negative log likelihood in float64."""
  logits = np.asarray(logits, np.float64)
  shifted = logits - logits.max(-1, keepdims=True)
  log_z = np.log(np.exp(shifted).sum(-1))
  picked = np.take_along_axis(shifted, targets[..., None], -1)[..., 0]
  return (log_z - picked).mean()


def test_against_numpy(tiny_llama, windows):
  scores = perplexity.evaluate(
    tiny_llama.apply, tiny_llama.params, windows, batch=3, n_bytes=200
  )
  logits = jax.jit(tiny_llama.apply)(tiny_llama.params, windows[:, :-1])
  expected = oracle(logits, windows[:, 1:])
  assert scores.tokens == 7 * 12 and scores.bytes == 200
  assert scores.nll == pytest.approx(expected, rel=1e-6)
  assert scores.perplexity == pytest.approx(np.exp(expected), rel=1e-6)
  bits = expected * 84 / np.log(2) / 200
  assert scores.bits_per_byte == pytest.approx(bits, rel=1e-6)


def test_uniform_model_has_the_perplexity_of_its_vocabulary(windows):
  uniform = lambda params, tokens: jnp.zeros((*tokens.shape, 96))
  scores = perplexity.evaluate(uniform, {}, windows)
  assert scores.perplexity == pytest.approx(96, rel=1e-5)
  assert scores.bits_per_byte is None and scores.bytes is None


@pytest.mark.parametrize('batch', [1, 3, 16])
def test_batch_does_not_matter(tiny_llama, windows, batch):
  seen = []
  scores = perplexity.evaluate(
    tiny_llama.apply,
    tiny_llama.params,
    windows,
    batch=batch,
    progress=lambda done, total: seen.append((done, total)),
  )
  whole = perplexity.evaluate(tiny_llama.apply, tiny_llama.params, windows)
  assert scores.nll == pytest.approx(whole.nll, rel=1e-6)
  assert seen[-1] == (7, 7) and len(seen) == -(-7 // batch)


def test_compiles_once_and_is_deterministic(tiny_llama, windows):
  apply = chex.assert_max_traces(
    lambda params, tokens: tiny_llama.apply(params, tokens), n=1
  )
  params = tiny_llama.params
  halved = jax.tree.map(lambda x: x / 2, params)
  one, other, two = (
    perplexity.evaluate(apply, p, windows, batch=3)
    for p in (params, halved, params)
  )
  assert one == two and one != other


def test_token_outside_the_vocabulary_is_not_clamped(tiny_llama, windows):
  bad = windows.copy()
  bad[2, -1] = 96
  scores = perplexity.evaluate(tiny_llama.apply, tiny_llama.params, bad)
  assert np.isnan(scores.nll) and np.isnan(scores.perplexity)


def test_overflow_is_infinite(windows):
  certain = lambda params, tokens: (
    jnp.zeros((*tokens.shape, 97)).at[..., 96].set(1e4)
  )
  scores = perplexity.evaluate(certain, {}, windows)
  assert scores.nll == 1e4 and scores.perplexity == np.inf


@pytest.mark.parametrize(
  'bad, message',
  [
    (np.zeros((0, 5), int), 'predict nothing'),
    (np.zeros((2, 1), int), 'predict nothing'),
    (np.zeros(5, int), 'predict nothing'),
    (np.zeros((2, 5)), 'float64'),
    (np.full((2, 5), -1), 'from -1'),
  ],
)
def test_bad_windows(tiny_llama, bad, message):
  with pytest.raises(ValueError, match=message):
    perplexity.evaluate(tiny_llama.apply, tiny_llama.params, bad)


def test_bad_options(tiny_llama, windows):
  for options in ({'batch': 0}, {'n_bytes': 0}):
    with pytest.raises(ValueError, match='must be positive'):
      perplexity.evaluate(
        tiny_llama.apply, tiny_llama.params, windows, **options
      )


def test_published_likelihood_of_babyllama(babyllama, stories):
  scores = perplexity.evaluate(babyllama.apply, babyllama.params, stories)
  assert stories.shape == (12, 256)
  assert scores.nll == pytest.approx(0.7563, abs=5e-5)


@pytest.mark.parametrize('bits, nll', [(4, 0.8630), (3, 1.4196), (2, 4.9187)])
def test_published_round_to_nearest_of_babyllama(babyllama, stories, bits, nll):
  params = rounded.kernels(babyllama.params, bits, lambda n: '_proj' in n)
  scores = perplexity.evaluate(babyllama.apply, params, stories)
  assert scores.nll == pytest.approx(nll, abs=2e-3)


def byte_level(texts=('aaabbb abc abc é',)):
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  pre = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.pre_tokenizer = pre
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=270,
    initial_alphabet=pre.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  return tokenizer


BYTE_LEVEL = byte_level()


@given(
  text=st.text(st.sampled_from('abc é😀ß\n'), min_size=4, max_size=60),
  length=st.integers(1, 4),
  bos=st.sampled_from([None, 0]),
)
def test_bytes_of_byte_level_windows(text, length, bos):
  tokens = BYTE_LEVEL.encode(text, add_special_tokens=False).tokens
  first = 0 if bos is not None else 1
  count = (len(tokens) - first) // length
  if count < 1:
    with pytest.raises(ValueError, match='shorter'):
      cuts.text_windows(BYTE_LEVEL, text, length, bos)
    return
  found = cuts.text_windows(BYTE_LEVEL, text, length, bos)
  assert found.tokens.shape == (count, length + 1)
  # A letter of a byte-level token is a byte. Characters cut at either end
  # count as a whole where they end.
  exact = sum(map(len, tokens[first : first + count * length]))
  assert abs(found.n_bytes - exact) <= 3
  if text.isascii():
    assert found.n_bytes == exact
  if bos is not None and count * length == len(tokens):
    assert found.n_bytes == len(text.encode())


def test_bytes_of_a_character_vocabulary(babyllama):
  text = 'She said “hi” to Ben.'
  found = cuts.text_windows(babyllama.tokenizer, text, 1, 1)
  assert found.n_bytes == len(text.encode())  # '“' is 3 bytes, one token
  assert (found.tokens[:, 0] == 1).all()
  half = cuts.text_windows(babyllama.tokenizer, text, 11, 1, limit=1)
  assert half.tokens.shape == (1, 12)
  assert half.n_bytes == len('She said “'.encode())  # and a leading mark
  for length, limit in ((0, None), (5, 0)):
    with pytest.raises(ValueError, match='at least 1'):
      cuts.text_windows(babyllama.tokenizer, text, length, 1, limit)


def test_windows_at_a_time_on_a_cpu(tiny_llama):
  fitting = lambda length, params: perplexity.fitting(16, length, params)
  assert fitting(256, tiny_llama.params) == fitting(4096, {}) == 1
  assert fitting(64, tiny_llama.params) == 4
  assert fitting(3, tiny_llama.params) == 16
  # A mesh needs the whole batch, which it divides.
  divided = sharding.on_mesh(tiny_llama, sharding.make_mesh(data=2))
  assert fitting(256, divided.params) == 16
