"""Bit widths and accelerator by gradient, against a grid of accelerators.

python -m experiments.codesign configs/allocation/codesign.gin

For each pair of budgets (area, cycles) the best plan on the best accelerator:
by a grid, each accelerator of which gets its best plan (or a bound that
proves it no better); by `codesign.search`; and by random accelerators, as
many as the search has evaluated.
"""

import time
from typing import Any, NamedTuple

import gin
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import figure as mpl

import mq_jax as mq
from experiments import _pages
from mq_jax import allocation, hardware, sites
from mq_jax.allocation import candidates as candidates_lib
from mq_jax.allocation import codesign as codesign_lib
from mq_jax.allocation import sensitivities
from mq_jax.lab import measure, opening
from mq_jax.quantize import quantize_matrix


class Sites(NamedTuple):
  """What is to be run: names, loss, sizes and candidates of sites.

  Attributes:
    sensitivity: f64[l, c].
    work: [l].
    candidates: [l, c].
  """

  sensitivity: np.ndarray
  work: hardware.Workload
  candidates: hardware.Precision


def recipes(options):
  """MicroScopiQ of these (bits, sigma): more outliers, less error."""
  make = mq.recipes.microscopiq
  return [make(bits=b, sigma=s, compensate=False) for b, s in options]


def drawn(model, batch, options, freedoms, spread, size, seed) -> Sites:
  """Sizes of a published model, an openly synthetic loss.

  Weights of each kind of site are drawn from Student's t, quantized by every
  candidate, and measured: stored bits, outlier blocks, relative error. The
  loss is that error times a weight of each site, log-normal.

  Args:
    model: One of `hardware.shapes.MODELS`.
    batch: Sequences in decode.
    options: (bits, sigma) of the candidates.
    freedoms: Of Student's t, by kind of site: less have more outliers.
    spread: Of the logarithms of the sites' weights.
    size: Rows and columns of the drawn matrices.
    seed: Of everything drawn.
  """
  work = hardware.workload.model(model, 'decode', batch=batch, each_layer=True)
  kinds = [name.rsplit('/', 1)[-1] for name in work.names]
  rng = np.random.default_rng(seed)
  unknown = [kind for kind in kinds if kind not in freedoms]
  if unknown:
    raise ValueError(f'codesign: no degrees of freedom of {unknown[0]!r}')
  errors, precisions = {}, {}
  for freedom in sorted(set(freedoms.values())):
    matrix = rng.standard_t(freedom, (size, size))
    weight = jnp.asarray(matrix, jnp.float32)
    made = [quantize_matrix(weight, recipe) for recipe in recipes(options)]
    lost = [jnp.sum((m.dequantize() - weight) ** 2) for m in made]
    errors[freedom] = np.array(lost) / float(jnp.sum(weight**2))
    precisions[freedom] = hardware.stack([hardware.of_matrix(m) for m in made])
  own = [freedoms[kind] for kind in kinds]
  weight = rng.lognormal(0.0, spread, len(kinds))
  table = weight[:, None] * np.stack([errors[freedom] for freedom in own])
  return Sites(table, work, hardware.stack([precisions[x] for x in own]))


def measured(model, batch, options, windows) -> Sites:
  """A model's own sites: relative output errors, precisions of its codes."""
  opened = opening.open_any(model)
  text = measure.calibration_text(None)
  tokens = measure.windows(opened, text, windows).tokens[:, :-1]
  found = mq.sites.find(opened.apply, opened.params, tokens)
  statistics = mq.calibrate(opened.apply, opened.params, [tokens], sites=found)
  made = candidates_lib.make(opened.params, found, recipes(options))
  chosen = made.candidates.sites
  table = sensitivities.output_sqnr_table(
    opened.params, chosen, made.candidates.values, statistics
  )
  precisions = [
    hardware.stack(
      [hardware.of_matrix(sites.get(packed, site)) for packed in made.packed]
    )
    for site in chosen
  ]
  work = hardware.workload.from_sites(chosen, 'decode', batch=batch)
  return Sites(np.asarray(table), work, hardware.stack(precisions))


def _designs(numbers, at) -> dict[str, np.ndarray]:
  return {name: x[at] for name, x in numbers.items()}


def random_losses(task, grid, priced, counts, seeds) -> list[dict[str, Any]]:
  """The best plans on random accelerators within the area."""
  inside = np.flatnonzero(priced.area_um2 <= task.area)
  found = []
  for seed in seeds:
    order = np.random.default_rng(seed).permutation(inside)
    for count in counts:
      some = order[:count]
      best = codesign_lib.best(
        task, _designs(grid, some),
        priced=codesign_lib.Tables(priced.cost[:, some], priced.area_um2[some]),
      )  # fmt: skip
      loss = best.loss if best.choice is not None else None
      found.append({'seed': seed, 'evaluations': len(some), 'loss': loss})
  return found


def compare(name, data, space, levels, seeds, counts, options) -> list[dict]:
  """Records of each level: grid, searches, random accelerators."""
  make = lambda area, cycles: codesign_lib.make_task(
    space, data.sensitivity, data.work, data.candidates,
    {'area_um2': 1e6 * area, 'cycles': 1e6 * cycles},
  )  # fmt: skip
  begun = time.perf_counter()
  grid = space.grid()
  priced = codesign_lib.tables(make(*levels[0]), grid)
  pricing = time.perf_counter() - begun
  records = []
  for area, cycles in levels:
    task = make(area, cycles)
    begun = time.perf_counter()
    best = codesign_lib.best(task, grid, priced=priced)
    record = {
      'workload': name, 'area_mm2': area, 'mcycles': cycles,
      'pricing_seconds': pricing, 'searches': [],
      'grid': _record(best, time.perf_counter() - begun, data),
    }  # fmt: skip
    for seed in seeds:
      begun = time.perf_counter()
      try:
        found = codesign_lib.search(task, key=jax.random.key(seed), **options)
      except allocation.InfeasibleError as error:
        record['searches'].append({'seed': seed, 'error': str(error)})
        continue
      seconds = time.perf_counter() - begun
      mine = {'seed': seed} | _record(found, seconds, data)
      record['searches'].append(mine)
    record['random'] = random_losses(task, grid, priced, counts, seeds)
    records.append(record)
    done = [x.get('loss') for x in record['searches']]
    print(f'{name} {area} mm2, {cycles} Mcycles: {best.loss:.6g}, {done}')
  return records


def _record(found, seconds, data) -> dict[str, Any]:
  if found.choice is None:
    raise ValueError('codesign: a budget is below all of the grid')
  rows = np.arange(len(found.choice))
  weights = np.asarray(data.work.k * data.work.n * data.work.count, np.float64)
  ebw = np.asarray(data.candidates.ebw)[rows, found.choice]
  return {
    'numbers': found.numbers,
    'loss': found.loss,
    'totals': found.totals,
    'ebw': float((ebw * weights).sum() / weights.sum()),
    'evaluations': found.evaluations,
    'plans': found.plans,
    'seconds': seconds,
    'choice': found.choice.tolist(),
  }


def _shown(record, bank_kib) -> str:
  n = {name: int(x) for name, x in record['numbers'].items()}
  kib = '/'.join(
    f'{n[x] * bank_kib:g}' for x in ('weight', 'input', 'output', 'l2')
  )
  return f'{n["rows"]} x {n["cols"]}, U {n["recon_units"]}, {kib}'


def _ratios(record) -> list[float]:
  """Loss of each search over the grid's; infinite where it found none."""
  base = record['grid']['loss']
  return [x.get('loss', np.inf) / base for x in record['searches']]


def _lines(records, banks) -> list[str]:
  rows, sums = [], []
  for r in records:
    grid, ratios = r['grid'], _ratios(r)
    worst = r['searches'][int(np.argmax(ratios))]
    for method, entry in (('grid', grid), ('gradient', worst)):
      shown = [r['workload'], f'{r["area_mm2"]:g} / {r["mcycles"]:g}', method]
      if 'loss' not in entry:
        rows.append([*shown, 'none', '', '', '', '', '', ''])
        continue
      rows.append([
        *shown, f'{entry["loss"]:.6g}', _shown(entry, banks[r['workload']]),
        f'{entry["totals"]["area_um2"] * 1e-6:.4f}',
        f'{entry["totals"]["cycles"] * 1e-6:.4f}', f'{entry["ebw"]:.3f}',
        entry['evaluations'], f'{entry["seconds"]:.1f}',
      ])  # fmt: skip
  for name in dict.fromkeys(r['workload'] for r in records):
    mine = [r for r in records if r['workload'] == name]
    ratios = np.concatenate([_ratios(r) for r in mine])
    each = [
      x['evaluations'] for r in mine for x in r['searches'] if 'loss' in x
    ]
    count = mine[0]['grid']['evaluations']
    cost = [np.mean([x['evaluations'] for x in r['searches'] if 'loss' in x])
            for r in mine]  # fmt: skip
    seconds = [s['seconds'] for r in mine for s in r['searches'] if 'loss' in s]
    sums.append(
      f'**{name}**: {np.sum(ratios <= 1.001)} of {len(ratios)} searches are '
      "within 0.1 % of the grid's best loss or better (worst ratio "
      f'{ratios.max():.4f}), by {np.mean(each):.0f} evaluations on average, '
      f'{max(each)} at most; the grid has {count}: **{count / max(each):.0f} '
      'times fewer** at each pair of budgets, and '
      f'{count / np.sum(cost):.0f} times fewer where one pricing of the grid '
      f'serves all {len(mine)} pairs. Pricing the grid took '
      f'{mine[0]["pricing_seconds"]:.1f} s, its plans '
      f'{np.sum([r["grid"]["seconds"] for r in mine]):.0f} s for all pairs '
      f'({max(r["grid"]["plans"] for r in mine)} solvers at most, bounds for '
      f'the rest); a search {np.median(seconds):.1f} s, the first with '
      f'compiling {max(seconds):.1f} s.'
    )
  heads = [
    'workload', 'budget: mm2 / Mcycles', 'by', 'loss',
    'rows x cols, U, KiB weight/input/output/L2', 'area [mm2]', 'Mcycles',
    'ebw [bit/weight]', 'evaluations', 'seconds',
  ]  # fmt: skip
  return [
    *(line for text in sums for line in (text, '')),
    'An evaluation is the hardware model on one accelerator, all sites and '
    'candidates: exact, or relaxed with its gradient. Of the searches from '
    'several seeds the worst is shown. KiB of buffers count both halves.',
    '',
    _pages.table(heads, rows),
  ]


def draw(records, footnote: str) -> mpl.Figure:
  """Loss over the grid's, by evaluations; a panel for each workload."""
  names = list(dict.fromkeys(r['workload'] for r in records))
  fig = mpl.Figure(figsize=(11, 4.6), dpi=120, layout='constrained')
  panels = fig.subplots(1, len(names), squeeze=False)[0]
  floor = 1e-3  # of the logarithmic axis: 0.1 % is the claim
  for axes, name in zip(panels, names):
    mine = [r for r in records if r['workload'] == name]
    shades = np.linspace(0.0, 0.7, len(mine))
    for i, (r, shade) in enumerate(zip(mine, shades)):
      look = {'color': str(shade), 'marker': 'osD^v*'[i % 6], 'ms': 6}
      base = r['grid']['loss']
      label = f'{r["area_mm2"]:g} mm², {r["mcycles"]:g} Mcycles'
      counts = sorted({x['evaluations'] for x in r['random']})
      x, y = [], []
      for n in counts:
        found = [e['loss'] for e in r['random'] if e['evaluations'] == n]
        # None of the accelerators kept the budgets: no point.
        if all(v is not None for v in found):
          x.append(n)
          y.append(np.median(found) / base - 1)
      axes.plot(x, np.maximum(y, 0), ls='--', lw=0.9, mfc='w', **look)
      x = [s['evaluations'] for s in r['searches'] if 'loss' in s]
      y = [s['loss'] / base - 1 for s in r['searches'] if 'loss' in s]
      axes.plot(x, y, ls='', label=label, **look)
    count = mine[0]['grid']['evaluations']
    axes.plot(count, 0, 'k+', ms=14, mew=2)
    axes.annotate('grid', (count, 0), (-6, 10), textcoords='offset points',
                  ha='right')  # fmt: skip
    axes.axhspan(-floor, floor, color='0.9', zorder=0)
    axes.set_xscale('log')
    axes.set_yscale('symlog', linthresh=floor)
    axes.set(
      title=name, xlabel='evaluations of the hardware model',
      ylabel="loss over the grid's best, less 1",
    )  # fmt: skip
    axes.set_ylim(-5 * floor, None)
    axes.grid(True, color='0.92', lw=0.6)
    axes.set_axisbelow(True)
    axes.legend(fontsize=7, title='filled: gradient, each seed\n'
                'hollow, dashed: random (median)\ngrey band: ±0.1 %',
                title_fontsize=7)  # fmt: skip
  fig.supxlabel(footnote, fontsize=7, color='0.3', ha='left', x=0.01)
  return fig


@gin.configurable
def codesign(
  out=gin.REQUIRED,
  model=gin.REQUIRED,
  batch=gin.REQUIRED,
  options=gin.REQUIRED,
  freedoms=gin.REQUIRED,
  spread=1.0,
  size=512,
  values=gin.REQUIRED,
  sram_kib=gin.REQUIRED,
  levels=gin.REQUIRED,
  own_model=None,
  own_windows=32,
  own_values=None,
  own_sram_kib=None,
  own_levels=(),
  banks=16,
  area_scale=10.8,
  starts=5,
  steps=30,
  kept=3,
  rounds=4,
  seeds=(0,),
  random_counts=(16, 64, 256, 1024, 4096),
  seed=0,
):
  """Run all levels of one or two workloads; write page and figure.

  Args:
    out: Folder.
    model: Of published shapes, with a synthetic loss.
    batch: Sequences in decode.
    options: (bits, sigma) of the MicroScopiQ candidates.
    freedoms: Of Student's t, by kind of site.
    spread: Of the logarithms of the sites' weights in the synthetic loss.
    size: Of drawn matrices.
    values: Of rows, cols and recon_units.
    sram_kib: L2 and both halves of all buffers together.
    levels: Budgets, mm2 and millions of cycles.
    own_model: With a measured loss; none for None. Likewise what follows.
    own_windows: Of calibration.
    own_values: See `values`.
    own_sram_kib: See `sram_kib`.
    own_levels: See `levels`.
    banks: Of the SRAM.
    area_scale: Of the compute area.
    starts: Of each search.
    steps: Of each start.
    kept: Starts that are rounded.
    rounds: Most moves to neighbours.
    seeds: Of searches and random accelerators.
    random_counts: Random accelerators.
    seed: Of the synthetic loss.
  """
  begun = time.perf_counter()
  search = {'starts': starts, 'steps': steps, 'kept': kept, 'rounds': rounds}
  records = []
  names = (f'{model}, synthetic loss', f'{own_model}, measured loss')
  for name, given in (
    (names[0], (model, values, sram_kib, levels)),
    (names[1], (own_model, own_values, own_sram_kib, own_levels)),
  ):
    which, axes, kib, pairs = given
    if which is None:
      continue
    data = (
      drawn(which, batch, options, freedoms, spread, size, seed)
      if name == names[0]
      else measured(which, batch, options, own_windows)
    )
    space = codesign_lib.microscopiq(
      axes, data.candidates, sram_bytes=1024 * kib, banks=banks,
      area_scale=area_scale,
    )  # fmt: skip
    records += compare(name, data, space, pairs, seeds, random_counts, search)
  bank_kib = dict(zip(names, (sram_kib / banks, (own_sram_kib or 0) / banks)))
  footnote = (
    f'codesign.gin, seed {seed}, searches of seeds {list(seeds)}; decode of '
    f'{batch} sequences; MicroScopiQ of 2 and 4 bits, logic {area_scale:g} '
    "times the paper's area"
  )
  return _pages.write(
    out,
    title='Bits and accelerator together: gradients against a grid',
    command='python -m experiments.codesign configs/allocation/codesign.gin',
    lines=_lines(records, bank_kib),
    records=records,
    config=gin.operative_config_str(),
    figure=draw(records, footnote),
    seed=seed,
    seconds=time.perf_counter() - begun,
  )


def main(argv: list[str] | None = None) -> None:
  _pages.main(__doc__, codesign, argv)


if __name__ == '__main__':
  main()
