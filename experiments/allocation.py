"""Solvers of bit allocation head to head, at equal budgets and time.

python -m experiments.allocation configs/allocation/claim.gin

Runs what `mq allocate` runs, for models and seeds; a run that is finished is
not done again.
"""

import pathlib
import time

import gin
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import figure as mpl
from matplotlib import ticker
from rich import console

from experiments import _pages
from mq_jax.lab import allocating, costing, progress
from mq_jax.report import allocation as report_lib

_SHOWN = 40.0  # per cent; what is worse is drawn at the edge


def one_run(folder, model, seed, budget, accelerator, ask) -> dict:
  """The report of one model and seed."""
  design, solvers = None, ask.pop('solvers')
  if accelerator is not None:
    (request,) = costing.requests(accelerator, None)
    design = costing.design(request.accelerator, {})
  texts = ask.pop('candidates')
  return allocating.run(
    allocating.Ask(
      model=model,
      budgets=allocating.parse([budget], design is not None),
      candidates=allocating.candidates(texts, design),
      solvers=tuple(solvers),
      design=design,
      accelerator=accelerator,
      seed=seed,
      **ask,
    ),
    folder,
    progress.Display(console.Console(stderr=True)),
  )


def records(report: dict, quantity: str) -> list[dict]:
  """Rise of the test loss in bits per byte, by solver and budget."""
  scores, base = report['scores'], report['loss']['unquantized_test']
  per_byte = scores['bits_per_byte'] / scores['nll']
  return [
    {
      'model': report['model'],
      'seed': report['seed'],
      'solver': point['solver'],
      'budget': point['budget'][quantity],
      'achieved': point['costs'][quantity],
      'rise': per_byte * (point['test'] - base),
      'search': point['search'],
      'test_divergence': point['test_divergence'],
      'seconds': report['seconds'].get(point['solver']),
    }
    for point in report['front']
  ]


def _by_seed(rows, field, **which) -> np.ndarray:
  chosen = [r for r in rows if all(r[k] == v for k, v in which.items())]
  return np.array([r[field] for r in sorted(chosen, key=lambda r: r['seed'])])


def unique(rows, name) -> list:
  return list(dict.fromkeys(r[name] for r in rows))


# Fields of a record, and what they are.
_FIELDS = {
  'rise': 'Rise of the test loss, thousandths of a bit per byte',
  'test_divergence': 'Divergence from the unquantized model on the test '
  'windows, thousandths of a nat per token: the same without the noise of the '
  'text',
}


def tables(rows, quantity) -> list[str]:
  """Two tables a model: means over seeds and half of their range."""
  pages = []
  for model in unique(rows, 'model'):
    own = [r for r in rows if r['model'] == model]
    seeds = sorted(unique(own, 'seed'))
    named = f'seed{"s" * (len(seeds) > 1)} {" and ".join(map(str, seeds))}'
    pages.append(f'## {model}, {named}\n')
    for field, title in _FIELDS.items():
      pages += [f'{title}:\n', _table(own, field, quantity)]
      pages.append(f'Gradient is ahead, by seed: {duels(own, field)}.\n')
  return pages


def _table(rows, field, quantity) -> str:
  solvers, body = unique(rows, 'solver'), []
  for budget in sorted(unique(rows, 'budget')):
    found = {
      s: 1e3 * _by_seed(rows, field, solver=s, budget=budget) for s in solvers
    }
    best = min(v.mean() for v in found.values() if len(v))
    cells = []
    for v in found.values():
      cell = f'{v.mean():.1f}' if len(v) else ''
      if len(v) > 1:
        cell += f' ± {np.ptp(v) / 2:.1f}'
      cells.append(f'**{cell}**' if len(v) and v.mean() == best else cell)
    body.append([f'{budget:.4g}', *cells])
  return _pages.table([quantity, *solvers], body)


def duels(rows, field) -> str:
  """How often gradient search is ahead of each solver, over all budgets."""
  words = []
  for other in unique(rows, 'solver'):
    if other == 'gradient':
      continue
    better = total = 0
    shares = []
    for budget in unique(rows, 'budget'):
      a = _by_seed(rows, field, solver='gradient', budget=budget)
      b = _by_seed(rows, field, solver=other, budget=budget)
      if len(a) == len(b):
        better, total = better + int((a < b).sum()), total + len(a)
        shares.append(1 - a.mean() / b.mean())
    if total:
      words.append(
        f'{better} of {total} against {other} '
        f'({100 * np.mean(shares):+.0f} % less)'
      )
  return '; '.join(words)


def draw(rows, quantity, unit, footnote) -> mpl.Figure:
  """Divergence over that of gradient search; bars are seeds' ranges."""
  models = unique(rows, 'model')
  fig, panels = plt.subplots(
    1, len(models), figsize=(2.4 + 3.6 * len(models), 3.6), squeeze=False,
    sharey=True, layout='constrained',
  )  # fmt: skip
  solvers = [s for s in unique(rows, 'solver') if s != 'gradient']
  for axes, model in zip(panels[0], models, strict=True):
    own = [r for r in rows if r['model'] == model]
    for solver in solvers:
      marker, line, color = report_lib.LOOKS[solver]
      x, y, low, high = [], [], [], []
      for budget in sorted(unique(own, 'budget')):
        a = _by_seed(own, 'test_divergence', solver='gradient', budget=budget)
        b = _by_seed(own, 'test_divergence', solver=solver, budget=budget)
        if not len(b) or len(a) != len(b):
          continue
        share = 100 * (b / a - 1)
        mean = float(np.clip(share.mean(), -_SHOWN, _SHOWN))
        x.append(budget)
        y.append(mean)
        low.append(max(0.0, mean - max(share.min(), -_SHOWN)))
        high.append(max(0.0, min(share.max(), _SHOWN) - mean))
      axes.errorbar(
        x, y, (low, high), marker=marker, ls=line, color=color, label=solver,
        lw=1, capsize=2, markersize=4,
      )  # fmt: skip
    axes.axhline(0, color='black', lw=2)
    count = len(unique(own, 'seed'))
    axes.set(
      title=f'{model} ({count} seed{"s" * (count > 1)})',
      xlabel=f'budget, {quantity} [{unit}]',
    )
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=''))
    axes.grid(True, color='0.9')
  panels[0][0].set(
    ylabel='divergence on test windows over\nthat of gradient search [%]',
    ylim=(-_SHOWN / 2, _SHOWN * 1.03),
  )
  fig.legend(
    *panels[0][0].get_legend_handles_labels(), fontsize=8, frameon=False,
    loc='outside right upper',
  )  # fmt: skip
  fig.supxlabel(footnote, fontsize=7, color='0.3', x=0.01, ha='left')
  return fig


@gin.configurable
def allocation(
  config=gin.REQUIRED,
  out=gin.REQUIRED,
  runs='runs/allocation',
  models=gin.REQUIRED,
  texts=(),
  seeds=(0,),
  budget=gin.REQUIRED,
  accelerator=None,
  front=8,
  candidates=(),
  solvers=(
    'gradient', 'integer_program', 'hawq_v2', 'greedy', 'evolution', 'random',
    'uniform',
  ),
  calibration_windows=64,
  search_windows=8,
  test_windows=48,
  steps=16,
):  # fmt: skip
  """Run all models and seeds; write the page, its figure and results.json.

  Args:
    config: The file that says all this, for the page.
    out: Folder of the page.
    runs: Folder of the runs.
    models: As `mq allocate --model` takes them.
    texts: By model, (test text, calibration text); the docs corpus without.
    seeds: Of windows and solvers, for all models or by model.
    budget: As `mq allocate --budget` takes it.
    accelerator: For budgets of hardware.
    front: Budgets, or how many of them.
    candidates: As `mq allocate --candidate` takes them.
    solvers: Those that are compared, the first of them gradient.
    calibration_windows: Of the model's context.
    search_windows: Likewise.
    test_windows: Likewise.
    steps: Of the relaxation.
  """
  quantity = budget.split('=')[0]
  start = time.perf_counter()
  rows, seconds = [], {}
  for model in models:
    text, calibration = dict(texts).get(model, (None, None))
    for seed in seeds[model] if isinstance(seeds, dict) else seeds:
      name = f'{pathlib.Path(model).name}-{quantity}-{seed}'
      report = one_run(
        pathlib.Path(runs) / name,
        model,
        seed,
        budget,
        accelerator,
        {
          'solvers': solvers,
          'candidates': candidates,
          'front': front if isinstance(front, int) else tuple(front),
          'text': text,
          'calibration_text': calibration,
          'calibration_windows': calibration_windows,
          'search_windows': search_windows,
          'test_windows': test_windows,
          'steps': steps,
        },
      )
      rows += records(report, quantity)
      seconds.setdefault(report['model'], report['seconds'])
  spent = '; '.join(
    f'{model}: ' + ', '.join(f'{k} {v:.0f}' for k, v in found.items())
    for model, found in seconds.items()
  )
  unit = allocating.QUANTITIES[quantity].unit
  drawn = sorted(unique(rows, 'seed'))
  return _pages.write(
    out,
    title=f'Bit allocation under {quantity} budgets',
    command=f'python -m experiments.allocation configs/allocation/{config}',
    lines=[
      'Means over seeds and half of their range; the least is bold. Every '
      'choice keeps its budget by packed bytes and the exact hardware model. '
      'Calibration, search and test windows are disjoint. All solvers that '
      'look at losses look at the same: the divergence from the unquantized '
      'model on the search windows.\n',
      *tables(rows, quantity),
      f'Seconds of the first seed, for all budgets together: {spent}.',
    ],
    records=rows,
    config=gin.operative_config_str(),
    figure=draw(rows, quantity, unit, f'{config}, seeds {drawn}'),
    seed=drawn[0],
    seconds=time.perf_counter() - start,
  )


def main(argv: list[str] | None = None) -> None:
  print(f'written to {_pages.main(__doc__, allocation, argv)}')


if __name__ == '__main__':
  main()
