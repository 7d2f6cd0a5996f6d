"""A model quantized a block at a time is the model quantized whole."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mq_jax import (
  activations,
  calibration,
  plans,
  recipes,
  sharding,
  sites,
  streaming,
)
from mq_jax.evaluation import perplexity
from mq_jax.models import decoder

CONFIG = decoder.DecoderConfig(
  vocab_size=96,
  hidden_size=32,
  intermediate_size=64,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=8,
  max_position_embeddings=64,
)
TOKENS = np.random.default_rng(0).integers(0, 96, (3, 4, 24)).astype(np.int32)
RECIPES = {
  'gptq': recipes.gptq(bits=3, group=16),
  'rtn': recipes.rtn(bits=4, group=16),
}


@pytest.fixture(scope='module')
def params():
  return decoder.init_params(CONFIG, 1)


@pytest.fixture(scope='module')
def blocks(params):
  return streaming.of_params(decoder.parts(CONFIG), params)


def _streamed(blocks, recipe, **options):
  plan = plans.uniform(streaming.find_sites(blocks, TOKENS[0]), recipe)
  carried = streaming.begin(blocks, list(TOKENS))
  return list(streaming.quantize(blocks, plan, carried, **options))


def _codes(params):
  return {n: q.codes for n, q in plans.matrices(params).items()}


def _assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_sites_are_those_of_the_whole_model(params, blocks):
  apply = decoder.functional(CONFIG)
  whole = {s.name: s for s in sites.find(apply, params, TOKENS[0])}
  found = streaming.find_sites(blocks, TOKENS[0])
  assert len(found) == 2 * 7
  for site in found:
    other = whole[site.name]
    same = ('path', 'shape', 'layout', 'm', 'k', 'n', 'macs', 'tied')
    assert all(getattr(site, f) == getattr(other, f) for f in same), site.name


@pytest.mark.slow
def test_through_original_blocks_it_is_compress(params, blocks):
  """Code by code: the whole model calibrated at once and compressed."""
  recipe = RECIPES['gptq']
  apply = decoder.functional(CONFIG)
  found = sites.find(apply, params, TOKENS[0])
  statistics = calibration.calibrate(apply, params, list(TOKENS), sites=found)
  whole = plans.compress(
    params, plans.uniform(found, recipe), statistics=statistics
  )
  steps = _streamed(blocks, recipe, inputs='original')
  _assert_equal(_codes(streaming.assemble(blocks, steps)), _codes(whole))


def test_later_blocks_see_what_the_quantized_ones_give(params, blocks):
  """Each block done by hand, from what the blocks before it give."""
  recipe = RECIPES['gptq']
  steps = _streamed(blocks, recipe)
  parts = decoder.parts(CONFIG)
  inputs = [parts.embed(params, tokens) for tokens in TOKENS]
  for i, step in enumerate(steps):
    f = parts.block(i)
    found = sites.find(f, params['layers'][i], inputs[0])
    statistics = calibration.calibrate(
      f, params['layers'][i], inputs, sites=found
    )
    want = plans.compress(
      params['layers'][i], plans.uniform(found, recipe), statistics=statistics
    )
    got = {
      name.removeprefix(f'layers/{i}/'): codes
      for name, codes in _codes({'layers': {i: step.params}}).items()
    }
    _assert_equal(got, _codes(want))
    inputs = [jax.jit(f)(plans.decode(want), x) for x in inputs]


def test_goes_on_from_a_block_to_the_same_bits(blocks):
  plan = plans.uniform(streaming.find_sites(blocks, TOKENS[0]), RECIPES['gptq'])
  steps = _streamed(blocks, RECIPES['gptq'])
  (again,) = streaming.quantize(blocks, plan, steps[0].carried, start=1)
  assert again.index == 1
  _assert_equal(jax.tree.leaves(again.params), jax.tree.leaves(steps[1].params))


def test_blocks_alike_compile_once(params):
  """Programs are those of one block, however many there are."""
  deep = dataclasses.replace(CONFIG, num_hidden_layers=6)
  parts, counts = decoder.parts(deep), []
  real = parts.block(0)

  def counted(p, x):
    counts.append(1)
    return real(p, x)

  blocks = streaming.of_params(
    types.SimpleNamespace(
      embed=parts.embed, block=lambda i: counted, head=parts.head
    ),
    decoder.init_params(deep, 0),
  )
  _streamed(blocks, RECIPES['gptq'])
  # Traced to find its sites, to calibrate and to carry: each once (a trace of
  # an abstract value may come twice).
  assert len(counts) <= 5, len(counts)


def test_without_batches_nothing_is_calibrated(blocks):
  plan = plans.uniform(streaming.find_sites(blocks, TOKENS[0]), RECIPES['gptq'])
  steps = list(streaming.quantize(blocks, plan, []))
  status = {r['status'] for s in steps for r in plans.records({'x': s.params})}
  assert status == {'no_hessian'}


def test_sites_outside_the_blocks_are_refused(params, blocks):
  apply = decoder.functional(
    dataclasses.replace(CONFIG, tie_word_embeddings=False)
  )
  untied = decoder.init_params(
    dataclasses.replace(CONFIG, tie_word_embeddings=False), 0
  )
  found = sites.find(apply, untied, TOKENS[0])
  plan = plans.plan(found, [('lm_head*', RECIPES['rtn'])])
  with pytest.raises(ValueError, match='lm_head/kernel: is in none of the 2'):
    next(streaming.quantize(blocks, plan, []))
  with pytest.raises(ValueError, match="inputs='before'"):
    next(streaming.quantize(blocks, plan, [], inputs='before'))


@pytest.mark.slow
def test_on_a_mesh_it_comes_out_close(blocks):
  """Sums over divided batches round differently; codes rarely do."""
  mesh = sharding.make_mesh(data=2)
  recipe = RECIPES['gptq']
  one = _streamed(blocks, recipe)
  two = _streamed(streaming.on_mesh(blocks, mesh), recipe)
  for a, b in zip(one, two, strict=True):
    for x, y in zip(
      jax.tree.leaves(plans.decode(a.params)),
      jax.tree.leaves(plans.decode(b.params)),
      strict=True,
    ):
      equal = np.isclose(x, y, rtol=1e-5, atol=1e-6).mean()
      assert equal > 0.98, equal


def test_activations_that_are_not_finite_name_the_site(blocks):
  plan = plans.uniform(streaming.find_sites(blocks, TOKENS[0]), RECIPES['gptq'])
  bad = [jnp.full((4, 24, 32), jnp.inf)]
  with pytest.raises(ValueError, match='inputs that are not finite'):
    next(streaming.quantize(blocks, plan, bad))


def test_evaluation_by_blocks_is_that_of_the_whole(params, blocks):
  windows = TOKENS.reshape(-1, 24)[:11]
  counted = np.random.default_rng(1).random((11, 23)) < 0.7
  options = {'batch': 4, 'n_bytes': 100, 'counted': counted}
  apply = decoder.functional(CONFIG)
  want = perplexity.evaluate(apply, params, windows, **options)
  got = streaming.evaluate(blocks, windows, **options)
  np.testing.assert_allclose(got, want, rtol=1e-6)
  # And of packed blocks, whose inputs are quantized too.
  recipe = RECIPES['rtn'].with_activations(activations.make('token', bits=8))
  steps = _streamed(blocks, recipe)
  packed = streaming.assemble(blocks, steps)
  by_blocks = streaming.evaluate(
    streaming.of_params(decoder.parts(CONFIG), packed), windows, **options
  )
  f, given = plans.runnable(apply, packed)
  want = perplexity.evaluate(f, given, windows, **options)
  np.testing.assert_allclose(by_blocks, want, rtol=1e-5)
  assert abs(by_blocks.nll - got.nll) > 1e-4
