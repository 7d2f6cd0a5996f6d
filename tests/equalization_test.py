import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mq_jax import equalization
from mq_jax.models import decoder

TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12)
KINDS = ('norm', 'hidden', 'value', 'key')


@pytest.fixture(scope='module')
def run(tiny_llama):
  return jax.jit(tiny_llama.apply)


@pytest.mark.parametrize('scale', [16.0, 1 / 8])
@pytest.mark.parametrize('kind', KINDS)
def test_planting_is_exact_and_does_something(tiny_llama, run, kind, scale):
  pairs = decoder.channel_pairs(tiny_llama.config)[kind]
  planted = equalization.plant_outliers(
    tiny_llama.params, pairs, jax.random.key(1), share=0.1, scale=scale
  )
  np.testing.assert_array_equal(
    run(planted, TOKENS), run(tiny_llama.params, TOKENS)
  )
  for pair in pairs:
    for path, _ in pair.producers + pair.consumers:
      was, now = (
        equalization._get(p, path) for p in (tiny_llama.params, planted)
      )
      ratio = np.unique(np.abs(np.log2(np.asarray(now / was))))
      assert ratio[0] == 0 and ratio[-1] == abs(np.log2(scale)), path


def test_half_precision_is_exact_too(tiny_llama, run):
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_llama.params)
  planted = params
  for kind in KINDS:
    planted = equalization.plant_outliers(
      planted,
      decoder.channel_pairs(tiny_llama.config)[kind],
      jax.random.key(0),
      share=0.2,
      scale=8.0,
    )
  with jax.numpy_dtype_promotion('standard'):  # flax promotes to float32
    before, after = run(params, TOKENS), run(planted, TOKENS)
  np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize('kind', KINDS)
def test_arbitrary_factors_keep_the_function(tiny_llama, run, kind):
  pairs = decoder.channel_pairs(tiny_llama.config)[kind]
  keys = jax.random.split(jax.random.key(0), len(pairs))
  factors = [
    jnp.exp(jax.random.normal(key, (pair.channels,)))
    for key, pair in zip(keys, pairs)
  ]
  rescale = jax.jit(equalization.rescale_channels, static_argnums=1)
  rescaled = rescale(tiny_llama.params, pairs, factors)
  np.testing.assert_allclose(
    run(rescaled, TOKENS), run(tiny_llama.params, TOKENS), atol=1e-4
  )


def test_counts_and_levels_of_planted_channels():
  params = {'a': jnp.ones((3, 100)), 'b': jnp.ones((100, 2))}
  pair = equalization.ChannelPair(100, ((('a',), 1),), ((('b',), 0),))
  plant = lambda seed, **kwargs: equalization.plant_outliers(
    params, [pair], jax.random.key(seed), **kwargs
  )
  up = plant(0, share=0.05, scale=16)
  column = np.asarray(up['a'][0])
  assert sorted(column[column != 1]) == [4, 8, 8, 16, 16]
  np.testing.assert_array_equal(up['b'][:, 0], 1 / column)
  down = plant(0, share=0.04, scale=1 / 4)
  assert sorted(np.asarray(down['b'][:, 0]))[-5:] == [1, 2, 2, 4, 4]
  assert (plant(1, share=0.05, scale=16)['a'][0] != column).any()
  assert (np.asarray(plant(0, share=1e-9, scale=2)['a']) == 2).sum() == 3
  assert (params['a'] == 1).all()


def test_repeated_blocks_keep_their_factors():
  # Two value heads of 2 channels, three query heads each.
  params = {'v': jnp.ones((1, 4)), 'o': jnp.ones((12, 1))}
  pair = equalization.ChannelPair(4, ((('v',), 1),), ((('o',), 0),), 2)
  factor = jnp.array([1.0, 2.0, 4.0, 8.0])
  out = equalization.rescale_channels(params, [pair], [factor])
  expected = [1, 2] * 3 + [4, 8] * 3
  np.testing.assert_array_equal(1 / out['o'][:, 0], expected)


def test_gradient_reaches_the_factors():
  params = {'a': jnp.ones((2, 3)), 'b': jnp.ones((3, 2))}
  pair = equalization.ChannelPair(3, ((('a',), 1),), ((('b',), 0),))

  def largest(factor):
    return equalization.rescale_channels(params, [pair], [factor])['a'].sum()

  np.testing.assert_array_equal(jax.grad(largest)(jnp.ones(3)), 2 * np.ones(3))


def test_errors_name_the_parameter():
  params = {'a': {'kernel': jnp.ones((3, 4))}, 'b': jnp.ones((4, 3))}
  pair = lambda *args: equalization.ChannelPair(*args)
  good = pair(4, ((('a', 'kernel'), 1),), ((('b',), 0),))
  rescale = lambda p, f: equalization.rescale_channels(params, p, f)
  with pytest.raises(ValueError, match='0 arrays of factors for 1'):
    rescale([good], [])
  with pytest.raises(ValueError, match=r'a/kernel: factors of shape \(3,\)'):
    rescale([good], [jnp.ones(3)])
  absent = good._replace(producers=((('a', 'kernl'), 1),))
  with pytest.raises(ValueError, match="a/kernl: .* nearest are .'kernel'"):
    rescale([absent], [jnp.ones(4)])
  wrong_axis = good._replace(consumers=((('b',), 1),))
  with pytest.raises(ValueError, match='b: axis 1 .* 4 channels'):
    rescale([wrong_axis], [jnp.ones(4)])
  no_block = pair(2, ((('a', 'kernel'), 1),), ((('b',), 0),))
  with pytest.raises(ValueError, match='a/kernel: axis 1'):
    rescale([no_block], [jnp.ones(2)])
  plant = lambda **kwargs: equalization.plant_outliers(
    params, [good], jax.random.key(0), **{'share': 0.1, 'scale': 8, **kwargs}
  )
  for scale in (1, 3, 0, -2, np.inf, np.nan):
    with pytest.raises(ValueError, match='power of two'):
      plant(scale=scale)
  for share in (0, -0.1, 1.1, np.nan):
    with pytest.raises(ValueError, match='share'):
      plant(share=share)


def test_smoothing_is_exact_for_shared_channels(tiny_llama, run):
  """One head of values, read by several of queries: a factor for all."""
  params = tiny_llama.params
  (pair, *_) = decoder.channel_pairs(tiny_llama.config)['value']
  (path, _) = pair.consumers[0]
  weight = equalization._get(params, path)
  largest = np.random.default_rng(0).uniform(0.1, 9.0, weight.shape[0])
  largest[3] = 0.0  # a channel that is never active
  name = '/'.join(map(str, path))
  found = equalization.smoothing_factors(
    params, [pair], {name: jnp.asarray(largest, jnp.float32)}, 0.7
  )
  # By hand: rows are [kv head, query head of it, d], factors [kv head, d].
  heads = lambda x: (
    np.asarray(x)
    .reshape(pair.channels // pair.block, -1, pair.block)
    .max(1)
    .reshape(-1)
  )
  inputs, weights = heads(largest), heads(np.abs(weight).max(1))
  want = np.where(inputs > 0, inputs**0.7 / weights**0.3, 1.0)
  np.testing.assert_allclose(1 / found[0], want, rtol=1e-5)
  smooth = equalization.rescale_channels(params, [pair], found)
  np.testing.assert_allclose(
    run(smooth, TOKENS), run(params, TOKENS), rtol=1e-4, atol=1e-4
  )
  with pytest.raises(ValueError, match='largest of its inputs are not known'):
    equalization.smoothing_factors(params, [pair], {}, 0.7)
