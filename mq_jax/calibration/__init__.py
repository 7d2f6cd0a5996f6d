"""Statistics gathered at sites: one pass, streaming, mergeable."""

from mq_jax.calibration.statistics import (
  Statistics,
  calibrate,
  merge,
  of_rows,
)

__all__ = ['Statistics', 'calibrate', 'merge', 'of_rows']
