"""Calibration, quantization, search and evaluation, on one device or many.

    python sharded.py TINY_LLAMA DATA MODEL [COORDINATOR PROCESS PROCESSES]

prints what comes out as one line of JSON. Devices are those of XLA_FLAGS.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax import allocation, calibration, plans, recipes, sharding, sites
from mq_jax.allocation import candidates, losses, measured, search
from mq_jax.evaluation import perplexity
from mq_jax.models import huggingface


def outcome(folder, data=1, model=1) -> dict:
  """What a mesh must not change, but for the order of sums."""
  opened = huggingface.load(folder)
  if data * model > 1:
    opened = sharding.on_mesh(opened, sharding.make_mesh(data, model))
  apply, params = opened.apply, opened.params
  draw = np.random.default_rng(0)
  size = opened.config.vocab_size
  windows = draw.integers(0, size, (16, 17)).astype(np.int32)
  inputs = windows[:, :-1].reshape(2, 8, 16)

  found = sites.find(apply, params, inputs[0])
  found = tuple(s for s in found if 'self_attn' in s.name)[:4]
  statistics = calibration.calibrate(apply, params, list(inputs), sites=found)
  gram = sharding.to_host(statistics[found[1].name].gram)

  choices = [recipes.rtn(bits=b, group=16) for b in (2, 3, 4)]
  plan = plans.uniform(found, choices[1])
  packed = plans.compress(params, plan, statistics=statistics)
  plain = plans.dequantize(packed)
  score = perplexity.evaluate(apply, plain, windows, batch=8)

  made = candidates.make(params, found, choices, statistics=statistics)
  loss = losses.divergence(apply)
  batches = losses.reference(apply, params, jnp.asarray(inputs))
  table = measured.one_site_table(loss, params, made.candidates, batches)
  weights = np.array([np.prod(s.matrix_shape) for s in found])
  bits = np.asarray(made.bits, np.float64)
  problem = allocation.make_problem(
    table, {'bits': bits}, {'bits': 3.3 * weights.sum()}
  )
  front = search.front(
    loss, params, made.candidates, problem, [{}], batches, steps=4, rounds=2
  )
  return {
    'devices': jax.device_count(),
    'nll': score.nll,
    'gram': gram.astype(np.float64).tolist(),
    'table': table.tolist(),
    'choice': front.choices[0].tolist(),
    'loss': float(front.losses[0]),
  }


if __name__ == '__main__':
  path, data, model, *rest = sys.argv[1:]
  if rest:
    jax.distributed.initialize(rest[0], int(rest[2]), int(rest[1]))
  print(json.dumps(outcome(path, int(data), int(model))))
