"""Accelerators: frozen pytrees of numbers, made by these functions."""

from mq_jax.hardware.accelerators._base import (
  Accelerator,
  Area,
  Memory,
  Traffic,
  buffers,
)
from mq_jax.hardware.accelerators.decoding import gobo, olive
from mq_jax.hardware.accelerators.fineq import fineq
from mq_jax.hardware.accelerators.fused import bitfusion, mixpe
from mq_jax.hardware.accelerators.microscopiq import microscopiq
from mq_jax.hardware.accelerators.roofline import gpu_roofline, tpu_roofline
from mq_jax.hardware.accelerators.systolic import systolic

BY_NAME = {
  'microscopiq': microscopiq,
  'fineq': fineq,
  'systolic': systolic,
  'olive': olive,
  'gobo': gobo,
  'mixpe': mixpe,
  'bitfusion': bitfusion,
  'gpu_roofline': gpu_roofline,
  'tpu_roofline': tpu_roofline,
}

__all__ = [
  'BY_NAME',
  'Accelerator',
  'Area',
  'Memory',
  'Traffic',
  'bitfusion',
  'buffers',
  'fineq',
  'gobo',
  'gpu_roofline',
  'microscopiq',
  'mixpe',
  'olive',
  'systolic',
  'tpu_roofline',
]
