"""The published tables come out, within what each explains."""

import pathlib

import gin
import matplotlib.pyplot as plt
import pytest

from experiments import hardware_tables

CONFIG = (
  pathlib.Path(__file__).parents[2] / 'configs' / 'hardware' / 'tables.gin'
)


@pytest.fixture(scope='module')
def sections():
  return {
    name: section(0.09, 2048)
    for name, section in hardware_tables.SECTIONS.items()
  }


def test_mixpe_times_and_energies(sections):
  rows = [r for r in sections['MixPE'] if r.published is not None]
  times = [r for r in rows if r.quantity.endswith('time')]
  energies = [r for r in rows if r.quantity.endswith('energy')]
  assert len(times) == 20 and len(energies) == 5
  for row in times:
    assert float(row.ours) == pytest.approx(row.published, abs=0.05), row
  for row in energies:
    assert float(row.ours) == pytest.approx(row.published, abs=0.02), row


def test_mixpe_with_operands_at_their_own_widths():
  base = hardware_tables.mixpe_cost('LLaMA-2-13B', 'fp16', fair=True)
  own = hardware_tables.mixpe_cost('LLaMA-2-13B', 'w4a16', fair=True)
  ratio = float(own.compute_cycles / base.compute_cycles)
  assert ratio == pytest.approx(0.39, abs=0.02)


def test_power_split(sections):
  rows = {r.quantity: r for r in sections['MicroScopiQ: power']}
  for name, row in rows.items():
    tolerance = 0.5 if name.startswith('LLaMA') else 1.5
    assert float(row.ours) == pytest.approx(row.published, abs=tolerance), row


def test_page_and_figure(tmp_path):
  plt.switch_backend('agg')
  with gin.unlock_config():
    gin.clear_config()
    gin.parse_config_file(str(CONFIG))
    gin.bind_parameter('tables.out', str(tmp_path))
    hardware_tables.tables()
    gin.clear_config()
  text = (tmp_path / 'README.md').read_text(encoding='utf-8')
  assert '| MicroScopiQ 64x64, one ReCoN: compute area, um2 |' in text
  assert (tmp_path / 'figure.png').stat().st_size > 10_000
