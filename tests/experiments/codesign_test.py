"""The co-design study on a few accelerators."""

import json

import gin
import jax
import numpy as np
import pytest

from experiments import codesign as study

SMALL = {
  'model': 'llama-2-7b',
  'batch': 64,
  'options': ((2, 3.0), (4, 3.0)),
  'freedoms': {
    f'{name}_proj': 5 for name in ('q', 'k', 'v', 'o', 'gate', 'up', 'down')
  },
  'size': 128,
  'values': {'rows': (16, 64), 'cols': (32, 128), 'recon_units': (4, 32)},
  'sram_kib': 1024,
  'banks': 8,
  'levels': ((0.7, 110), (1.2, 95)),
  'starts': 2,
  'steps': 10,
  'kept': 1,
  'rounds': 2,
  'random_counts': (4, 16),
}


@pytest.fixture
def loose():
  """Adam's own constants need promotions."""
  with jax.numpy_dtype_promotion('standard'):
    yield
  gin.clear_config()


@pytest.mark.slow
def test_study_writes_its_folder(loose, tmp_path):
  folder = study.codesign(out=tmp_path / 'found', **SMALL)
  names = {path.name for path in folder.iterdir()}
  assert names == {'README.md', 'results.json', 'config.gin', 'figure.png'}
  records = json.loads((folder / 'results.json').read_text())
  assert len(records) == 2
  for record in records:
    budget = {
      'area_um2': 1e6 * record['area_mm2'],
      'cycles': 1e6 * record['mcycles'],
    }
    grid = record['grid']
    assert grid['evaluations'] == 2**3 * 35  # 8 banks dealt to 4 parts
    for found in [grid, *record['searches']]:
      for name, most in budget.items():
        assert found['totals'][name] <= most * (1 + 1e-12)
      # The grid holds all that the others may choose.
      assert found['loss'] >= grid['loss'] * (1 - 1e-4)
      assert len(found['choice']) == 224
    losses = [x['loss'] for x in record['random'] if x['loss'] is not None]
    assert all(loss >= grid['loss'] * (1 - 1e-4) for loss in losses)
  page = (folder / 'README.md').read_text()
  assert 'times fewer' in page and 'synthetic loss' in page


def test_an_unknown_kind_of_site_is_named():
  with pytest.raises(ValueError, match="degrees of freedom of 'q_proj'"):
    study.drawn('llama-2-7b', 64, ((2, 3.0),), {}, 1.0, 64, 0)


def test_the_drawn_loss_falls_with_bits_and_outliers():
  data = study.drawn(
    'llama-2-7b', 64, ((2, 4.0), (2, 2.5), (4, 3.0)), SMALL['freedoms'],
    1.0, 128, 0,
  )  # fmt: skip
  assert data.sensitivity.shape == (224, 3)
  assert (np.diff(data.sensitivity) < 0).all()
  assert (np.diff(data.candidates.ebw) > 0).all()
