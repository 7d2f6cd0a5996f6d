"""What an allocation came to: records, files, and what the console shows.

plan.json    site -> recipe and its options, as `mq cost --plan` reads it
report.json  budgets asked and achieved, losses, the front, the setup
sites.csv    a row a site: bits, recipe, and what others would have done
pareto.png   test loss against the first budgeted quantity, every solver
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mq_jax.allocation import candidates as candidates_lib
from mq_jax.lab import config
from mq_jax.lab.allocating import budgets, checkpoints, costs, setup
from mq_jax.recipes import Recipe
from mq_jax.report import allocation as allocation_report
from mq_jax.report import style, tables

_PLAN, _SITES, _FIGURE = 'plan.json', 'sites.csv', 'pareto.png'


class Result(NamedTuple):
  """What was found; see `running`."""

  bench: setup.Bench
  made: candidates_lib.Made
  costs: Mapping[str, np.ndarray]  # f64[l, c] by quantity
  table: np.ndarray  # f64[l, c]
  asked: Sequence[Mapping[str, float]]
  choice: np.ndarray  # i64[l]
  achieved: Mapping[str, Any]
  choices: Mapping[str, Sequence[Sequence[int] | None]]
  uniform: Sequence[np.ndarray]
  searched: Any  # choices -> losses
  tested: Any  # choices -> loss and divergence on the test windows
  scores: Mapping[str, Any] | None
  seconds: Mapping[str, float]
  notes: Sequence[str]


def label(recipe: Recipe) -> str:
  """Short, as rows of a study are named: 'gptq w4 g64'."""
  return config.label_of(recipe.name, dict(recipe.options))


def _finite(value: float) -> float | None:
  return float(value) if np.isfinite(value) else None


def make_report(result: Result) -> dict[str, Any]:
  """Everything as plain data, from which all else is drawn."""
  bench, ask = result.bench, result.bench.ask
  recipes = [candidate.recipe for candidate in ask.candidates]
  total = result.achieved['total']
  limits = result.asked[0]
  own = np.full(len(result.choice), -1)
  return {
    'model': bench.model.name,
    'solver': ask.solvers[0],
    'seed': ask.seed,
    'steps': ask.steps,
    'budgets': [
      {
        'quantity': b.quantity,
        'unit': budgets.QUANTITIES[b.quantity].unit,
        'asked': b.asked,
        'limit': limits[b.quantity],
        'achieved': total[b.quantity],
        'room': 1 - total[b.quantity] / limits[b.quantity],
      }
      for b in ask.budgets
    ],
    'achieved': total,
    'loss': {
      'search': _finite(result.searched([result.choice])[0]),
      'test': _finite(result.tested([result.choice])[0, 0]),
      'unquantized_search': _finite(result.searched([own])[0]),
      'unquantized_test': _finite(result.tested([own])[0, 0]),
    },
    'scores': result.scores,
    'plan': candidates_lib.plan_of(
      result.made, recipes, result.choice
    ).to_json(),
    'choice': [int(c) for c in result.choice],
    'sites': _sites(result),
    'uniform': [
      {'candidate': label(recipes[c[0]])} | _point(result, c)
      for c in result.uniform
    ],
    'front': [
      {'solver': name, 'asked': i == 0, 'budget': dict(budget)}
      | _point(result, np.array(choice))
      for name, choices in result.choices.items()
      for i, (budget, choice) in enumerate(
        zip(result.asked, choices, strict=True)
      )
      if choice is not None
    ],
    'left_out': list(bench.left_out),
    'seconds': dict(result.seconds),
    'notes': [note for note in result.notes if note],
  }


def _point(result: Result, choice: np.ndarray) -> dict[str, Any]:
  """A choice as a point of the figure."""
  rows = np.arange(len(choice))
  test, divergence = result.tested([choice])[0]
  return {
    'costs': {
      name: float(table[rows, choice].sum())
      for name, table in result.costs.items()
    },
    'search': _finite(result.searched([choice])[0]),
    'test': _finite(test),
    'test_divergence': _finite(divergence),
  }


def _sites(result: Result) -> list[dict[str, Any]]:
  """A record a site: what it got, and what its neighbours would have done."""
  bench = result.bench
  recipes = [candidate.recipe for candidate in bench.ask.candidates]
  first = bench.ask.budgets[0].quantity
  cost = result.costs[first]
  allowed = bench.allowed
  ties = costs.ties(bench, result.made)
  tied = {name: group[0] for group in ties for name in group}
  records = []
  names = result.made.candidates.names
  for i, (site, c) in enumerate(zip(names, result.choice, strict=True)):
    own = np.flatnonzero(allowed[i])
    order = own[np.argsort(cost[i, own], kind='stable')]
    place = int(np.flatnonzero(order == c)[0])
    alone = float(result.table[i, c])
    record = {
      'site': site,
      'recipe': recipes[c].label,
      'label': label(recipes[c]),
      **{
        name: float(values[i])
        for name, values in result.achieved['rows'].items()
      },
      'alone': alone,
      'tied_to': tied.get(site, ''),
    }
    words = [f'{alone:+.4f} alone']
    for side, at, does in (
      ('cheaper', place - 1, 'saves'),
      ('dearer', place + 1, 'takes'),
    ):
      there = 0 <= at < len(order)
      other = order[at] if there else c
      change = float(result.table[i, other] - alone) if there else None
      price = float(abs(cost[i, other] - cost[i, c])) if there else None
      record |= {
        side: label(recipes[other]) if there else '',
        f'{side}_loss': change,
        f'{side}_{does}': price,
      }
      if there:
        words.append(
          f'{label(recipes[other])} {change:+.4f}, {does} {price:.3g} {first}'
        )
    records.append(record | {'why': '; '.join(words)})
  return records


def read(path: pathlib.Path) -> dict[str, Any] | None:
  """The report of a finished folder; None if it is not finished."""
  return checkpoints.Folder(path).read_json(checkpoints.REPORT)


def write(folder: checkpoints.Folder, report: Mapping[str, Any]) -> None:
  """Write all files; report.json is the last of them, it marks the end."""
  folder.write_json(_PLAN, report['plan'])
  records = report['sites']
  folder.write(_SITES, tables.csv_text(records, list(records[0])))
  style.save(allocation_report.pareto(report), folder.path / _FIGURE)
  folder.write_json(checkpoints.REPORT, dict(report))


def show(report: Mapping[str, Any], path: pathlib.Path | str) -> None:
  """Print budgets, losses, sites and notes."""
  from rich import console

  out = console.Console()
  say = lambda text: out.print(text, markup=False, highlight=False)
  out.print(allocation_report.sites_table(report))
  out.print(allocation_report.solvers_table(report))
  out.print(allocation_report.budgets_table(report))
  say(allocation_report.sentence(report))
  for note in report['notes']:
    say(f'- {note}')
  out.print(f'written to {path}', markup=False, highlight=False, soft_wrap=True)
