import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mq_jax.models import llama

CONFIG = llama.LlamaConfig(
  vocab_size=40,
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=8,
  max_position_embeddings=32,
)


@pytest.fixture(scope='module')
def params():
  return llama.init_params(CONFIG, 0)


def test_parameters_are_plain_nested_dicts(params):
  assert params.keys() == {'embed_tokens', 'layers', 'norm'}
  assert list(params['layers']) == [0, 1]
  assert params['layers'][1]['mlp']['down_proj']['kernel'].shape == (24, 16)


def test_same_config_same_function():
  assert llama.functional(CONFIG) is llama.functional(CONFIG)


def test_logits_depend_on_the_past_only(params):
  apply = jax.jit(llama.functional(CONFIG))
  tokens = jnp.arange(12, dtype=jnp.int32).reshape(1, 12)
  changed = tokens.at[0, 7].set(39)
  before, after = apply(params, tokens), apply(params, changed)
  np.testing.assert_array_equal(before[:, :7], after[:, :7])
  assert (before[:, 7:] != after[:, 7:]).any(-1).all()


def test_wrong_structure_is_named(params):
  renamed = {k: v for k, v in params.items() if k != 'norm'}
  renamed['nrom'] = params['norm']
  with pytest.raises(ValueError, match="'norm/scale'.*'nrom/scale'"):
    llama.functional(CONFIG)(renamed, jnp.zeros((1, 2), jnp.int32))


def test_rotation_against_complex_numbers():
  x = np.random.default_rng(0).normal(size=(1, 5, 2, 8))
  angle = np.arange(5)[:, None] * 100.0 ** (-np.arange(4) / 4)
  turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)[None, :, None]
  expected = np.concatenate([turned.real, turned.imag], -1)
  found = llama.rotate(jnp.asarray(x, jnp.float32), jnp.arange(5), 100.0)
  np.testing.assert_allclose(found, expected, atol=1e-5)
