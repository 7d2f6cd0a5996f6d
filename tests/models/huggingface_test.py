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


def run(model, tokens):
  # Half the time of a test is spent optimizing code that runs once.
  options = {'xla_backend_optimization_level': 0}
  return jax.jit(model.apply, compiler_options=options)(model.params, tokens)


@pytest.mark.parametrize('variant', ['tiny', 'tiny_bf16'])
def test_logits_agree_with_transformers(golden_dir, variant):
  golden = np.load(golden_dir / 'llama_golden.npz')
  folder = variant.replace('tiny', 'tiny-llama').replace('_', '-')
  model = huggingface.load(golden_dir / folder)
  assert {x.dtype.name for x in jax.tree.leaves(model.params)} == {'float32'}
  logits = run(model, golden['tiny_tokens'].astype(np.int32))
  expected = golden[f'{variant}_logits']
  assert np.abs(expected).max() > 1  # the comparison is not of zeros
  np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_babyllama_logits_agree_with_transformers(babyllama, golden_dir):
  golden = np.load(golden_dir / 'llama_golden.npz')
  logits = run(babyllama, golden['babyllama_tokens'].astype(np.int32))
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
  with pytest.raises(
    ValueError, match='model.norm.weight is of shape .31,. in'
  ):
    huggingface.save(tmp_path, broken(params))


REFUSED = {
  'architecture': ({'architectures': ['BloomModel']}, 'BloomModel .*Llama'),
  'no architecture': ({'architectures': None}, 'LlamaForCausalLM'),
  'positions of another kind': (
    {'rope_parameters': {'rope_type': 'axial', 'rope_theta': 5e5}},
    "rope_parameters of type 'axial' is not supported; .*linear",
  ),
  'positions with more': (
    {'rope_parameters': {'rope_type': 'linear', 'factor': 2, 'power': 1}},
    "'linear' with .'power'.",
  ),
  'positions with less': (
    {'rope_parameters': {'rope_type': 'linear'}},
    'rope_parameters: factor must be a positive number, found nothing',
  ),
  'positions spelled twice': (
    {'rope_scaling': {'type': 'linear', 'factor': 2.0}},
    'rope_scaling.rope_type and rope_parameters.rope_type contradict',
  ),
  'ramp upside down': (
    {
      'rope_parameters': {
        'rope_type': 'llama3',
        'factor': 2.0,
        'low_freq_factor': 4.0,
        'high_freq_factor': 1.0,
      }
    },
    'high_freq_factor must be above',
  ),
  'too few factors': (
    {
      'rope_parameters': {
        'rope_type': 'longrope',
        'short_factor': [1.0, 2.0],
        'long_factor': [1.0, 2.0],
      }
    },
    'short_factor must be a list of 8 positive numbers',
  ),
  'part of a head': (
    {'partial_rotary_factor': 0.5},
    'partial_rotary_factor=0.5',
  ),
  'two bases': ({'rope_theta': 1e4}, 'contradict'),
  'base no number': (
    {'rope_parameters': {'rope_theta': 'x'}},
    'positive number',
  ),
  'attention bias': ({'attention_bias': True}, 'q_proj.bias is missing'),
  'mlp bias': ({'mlp_bias': True}, 'up_proj.bias is missing'),
  'bias no bool': ({'mlp_bias': 1}, 'mlp_bias must be true or false'),
  'activation': ({'hidden_act': 'mish'}, 'hidden_act=mish .*silu'),
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
  checkpoint.config(architectures=['BloomForCausalLM'])
  (checkpoint.path / 'model.safetensors').unlink()
  with pytest.raises(ValueError, match='BloomForCausalLM is not supported'):
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
  root = pathlib.Path(huggingface.__file__).parents[3]
  out = subprocess.run(
    [sys.executable, '-c', code],
    cwd=root,
    capture_output=True,
    text=True,
    check=True,
  )
  assert out.stdout.strip() == '[]'


def test_blocks_are_read_one_by_one(checkpoint, tiny_llama):
  opened = huggingface.open_folder(checkpoint.path)
  rest = opened.rest()
  assert rest.keys() == {'embed_tokens', 'norm', 'lm_head'}
  layers = {i: opened.block(i) for i in range(2)}
  jax.tree.map(
    np.testing.assert_array_equal, {**rest, 'layers': layers}, tiny_llama.params
  )
  half = opened.block(1, jnp.bfloat16)  # again, and after pages were let go
  assert {x.dtype.name for x in jax.tree.leaves(half)} == {'bfloat16'}
  for i in (-1, 2):
    with pytest.raises(ValueError, match=f'block {i} of 2'):
      opened.block(i)


def test_opening_reads_no_weights(checkpoint):
  def poison(found):
    found['model.layers.1.mlp.up_proj.weight'][0, 0] = np.nan

  checkpoint.tensors(poison)
  opened = huggingface.open_folder(checkpoint.path)
  opened.rest()
  opened.block(0)
  with pytest.raises(ValueError, match='layers.1.mlp.up_proj.weight: 1 of'):
    opened.block(1)


def test_shards(tiny_llama, tmp_path):
  huggingface.save(tmp_path / 'm', tiny_llama, max_shard_bytes=20_000)
  files = sorted(p.name for p in (tmp_path / 'm').iterdir())
  shards = [name for name in files if name.endswith('.safetensors')]
  assert len(shards) > 3
  assert shards[0] == f'model-00001-of-{len(shards):05}.safetensors'
  assert 'model.safetensors' not in files
  for name in shards:
    assert (tmp_path / 'm' / name).stat().st_size < 22_000
  again = huggingface.load(tmp_path / 'm')
  jax.tree.map(np.testing.assert_array_equal, again.params, tiny_llama.params)
  # Another size over it: no shard of the first is left.
  huggingface.save(tmp_path / 'm', tiny_llama)
  files = {p.name for p in (tmp_path / 'm').iterdir()}
  assert {n for n in files if 'model' in n} == {'model.safetensors'}
  assert huggingface.load(tmp_path / 'm').config == tiny_llama.config
  (tmp_path / 'file').write_text('')
  with pytest.raises(NotADirectoryError, match='file: is a file'):
    huggingface.save(tmp_path / 'file', tiny_llama)
  with pytest.raises(ValueError, match='max_shard_bytes=0'):
    huggingface.save(tmp_path / 'n', tiny_llama, max_shard_bytes=0)
  assert not (tmp_path / 'n').exists()


def test_values_that_the_stored_type_cannot_hold(tiny_llama, tmp_path):
  params = dict(tiny_llama.params)
  params['norm'] = {'scale': 1e6 * params['norm']['scale']}
  model = huggingface.LanguageModel(
    tiny_llama.config, params, tiny_llama.apply, None, None, 'large'
  )
  with pytest.raises(ValueError, match='norm.weight: 32 of 32 .* as float16'):
    huggingface.save(tmp_path / 'm', model, dtype=jnp.float16)
  assert not (tmp_path / 'm').exists()


def test_links_inside_a_cache_of_the_hub(checkpoint, tmp_path, tiny_llama):
  cache = tmp_path / 'models--org--tiny'
  snapshot = cache / 'snapshots' / 'abc'
  for folder in (snapshot, cache / 'blobs'):
    folder.mkdir(parents=True)
  for i, path in enumerate(checkpoint.path.iterdir()):
    path.rename(cache / 'blobs' / str(i))
    (snapshot / path.name).symlink_to(f'../../blobs/{i}')
  assert huggingface.load(snapshot).config == tiny_llama.config
  (tmp_path / 'moved').symlink_to(snapshot)  # of the whole folder: one's own
  assert huggingface.load(tmp_path / 'moved').config == tiny_llama.config


def test_nothing_is_left_of_a_failed_write(tiny_llama, tmp_path):
  entries = huggingface.expected_tensors(tiny_llama.config)

  def full(name):
    if name == 'model.norm.weight':
      raise OSError(28, 'No space left on device')
    return np.zeros(entries[name].shape)

  fail = lambda folder: huggingface.write_folder(
    folder, tiny_llama.config, full, max_shard_bytes=10_000
  )
  with pytest.raises(OSError, match='No space'):
    fail(tmp_path / 'new')
  assert not list(tmp_path.iterdir())
  huggingface.save(tmp_path / 'old', tiny_llama)
  before = {p.name: p.read_bytes() for p in (tmp_path / 'old').iterdir()}
  with pytest.raises(OSError, match='No space'):
    fail(tmp_path / 'old')
  after = {p.name: p.read_bytes() for p in (tmp_path / 'old').iterdir()}
  assert after == before


@pytest.mark.parametrize('name', ['model.safetensors', 'config.json'])
def test_links_out_of_the_folder(checkpoint, tmp_path, name):
  outside = tmp_path / 'outside'
  (checkpoint.path / name).rename(outside)
  (checkpoint.path / name).symlink_to(outside)
  with pytest.raises(ValueError, match=f'{name}: is a link to .*outside'):
    huggingface.open_folder(checkpoint.path)
