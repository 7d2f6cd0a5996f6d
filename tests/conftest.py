"""What all tests share. Set before jax is imported: CPU, two fake devices.

Programs of tests run once: most of their time the compiler would optimize them.
JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests what users run, in a fifth more time.
"""

import os
import pathlib

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
_COUNT = '--xla_force_host_platform_device_count'
if _COUNT not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_COUNT}=2'

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

# A slip in dtype or rank is an error, not a promotion. Flax runs under it.
jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')

# The first example of a property may compile for seconds.
hypothesis.settings.register_profile('mq_jax', deadline=None)
hypothesis.settings.load_profile('mq_jax')

GOLDEN = pathlib.Path(__file__).parent / 'golden'


@pytest.fixture(scope='session')
def golden_dir() -> pathlib.Path:
  """Small files with figures from other libraries."""
  return GOLDEN


@pytest.fixture(scope='session')
def data_dir() -> pathlib.Path:
  """Data that is not part of the repository; its tests skip without it."""
  beside = pathlib.Path(__file__).parents[1] / '../shared/data'
  folder = pathlib.Path(os.environ.get('MQ_DATA') or beside).resolve()
  if not folder.is_dir():
    pytest.skip(f'no test data in {folder}; MQ_DATA names another folder')
  return folder


@pytest.fixture(scope='session')
def babyllama(data_dir):
  """A trained character-level Llama of 0.9 M parameters."""
  from mq_jax.models import huggingface

  return huggingface.load(data_dir / 'babyllama105-hf')


@pytest.fixture(scope='session')
def tiny_llama():
  """A random Llama: grouped queries, head_dim of its own, untied."""
  from mq_jax.models import huggingface

  return huggingface.load(GOLDEN / 'tiny-llama')


@pytest.fixture(scope='session')
def tiny(tmp_path_factory):
  """Folder of a random Llama that reads bytes: compiles in a second."""
  import tokenizers

  from mq_jax.models import decoder, huggingface

  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocabulary = {'<s>': 0} | {c: i + 1 for i, c in enumerate(alphabet)}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  config = decoder.DecoderConfig(
    vocab_size=len(vocabulary),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=32,
  )
  # Ten times the usual size: quantization must show in the results.
  params = jax.tree.map(
    lambda x: 10 * x if x.ndim == 2 else x, decoder.init_params(config, 0)
  )
  model = huggingface.LanguageModel(
    config=config,
    params=params,
    apply=decoder.functional(config),
    tokenizer=tokenizer,
    bos=0,
    name='tiny',
  )
  folder = tmp_path_factory.mktemp('models') / 'tiny'
  huggingface.save(folder, model)
  return folder


@pytest.fixture(scope='session')
def text(tmp_path_factory):
  """A short text file, not all of it ASCII."""
  path = tmp_path_factory.mktemp('texts') / 'text.txt'
  lines = [f'The {i}th café had {i * i} guests.' for i in range(60)]
  path.write_text('\n'.join(lines), encoding='utf-8')
  return path


@pytest.fixture
def study(tmp_path, tiny, text):
  """A config file of three quick rows."""
  path = tmp_path / 'study.gin'
  path.write_text(f"""
compare.models = ['{tiny}']
compare.recipes = [
  {{'recipe': 'none'}},
  {{'recipe': 'rtn', 'bits': 3, 'group': 16}},
  {{'recipe': 'gptq', 'bits': 2, 'group': 16, 'label': 'two'}},
]
compare.text = '{text}'
compare.calibration_text = '{text}'
compare.windows = 8
compare.calibration_windows = 6
compare.batch = 4
compare.artifact = 'two'
""")
  return path
