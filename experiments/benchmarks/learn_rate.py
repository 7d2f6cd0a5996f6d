"""How long it takes to learn the codes of a model, and what its matmuls take.

    python -m experiments.benchmarks.learn_rate [--model DIR]
        [--recipe autoround] [--group 128] [--steps 200] [--windows 24]
        [--tokens 128] [--batch 8] [--json]

`learn.reconstruct` block by block on random tokens (time does not depend on
them), twice in one process: the first run compiles, unless the compile cache of
JAX is on, the second only runs. The floor is the time that the matrix products
of all steps take alone: forward, and backward to weights and inputs, at the
same shapes, the least of some rounds.
"""

import argparse
import json
import resource
import sys
import time
from typing import Any

# As issue 7 asks, by model, for 200 steps on two cores.
SECONDS = {'babyllama105-hf': 30, 'reference': 300}


def report(options: argparse.Namespace) -> dict[str, Any]:
  import jax
  import numpy as np

  from experiments import _pages
  from mq_jax import learn, plans, recipes, streaming
  from mq_jax.lab import opening
  from mq_jax.models import decoder

  model = opening.open_any(options.model)
  parts = decoder.parts(model.config)
  rng = np.random.default_rng(0)
  shape = options.windows, options.tokens
  tokens = rng.integers(0, model.config.vocab_size, shape).astype(np.int32)
  blocks = streaming.of_params(parts, model.params)
  recipe = recipes.make(
    options.recipe,
    bits=4,
    group=options.group,
    learning={'steps': options.steps, 'batch': options.batch},
  )
  plan = plans.uniform(streaming.find_sites(blocks, tokens[:2]), recipe)
  peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
  before, seconds = peak(), []
  for _ in range(2):
    start = time.perf_counter()
    learn.reconstruct(parts, model.params, plan, tokens)
    seconds.append(time.perf_counter() - start)
  after = peak()
  floor = _floor(model, parts, options) * options.steps * blocks.count
  return {
    'model': model.name,
    'recipe': recipe.label,
    'machine': _pages.machine(),
    'blocks': blocks.count,
    'steps': options.steps,
    'tokens_a_step': options.batch * options.tokens,
    'first_seconds': seconds[0],
    'again_seconds': seconds[1],
    'floor_seconds': floor,
    'share_of_floor': floor / seconds[1],
    'megabytes': after - before,
    'asked_seconds': SECONDS.get(model.name.rsplit('/', 1)[-1]),
    'jax': jax.__version__,
  }


def _floor(model, parts, options) -> float:
  """Seconds of the matrix products of one step of one block."""
  import jax
  import jax.numpy as jnp

  from experiments.benchmarks import evaluation_rate as rate
  from mq_jax.learn import losses

  f = parts.block(0)
  x = parts.embed(
    model.params, jnp.zeros((options.batch, options.tokens), jnp.int32)
  )
  loss = losses.mse(f)
  jaxpr = jax.make_jaxpr(jax.grad(loss))(model.params['layers'][0], ((x,), x))
  counts = rate.summed(rate.products(jaxpr.jaxpr))
  taken = rate.least_seconds([rate.alone(p) for p in counts], 7)
  return sum(n * t for n, (t, _) in zip(counts.values(), taken, strict=True))


def markdown(found: dict[str, Any]) -> str:
  """The report as a row of a page."""
  asked = found['asked_seconds']
  verdict = ''
  if asked is not None:
    verdict = f' (asked {asked}: {_met(found)})'
  return (
    f'{found["model"]}, {found["recipe"]}: {found["blocks"]} blocks, '
    f'{found["steps"]} steps of {found["tokens_a_step"]} tokens each; '
    f'{found["machine"]}.\n\n'
    f'- first {found["first_seconds"]:.1f} s with compilation, again '
    f'{found["again_seconds"]:.1f} s{verdict}\n'
    f'- matrix products alone {found["floor_seconds"]:.1f} s, '
    f'{found["share_of_floor"]:.0%} of it\n'
    f'- {found["megabytes"]:.0f} MiB more resident at the peak than before\n'
  )


def _met(found: dict[str, Any]) -> str:
  good = found['again_seconds'] <= found['asked_seconds']
  return 'met' if good else 'missed'


def main(argv: list[str] | None = None) -> dict[str, Any]:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--model', default='reference')
  parser.add_argument('--recipe', default='autoround')
  parser.add_argument('--group', type=int, default=128)
  parser.add_argument('--steps', type=int, default=200)
  parser.add_argument('--windows', type=int, default=24)
  parser.add_argument('--tokens', type=int, default=128)
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--json', action='store_true')
  options = parser.parse_args(argv)
  found = report(options)
  print(json.dumps(found, indent=1) if options.json else markdown(found))
  return found


if __name__ == '__main__':
  main(sys.argv[1:])
