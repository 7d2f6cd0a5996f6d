"""What all tests share. Set before jax is imported: CPU, two fake devices."""

import os
import pathlib

os.environ['JAX_PLATFORMS'] = 'cpu'
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
