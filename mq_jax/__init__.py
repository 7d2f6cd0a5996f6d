"""mq_jax: differentiable mixed-precision quantization research in JAX.

import mq_jax as mq

q = mq.quantize_matrix(weight, mq.recipes.gptq(bits=3), hessian=x.T @ x)
q.dequantize(), q.ebw, q.pack().nbytes

found = mq.sites.find(f, params, batch)
statistics = mq.calibrate(f, params, batches, sites=found)
plan = mq.plans.uniform(found, mq.recipes.microscopiq(bits=2))
packed = mq.compress(params, plan, statistics=statistics)
f(mq.dequantize(packed), batch)

work = mq.hardware.workload.from_sites(found, 'decode')
mq.hardware.cost(mq.hardware.accelerators.microscopiq(), work,
                 mq.hardware.precision(2, 8, ebw=2.4)).sum().total_cycles
"""

from mq_jax import (
  allocation,
  calibration,
  clusters,
  compensation,
  equalization,
  formats,
  hardware,
  layouts,
  plans,
  recipes,
  sites,
  steps,
)
from mq_jax.calibration import calibrate
from mq_jax.clusters import Cluster, chain, lift, new_cluster, within
from mq_jax.compensation import Status
from mq_jax.plans import Plan, compress, dequantize
from mq_jax.quantize import QuantizedMatrix, quantize_matrix
from mq_jax.recipes import Recipe

__version__ = '0.1.0'

__all__ = [
  'Cluster',
  'Plan',
  'QuantizedMatrix',
  'Recipe',
  'Status',
  'allocation',
  'calibrate',
  'calibration',
  'chain',
  'clusters',
  'compensation',
  'compress',
  'dequantize',
  'equalization',
  'formats',
  'hardware',
  'layouts',
  'lift',
  'new_cluster',
  'plans',
  'quantize_matrix',
  'recipes',
  'sites',
  'steps',
  'within',
]
