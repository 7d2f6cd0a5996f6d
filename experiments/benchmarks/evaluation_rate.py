"""How fast a model is evaluated, and how far from the floor of its matmuls.

    python -m experiments.benchmarks.evaluation_rate [--model reference]
        [--batches 1 4 8] [--rounds 7] [--json]

Seconds a token for `perplexity.window_nll`, which is all that evaluation does
on the device, on windows of the model's context, at some batch sizes. The floor
is the time that the matmuls alone take: each matrix product of the program, of
attention and logits too (attention's whole squares, as they are computed), at
the same shapes, in the same rounds, at the batch size that suits it best. Of
all times the least of the rounds counts: whatever else a machine does only adds
to it. CPU seconds stand beside those of the clock, for machines that are busy.
"""

import argparse
import collections
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

TARGET = 0.7  # of the floor, as issue 6 asks


class Product(NamedTuple):
  """A matrix product of a program, by shapes and dimension numbers."""

  lhs: tuple[int, ...]
  rhs: tuple[int, ...]
  dimensions: Any

  @property
  def operations(self) -> int:
    (lhs, rhs), (batch, rhs_batch) = self.dimensions
    n = [d for i, d in enumerate(self.rhs) if i not in {*rhs, *rhs_batch}]
    return 2 * math.prod(self.lhs) * math.prod(n)


def products(jaxpr: Any, times: int = 1) -> Iterator[tuple[Product, int]]:
  """The matrix products of a program, and how often each is done."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      lhs, rhs = (v.aval.shape for v in equation.invars)
      yield Product(lhs, rhs, equation.params['dimension_numbers']), times
      continue
    inner = times * equation.params.get('length', 1)
    for value in equation.params.values():
      for one in value if isinstance(value, tuple | list) else (value,):
        one = getattr(one, 'jaxpr', one)
        if hasattr(one, 'eqns'):
          yield from products(one, inner)


def program(model: Any, batch: int) -> tuple[Callable[[], Any], Any]:
  """Evaluation of one batch of windows, and its jaxpr."""
  import jax
  import numpy as np

  from mq_jax.evaluation import perplexity

  t = model.config.max_position_embeddings
  rng = np.random.default_rng(0)
  windows = rng.integers(0, model.config.vocab_size, (batch, t + 1), np.int32)
  counted = np.ones((batch, t), bool)
  f = functools.partial(perplexity.window_nll, model.apply)
  jaxpr = jax.make_jaxpr(f)(model.params, windows, counted)
  return lambda: f(model.params, windows, counted), jaxpr.jaxpr


def alone(product: Product) -> Callable[[], Any]:
  """A matrix product by itself."""
  import jax

  keys = jax.random.split(jax.random.key(0))
  lhs, rhs = (
    jax.random.normal(key, shape)
    for key, shape in zip(keys, (product.lhs, product.rhs))
  )
  dot = jax.jit(lambda a, b: jax.lax.dot_general(a, b, product.dimensions))
  return lambda: dot(lhs, rhs)


def least_seconds(
  runs: Sequence[Callable[[], Any]], rounds: int
) -> list[tuple[float, float]]:
  """Least seconds by the clock and of CPU of each, taken turn by turn."""
  import jax

  for run in runs:
    jax.block_until_ready(run())
  found = [(math.inf, math.inf)] * len(runs)
  for _ in range(rounds):
    for i, run in enumerate(runs):
      cpu, start = time.process_time(), time.perf_counter()
      jax.block_until_ready(run())
      taken = time.perf_counter() - start, time.process_time() - cpu
      found[i] = tuple(map(min, found[i], taken))
  return found


def measure(
  model: Any, batches: Sequence[int], rounds: int
) -> list[dict[str, Any]]:
  """One row a batch size."""
  t = model.config.max_position_embeddings
  programs = {batch: program(model, batch) for batch in batches}
  counts = {
    batch: collections.Counter(
      {p: n for p, n in summed(products(jaxpr)).items()}
    )
    for batch, (_, jaxpr) in programs.items()
  }
  single = [(batch, p) for batch in batches for p in counts[batch]]
  runs = [programs[batch][0] for batch in batches]
  runs += [alone(p) for _, p in single]
  taken = least_seconds(runs, rounds)
  # A product of a token's worth, at each batch size; they come in one order.
  floors = []
  for batch in batches:
    own = [
      (s[0] * counts[b][p] / (b * t), s[1] * counts[b][p] / (b * t))
      for (b, p), s in zip(single, taken[len(batches) :])
      if b == batch
    ]
    floors.append(own)
  best = [
    tuple(map(min, *each)) if len(each) > 1 else each[0]
    for each in zip(*floors)
  ]
  wall, cpu = (sum(x) for x in zip(*best))
  rows = []
  for batch, (seconds, cpu_seconds) in zip(batches, taken):
    operations = sum(p.operations * n for p, n in counts[batch].items())
    tokens = batch * t
    rows.append(
      {
        'batch': batch,
        'operations_per_token': operations / tokens,
        'microseconds_per_token': seconds / tokens * 1e6,
        'cpu_microseconds_per_token': cpu_seconds / tokens * 1e6,
        'floor_microseconds_per_token': wall * 1e6,
        'floor_cpu_microseconds_per_token': cpu * 1e6,
        'share_of_floor': wall / (seconds / tokens),
        'cpu_share_of_floor': cpu / (cpu_seconds / tokens),
      }
    )
  return rows


def summed(found: Iterator[tuple[Product, int]]) -> dict[Product, int]:
  total: dict[Product, int] = {}
  for product, times in found:
    total[product] = total.get(product, 0) + times
  return total


def report(options: argparse.Namespace) -> dict[str, Any]:
  import jax

  from mq_jax.models import bundled

  model = bundled.open_model(options.model)
  load = os.getloadavg()[0]
  rows = measure(model, options.batches, options.rounds)
  return {
    'model': model.name,
    'device': jax.devices()[0].device_kind,
    'cores': len(os.sched_getaffinity(0)),
    'load': [load, os.getloadavg()[0]],
    'rows': rows,
  }


def markdown(found: dict[str, Any]) -> str:
  """The report as a page."""
  before, after = found['load']
  lines = [
    f'{found["model"]}, windows of its context, on {found["device"]}, '
    f'{found["cores"]} cores, load {before:.1f} before and {after:.1f} after',
    '',
    '| windows at a time | Mflop a token | us a token | floor | share '
    '| CPU us a token | floor | share |',
    '| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |',
  ]
  for row in found['rows']:
    lines.append(
      f'| {row["batch"]} | {row["operations_per_token"] / 1e6:.2f} '
      f'| {row["microseconds_per_token"]:.0f} '
      f'| {row["floor_microseconds_per_token"]:.0f} '
      f'| {row["share_of_floor"]:.0%} '
      f'| {row["cpu_microseconds_per_token"]:.0f} '
      f'| {row["floor_cpu_microseconds_per_token"]:.0f} '
      f'| {row["cpu_share_of_floor"]:.0%} |'
    )
  best = max(row['share_of_floor'] for row in found['rows'])
  verdict = 'met' if best >= TARGET else 'missed'
  lines += ['', f'{TARGET:.0%} of the floor: {verdict}, {best:.0%} at best.']
  return '\n'.join(lines) + '\n'


def main(argv: list[str] | None = None) -> dict[str, Any]:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--model', default='reference')
  parser.add_argument('--batches', type=int, nargs='+', default=[1, 4, 8])
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--json', action='store_true')
  options = parser.parse_args(argv)
  found = report(options)
  print(json.dumps(found, indent=1) if options.json else markdown(found))
  return found


if __name__ == '__main__':
  main(sys.argv[1:])
