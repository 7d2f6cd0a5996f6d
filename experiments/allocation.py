"""Solvers of bit allocation head to head, at equal stored bits and time.

python -m experiments.allocation configs/allocation/claim.gin
"""

import dataclasses
import functools
import json
import pathlib
import time

import gin
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import mq_jax as mq
from experiments import _pages
from mq_jax import allocation as al
from mq_jax import plans
from mq_jax.allocation import candidates as candidates_lib
from mq_jax.allocation import hessians, measured, search, sensitivities
from mq_jax.evaluation import perplexity
from mq_jax.lab import measure, opening


def language_loss(apply):
  """Mean nats a token of `(params, windows i32[b, t + 1])`."""

  def loss(params, windows):
    logits = apply(params, windows[:, :-1])
    return perplexity.nll_per_token(logits, windows[:, 1:]).mean()

  return loss


def candidates(group: int):
  r = mq.recipes
  return [
    r.gptq(bits=2, group=group),
    r.fineq(compensate=True),
    r.gptq(bits=3, group=group),
    r.gptq(bits=4, group=group),
    r.gptq(bits=6, group=group),
  ]


def _batches(windows: np.ndarray, each: int) -> np.ndarray:
  whole = len(windows) - len(windows) % each
  return windows[:whole].reshape(-1, each, windows.shape[1]).astype(np.int32)


def one_seed(
  model,
  text,
  calibration_text,
  group,
  budgets,
  calibration,
  windows,
  tested,
  steps,
  seed,
):
  """Records of every method at every budget."""
  rng = np.random.default_rng(seed)
  found = measure.windows(model, calibration_text).tokens
  order = rng.permutation(len(found))
  if len(found) < windows + calibration:
    raise ValueError(
      f'{calibration_text.source}: {len(found)} windows; '
      f'{windows + calibration} needed'
    )
  searched = _batches(found[order[:windows]], 2)
  calibrated = _batches(found[order[windows : windows + calibration]], 8)[
    :, :, :-1
  ]
  test = _batches(measure.windows(model, text, tested).tokens, 8)
  loss = language_loss(model.apply)
  sites = mq.sites.find(model.apply, model.params, calibrated[0])
  statistics = mq.calibrate(
    model.apply, model.params, list(calibrated), sites=sites
  )
  recipes = candidates(group)
  made = candidates_lib.make(
    model.params, sites, recipes, statistics=statistics
  )
  weights = sum(int(np.prod(s.matrix_shape)) for s in made.candidates.sites)
  count = len(recipes)
  losses = lambda choices, data: np.asarray(
    measured.choice_losses(
      loss,
      model.params,
      made.candidates,
      measured.one_hot(np.asarray(choices), count),
      data,
    ),
    np.float64,
  )

  clock = {}

  def timed(name, work):
    start = time.perf_counter()
    value = work()
    clock[name] = time.perf_counter() - start
    return value

  table = timed(
    'table',
    lambda: measured.one_site_table(
      loss, model.params, made.candidates, searched
    ),
  )
  problem = al.make_problem(
    table,
    {'ebw': made.bits / weights},
    {},
    sites=[s.name for s in made.candidates.sites],
    candidates=made.candidates.labels,
  )
  under = [problem.with_budget(ebw=b) for b in budgets]
  choices = {}
  uniform = made.bits.sum(0) / weights
  order = losses(
    np.repeat(np.arange(count)[:, None], len(problem.sites), 1), searched
  )
  choices['uniform'] = [
    np.full(
      len(problem.sites),
      min((c for c in range(count) if uniform[c] <= b), key=order.__getitem__),
    )
    if min(uniform) <= b
    else None
    for b in budgets
  ]

  def hawq():
    mean = lambda params, data: jnp.mean(
      jax.lax.map(lambda b: loss(params, b), data)
    )
    traces = hessians.hutchinson_trace(
      mean,
      model.params,
      jnp.asarray(searched[:2]),
      made.candidates.sites,
      key=jax.random.key(seed),
      draws=32,
    )
    omega = sensitivities.trace_table(
      model.params, made.candidates.sites, made.candidates.values, traces
    )
    sizes = np.array([np.prod(s.matrix_shape) for s in made.candidates.sites])
    importance = np.asarray(traces.mean) / sizes
    return [
      al.monotone_pareto(
        dataclasses.replace(p, sensitivity=np.asarray(omega, np.float64)),
        importance,
      )
      for p in under
    ]

  choices['HAWQ-V2'] = timed('HAWQ-V2', hawq)
  choices['integer program'] = timed(
    'integer program', lambda: [al.integer_program(p) for p in under]
  )
  choices['greedy'] = timed('greedy', lambda: [al.greedy(p) for p in under])
  result = timed(
    'gradient',
    lambda: search.front(
      loss,
      model.params,
      made.candidates,
      problem,
      [{'ebw': b} for b in budgets],
      searched,
      steps=steps,
      key=jax.random.key(seed),
    ),
  )
  choices['gradient'] = list(result.choices)

  # Evolution gets the seconds of the search, in losses on the same batches.
  many = 8
  warm = np.repeat(choices['gradient'][:1], many, 0)
  losses(warm, searched)
  start = time.perf_counter()
  losses(warm, searched)
  seconds = (time.perf_counter() - start) / many
  allowed = clock['gradient'] / len(budgets) / seconds
  generations = max(1, int(allowed) // many - 1)
  fitness = lambda x: losses(np.resize(x, (many, x.shape[1])), searched)[
    : len(x)
  ]
  choices['evolution'] = timed(
    'evolution',
    lambda: [
      al.evolve(
        p,
        fitness,
        seed=seed,
        population=many,
        generations=generations,
        batch=many,
      )
      for p in under
    ],
  )
  random = [al.random_choices(p, 8, seed=seed) for p in under]

  records = []

  def record(method, budget, choice, value):
    packed = candidates_lib.assemble(made, model.params, choice)
    records.append(
      {
        'method': method,
        'budget': budget,
        'ebw': plans.size(packed).ebw,
        'nll': float(value),
        'seed': seed,
        'seconds': clock.get(method),
        'choice': [int(c) for c in choice],
      }
    )

  for method, chosen in choices.items():
    known = [(b, c) for b, c in zip(budgets, chosen) if c is not None]
    values = losses(np.stack([c for _, c in known]), test)
    for (budget, choice), value in zip(known, values, strict=True):
      record(method, budget, choice, value)
  for budget, chosen in zip(budgets, random, strict=True):
    record('random', budget, chosen[0], losses(chosen, test).mean())
  return records, clock


def draw(records, budgets, footnote):
  """Loss above the integer program's, by budget; bars are seeds' ranges."""
  fig, axes = plt.subplots(figsize=(7.2, 4.2), layout='constrained')
  methods = list(dict.fromkeys(r['method'] for r in records))
  shades = plt.get_cmap('viridis')(np.linspace(0, 0.85, len(methods)))
  base = _means(records, 'integer program')
  for method, marker, color in zip(methods, 'osD^v*P', shades, strict=False):
    values = _means(records, method)
    x = [b for b in budgets if b in values]
    y = [values[b].mean() - base[b].mean() for b in x]
    low = [values[b].mean() - values[b].min() for b in x]
    high = [values[b].max() - values[b].mean() for b in x]
    axes.errorbar(
      x, y, (low, high), marker=marker, color=color, label=method, capsize=3,
      lw=2.5 if method == 'gradient' else 1,
    )  # fmt: skip
  axes.set(
    xlabel='budget, effective bit width [bit/weight]',
    ylabel='test loss above the integer program [nat/token]',
  )
  axes.set_yscale('symlog', linthresh=0.05)
  axes.grid(True, color='0.9')
  axes.legend(fontsize=8)
  fig.supxlabel(footnote, fontsize=7, color='0.3', x=0.01, ha='left')
  return fig


def _means(records, method):
  found = {}
  for r in records:
    if r['method'] == method:
      found.setdefault(r['budget'], []).append(r['nll'])
  return {b: np.array(v) for b, v in found.items()}


@gin.configurable
def allocation(
  out=gin.REQUIRED,
  model=gin.REQUIRED,
  text=None,
  calibration_text=None,
  group=64,
  budgets=gin.REQUIRED,
  seeds=(0,),
  calibration_windows=64,
  search_windows=32,
  test_windows=48,
  steps=32,
):
  """Run all seeds; write records, table and figure."""
  path = pathlib.Path(out)
  path.mkdir(parents=True, exist_ok=True)
  opened = opening.open_any(model)
  run = functools.partial(
    one_seed,
    opened,
    measure.evaluation_text(text),
    measure.calibration_text(calibration_text),
    group,
    list(budgets),
    calibration_windows,
    search_windows,
    test_windows,
    steps,
  )
  records, clocks = [], []
  for seed in seeds:
    found, clock = run(seed)
    records += found
    clocks.append(clock)
    (path / 'results.json').write_text(json.dumps(records, indent=1))
    print(f'seed {seed}: { ({k: round(v, 1) for k, v in clock.items()}) }')
  methods = list(dict.fromkeys(r['method'] for r in records))
  rows = []
  for budget in budgets:
    row = [budget]
    for method in methods:
      values = _means(records, method).get(budget)
      row.append('' if values is None else f'{values.mean():.4f}')
    rows.append(row)
  name = pathlib.Path(model).name
  listed = ', '.join(f'{s} {clocks[0][s]:.0f} s' for s in clocks[0])
  page = (
    f'# Bit allocation on {name}\n\n'
    '    python -m experiments.allocation configs/allocation/claim.gin\n\n'
    f'Test loss in nats a token, means over seeds {list(seeds)}; every choice '
    'keeps the budget by packed bytes. Seconds of the first seed, for all '
    f'budgets together: {listed}. {_pages.machine()}; jax {jax.__version__}.'
    '\n\n' + _pages.table(['budget', *methods], rows) + '\n'
    f'![test loss above the integer program](figure.png)\n\n{_pages.MEANING}'
  )
  before = path / 'README.md'
  text = before.read_text() if before.exists() else ''
  # What was written there by hand is to be read again, not lost.
  before.write_text(page + (text.split(_pages.MEANING, 1) + ['\n'])[1])
  fig = draw(records, list(budgets), f'claim.gin, {name}, seeds {list(seeds)}')
  fig.savefig(path / 'figure.png', dpi=120)
  plt.close(fig)
  return records


def main(argv: list[str] | None = None) -> None:
  _pages.main(__doc__, allocation, argv)


if __name__ == '__main__':
  main()
