import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mq_jax.models import huggingface, tensors


@pytest.fixture
def checkpoint(golden_dir, tmp_path):
  """A copy of tiny-llama whose config and tensors a test may change."""
  folder = tmp_path / 'tiny'
  shutil.copytree(golden_dir / 'tiny-llama', folder)

  class Checkpoint:
    path = folder

    def config(self, **changes):
      raw = json.loads((folder / 'config.json').read_text())
      raw |= changes
      raw = {k: v for k, v in raw.items() if v != 'absent'}
      (folder / 'config.json').write_text(json.dumps(raw))

    def tensors(self, change):
      file = folder / 'model.safetensors'
      found = {k: np.array(v) for k, v in tensors.read_folder(folder).items()}
      change(found)
      tensors.write_safetensors(file, found)

  return Checkpoint()


@pytest.mark.parametrize('variant', ['tiny', 'tiny_bf16'])
def test_logits_agree_with_transformers(golden_dir, variant):
  golden = np.load(golden_dir / 'llama_golden.npz')
  folder = variant.replace('tiny', 'tiny-llama').replace('_', '-')
  model = huggingface.load(golden_dir / folder)
  assert {x.dtype.name for x in jax.tree.leaves(model.params)} == {'float32'}
  logits = jax.jit(model.apply)(
    model.params, golden['tiny_tokens'].astype(np.int32)
  )
  expected = golden[f'{variant}_logits']
  assert np.abs(expected).max() > 1  # the comparison is not of zeros
  np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_babyllama_logits_agree_with_transformers(babyllama, golden_dir):
  golden = np.load(golden_dir / 'llama_golden.npz')
  logits = jax.jit(babyllama.apply)(
    babyllama.params, golden['babyllama_tokens'].astype(np.int32)
  )
  np.testing.assert_allclose(logits, golden['babyllama_logits'], atol=1e-4)
  assert (babyllama.bos, babyllama.eos) == (1, 2)
  assert babyllama.name == 'babyllama105-hf'
  assert babyllama.tokenizer.get_vocab_size() == 105


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_saved_model_loads_as_it_was(tiny_llama, tmp_path, dtype):
  huggingface.save(tmp_path / 'a/b', tiny_llama, dtype=dtype)
  again = huggingface.load(tmp_path / 'a/b', dtype=dtype)
  assert again.config == tiny_llama.config
  assert again.apply is tiny_llama.apply  # equal configs share what compiles
  assert (again.bos, again.eos) == (tiny_llama.bos, tiny_llama.eos)
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a, np.asarray(b).astype(dtype)),
    again.params,
    tiny_llama.params,
  )


def test_saved_tokenizer_loads(babyllama, tmp_path):
  huggingface.save(tmp_path, babyllama, dtype=jnp.bfloat16)
  again = huggingface.load(tmp_path)
  text = 'Once upon a time'
  assert (
    again.tokenizer.encode(text).ids == babyllama.tokenizer.encode(text).ids
  )
  settings = json.loads((tmp_path / 'tokenizer_config.json').read_text())
  assert (settings['bos_token'], settings['eos_token']) == ('<s>', '</s>')


def test_save_refuses_what_load_would(tiny_llama, tmp_path):
  with pytest.raises(ValueError, match='int8'):
    huggingface.save(tmp_path, tiny_llama, dtype=jnp.int8)
  params = dict(tiny_llama.params)
  norm = params.pop('norm')
  broken = lambda p: huggingface.LanguageModel(
    tiny_llama.config, p, tiny_llama.apply, None, None, 'broken'
  )
  with pytest.raises(ValueError, match='norm'):
    huggingface.save(tmp_path, broken(params))
  params['norm'] = {'scale': norm['scale'][1:]}
  with pytest.raises(ValueError, match='model.norm.weight is of shape'):
    huggingface.save(tmp_path, broken(params))


REFUSED = {
  'architecture': ({'architectures': ['GPT2LMHeadModel']}, 'LlamaForCausalLM'),
  'no architecture': ({'architectures': None}, 'LlamaForCausalLM'),
  'scaled positions': (
    {'rope_scaling': {'type': 'linear', 'factor': 2.0}},
    "rope_scaling of type 'linear'",
  ),
  'llama3 positions': (
    {'rope_parameters': {'rope_type': 'llama3', 'rope_theta': 5e5}},
    "rope_parameters of type 'llama3'",
  ),
  'two bases': ({'rope_theta': 1e4}, 'contradict'),
  'base no number': (
    {'rope_parameters': {'rope_theta': 'x'}},
    'positive number',
  ),
  'attention bias': ({'attention_bias': True}, 'attention_bias=True'),
  'mlp bias': ({'mlp_bias': True}, 'mlp_bias=True'),
  'activation': ({'hidden_act': 'gelu'}, 'hidden_act=gelu .*silu'),
  'window': ({'sliding_window': 4096}, 'sliding_window=4096'),
  'quantized': ({'quantization_config': {'bits': 4}}, 'quantization_config'),
  'size missing': ({'hidden_size': 'absent'}, 'hidden_size .* nothing'),
  'size zero': ({'vocab_size': 0}, 'vocab_size'),
  'size fraction': ({'num_hidden_layers': 2.0}, 'num_hidden_layers'),
  'size true': ({'num_key_value_heads': True}, 'num_key_value_heads'),
  'size huge': ({'num_hidden_layers': 2**40}, 'num_hidden_layers'),
  'layers by the billion': ({'num_hidden_layers': 10**9}, 'only 21 tensors'),
  'heads': ({'num_key_value_heads': 3}, 'multiple'),
  'odd head': ({'head_dim': 15}, 'odd'),
  'no head_dim': (
    {'head_dim': None, 'num_attention_heads': 3, 'num_key_value_heads': 3},
    'multiple',
  ),
  'epsilon': ({'rms_norm_eps': -1}, 'rms_norm_eps'),
  'tied no bool': ({'tie_word_embeddings': 1}, 'tie_word_embeddings'),
  'bos outside': ({'bos_token_id': 96}, 'bos_token_id .* 0 to 95'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_config_is_refused(checkpoint, case):
  changes, message = REFUSED[case]
  checkpoint.config(**changes)
  with pytest.raises(ValueError, match=message) as error:
    huggingface.load(checkpoint.path)
  assert str(checkpoint.path) in str(error.value)


def test_refused_before_weights_are_read(checkpoint):
  checkpoint.config(architectures=['MistralForCausalLM'])
  (checkpoint.path / 'model.safetensors').unlink()
  with pytest.raises(ValueError, match='MistralForCausalLM is not supported'):
    huggingface.load(checkpoint.path)


def test_rotary_base_of_old_and_new_configs(checkpoint):
  assert huggingface.load(checkpoint.path).config.rope_theta == 500000
  checkpoint.config(rope_parameters='absent', rope_theta=1000)
  assert huggingface.load(checkpoint.path).config.rope_theta == 1000
  checkpoint.config(rope_theta='absent', rope_scaling=None)
  assert huggingface.load(checkpoint.path).config.rope_theta == 10000


def test_every_wrong_tensor_is_named(checkpoint):
  def change(found):
    found['model.layers.0.mlp.up.weight'] = found.pop(
      'model.layers.0.mlp.up_proj.weight'
    )
    found['model.norm.weight'] = found['model.norm.weight'][:-1]
    found['model.layers.1.self_attn.q_proj.bias'] = np.ones(64, np.float32)
    found['lm_head.weight'] = found['lm_head.weight'].astype(np.float64)

  checkpoint.tensors(change)
  with pytest.raises(ValueError) as error:
    huggingface.load(checkpoint.path)
  for part in (
    'mlp.up_proj.weight is missing (there is model.layers.0.mlp.up.weight)',
    'model.norm.weight is of shape (31,), expected (32,)',
    'q_proj.bias is not part of the architecture',
    'lm_head.weight is float64',
  ):
    assert part in str(error.value)


@pytest.mark.filterwarnings('error')
def test_weights_that_are_not_finite(checkpoint):
  def change(found):
    found['model.norm.weight'][3] = 1e6

  checkpoint.tensors(change)
  huggingface.load(checkpoint.path)
  with pytest.raises(ValueError, match='norm.weight: 1 of 32 .* as float16'):
    huggingface.load(checkpoint.path, dtype=jnp.float16)

  def poison(found):
    found['lm_head.weight'][0, 1] = np.nan

  checkpoint.tensors(poison)
  with pytest.raises(ValueError, match='lm_head.weight: 1 of 3072'):
    huggingface.load(checkpoint.path)


def test_tied_head_may_be_stored_if_equal(checkpoint):
  def tie(found):
    found['lm_head.weight'] = found['model.embed_tokens.weight']
    name = 'model.layers.0.self_attn.rotary_emb.inv_freq'
    found[name] = np.ones(8, np.float32)  # of old transformers

  checkpoint.config(tie_word_embeddings=True)
  with pytest.raises(ValueError, match='lm_head.weight differs'):
    huggingface.load(checkpoint.path)
  checkpoint.tensors(tie)
  assert 'lm_head' not in huggingface.load(checkpoint.path).params


def test_malformed_json_and_tokenizer(checkpoint):
  path = checkpoint.path / 'tokenizer.json'
  for text in ('{', '{}', '[]'):
    path.write_text(text)
    with pytest.raises(ValueError, match='tokenizer.json'):
      huggingface.load(checkpoint.path)
  words = {str(i): i for i in range(97)}
  model = {'type': 'WordLevel', 'vocab': words, 'unk_token': '0'}
  path.write_text(json.dumps({'version': '1.0', 'model': model}))
  with pytest.raises(ValueError, match='has token 96, the model only 96'):
    huggingface.load(checkpoint.path)
  (checkpoint.path / 'config.json').write_text('{"a": 1, "a": 2}')
  with pytest.raises(ValueError, match="'a' is given 2 times"):
    huggingface.load(checkpoint.path)
  (checkpoint.path / 'config.json').unlink()
  with pytest.raises(FileNotFoundError, match='config.json'):
    huggingface.load(checkpoint.path)


def test_pickles_are_refused(checkpoint):
  folder = checkpoint.path
  (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
  with pytest.raises(ValueError, match='pickles'):
    huggingface.load(folder)


def test_hub_names(checkpoint, monkeypatch):
  import huggingface_hub

  asked = []

  def fetch(name, allow_patterns):
    asked.append((name, allow_patterns))
    if name == 'org/absent':
      raise OSError('offline')
    return str(checkpoint.path)

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', fetch)
  assert huggingface.load('org/tiny').name == 'tiny'
  with pytest.raises(FileNotFoundError, match='OSError: offline'):
    huggingface.load('org/absent')
  assert [name for name, _ in asked] == ['org/tiny', 'org/absent']
  assert all(p.endswith(('.json', '.safetensors')) for p in asked[0][1])
  for name in ('../x', 'a/b/c', 'nothing', '/absent/folder', ''):
    with pytest.raises((FileNotFoundError, ValueError)):
      huggingface.load(name)
  assert len(asked) == 2


def test_import_is_cheap():
  code = (
    'import sys, mq_jax.models.bundled\n'
    "print([m for m in ('torch', 'transformers', 'orbax', "
    "'huggingface_hub', 'matplotlib') if m in sys.modules])"
  )
  root = pathlib.Path(huggingface.__file__).parents[2]
  out = subprocess.run(
    [sys.executable, '-c', code],
    cwd=root,
    capture_output=True,
    text=True,
    check=True,
  )
  assert out.stdout.strip() == '[]'
