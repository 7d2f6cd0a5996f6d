import json

import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mq_jax.models import decoder, huggingface, tensors
from mq_jax.models.decoder import rotary


def run(model, tokens):
  # Half the time of a test is spent optimizing code that runs once.
  options = {'xla_backend_optimization_level': 0}
  return jax.jit(model.apply, compiler_options=options)(model.params, tokens)


@pytest.fixture(scope='module')
def listing(golden_dir):
  return json.loads((golden_dir / 'decoders.json').read_text())


@pytest.fixture(scope='module')
def golden(golden_dir):
  return dict(np.load(golden_dir / 'decoders_golden.npz'))


def write(folder, config, weights):
  folder.mkdir(exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(config))
  tensors.write_safetensors(folder / 'model.safetensors', weights)
  return folder


@pytest.fixture
def folder(listing, tmp_path):
  """Makes a checkpoint of a case, as transformers saves it."""

  def make(case, **changes):
    config = listing[case]['config'] | changes
    weights = drawn.tensors(listing[case]['saved'])
    return write(tmp_path / case, config, weights)

  return make


# One of each layout and the least alike rotations; compiling takes a second.
QUICK = (
  'llama-dynamic', 'qwen2', 'qwen3', 'phi3-long', 'mixtral', 'opt', 'gpt2'
)  # fmt: skip
CASES = (
  *QUICK, 'llama-linear', 'llama-llama3', 'llama-yarn', 'llama-yarn-options',
  'llama-biases', 'mistral', 'mistral-full', 'qwen2-plain', 'qwen3-biases',
  'phi3', 'phi3-partial', 'phi3-short', 'mixtral-window', 'opt-no-bias',
  'gpt2-inner',
)  # fmt: skip
slow = lambda case: pytest.param(case, marks=pytest.mark.slow)


def test_all_cases_are_listed(listing):
  assert set(CASES) == set(listing)


@pytest.mark.parametrize('case', [c if c in QUICK else slow(c) for c in CASES])
def test_family_agrees_with_transformers(folder, golden, case):
  model = huggingface.load(folder(case))
  logits = run(model, golden['tokens'])
  assert np.abs(golden[case]).max() > 1
  # float32 on both sides, in another order: 4e-6 at most when made.
  np.testing.assert_allclose(logits, golden[case], atol=1e-4)


@pytest.mark.parametrize('case', ['mixtral', slow('llama-llama3'), slow('opt')])
def test_weights_of_half_precision(folder, golden, case):
  model = huggingface.load(folder(case), dtype=jnp.bfloat16)
  logits = run(model, golden['tokens'])
  assert np.abs(golden[f'{case}-rounded'] - golden[case]).max() > 1e-3
  np.testing.assert_allclose(logits, golden[f'{case}-rounded'], atol=1e-4)


@pytest.mark.parametrize(
  'case', [slow(case) for case in ('qwen3', 'llama-llama3', 'opt')]
)
def test_computing_in_half_precision(folder, golden, case):
  model = huggingface.load(folder(case), dtype=jnp.bfloat16, compute='bfloat16')
  with jax.numpy_dtype_promotion('standard'):  # inside jax's attention
    logits = run(model, golden['tokens'])
  assert logits.dtype == jnp.bfloat16
  want = golden[f'{case}-half']
  error = np.asarray(logits, np.float32) - want
  # Each rounds to 8 bits after every step, in its own order. A router would
  # choose other experts now and then, so mixtures are not compared.
  assert np.sqrt(np.mean(error**2) / np.mean(want**2)) < 2e-2


@pytest.mark.slow
@pytest.mark.parametrize('case', ['mistral', 'qwen3', 'gpt2'])
def test_greedy_continuation(folder, golden, case):
  model = huggingface.load(folder(case))
  apply = jax.jit(model.apply)
  tokens = np.zeros((2, 32), np.int32)
  tokens[:, :16] = golden['tokens']
  for i in range(16, 32):  # what follows has no say in what went before
    tokens[:, i] = apply(model.params, tokens)[:, i - 1].argmax(-1)
  np.testing.assert_array_equal(tokens[:, 16:], golden[f'{case}-greedy'])


@pytest.mark.parametrize('case', CASES)
def test_family_is_saved_as_transformers_does(listing, folder, tmp_path, case):
  source = folder(case)
  model = huggingface.load(source)
  huggingface.save(tmp_path / 'new', model)
  again = huggingface.load(tmp_path / 'new')
  assert again.config == model.config
  assert again.apply is model.apply
  jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
  found, want = (
    tensors.read_folder(path) for path in (tmp_path / 'new', source)
  )
  assert found.keys() == want.keys()
  for name in want:
    np.testing.assert_array_equal(found[name], want[name])


def test_parameters_have_the_names_of_llama(folder):
  paths = [
    {
      jax.tree_util.keystr(p, simple=True, separator='/')
      for p, _ in jax.tree_util.tree_leaves_with_path(
        huggingface.open_folder(folder(case)).block(0)
      )
    }
    for case in ('llama-biases', 'phi3', 'gpt2', 'mixtral')
  ]
  llama, phi, gpt, mixtral = paths
  kernels = {p for p in llama if p.endswith('kernel')}
  assert phi == {p for p in llama if not p.endswith('bias')}
  assert gpt >= kernels - {'mlp/gate_proj/kernel'}
  assert mixtral >= {p for p in kernels if 'self_attn' in p}
  assert 'mlp/experts/down_proj/kernel' in mixtral


def test_gpt2_of_the_hub(listing, folder, tmp_path):
  """Saved without its head, and with the masks of old versions."""
  want = huggingface.load(folder('gpt2'))
  weights = {
    name.removeprefix('transformer.'): value
    for name, value in drawn.tensors(listing['gpt2']['saved']).items()
  }
  # Drawn by the full names.
  for name in weights:
    weights[name] = drawn.tensor(f'transformer.{name}', weights[name].shape)
  for i in range(2):
    weights[f'h.{i}.attn.bias'] = np.ones((1, 1, 32, 32), np.float32)
  path = write(tmp_path / 'hub', listing['gpt2']['config'], weights)
  found = huggingface.load(path)
  jax.tree.map(np.testing.assert_array_equal, found.params, want.params)


@pytest.mark.parametrize(
  'case, changes, message',
  [
    ('opt', {'do_layer_norm_before': False}, 'do_layer_norm_before=False'),
    ('opt', {'word_embed_proj_dim': 16}, 'word_embed_proj_dim=16'),
    ('opt', {'num_attention_heads': 3}, 'multiple of num_attention_heads=3'),
    ('gpt2', {'add_cross_attention': True}, 'add_cross_attention=True'),
    ('gpt2', {'scale_attn_by_inverse_layer_idx': True}, 'inverse_layer'),
    ('gpt2', {'n_embd': None}, 'n_embd must be'),
    ('mistral', {'layer_types': ['full_attention'] * 2}, 'layer_types'),
    ('mistral', {'sliding_window': 0}, 'sliding_window'),
    ('qwen2', {'layer_types': ['chunked'] * 2}, 'layer_types'),
    ('qwen2', {'layer_types': ['full_attention']}, 'a list of 2'),
    ('qwen2-plain', {'attention_bias': True}, 'attention_bias=True'),
    ('qwen2', {'num_hidden_layers': 2**31 - 1}, 'num_hidden_layers .*100000'),
    ('mixtral', {'num_local_experts': 2**31 - 1}, 'only 41 tensors'),
    ('phi3-long', {'original_max_position_embeddings': 1}, 'must be above 1'),
    (
      'llama-yarn',
      {'rope_parameters': {'rope_type': 'yarn', 'rope_theta': 1, 'factor': 2}},
      'rope_theta must be above 1',
    ),
    ('llama-dynamic', {'head_dim': 2}, 'head_dim must be above 2'),
    ('mixtral', {'num_experts_per_tok': 5}, 'among the 4 experts'),
    ('mixtral', {'num_local_experts': 3}, 'experts.3.w1.weight is not part'),
    ('phi3-partial', {'hidden_size': 33}, 'multiple'),
  ],
)  # fmt: skip
def test_family_options_are_refused(folder, case, changes, message):
  path = folder(case, **changes)
  with pytest.raises(ValueError, match=message) as error:
    huggingface.open_folder(path)
  assert str(path) in str(error.value)


@pytest.mark.parametrize(
  'case',
  ['llama-linear', 'llama-dynamic', 'llama-llama3', 'llama-yarn', 'phi3-long'],
)
def test_rope_in_the_words_of_transformers_4(listing, case):
  config = listing[case]['config']
  inner = dict(config['rope_parameters'])
  old = {k: v for k, v in config.items() if k != 'rope_parameters'}
  old['rope_theta'] = inner.pop('rope_theta')
  inner['type'] = inner.pop('rope_type')
  if case == 'phi3-long':
    inner['type'] = 'su'  # of the first Phi-3
    for name in ('original_max_position_embeddings', 'partial_rotary_factor'):
      inner.pop(name, None)
  old['rope_scaling'] = inner
  want = huggingface.read_config(config, 'new')
  assert want.rope_scaling is not None
  assert huggingface.read_config(old, 'old') == want


def test_defaults_of_absent_fields(listing):
  """As in transformers 5.23, where a class and not a file has them."""
  read = lambda case, *absent: huggingface.read_config(
    {k: v for k, v in listing[case]['config'].items() if k not in absent}, case
  )
  assert read('mistral', 'sliding_window').sliding_window == 4096
  assert read('mixtral', 'rope_parameters').rope_theta == 1e6
  assert read('mixtral', 'sliding_window').sliding_window is None
  assert read('qwen3', 'head_dim').head_dim == 128
  assert read('qwen2', 'use_sliding_window').sliding_window is None
  assert read('qwen2', 'layer_types').window_layers == (1,)
  assert read('gpt2', 'activation_function').activation == 'gelu_tanh'
  assert read('gpt2', 'n_inner').intermediate_size == 128
  assert read('opt', 'activation_function', 'enable_bias').mlp_bias


def test_config_that_a_family_cannot_say(tiny_llama):
  config = tiny_llama.config
  replaced = lambda **changes: decoder.DecoderConfig(
    **{**vars(config), **changes}
  )
  for changes, message in (
    ({'qk_norm': True}, 'llama checkpoints cannot say qk_norm=True'),
    ({'sliding_window': 4}, 'cannot say sliding_window=4'),
    ({'family': 'bloom'}, "family='bloom'"),
    ({'rope_scaling': rotary.Dynamic(2.0, 3)}, 'length=3 cannot be stored'),
  ):
    with pytest.raises(ValueError, match=message):
      huggingface.write_config(replaced(**changes))
  assert (
    huggingface.read_config(
      huggingface.write_config(replaced(dtype='bfloat16')), 'x'
    )
    == config
  )  # what it computes in is no matter of the checkpoint


# Parts of public configs that decide how they are read, recalled.
PUBLIC = {
  'Llama-3.1-8B': (
    {
      'architectures': ['LlamaForCausalLM'],
      'attention_bias': False,
      'bos_token_id': 128000,
      'eos_token_id': [128001, 128008, 128009],
      'hidden_act': 'silu',
      'hidden_size': 4096,
      'intermediate_size': 14336,
      'max_position_embeddings': 131072,
      'mlp_bias': False,
      'num_attention_heads': 32,
      'num_hidden_layers': 32,
      'num_key_value_heads': 8,
      'pretraining_tp': 1,
      'rms_norm_eps': 1e-05,
      'rope_scaling': {
        'factor': 8.0,
        'low_freq_factor': 1.0,
        'high_freq_factor': 4.0,
        'original_max_position_embeddings': 8192,
        'rope_type': 'llama3',
      },
      'rope_theta': 500000.0,
      'tie_word_embeddings': False,
      'vocab_size': 128256,
    },
    8.03e9,
  ),
  'Mistral-7B-v0.1': (
    {
      'architectures': ['MistralForCausalLM'],
      'hidden_size': 4096,
      'intermediate_size': 14336,
      'max_position_embeddings': 32768,
      'num_attention_heads': 32,
      'num_hidden_layers': 32,
      'num_key_value_heads': 8,
      'rms_norm_eps': 1e-05,
      'rope_theta': 10000.0,
      'sliding_window': 4096,
      'tie_word_embeddings': False,
      'vocab_size': 32000,
    },
    7.24e9,
  ),
  'Qwen2.5-0.5B': (
    {
      'architectures': ['Qwen2ForCausalLM'],
      'attention_dropout': 0.0,
      'hidden_act': 'silu',
      'hidden_size': 896,
      'intermediate_size': 4864,
      'max_position_embeddings': 32768,
      'max_window_layers': 24,
      'num_attention_heads': 14,
      'num_hidden_layers': 24,
      'num_key_value_heads': 2,
      'rms_norm_eps': 1e-06,
      'rope_theta': 1000000.0,
      'sliding_window': 32768,
      'tie_word_embeddings': True,
      'use_sliding_window': False,
      'vocab_size': 151936,
    },
    0.494e9,
  ),
  'Qwen3-0.6B': (
    {
      'architectures': ['Qwen3ForCausalLM'],
      'attention_bias': False,
      'head_dim': 128,
      'hidden_act': 'silu',
      'hidden_size': 1024,
      'intermediate_size': 3072,
      'max_position_embeddings': 40960,
      'max_window_layers': 28,
      'num_attention_heads': 16,
      'num_hidden_layers': 28,
      'num_key_value_heads': 8,
      'rms_norm_eps': 1e-06,
      'rope_scaling': None,
      'rope_theta': 1000000,
      'sliding_window': None,
      'tie_word_embeddings': True,
      'use_sliding_window': False,
      'vocab_size': 151936,
    },
    0.596e9,
  ),
  'Phi-3-mini-128k': (
    {
      'architectures': ['Phi3ForCausalLM'],
      'attention_bias': False,
      'embd_pdrop': 0.0,
      'hidden_act': 'silu',
      'hidden_size': 3072,
      'intermediate_size': 8192,
      'max_position_embeddings': 131072,
      'num_attention_heads': 32,
      'num_hidden_layers': 32,
      'num_key_value_heads': 32,
      'original_max_position_embeddings': 4096,
      'rms_norm_eps': 1e-05,
      'rope_scaling': {
        'long_factor': [1.5] * 48,
        'short_factor': [1.0] * 48,
        'type': 'longrope',
      },
      'rope_theta': 10000.0,
      'sliding_window': 262144,
      'tie_word_embeddings': False,
      'vocab_size': 32064,
    },
    3.82e9,
  ),
  'Mixtral-8x7B': (
    {
      'architectures': ['MixtralForCausalLM'],
      'hidden_size': 4096,
      'intermediate_size': 14336,
      'max_position_embeddings': 32768,
      'num_attention_heads': 32,
      'num_experts_per_tok': 2,
      'num_hidden_layers': 32,
      'num_key_value_heads': 8,
      'num_local_experts': 8,
      'rms_norm_eps': 1e-05,
      'rope_theta': 1000000.0,
      'sliding_window': None,
      'tie_word_embeddings': False,
      'vocab_size': 32000,
    },
    46.7e9,
  ),
  'opt-1.3b': (
    {
      '_remove_final_layer_norm': False,
      'activation_function': 'relu',
      'architectures': ['OPTForCausalLM'],
      'do_layer_norm_before': True,
      'ffn_dim': 8192,
      'hidden_size': 2048,
      'max_position_embeddings': 2048,
      'num_attention_heads': 32,
      'num_hidden_layers': 24,
      'vocab_size': 50272,
      'word_embed_proj_dim': 2048,
    },
    1.316e9,
  ),
  'gpt2': (
    {
      'activation_function': 'gelu_new',
      'architectures': ['GPT2LMHeadModel'],
      'layer_norm_epsilon': 1e-05,
      'n_ctx': 1024,
      'n_embd': 768,
      'n_head': 12,
      'n_layer': 12,
      'n_positions': 1024,
      'summary_type': 'cls_index',
      'vocab_size': 50257,
    },
    0.1244e9,
  ),
}


@pytest.mark.parametrize('name', PUBLIC)
def test_public_configs_have_their_published_sizes(name):
  raw, count = PUBLIC[name]
  config = huggingface.read_config(raw, name)
  entries = huggingface.expected_tensors(config)
  found = sum(np.prod(entry.shape) for entry in entries.values())
  assert found == pytest.approx(count, rel=0.003)
  again = huggingface.read_config(huggingface.write_config(config), name)
  assert again == config
