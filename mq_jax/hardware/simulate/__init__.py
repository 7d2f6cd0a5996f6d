"""Simulators that move real bits, against which the models are checked.

Functional, in integers, on codes of real quantized weights: `microscopiq`
with its butterfly `recon`, and `temporal`. Cycle by cycle: `systolic` arrays
that move operands, the elastic `pipeline` of rows that share ReCoN units, and
the pulses of lock-step arrays, `temporal_cycles`.
"""

from mq_jax.hardware.simulate import (
  microscopiq,
  pipeline,
  recon,
  systolic,
  temporal,
  temporal_cycles,
)

__all__ = [
  'microscopiq',
  'pipeline',
  'recon',
  'systolic',
  'temporal',
  'temporal_cycles',
]
