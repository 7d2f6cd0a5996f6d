"""How much a sweep over leaf numbers gains over separate runs.

    python -m experiments.benchmarks.sweep_rate [--size 256] [--json]
        [--separate 64]

64 settings of `microscopiq(bits=2)` (sigma x inlier_clip x damping, four each)
on a float32 weight [size, size] with its Hessian, all in one process:

* stacked: one program by `vmap`, its compilation included;
* separate: each setting by a program of its own, compiled anew, as a process
  without a compile cache pays it (without the start of the process);
* warm: each setting alone, by one program that all share, compiled once.

Codes of all three are compared.
"""

import argparse
import itertools
import json
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _pages
from experiments.benchmarks import quantize_rate
from mq_jax import quantize, recipes
from mq_jax.lab.sweeping import stacking

# What issue 5 asks for: separate runs over the sweep, compilation included.
AT_LEAST = 10.0

SIGMA = (2.0, 2.5, 3.0, 3.5)
CLIP = (0.7, 0.8, 0.9, 1.0)
DAMPING = (0.003, 0.01, 0.03, 0.1)


def settings() -> list[recipes.Recipe]:
  """The 64 recipes."""
  return [
    recipes.microscopiq(bits=2, sigma=s, inlier_clip=c, damping=d)
    for s, c, d in itertools.product(SIGMA, CLIP, DAMPING)
  ]


def _timed(run) -> tuple[Any, float]:
  start = time.perf_counter()
  found = jax.block_until_ready(run())
  return found, time.perf_counter() - start


def _fresh(weight, hessian, recipe):
  """One setting as a new process does it: nothing is compiled yet."""
  jax.clear_caches()
  return quantize.quantize_batch(weight, recipe, hessian)


def report(size: int, separate: int) -> dict[str, Any]:
  """All measurements.

  Args:
    size: Of the weight.
    separate: Settings that are really compiled one by one; where fewer than
      all, `separate_seconds` is their time scaled up.
  """
  weight, hessian = map(jnp.asarray, quantize_rate.problem(size, size))
  given = settings()
  load = os.getloadavg()[0]
  jax.clear_caches()
  before = stacking.programs()
  stacked = lambda: stacking.quantize_stacked(weight, given, hessian)
  (codes, record), first = _timed(stacked)
  programs = stacking.programs() - before
  _, again = _timed(stacked)

  alone = lambda r: quantize.quantize_batch(weight, r, hessian)
  jax.clear_caches()
  warm = [_timed(lambda r=r: alone(r)) for r in given]
  warm_seconds = sum(seconds for _, seconds in warm)

  # Spread over the settings, though each of them costs the same.
  chosen = given[:: max(1, len(given) // separate)][:separate]
  fresh = [_timed(lambda r=r: _fresh(weight, hessian, r))[1] for r in chosen]
  separate_seconds = sum(fresh) * len(given) / len(fresh)

  equal, errors = [], []
  for i, ((one_codes, one_record), _) in enumerate(warm):
    same = [np.mean(np.asarray(codes[n][i] == one_codes[n])) for n in codes]
    equal.append(float(min(same)))
    mine, other = record['output_error'][i], one_record['output_error']
    errors.append(abs(float(mine / other) - 1.0))
  return {
    'machine': _pages.machine(),
    'load': load,
    'size': size,
    'settings': len(given),
    'programs': programs,
    'stacked_seconds': first,
    'stacked_again_seconds': again,
    'separate_measured': len(fresh),
    'separate_seconds': separate_seconds,
    'warm_seconds': warm_seconds,
    'speedup': separate_seconds / first,
    'speedup_warm': warm_seconds / first,
    'least_equal_codes': min(equal),
    'largest_error_difference': max(errors),
    'missed': separate_seconds / first < AT_LEAST,
  }


def markdown(found: dict[str, Any]) -> str:
  """The report as a page."""
  n, measured = found['settings'], found['separate_measured']
  how = '' if measured == n else f' ({measured} measured, scaled up)'
  rows = [
    ('one stacked program, compilation included', found['stacked_seconds']),
    ('the same again, compiled', found['stacked_again_seconds']),
    (f'{n} separate runs, each compiled{how}', found['separate_seconds']),
    (f'{n} runs of one compiled program, one by one', found['warm_seconds']),
  ]
  lines = [
    '# A sweep against separate runs',
    '',
    f'`python -m experiments.benchmarks.sweep_rate`: {n} settings of '
    f'`microscopiq(bits=2)`, sigma x inlier_clip x damping, on a '
    f'{found["size"]} x {found["size"]} weight with its Hessian; '
    f'{found["machine"]}.',
    '',
    _pages.table(['what', 'seconds'], rows),
    f'- {found["programs"]} program served {n} settings: '
    f'{found["speedup"]:.1f} times faster than separate runs (at least '
    f'{AT_LEAST:g}{", MISSED" if found["missed"] else ""}), '
    f'{found["speedup_warm"]:.2f} times as fast as a program that all share.',
    f'- Codes equal to those of single runs: '
    f'{100 * found["least_equal_codes"]:.2f} % at least; output errors differ '
    f'by {found["largest_error_difference"]:.1e} at most, relative.',
  ]
  return '\n'.join(lines) + '\n'


def main(argv: list[str] | None = None) -> dict[str, Any]:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--size', type=int, default=256)
  parser.add_argument('--separate', type=int, default=64, metavar='N')
  parser.add_argument('--json', action='store_true')
  options = parser.parse_args(argv)
  if options.separate < 1:
    parser.error(f'--separate {options.separate}: needs at least 1')
  found = report(options.size, options.separate)
  print(json.dumps(found, indent=1) if options.json else markdown(found))
  return found


if __name__ == '__main__':
  main()
