import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_decoders import CONFIG, OPTIONS, TOKENS, compiled, make

from mq_jax import equalization, sites
from mq_jax.models import decoder
from mq_jax.models.decoder import rotary


def some(*quick):
  """All options, those not named as slow tests."""
  slow = lambda name: pytest.param(name, marks=pytest.mark.slow)
  return [name if name in quick else slow(name) for name in OPTIONS]


def test_parameters_are_plain_nested_dicts():
  params = jax.eval_shape(lambda: decoder.init_params(CONFIG, 0))
  assert params.keys() == {'embed_tokens', 'layers', 'norm'}
  assert list(params['layers']) == [0]
  assert params['layers'][0]['mlp']['down_proj']['kernel'].shape == (24, 16)


def test_same_config_same_functions():
  two = dataclasses.replace(CONFIG, num_hidden_layers=2)
  again = dataclasses.replace(two)
  assert decoder.functional(two) is decoder.functional(again)
  assert decoder.cached(two) is decoder.cached(again)
  block = decoder.parts(again).block
  assert decoder.parts(two).block(0) is block(1)
  windowed = dataclasses.replace(CONFIG, **OPTIONS['windowed'])
  block = decoder.parts(windowed).block
  assert block(0) is not block(1)
  with pytest.raises(ValueError, match='block 2 of 2'):
    block(2)


@pytest.mark.parametrize('name', ['windowed', 'opt'])
def test_parts_are_the_whole(name):
  config, params, apply = make(name)
  parts = decoder.parts(config)
  rest = {k: v for k, v in params.items() if k != 'layers'}

  @compiled
  def composed(params, rest, tokens):
    x = parts.embed(rest, tokens)
    for i in range(config.num_hidden_layers):
      x = parts.block(i)(params['layers'][i], x)
    return parts.head(rest, x)

  np.testing.assert_array_equal(
    composed(params, rest, TOKENS), apply(params, TOKENS)
  )


@pytest.mark.parametrize('name', some('windowed', 'phi', 'opt'))
def test_cached_is_the_whole(name):
  config, params, apply = make(name)
  whole = apply(params, TOKENS)
  assert np.isfinite(whole).all()
  assert np.abs(whole).max() > 0.1
  n = config.num_hidden_layers

  @compiled
  def cached(params, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return decoder.cached(config)(
      params, tokens, positions, (None,) * n, decoder.attend_all
    )

  logits, caches = cached(params, TOKENS)
  assert caches == (None,) * n
  # Rotations of [b, t] rather than [1, t] positions may round differently.
  np.testing.assert_allclose(logits, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('name', some('windowed', 'phi', 'opt', 'mixtral'))
def test_logits_depend_on_the_past_only(name):
  _, params, apply = make(name)
  changed = TOKENS.copy()
  changed[:, 7] = (changed[:, 7] + 1) % 40
  before, after = apply(params, TOKENS), apply(params, changed)
  np.testing.assert_array_equal(before[:, :7], after[:, :7])
  # A window of 3 in one of two blocks still reaches every later token.
  assert (before[:, 7:] != after[:, 7:]).any(-1).all()


def test_window_hides_what_lies_behind_it():
  config, params, _ = make('windowed')
  config = dataclasses.replace(config, window_layers=None)
  changed = TOKENS.copy()
  changed[:, 2] = (changed[:, 2] + 1) % 40
  apply = compiled(decoder.functional(config))
  same = (apply(params, TOKENS) == apply(params, changed)).all((0, 2))
  # Two blocks of a window of 3: a token is seen by the 4 that follow it.
  assert same.tolist() == [True] * 2 + [False] * 5 + [True] * 5


@pytest.mark.parametrize('name', some('qwen', 'opt', 'mixtral'))
def test_channel_pairs_keep_the_function(name):
  config, params, apply = make(name)
  whole = apply(params, TOKENS)
  rng = np.random.default_rng(1)
  for kind, pairs in decoder.channel_pairs(config).items():
    if not pairs:
      continue
    factors = [
      jnp.asarray(2.0 ** rng.integers(-3, 4, p.channels), jnp.float32)
      for p in pairs
    ]
    new = equalization.rescale_channels(params, pairs, factors)
    assert any(
      (a != b).any() for a, b in zip(*map(jax.tree.leaves, (params, new)))
    ), kind
    # Exact: powers of two, and nothing leaves the range of normal numbers.
    np.testing.assert_array_equal(apply(new, TOKENS), whole)


def test_channel_pairs_that_would_change_the_function():
  missing = {
    name: kind
    for name in OPTIONS
    for kind, pairs in decoder.channel_pairs(
      dataclasses.replace(CONFIG, **OPTIONS[name])
    ).items()
    if not pairs
  }
  assert missing == {'gpt2': 'hidden', 'phi': 'key'}


def test_experts_are_one_site_with_their_own_rows():
  config, params, _ = make('mixtral')
  apply = decoder.functional(config)
  found = {s.name: s for s in sites.find(apply, params, TOKENS)}
  site = found['layers/0/mlp/experts/up_proj/kernel']
  assert (site.groups, site.k, site.n) == (3, 16, 24)
  assert site.matrix_shape == (3, 16, 24)
  assert found['layers/0/mlp/router/kernel'].n == 3
  rows = lambda site, rows: rows
  seen = compiled(sites.tap(apply, rows))(params, TOKENS)[1]
  for name in ('up_proj', 'down_proj'):
    own = np.asarray(seen[f'layers/0/mlp/experts/{name}/kernel']).any(-1)
    np.testing.assert_array_equal(own.sum(0), 2)  # of three experts
    assert (own.sum(1) > 0).all()
    assert not own.all(1).any()


def test_mixture_against_numpy():
  config, params, _ = make('mixtral')
  x = np.random.default_rng(1).normal(size=(2, 5, 16)).astype(np.float32)
  block = params['layers'][0]
  mixed = _mlp(config, block, x)
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), block['mlp'])
  rows = x.reshape(-1, 16).astype(np.float64)
  logits = rows @ p['router']['kernel']
  want = np.zeros_like(rows)
  for i, row in enumerate(rows):
    best = np.argsort(-logits[i])[:2]
    share = np.exp(logits[i][best])
    for e, s in zip(best, share / share.sum()):
      kernel = lambda n, e=e: p['experts'][f'{n}_proj']['kernel'][e]
      gate = row @ kernel('gate')
      hidden = gate / (1 + np.exp(-gate)) * (row @ kernel('up'))
      want[i] += s * (hidden @ kernel('down'))
  np.testing.assert_allclose(mixed.reshape(-1, 16), want, rtol=1e-4, atol=1e-4)


def _mlp(config, block, x):
  """The mixture alone: what a block adds when attention and norm do nothing."""
  from flax import nnx

  from mq_jax.models.decoder import _network

  graph = nnx.graphdef(
    nnx.eval_shape(lambda: _network.Mixture(config, rngs=nnx.Rngs(0)))
  )
  run = compiled(lambda params, x: nnx.merge(graph, params)(x))
  return np.asarray(run(block['mlp'], jnp.asarray(x)))


def test_wrong_structure_is_named():
  params = make('llama')[1]
  renamed = {k: v for k, v in params.items() if k != 'norm'}
  renamed['nrom'] = params['norm']
  tokens = jnp.zeros((1, 2), jnp.int32)
  for run in (decoder.functional(CONFIG), decoder.parts(CONFIG).embed):
    with pytest.raises(ValueError, match="'norm/scale'.*'nrom/scale'"):
      run(renamed, tokens)
  layer = {k: v for k, v in params['layers'][0].items() if k != 'mlp'}
  with pytest.raises(ValueError, match='mlp/up_proj/kernel'):
    decoder.parts(CONFIG).block(0)(layer, jnp.zeros((1, 2, 16)))
  with pytest.raises(ValueError, match='0 caches for 1 blocks'):
    decoder.cached(CONFIG)(params, tokens, tokens, (), decoder.attend_all)


def test_learned_positions_end():
  config, params, _ = make('opt')
  with pytest.raises(ValueError, match='33 tokens, .* only 32 positions'):
    decoder.functional(config)(params, jnp.zeros((1, 33), jnp.int32))

  @compiled
  def at(params, position):
    return decoder.cached(config)(
      params, TOKENS[:1, :1], position, (None,), decoder.attend_all
    )[0]

  for position, lost in ((31, False), (32, True)):
    logits = at(params, jnp.full((1, 1), position, jnp.int32))
    assert np.isnan(logits).all() == lost  # not some other position's


@pytest.mark.parametrize(
  'options, message',
  [
    ({'norm': 'batch'}, "norm='batch' is not one of rms, layer"),
    ({'activation': 'tanh'}, 'activation'),
    ({'dtype': 'float8'}, 'dtype'),
    ({'num_key_value_heads': 3}, 'not a multiple'),
    ({'rotary_dim': 3}, 'pair channels'),
    ({'num_experts': 2, 'experts_per_token': 3}, 'among the 2 experts'),
  ],
)
def test_config_is_refused(options, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIG, **options)


def test_half_precision():
  config = dataclasses.replace(CONFIG, dtype='bfloat16')
  params = make('llama')[1]
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  with jax.numpy_dtype_promotion('standard'):  # inside jax's attention
    found = compiled(decoder.functional(config))(half, TOKENS)
  want = make('llama')[2](half, TOKENS)
  assert want.dtype == jnp.float32
  assert found.dtype == jnp.bfloat16
  error = np.abs(np.asarray(found, np.float32) - want)
  # 8 bits of precision through two blocks.
  assert error.max() < 0.03 * np.abs(want).max()


def test_rotation_against_complex_numbers():
  x = np.random.default_rng(0).normal(size=(1, 5, 2, 8))
  angle = np.arange(5)[:, None] * 100.0 ** (-np.arange(4) / 4)
  turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)[None, :, None]
  expected = np.concatenate([turned.real, turned.imag], -1)
  turn = compiled(lambda x: rotary.rotate(x, jnp.arange(5)[None], 100.0))
  found = turn(jnp.asarray(x, jnp.float32))
  np.testing.assert_allclose(found, expected, atol=1e-5)
