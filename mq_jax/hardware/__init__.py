"""Accelerators as differentiable functions: cycles, energy, area.

cost(accelerator, workload, precision) is pure and broadcasts:

  from mq_jax import hardware
  accelerator = hardware.accelerators.microscopiq(64, 64, recon_units=1)
  work = hardware.workload.model('llama-2-7b', 'prefill')
  found = hardware.cost(accelerator, work, hardware.precision(2, 8, ebw=2.4))
  found.sum().total_cycles
"""

from mq_jax.hardware import (
  accelerators,
  shapes,
  simulate,
  technology,
  workload,
)
from mq_jax.hardware._cost import (
  Cost,
  Energy,
  cost,
  expected_cost,
  relaxed_cost,
)
from mq_jax.hardware._precision import (
  Precision,
  of_matrix,
  of_recipe,
  precision,
  stack,
  weight_bits,
)
from mq_jax.hardware.workload import Workload

__all__ = [
  'Cost',
  'Energy',
  'Precision',
  'Workload',
  'accelerators',
  'cost',
  'expected_cost',
  'of_matrix',
  'of_recipe',
  'precision',
  'relaxed_cost',
  'shapes',
  'simulate',
  'stack',
  'technology',
  'weight_bits',
  'workload',
]
