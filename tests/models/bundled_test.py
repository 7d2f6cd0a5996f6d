import pathlib
import shutil

import jax
import numpy as np
import pytest

from mq_jax.models import bundled


@pytest.fixture
def reference(golden_dir, tmp_path, monkeypatch):
  """Stands in for the bundled model, which is larger."""
  shutil.copytree(golden_dir / 'tiny-llama', tmp_path / 'reference')
  monkeypatch.setattr(bundled, '_FOLDER', tmp_path / 'reference')


def test_names_load(reference):
  assert bundled.names() == ('reference', 'reference-planted')
  tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
  plain, planted = (bundled.open_model(name) for name in bundled.names())
  assert (plain.name, planted.name) == bundled.names()
  run = jax.jit(plain.apply)
  np.testing.assert_array_equal(
    run(plain.params, tokens), run(planted.params, tokens)
  )
  assert any(
    (a != b).any()
    for a, b in zip(
      jax.tree.leaves(plain.params), jax.tree.leaves(planted.params)
    )
  )


def test_planting_is_the_same_every_time(reference):
  one, two = (bundled.load('reference-planted').params for _ in range(2))
  jax.tree.map(np.testing.assert_array_equal, one, two)


def test_folder(golden_dir):
  assert bundled.open_model(golden_dir / 'tiny-llama').name == 'tiny-llama'


@pytest.mark.parametrize('name', ['refrence', 'reference_planted'])
def test_unknown_name_gets_the_nearest(name):
  with pytest.raises(ValueError, match='nearest: reference') as error:
    bundled.open_model(name)
  assert 'Hugging Face' in str(error.value)
  with pytest.raises(ValueError, match='nearest: reference'):
    bundled.load(name)


@pytest.mark.parametrize('name', ['', '/absent/folder', './absent', '~/absent'])
def test_absent_folder(name):
  with pytest.raises(ValueError, match='is no model'):
    bundled.open_model(name)


def test_installation_without_the_files(monkeypatch):
  monkeypatch.setattr(bundled, '_FOLDER', pathlib.Path('/absent'))
  with pytest.raises(FileNotFoundError, match='lacks the bundled model'):
    bundled.load('reference')
