"""The study of contention on a few small tiles."""

import json
import pathlib

import gin
import pytest

from experiments import recon_contention as study
from mq_jax.hardware import technology

CONFIG = pathlib.Path(__file__).parents[2] / 'configs/hardware/contention.gin'
SMALL = """
cases = ((16, 2, False, (1, 2, 4, 8)), (16, 1, False, (8,)))
ms = (1, 4, 16)
outlier_blocks = (0.09,)
latency_ms = (4, 64)
tiles = 2
"""


@pytest.fixture
def config():
  yield [f'contention.{line}' for line in SMALL.split('\n') if line]
  gin.clear_config()


def test_latency_of_a_unit():
  # log2(64) + 1 stages and an arbiter; 63 columns of skew.
  assert study.unit_latency(64, False) == 8
  assert study.unit_latency(64, True) == 71
  assert study.asking_share(0.09, 64, 8) == pytest.approx(1 - 0.91**8)


def test_claim_holds_until():
  records = [{'m': m, 'conflicts': c} for m, c in ((4, 0.5), (1, 0.0), (2, 0))]
  assert study.holds_until(records, 'conflicts', 0.03) == 2
  assert study.holds_until(records, 'conflicts', 0.6) == 4
  assert study.holds_until(records[:1], 'conflicts', 0.03) is None


def test_areas_are_those_of_table_5():
  area, share = study.areas(64, 8)
  assert area[0] == pytest.approx(12783, abs=1)
  unit = technology.MICROSCOPIQ_RECON_64_UM2.value
  unit += technology.MICROSCOPIQ_SYNC_64_UM2.value
  assert area[3] - area[0] == pytest.approx(7 * unit)
  assert share[0] == pytest.approx(unit / area[0])


def test_simulation_and_model_agree_where_it_is_plain():
  case = (16, 1, False, (1, 16))
  few, many = study.measure(case, (64,), (0.2,), micro_block=8, tiles=2, seed=0)
  # With a unit for every row nobody waits, and cycles are exact.
  assert many['conflicts'] == 0 and many['conflicts_model'] < 1e-3
  assert many['cycles'] == pytest.approx(many['cycles_model'], rel=0.02)
  assert few['conflicts'] > 0.5 and few['conflicts_model'] > 0.5
  assert few['cycles'] == pytest.approx(few['cycles_model'], rel=0.25)


@pytest.mark.slow
def test_study_writes_its_folder(config, tmp_path, capsys):
  out = tmp_path / 'found'
  study.main([str(CONFIG), *config, f"contention.out = '{out}'"])
  assert 'written to' in capsys.readouterr().out
  names = {path.name for path in out.iterdir()}
  assert names == {'README.md', 'results.json', 'config.gin', 'figure.png'}
  found = json.loads((out / 'results.json').read_text())
  assert len(found['points']) == 3 * 4 + 3
  rows = {row['m']: row for row in found['latency_over_units']}
  assert rows[4]['tile'][0] == 1.0 and rows[4]['model'][3] <= 1.0
  assert 'tile' not in rows[64]  # not simulated
  page = (out / 'README.md').read_text()
  assert '16 x 16' in page and 'published' in page
