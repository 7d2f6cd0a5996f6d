"""Generation against what transformers gives, for all decoder families."""

import json

import cache_oracles
import drawn
import numpy as np
import pytest

from mq_jax import caches, generation
from mq_jax.evaluation import cached
from mq_jax.models import huggingface, tensors

# Their rotations depend on the length of the text, beyond the one they were
# made for: keys in a cache keep those of their time, there as here.
BY_LENGTH = ('llama-dynamic', 'phi3-long')


@pytest.fixture(scope='module')
def listing(golden_dir):
  return json.loads((golden_dir / 'decoders.json').read_text())


@pytest.fixture(scope='module')
def golden(golden_dir):
  return dict(np.load(golden_dir / 'decoders_golden.npz'))


@pytest.fixture
def model(listing, tmp_path):
  """Makes the model of a case from weights drawn by name."""

  def make(case):
    (tmp_path / 'config.json').write_text(json.dumps(listing[case]['config']))
    weights = drawn.tensors(listing[case]['saved'])
    tensors.write_safetensors(tmp_path / 'model.safetensors', weights)
    return huggingface.load(tmp_path)

  return make


@pytest.mark.slow
@pytest.mark.parametrize('family', [
  'llama', 'mistral', 'qwen2', 'qwen3', 'phi3', 'opt', 'gpt2', 'mixtral',
])  # fmt: skip
def test_token_by_token_agrees_with_transformers(
  listing, golden, model, family
):
  cases = [
    case
    for case in listing
    if case.split('-')[0] == family and case not in BY_LENGTH
  ]
  assert cases
  for case in cases:
    found = model(case)
    apply = cached.through_cache(found.config, caches.full())
    logits = cache_oracles.jit(apply)(found.params, golden['tokens'])
    np.testing.assert_allclose(logits, golden[case], atol=1e-4, err_msg=case)


@pytest.mark.slow
@pytest.mark.parametrize('case', ['mistral', 'qwen3', 'gpt2'])
def test_greedy_continuations_of_transformers(golden, model, case):
  found = model(case)
  generated = generation.generate(
    found.config, found.params, list(golden['tokens']), 16
  )
  np.testing.assert_array_equal(generated.tokens, golden[f'{case}-greedy'])
