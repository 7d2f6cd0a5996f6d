"""What a compressed cache of keys and values costs in likelihood, by its bits.

    python -m experiments.caches_table [--model reference] [--text FILE]
        [--windows 16] [--chunk 1] [--json]

Windows of a text are read token by token: each token sees itself and what the
cache keeps of those before it, as in generation. Bits are those of all that is
stored at the end of a window, side data included, the window in full
precision counted at 16. `chance` evicts by lot as much as `h2o` does by
attention. The figures published are in experiments/results/caches.md.
"""

import argparse
import json
import time
from typing import Any

import jax
import jax.numpy as jnp

from mq_jax import caches
from mq_jax.evaluation import cached, perplexity
from mq_jax.lab import measure, opening

# Contexts of the bundled model are 256 tokens: groups and windows are as small
# as that calls for, not as their papers have them.
ROWS = (
  ('full', {}),
  ('kivi', {'bits': 4, 'group': 16, 'residual': 32}),
  ('kivi', {'bits': 3, 'group': 16, 'residual': 32}),
  ('kivi', {'bits': 2, 'group': 16, 'residual': 32}),
  ('kivi', {'bits': 2, 'group': 16, 'residual': 0}),
  ('mikv', {'bits': 4}),
  ('mikv', {'bits': 2}),
  ('mikv', {'bits': 2, 'balance': False}),
  ('h2o', {'ratio': 0.2}),
  ('chance', {'ratio': 0.2}),
  ('kvcrush', {'ratio': 0.2}),
  ('zipvl', {'every': 32}),
)


def measured(model, windows, name, options, chunk: int) -> dict[str, Any]:
  """One row of the table."""
  policy, dtype = caches.make(name, **options), 'bfloat16'
  arguments = model.config, policy, chunk, dtype
  start = time.perf_counter()
  scores = perplexity.evaluate(
    cached.through_cache(*arguments),
    model.params,
    windows.tokens,
    n_bytes=windows.n_bytes,
  )
  bits = jax.jit(cached.bits_reader(*arguments))(
    model.params, jnp.asarray(windows.tokens[:4, :-1])
  )
  return {
    'cache': name,
    'options': options,
    'ebw': float(bits.ebw),
    'ebw_paper': float(bits.ebw_paper),
    'nll': scores.nll,
    'bits_per_byte': scores.bits_per_byte,
    'seconds': time.perf_counter() - start,
  }


def shown(row: dict[str, Any], base: float) -> str:
  """A row in Markdown."""
  options = ', '.join(f'{k}={v}' for k, v in row['options'].items())
  return (
    f'| `{row["cache"]}` | {options} | {row["ebw"]:.2f} | '
    f'{row["ebw_paper"]:.2f} | {row["nll"]:.4f} | {row["nll"] - base:+.4f} |'
  )


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--model', default='reference')
  parser.add_argument('--text', help='default: the test split of the docs')
  parser.add_argument('--windows', type=int, default=16)
  parser.add_argument('--chunk', type=int, default=1)
  parser.add_argument('--json', action='store_true')
  arguments = parser.parse_args(argv)
  model = opening.open_any(arguments.model)
  text = measure.evaluation_text(arguments.text)
  windows = measure.windows(model, text, arguments.windows)
  if not arguments.json:
    print('| cache | options | bits | without side data | nll | more |')
    print('|---|---|---:|---:|---:|---:|')
  base = None
  for name, options in ROWS:
    row = measured(model, windows, name, options, arguments.chunk)
    base = row['nll'] if base is None else base
    line = json.dumps(row) if arguments.json else shown(row, base)
    print(line, flush=True)


if __name__ == '__main__':
  main()
