import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_oracles import affine, attention, drive, jit, softmax_rows, text

from mq_jax import caches
from mq_jax.caches import tiers
from mq_jax.caches.kvcrush import codes, distances

T, FIRST = 24, 12

compress = jit(tiers.compress)
bits_of = jit(lambda policy, cache: policy.bits(cache))


@pytest.fixture(scope='module')
def given():
  return text(t=T)


@pytest.fixture(scope='module')
def h2o(given):
  return drive(caches.h2o(ratio=0.5, recent=0.5), given, FIRST, T)


def heavy(score, alive, length, ratio, recent):
  """Tokens of one head that H2O keeps."""
  count = int(ratio * length + 1e-9)
  newest = int(recent * count + 1e-9)
  old = [i for i in np.flatnonzero(alive) if i < length - newest]
  best = sorted(old, key=lambda i: -score[i])[: count - newest]
  return {*best, *(i for i in range(length - newest, length) if alive[i])}


def test_h2o_against_numpy(given, h2o):
  """All steps of each head: scores, what stays, what attention gives."""
  y, cache, (_, _, stored) = h2o
  for b in range(2):
    for g in range(2):
      k, v = given.k[b, :, g], given.v[b, :, g]
      q = given.q[b, :, 2 * g : 2 * g + 2]
      score, alive = np.zeros(T), np.zeros(T, bool)
      for begin, end in [(0, FIRST)] + [(i, i + 1) for i in range(FIRST, T)]:
        if begin:
          kept = stored[begin - FIRST, b, g]
          np.testing.assert_array_equal(
            np.flatnonzero(kept), np.flatnonzero(alive)
          )
        alive[begin:end] = True
        index = np.flatnonzero(alive)
        visible = index[None] <= np.arange(begin, end)[:, None]
        for r in range(2):
          p = softmax_rows(q[begin:end, r], k[index], visible)
          np.testing.assert_allclose(
            y[b, begin:end, 2 * g + r], p @ v[index], atol=1e-5
          )
          score[index] += p.sum(0)
        keep = heavy(score, alive, end, 0.5, 0.5)
        alive = np.isin(np.arange(T), list(keep))
      np.testing.assert_array_equal(cache.tier[b, g] > 0, alive)
      np.testing.assert_allclose(
        cache.score[b, g][alive], score[alive], rtol=1e-5
      )
  assert (cache.k[cache.tier == 0] == 0).all()
  # Each query but those of the first tokens sees one more than stay.
  assert cache.seen[:, :, 0].max() == T


def test_h2o_keeps_its_share_and_counts_it(h2o):
  _, cache, (_, _, stored) = h2o
  policy = caches.h2o(ratio=0.5, recent=0.5)
  for step, length in enumerate(range(FIRST, T)):
    assert (stored[step].sum(-1) == length // 2).all()
  bits = bits_of(policy, cache)
  assert bits.full == 2 * 2 * 12 * 2 * 16 * 32
  assert bits.codes == bits.scales == 0
  # Two bits of tier for every token, a score for those that are there.
  assert bits.side == 2 * 2 * (2 * 24 + 32 * 12)
  assert bits.ebw_paper == 16


def test_first_tokens_and_all_tokens_may_stay(given):
  y, cache, _ = drive(caches.h2o(ratio=1.0), given, FIRST, T)
  exact = attention(given.q, given.k, given.v)
  np.testing.assert_allclose(y, exact, atol=1e-5)
  # With everything kept, scores are the column sums of causal attention.
  mass = np.zeros((2, 2, T))
  at = np.arange(T)
  for b in range(2):
    for h in range(4):
      k = given.k[b, :, h // 2]
      mass[b, h // 2] += softmax_rows(
        given.q[b, :, h], k, at[None] <= at[:, None]
      ).sum(0)
  np.testing.assert_allclose(cache.score, mass, atol=1e-5)
  assert (cache.seen == T - at).all()
  _, cache, _ = drive(caches.h2o(ratio=0.2, sinks=3), given, FIRST, T)
  assert (cache.tier[:, :, :3] == tiers.FULL).all()
  assert ((cache.tier > 0).sum(-1) == 4 + 3).all()


def test_mikv_with_nothing_important_is_rounding(given):
  policy = caches.mikv(bits=3, ratio=0.0, balance=False)
  _, cache, (k, v, _) = drive(policy, given, FIRST, T)
  for found, x in ((cache.k, given.k), (cache.v, given.v)):
    expected = np.swapaxes(affine(x, 3, 3, 8), 1, 2)
    np.testing.assert_array_equal(found, expected)
  assert (cache.tier == tiers.LOW).all()
  assert bits_of(policy, cache).ebw_paper == 3 + 32 / 8


@pytest.mark.slow
def test_mikv_demotes_for_good_and_balances_keys(given):
  policy = caches.mikv(bits=2, high_bits=8, ratio=0.5)
  _, cache, (k, _, _) = drive(policy, given, FIRST, T)
  plain = caches.mikv(bits=2, high_bits=8, ratio=0.5, balance=False)
  _, unbalanced, _ = drive(plain, given, FIRST, T)
  assert set(np.unique(cache.tier)) == {tiers.LOW, tiers.HIGH}
  assert ((cache.tier == tiers.HIGH).sum(-1) == T // 2).all()
  # What was low stays as it was: the store of later steps does not change it.
  first, last = k[0], k[-1]
  exact = np.swapaxes(given.k, 1, 2)[:, :, :FIRST]
  lost = np.abs(first[:, :, :FIRST] - exact).max(-1) > 0.1
  assert lost.any() and not lost.all()
  same = (first[:, :, :FIRST] == last[:, :, :FIRST]).all(-1)
  assert same[lost].all()
  # sqrt of the largest query over the largest key, of the first tokens only.
  queries = np.abs(given.q[:, :FIRST]).max(1).reshape(2, 2, 2, 16).max(2)
  keys = np.abs(given.k[:, :FIRST]).max(1)
  np.testing.assert_allclose(
    cache.balancer, np.sqrt(queries / keys), rtol=2**-11
  )
  # The channel of keys that stands out takes less of the range from others.
  low = cache.tier == tiers.LOW
  low &= unbalanced.tier == tiers.LOW
  logits = lambda c: np.einsum('bthd,bgnd->bghtn', given.q, c.k)
  exact_k = np.swapaxes(given.k, 1, 2)
  true = np.einsum('bthd,bgnd->bghtn', given.q, exact_k)
  wrong = lambda c: np.square(logits(c) - true).sum((2, 3))[low].sum()
  assert wrong(cache) < 0.8 * wrong(unbalanced)


@pytest.mark.parametrize(
  'high_bits, percent', [(16, 32.5), (8, 23.1), (4, 18.1), (2, 15.6)]
)
def test_published_sizes_of_mikv(high_bits, percent):
  """Shares of 16 bits at 2 bits, 20 % important, groups of 64; its table 3."""
  policy = caches.mikv(bits=2, high_bits=high_bits, ratio=0.2)
  n = 1000
  high = tiers.FULL if high_bits == 16 else tiers.HIGH
  zeros = jax.tree.map(
    lambda x: np.zeros(x.shape, x.dtype),
    jax.eval_shape(lambda: policy.init(1, 1, n, 128, jnp.float16)),
  )

  cache = dataclasses.replace(
    zeros,
    tier=np.where(np.arange(n) < 200, high, tiers.LOW)[None, None],
    length=np.array([n]),
  )
  found = 100 * bits_of(policy, cache).ebw_paper / 16
  assert float(found) == pytest.approx(percent, abs=0.1)


def test_kvcrush_codes_distances_and_numbers(given):
  rng = np.random.default_rng(1)
  score = jnp.asarray(rng.random((2, 4, 11)), jnp.float32)
  among = jnp.asarray(rng.random((2, 1, 11)) < 0.8)
  bits = np.asarray(jit(codes)(score, among))
  half = np.asarray(among).sum(-1)[:, :, None] // 2
  assert (bits.sum(-1, keepdims=True) == half).all()
  for anchor, reference in {
    'zeros': np.zeros((4, 1)),
    'alternating': np.array([[0], [1], [0], [1]]),
  }.items():
    found = jit(distances, static_argnums=2)(bits, among, anchor)
    expected = (bits != reference).sum(1, keepdims=True)
    np.testing.assert_array_equal(found, expected)
  policy = caches.kvcrush(ratio=0.5, recent=0.25, representatives=0.5, sinks=1)
  _, cache, _ = drive(policy, given, FIRST, T)
  kept = cache.tier > 0
  assert (kept == kept[:, :1]).all()  # all heads alike
  assert (kept.sum(-1) == T // 2).all()
  assert kept[:, :, 0].all() and kept[:, :, -3:].all()


def test_kvcrush_without_representatives_is_the_top(given):
  """One compression, against the choice written out."""
  policy = caches.kvcrush(ratio=0.5, recent=0.5, representatives=0.0)
  score = np.random.default_rng(2).random((1, 2, T)).astype(np.float32)
  shape = jax.eval_shape(lambda: policy.init(1, 2, T, 8, jnp.float32))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape)

  cache = dataclasses.replace(
    zeros,
    tier=jnp.full((1, 2, T), tiers.FULL, jnp.uint8),
    score=jnp.asarray(score),
    length=jnp.array([T]),
  )
  found = np.asarray(compress(policy, cache).tier[0, 0])
  total = score[0].sum(0)
  best = np.argsort(-total[: T - 6])[:6]
  assert set(np.flatnonzero(found)) == {*best, *range(T - 6, T)}
  # With representatives, the important half of them stays, others come.
  crush = caches.kvcrush(ratio=0.5, recent=0.5, representatives=0.5)
  other = np.asarray(compress(crush, cache).tier[0, 0])
  assert other.sum() == found.sum()
  assert set(best[:3]) <= set(np.flatnonzero(other))


def test_zipvl_keeps_the_attention_it_is_asked_for(given):
  policy = caches.zipvl(share=0.8, every=8)
  y, cache, (k, _, _) = drive(policy, given, FIRST, T)
  # After 12 tokens, at 16 and at 24: all are judged in the end.
  assert cache.events.tolist() == [3, 3]
  assert set(np.unique(cache.tier)) == {tiers.LOW, tiers.HIGH}
  assert (cache.tier == cache.tier[:, :1]).all()
  # Of the first 12: as few as hold 80 % of the attention, those with the
  # most of it per query that could read them.
  at = np.arange(FIRST)
  for b in range(2):
    mass = sum(
      softmax_rows(
        given.q[b, :FIRST, h],
        given.k[b, :FIRST, h // 2],
        at[None] <= at[:, None],
      ).sum(0)
      for h in range(4)
    )
    ordered = np.sort(mass)[::-1].cumsum()
    count = int((ordered < 0.8 * mass.sum()).sum()) + 1
    best = np.argsort(-mass / (FIRST - at))[:count]
    found = np.flatnonzero(cache.tier[b, 0, :FIRST] == tiers.HIGH)
    assert set(found) == set(best)
    # Keys of the tier: each channel has 16 levels over its tokens.
    for g in range(2):
      keys = given.k[b, sorted(best), g]
      expected = affine(keys, 4, 0, len(best))
      np.testing.assert_allclose(
        cache.k[b, g, sorted(best)], expected, atol=1e-6
      )
  bits = bits_of(policy, cache)
  high = (cache.tier == tiers.HIGH).sum()
  low = (cache.tier == tiers.LOW).sum()
  high, low = int(high), int(low)
  assert bits.codes == 2 * 16 * (4 * high + 2 * low)
  # Of keys 32 bits a channel and event, of values 16, and 32 a token.
  assert bits.scales == 2 * (2 * 3 * 2 * 16 * 48) + 32 * (high + low)


@pytest.mark.slow
def test_chance_keeps_as_many_as_h2o(given, h2o):
  _, cache, _ = drive(caches.chance(ratio=0.5, seed=3), given, FIRST, T)
  kept, chosen = cache.tier > 0, h2o[1].tier > 0
  np.testing.assert_array_equal(kept.sum(-1), chosen.sum(-1))
  assert (kept != chosen).any()


@pytest.mark.parametrize(
  'name, options, message',
  [
    ('mikv', {'ratio': 1.5}, 'ratio=1.5 is not a share'),
    ('mikv', {'high_bits': 12}, 'high_bits=12'),
    ('mikv', {'groups': 0}, 'groups=0'),
    ('h2o', {'recent': -0.1}, 'recent=-0.1'),
    ('h2o', {'sinks': 1.5}, 'sinks=1.5'),
    ('kvcrush', {'anchor': 'median'}, "anchor='median' is not one of mean"),
    ('zipvl', {'every': 0}, 'every=0'),
    ('zipvl', {'bits': 9}, 'bits=9'),
  ],
)
def test_bad_options(name, options, message):
  with pytest.raises(ValueError, match=message):
    caches.make(name, **options)


def test_heads_that_no_group_divides():
  with pytest.raises(
    ValueError, match='15 channels are no multiple of groups=2'
  ):
    caches.mikv().init(1, 1, 8, 15, jnp.float32)
