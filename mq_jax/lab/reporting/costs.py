"""Folders of `mq cost --out`."""

import pathlib
from typing import Any

from mq_jax.lab import files
from mq_jax.lab.reporting import checks
from mq_jax.report import hardware
from mq_jax.report.sources import Source

_COST = 'cost.json'
_OTHER = '; it was made by another version of mq cost: make it again'
_NUMBERS = dict.fromkeys(
  (
    *(part.field for part in (*hardware.CYCLES, *hardware.ENERGY)),
    *('total_cycles', 'total_pj', 'dram_bytes', 'clock_ghz', 'time_s'),
    *('ebw', 'outlier_blocks', 'utilization', 'conflict_rate', 'count', 'macs'),
  ),
  float,
)
_AREAS = dict.fromkeys(
  (f'{part}_um2' for part in ('array', 'noc', 'control', 'sram', 'total')),
  float,
)
_WIDTHS = dict.fromkeys(('weight_bits', 'activation_bits'), checks.MAYBE)
_SIZES = dict.fromkeys(('m', 'k', 'n'), float) | {'site': str, 'recipe': str}
_FIELDS = {
  **{'model': str, 'phase': str, 'batch': int, 'notes': [str]},
  'entries': [
    {
      'entry': str,
      'clock_ghz': float,
      'total': _NUMBERS | _AREAS | _WIDTHS,
      'sites': [_NUMBERS | _SIZES | _WIDTHS],
    }
  ],
}


def is_one(path: pathlib.Path) -> bool:
  """Whether a folder says that it is of `mq cost`."""
  return (path / _COST).is_file()


def read(path: pathlib.Path) -> Source:
  """Prices of a model on accelerators.

  Raises:
    RunError: for damage, and for folders of other versions.
  """
  where = path / _COST
  report = checks.read_json(where)
  checks.need(report, str(where), _FIELDS, missing=_OTHER)
  if not all(entry['sites'] for entry in report['entries']):
    raise files.RunError(f'{where}: an entry has no matmuls{_OTHER}')
  if not report['entries']:
    raise files.RunError(f'{where}: has no entries{_OTHER}')
  from mq_jax.lab import costing  # jax with it: only where it is needed

  try:
    entries = [
      entry | {'grouped': costing.grouped(entry['sites'])}
      for entry in report['entries']
    ]
  except KeyError as error:
    raise files.RunError(f'{where}: has no {error}{_OTHER}') from None
  config: dict[str, Any] = {
    name: report.get(name) for name in ('model', 'phase', 'batch', 'context')
  }
  return Source(
    kind='cost',
    name=path.name,
    path=str(path),
    state='finished',
    finished=True,
    config=config | {'entries': [e['entry'] for e in entries]},
    report=report | {'entries': entries},
  )
