import functools

import cache_oracles
import jax
import numpy as np
import pytest
import small_decoders
from small_decoders import TOKENS

from mq_jax import caches, generation, plans, recipes, sites
from mq_jax.evaluation import cached
from mq_jax.models import decoder

# In a cache, phi's keys keep the rotations of their time: no whole to equal.
FAMILIES = ('llama', 'windowed', 'qwen', 'opt', 'gpt2', 'mixtral')
# A window and rotary positions; learned ones. The others are slow tests.
QUICK = ('windowed', 'opt')
make = functools.partial(small_decoders.make, vectors=0.5)


def continued(name, prompt, count):
  """The likeliest tokens, by the whole forward pass for each."""
  config, params, apply = make(name)
  ids = list(map(int, prompt))
  for _ in range(count):
    padded = np.zeros((2, 24), np.int32)
    padded[0, : len(ids)] = ids
    ids.append(int(np.asarray(apply(params, padded))[0, len(ids) - 1].argmax()))
  return ids[len(prompt) :]


@pytest.mark.parametrize(
  'name, chunk',
  [*((name, 1) for name in FAMILIES if name in QUICK), ('windowed', 5)]
  + [
    pytest.param(x, 1, marks=pytest.mark.slow)
    for x in FAMILIES
    if x not in QUICK
  ],
)
def test_token_by_token_is_the_whole(name, chunk):
  config, params, apply = make(name)
  read = cache_oracles.jit(cached.through_cache(config, caches.full(), chunk))
  whole = apply(params, TOKENS)
  assert np.abs(whole).max() > 1
  np.testing.assert_allclose(read(params, TOKENS), whole, atol=1e-4)


@pytest.mark.parametrize(
  'name',
  ['windowed']
  + [
    pytest.param(x, marks=pytest.mark.slow) for x in FAMILIES if x != 'windowed'
  ],
)
def test_greedy_is_what_the_whole_gives(name):
  """Prompts of different lengths side by side, one of them stopped."""
  config, params, _ = make(name)
  prompts = [TOKENS[0, :9], TOKENS[1, :4]]
  expected = [continued(name, p, 8) for p in prompts]
  found = generation.generate(config, params, prompts, 8, stop=[98, 99])
  assert np.asarray(found.tokens).tolist() == expected
  assert found.lengths.tolist() == [8, 8]
  if name != 'windowed':
    return
  stop = next(x for x in expected[0] if x not in expected[1])
  ends = expected[0].index(stop) + 1
  stopped = generation.generate(config, params, prompts, 8, stop=[stop, 99])
  assert stopped.lengths.tolist() == [ends, 8]
  tokens = np.asarray(stopped.tokens)
  assert tokens[0].tolist() == expected[0][:ends] + [-1] * (8 - ends)
  assert tokens[1].tolist() == expected[1]  # goes on undisturbed
  # Of a text that ended, the last token is never read.
  assert stopped.caches[0].length.tolist() == [8 + ends, 4 + 7]


@pytest.mark.slow
def test_sampled_stream_is_generate_and_compiles_once():
  config, params, _ = make('llama')
  policy = caches.kivi(2, group=4, value_group=8, residual=4)
  options = dict(
    policy=policy,
    sampling=generation.sampling(1.5, top_k=20, top_p=0.95),
    key=jax.random.key(3),
  )
  prompt = TOKENS[0, :7]
  steps = generation.stream(config, params, prompt, 10, multiple=1, **options)
  streamed = [int(state.token[0]) for state in steps]
  found = generation.generate(config, params, [prompt], 10, **options)
  assert found.tokens[0].tolist() == streamed
  assert len(set(streamed)) > 4
  bits = caches.total_bits(policy, found.caches)
  assert bits.elements == 2 * 2 * 8 * 16  # the last token is not in it
  # Numbers are no reason to compile.
  with count_compiles() as compiled:
    again = generation.generate(
      config,
      params,
      [prompt],
      10,
      policy=caches.kivi(4, group=4, value_group=8, residual=4),
      sampling=generation.sampling(0.7, top_k=5, top_p=0.5),
      key=jax.random.key(4),
    )
  assert not compiled
  assert again.tokens[0].tolist() != streamed


class count_compiles:
  """Programs compiled while open, of `generate`."""

  def __enter__(self):
    self.programs = generation.begin, generation.finish
    self.before = [p._cache_size() for p in self.programs]
    self.found = []
    return self.found

  def __exit__(self, *_):
    after = [p._cache_size() for p in self.programs]
    self.found += [b - a for a, b in zip(self.before, after) if a != b]


@pytest.mark.slow
def test_compressed_models_with_quantized_inputs():
  config, params, apply = make('llama')
  functional = decoder.functional(config)
  found = sites.find(functional, params, TOKENS)
  token = {'format': 'token', 'bits': 4}
  recipe = recipes.make('rtn', bits=8, group=8, activations=token)
  packed = plans.compress(params, plans.uniform(found, recipe))
  f, given = plans.runnable(functional, packed)
  whole = cache_oracles.jit(f)(given, TOKENS)
  assert np.abs(whole - apply(params, TOKENS)).max() > 0.1
  # Each token is rounded alone, so one by one they come out the same.
  read, _ = plans.runnable(cached.through_cache(config, caches.full()), packed)
  rows = cache_oracles.jit(read)(given, TOKENS)
  np.testing.assert_allclose(rows, whole, atol=1e-3)
  generated = generation.generate(config, given, list(TOKENS), 1)
  likeliest = np.asarray(whole)[:, -1].argmax(-1)
  np.testing.assert_array_equal(generated.tokens[:, 0], likeliest)


@pytest.mark.parametrize(
  'prompts, count, options, message',
  [
    ([], 4, {}, 'no prompt'),
    ([[1], []], 4, {}, 'prompt 1 has no tokens'),
    ([[1, 40]], 4, {}, 'tokens 1 to 40, the model knows 0 to 39'),
    ([[-1]], 4, {}, 'tokens -1 to -1'),
    ([[0.5]], 4, {}, 'prompt 0 is of float64'),
    ([[1]], 0, {}, '0 tokens asked for'),
    ([[1] * 5], 4, {'capacity': 8}, 'are 9; the cache has room for 8'),
    ([[1] * 30], 4, {}, 'are 34; the model is made for 32'),
    ([[1]], 4, {'sampling': generation.Sampling()}, 'needs a key'),
  ],
)
def test_refused_before_any_work(prompts, count, options, message):
  config, _, _ = make('llama')
  with pytest.raises(ValueError, match=message):
    generation.generate(config, None, prompts, count, **options)


def test_stream_refuses_before_the_first_step():
  config, _, _ = make('llama')
  with pytest.raises(ValueError, match='made for 32'):
    generation.stream(config, None, [1] * 30, 4)
