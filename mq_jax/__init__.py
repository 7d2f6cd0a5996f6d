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

import importlib
import typing

if typing.TYPE_CHECKING:  # what the names are, for editors and type checkers
  from mq_jax import (
    activations,
    allocation,
    caches,
    calibration,
    clusters,
    compensation,
    equalization,
    formats,
    generation,
    hardware,
    layouts,
    learn,
    plans,
    recipes,
    sites,
    steps,
    streaming,
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
  'activations',
  'allocation',
  'caches',
  'calibrate',
  'calibration',
  'chain',
  'clusters',
  'compensation',
  'compress',
  'dequantize',
  'equalization',
  'formats',
  'generation',
  'hardware',
  'layouts',
  'learn',
  'lift',
  'new_cluster',
  'plans',
  'quantize_matrix',
  'recipes',
  'sites',
  'steps',
  'streaming',
  'within',
]

# Of the names above those that are not modules themselves: where they are.
_FROM = {
  'Cluster': 'clusters',
  'Plan': 'plans',
  'QuantizedMatrix': 'quantize',
  'Recipe': 'recipes',
  'Status': 'compensation',
  'calibrate': 'calibration',
  'chain': 'clusters',
  'compress': 'plans',
  'dequantize': 'plans',
  'lift': 'clusters',
  'new_cluster': 'clusters',
  'quantize_matrix': 'quantize',
  'within': 'clusters',
}


def __getattr__(name: str) -> typing.Any:
  """Imports what is asked for: `mq --help` does not wait for jax."""
  if name not in __all__:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  if name not in _FROM:
    return importlib.import_module(f'{__name__}.{name}')
  found = getattr(importlib.import_module(f'{__name__}.{_FROM[name]}'), name)
  globals()[name] = found
  return found


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
