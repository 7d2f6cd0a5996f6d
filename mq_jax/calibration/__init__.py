"""Statistics gathered at sites: one pass, streaming, mergeable."""

from mq_jax.calibration.statistics import (
  Statistics,
  calibrate,
  check_coverage,
  merge,
  of_rows,
)

__all__ = ['Statistics', 'calibrate', 'check_coverage', 'merge', 'of_rows']
