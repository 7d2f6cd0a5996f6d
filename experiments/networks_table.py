"""Recipes on an image classifier and a diffusion transformer, at true bits.

python -m experiments.networks_table configs/networks/table.gin

ResNet20 (CIFAR-10) and a DiT (MNIST), as they were trained and with outlier
channels planted, by every recipe. Rows are kept as they are done in the folder
`runs`; the same command goes on with what is missing.
"""

import dataclasses
import functools
import json
import pathlib
import time
from typing import Any

import gin
import numpy as np
from matplotlib import figure as mpl

import mq_jax as mq
from experiments import _pages
from mq_jax import calibration, recipes, sites
from mq_jax.lab import config as lab_config
from mq_jax.lab import networks as lab
from mq_jax.models import networks
from mq_jax.report import style

# The quantity drawn, and what it is called, by task.
DRAWN = {
  'classes': ('nll', 'NLL of the label, nats'),
  'noise': ('mse', 'MSE of predicted noise'),
}
UNQUANTIZED = 'unquantized'


class Bench:
  """One network, its data, and what is calibrated when a row needs it."""

  def __init__(
    self,
    net: networks.Network,
    test: lab.Data,
    calibration_data: lab.Data,
    pattern: str,
    images: int,
    seed: int,
  ):
    self.net, self.test, self.pattern = net, test, pattern
    self._calibration = calibration_data, images, 64, seed

  @functools.cached_property
  def batches(self) -> list[tuple[np.ndarray, ...]]:
    """Inputs to calibrate, and to learn, on."""
    return lab.calibration_batches(self.net, *self._calibration)

  @functools.cached_property
  def sites(self) -> tuple[sites.Site, ...]:
    return sites.find(self.net.apply, self.net.params, *self.batches[0])

  @functools.cached_property
  def statistics(self) -> dict:
    return calibration.calibrate(
      self.net.apply, self.net.params, self.batches, sites=self.sites
    )

  def packed(self, recipe: mq.Recipe) -> Any:
    net = self.net
    plan = mq.plans.plan(self.sites, [(self.pattern, recipe)])
    if recipe.learning is None:
      return mq.compress(net.params, plan, statistics=self.statistics)
    options = recipe.learning
    if net.task == 'noise' and options.loss is None:
      # Its outputs are no logits.
      options = dataclasses.replace(options, loss='mse')
    examples = tuple(map(np.concatenate, zip(*self.batches)))
    found = mq.learn.reconstruct(
      net.apply, net.params, plan, examples, options=options
    )
    return found.params

  def scores(self, packed: Any) -> dict[str, Any]:
    return lab.scores(
      self.net, packed, self.test, batch=125, reference=self.net.params
    )


def row(bench: Bench, name: str | None, options: dict) -> dict[str, Any]:
  """The record of one recipe on one network; None is the network as it is."""
  start = time.perf_counter()
  found = {'model': bench.net.name, 'task': bench.net.task}
  if name is None:
    scores = bench.scores(bench.net.params)
    return {**found, 'recipe': UNQUANTIZED, 'family': UNQUANTIZED, **scores}
  packed = bench.packed(recipes.make(name, **options))
  size = mq.plans.size(packed)
  records = mq.plans.records(packed)
  return {
    **found,
    'recipe': label_of((name, options)),
    'family': f'{name} learned' if 'learning' in options else name,
    'bits': options.get('bits'),
    'ebw': float(size.ebw),
    'ebw_paper': float(size.ebw_paper),
    'weight_error': float(np.mean([r['weight_mse'] for r in records])),
    'not_ok': sum(r['status'] != 'ok' for r in records),
    **bench.scores(packed),
    'seconds': round(time.perf_counter() - start, 1),
  }


def label_of(asked: tuple[str | None, dict]) -> str:
  """What a row is called."""
  name, options = asked
  return UNQUANTIZED if name is None else lab_config.label_of(name, options)


def rows_of(
  benches: list[Bench],
  asked: list[tuple[str | None, dict]],
  folder: pathlib.Path,
  run: bool = True,
) -> list[dict]:
  """Records of all rows; those that the folder holds are not made again.

  One recipe on all networks before the next, while its programs are at hand.

  Args:
    benches: The networks.
    asked: Recipes, by name, with options; None for the network as it is.
    folder: Holds a file of rows for each network.
    run: Whether to make what is missing; otherwise it is left out, on all
      networks.
  """
  folder.mkdir(parents=True, exist_ok=True)
  found: dict[str, dict[str, dict]] = {}
  for bench in benches:
    kept = folder / f'{bench.net.name}.jsonl'
    known = kept.read_text().splitlines() if kept.exists() else []
    found[bench.net.name] = {r['recipe']: r for r in map(json.loads, known)}
  labels = []
  for name, options in asked:
    label = label_of((name, options))
    if not run and any(label not in found[b.net.name] for b in benches):
      continue
    labels.append(label)
    for bench in benches:
      done = found[bench.net.name]
      if label in done:
        continue
      done[label] = row(bench, name, options)
      with (folder / f'{bench.net.name}.jsonl').open('a') as file:
        file.write(json.dumps(done[label]) + '\n')
      what, _ = DRAWN[bench.net.task]
      print(
        f'{bench.net.name}  {label}: ebw {done[label].get("ebw", 32):.3f}, '
        f'{what} {done[label][what]:.4f}',
        flush=True,
      )
  return [found[bench.net.name][label] for bench in benches for label in labels]


def table(records: list[dict]) -> str:
  """Plain and planted side by side, one line a recipe."""
  task = records[0]['task']
  columns = {
    'classes': (('top1', '{:.1%}'), ('nll', '{:.3f}'), ('sqnr_db', '{:.1f}')),
    'noise': (('mse', '{:.4f}'), ('against', '{:.4f}')),
  }[task]
  by_recipe: dict[str, list[dict]] = {}
  for record in records:
    by_recipe.setdefault(record['recipe'], []).append(record)
  titles = {'top1': 'top-1', 'sqnr_db': 'SQNR, dB', 'against': 'MSE to fp32'}
  head = ['recipe']
  for kind in ('plain', 'planted'):
    head += [f'ebw {kind}', *(f'{titles.get(c, c)} {kind}' for c, _ in columns)]
  lines = []
  for name, found in by_recipe.items():
    cells = [name]
    for record in found:
      ebw = record.get('ebw')
      cells.append('32' if ebw is None else f'{ebw:.3f}')
      cells += [
        '' if record[c] is None else form.format(record[c])
        for c, form in columns
      ]
    lines.append(cells)
  return _pages.table(head, lines)


def draw(records: list[dict], footnote: str) -> mpl.Figure:
  """Quality over stored bits: a panel for each network, log scale."""
  models = list(dict.fromkeys(r['model'] for r in records))
  looks = style.looks([r['family'] for r in records if 'ebw' in r])
  fig = style.new(9.6, 7.2)
  axes = fig.subplots(2, 2, sharey='row', squeeze=False)
  for axis, model in zip(axes.flat, models):
    found = [r for r in records if r['model'] == model]
    what, label = DRAWN[found[0]['task']]
    for family, (marker, color) in looks.items():
      own = sorted(
        (r['ebw'], r[what])
        for r in found
        if r['family'] == family and r['ebw'] < 8
      )
      if own:
        axis.plot(
          *zip(*own),
          marker=marker,
          color=color,
          mfc='white',
          lw=1,
          label=family,
        )
    base = next(r[what] for r in found if r['recipe'] == UNQUANTIZED)
    axis.axhline(
      base, color=style.LINE, ls=style.DASHES, lw=1, label=UNQUANTIZED
    )
    axis.set_yscale('log')
    axis.set_xlabel('stored bits a weight')
    if not model.endswith('-planted'):  # these share the axis beside them
      axis.set_ylabel(label)
    style.title(axis, model)
    style.grid(axis)
  known: dict[str, Any] = {}
  for axis in axes.flat:  # not every network has every recipe
    handles, names = axis.get_legend_handles_labels()
    known |= dict(zip(names, handles))
  fig.legend(
    known.values(), known.keys(), loc='outside right upper', frameon=False
  )
  style.footnote(fig, footnote)
  return fig


@gin.configurable
def networks_table(
  config=gin.REQUIRED,
  out=gin.REQUIRED,
  data='../shared/data',
  runs='runs/networks',
  options=gin.REQUIRED,
  groups=gin.REQUIRED,
  calibration_images=512,
  test_images=500,
  seed=0,
  run=True,
) -> pathlib.Path:
  """Run what is missing and write the page; returns its folder.

  Args:
    config: The file that says all this, for the page.
    out: Folder of the page.
    data: Folder with the trained networks and their images.
    runs: Where rows are kept.
    options: Rows: a recipe's name, or (name, options).
    groups: Group of integer recipes by network, as its widths want it.
    calibration_images: To calibrate on.
    test_images: To evaluate on, at most.
    seed: Of planting, calibration, steps and noise.
    run: Whether to make missing rows; otherwise the page has those that are
      kept, and says which it lacks.
  """
  start = time.perf_counter()
  data = pathlib.Path(data)
  cifar, mnist = data / 'cifar10-subset', data / 'mnist-t10k'
  digits = lab.read_data(mnist / 't10k-images-idx3-ubyte.gz')
  # MNIST's test set is all there is: tested on the first images, calibrated
  # on the second half.
  setup = {
    'resnet20-cifar10': (
      lab.first(lab.read_data(cifar / 'test500.npz'), test_images),
      lab.read_data(cifar / 'train1000.npz'),
      '*',
    ),
    'dit-mnist': (
      lab.first(digits, test_images),
      lab.last(digits, len(digits.images.pixels) // 2),
      'dits/*',
    ),
  }
  records: list[dict] = []
  tables = []
  for name, (test, calibration_data, pattern) in setup.items():
    net = networks.load(data / name)
    asked = [(None, {})]
    for entry in options:
      recipe, more = (entry, {}) if isinstance(entry, str) else entry
      if recipe in ('rtn', 'gptq', 'awq'):
        more = {**more, 'group': groups[name]}
      asked.append((recipe, more))
    benches = [
      Bench(one, test, calibration_data, pattern, calibration_images, seed)
      for one in (net, networks.plant(net, seed))
    ]
    found = rows_of(benches, asked, pathlib.Path(runs), run)
    there = {r['recipe'] for r in found}
    missing = [x for x in map(label_of, asked) if x not in there]
    said = f'\nNot run yet: {", ".join(missing)}.\n' if missing else ''
    tables.append(f'{net.name}:\n\n{table(found)}{said}')
    records += found
  return _pages.write(
    out,
    title='Recipes on ResNet20 and a DiT',
    command=f'python -m experiments.networks_table configs/networks/{config}',
    lines=[_about(records), *tables],
    records=records,
    config=gin.operative_config_str(),
    figure=draw(records, f'{config}, seed {seed}'),
    seed=seed,
    seconds=time.perf_counter() - start,
  )


def _about(records: list[dict]) -> str:
  count = {r['task']: r['images'] for r in records}
  error = {
    r['task']: r
    for r in records
    if r['recipe'] == UNQUANTIZED and not r['model'].endswith('planted')
  }
  top1, mse = error['classes']['top1_error'], error['noise']['mse_error']
  made = sum(r.get('seconds', 0) for r in records)
  return (
    'Weights only. ResNet20: all convolutions and the last layer, batch norm '
    f'kept apart in float32; {count["classes"]} images of the test set (a '
    f'standard error of top-1 is {top1:.1%} without quantization), calibrated '
    'on training images. DiT: the linear weights of its blocks; '
    f'{count["noise"]} images of the test set, each at one random step '
    f'(standard error {mse:.4f} without quantization; differences between rows '
    'are known better, since all are asked the same), calibrated on other '
    'images of that set. `ebw` counts all stored bits; narrow layers pay for '
    'what is stored by row or padded. In the planted networks channels are '
    'scaled in one weight and back in the next, by powers of two: the same '
    f'function bit for bit. All rows together took {made:.0f} s of a busy '
    'machine.\n'
  )


def main(argv: list[str] | None = None) -> None:
  print(f'written to {_pages.main(__doc__, networks_table, argv)}')


if __name__ == '__main__':
  main()
