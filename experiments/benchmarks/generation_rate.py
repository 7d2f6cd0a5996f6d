"""How many tokens a second a model writes, by the kind of its cache.

    python -m experiments.benchmarks.generation_rate [--models reference DIR]
        [--prompt 64] [--tokens 128] [--batches 1 8] [--json]

Of each model, cache and number of texts side by side: seconds to compile the
prompt and the step (all new tokens are one program, a loop of one step), then,
compiled, seconds of the prompt and tokens a second of all rows, and what the
cache stores in bits an element and in bytes, and the bytes of its arrays.
Tokens a second of CPU time tell something on a machine that is busy otherwise.
The floor is the matmuls of one token by the rate of a product of a matrix and
a vector that this machine reaches in the same run, if one row is written.

Figures are in experiments/results/generation_rate.md.
"""

import argparse
import json
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import quantize_rate
from mq_jax import caches, generation, sites
from mq_jax.lab import opening

# Contexts of the models are 256: a window of 128 would leave little to round.
CACHES = {
  'full': {},
  'kivi': {'bits': 2, 'group': 16, 'residual': 32},
  'kivi packed': {'bits': 2, 'group': 16, 'residual': 32, 'packed': True},
}


def policy_of(name: str) -> caches.Policy:
  return caches.make(name.split()[0], **CACHES[name])


def matvec_rate(size: int = 1024) -> float:
  """Weights a second that pass through a product with a vector, float32."""
  a = jax.random.normal(jax.random.key(0), (8, size, size))
  x = jnp.ones((8, size))
  run = jax.jit(lambda a, x: jnp.einsum('bij,bj->bi', a, x))
  return a.size / quantize_rate.median_seconds(lambda: run(a, x), 9)


def weights_per_token(model) -> int:
  """Weights that a token is multiplied with, head included."""
  tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  found = sites.find(model.apply, model.params, tokens)
  return sum(
    int(np.prod([site.groups, site.k, site.n]))
    for site in found
    if site.kind != 'attention'
  )


def measure(
  model, name: str, batch: int, prompt: int, count: int, repeats: int = 3
) -> dict[str, Any]:
  """One row of the table."""
  config, policy = model.config, policy_of(name)
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, config.vocab_size, (batch, prompt)).astype(np.int32)
  positions = np.broadcast_to(np.arange(prompt, dtype=np.int32), tokens.shape)
  key, stop = jax.random.key(0), jnp.zeros(0, jnp.int32)
  first = lambda: generation.begin(
    config,
    model.params,
    tokens,
    positions,
    policy,
    None,
    key,
    stop,
    prompt + count,
    jnp.dtype('float32'),
  )
  rest = lambda state: generation.finish(
    config, model.params, state, policy, None, key, stop, count
  )
  start = time.perf_counter()
  state = jax.block_until_ready(first())
  begun = time.perf_counter()
  found = jax.block_until_ready(rest(state))
  done = time.perf_counter()
  prompt_seconds = quantize_rate.median_seconds(first, repeats)
  cpu = time.process_time()
  steps_seconds = quantize_rate.median_seconds(lambda: rest(state), repeats)
  cpu = (time.process_time() - cpu) / (repeats + 1)
  bits = caches.total_bits(policy, found.caches)
  return {
    'model': model.name,
    'cache': name,
    'rows': batch,
    'compile_prompt_seconds': begun - start - prompt_seconds,
    'compile_step_seconds': done - begun - steps_seconds,
    'prompt_seconds': prompt_seconds,
    'tokens_per_second': batch * (count - 1) / steps_seconds,
    'tokens_per_cpu_second': batch * (count - 1) / cpu,
    'cache_ebw': float(bits.ebw),
    'cache_bytes': int(float(bits.total) / 8),
    'allocated_bytes': sum(x.nbytes for x in jax.tree.leaves(found.caches)),
  }


def table(rows: list[dict[str, Any]]) -> str:
  """The rows in Markdown."""
  heads = (
    'model',
    'cache',
    'rows',
    'compile: prompt, step [s]',
    'prompt [s]',
    'tokens/s',
    'tokens/s of CPU',
    'share of floor',
    'bits an element',
    'bytes stored',
    'allocated',
  )
  lines = [heads, ('---',) * 2 + ('---:',) * 9]
  for row in rows:
    lines.append(
      (
        row['model'],
        row['cache'],
        row['rows'],
        f'{row["compile_prompt_seconds"]:.1f}, '
        f'{row["compile_step_seconds"]:.1f}',
        f'{row["prompt_seconds"]:.3g}',
        f'{row["tokens_per_second"]:.4g}',
        f'{row["tokens_per_cpu_second"]:.4g}',
        f'{row["share_of_floor"]:.2f}' if 'share_of_floor' in row else '',
        f'{row["cache_ebw"]:.3g}',
        row['cache_bytes'],
        row['allocated_bytes'],
      )
    )
  return '\n'.join(f'| {" | ".join(map(str, line))} |' for line in lines)


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--models', nargs='+', default=['reference'])
  parser.add_argument('--caches', nargs='+', default=list(CACHES))
  parser.add_argument('--prompt', type=int, default=64)
  parser.add_argument('--tokens', type=int, default=128)
  parser.add_argument('--batches', type=int, nargs='+', default=[1, 8])
  parser.add_argument('--json', action='store_true')
  arguments = parser.parse_args(argv)
  rate, rows = matvec_rate(), []
  for path in arguments.models:
    model = opening.open_any(path)
    weights = weights_per_token(model)
    for name in arguments.caches:
      for batch in arguments.batches:
        row = measure(model, name, batch, arguments.prompt, arguments.tokens)
        if batch == 1:
          row['share_of_floor'] = row['tokens_per_second'] * weights / rate
        rows.append(row)
  if arguments.json:
    print(json.dumps({'weights_per_second': rate, 'rows': rows}))
    return
  print(f'{rate:.3g} weights a second through a matrix-vector product, load')
  print(f'{os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores.\n')
  print(table(rows))


if __name__ == '__main__':
  main()
