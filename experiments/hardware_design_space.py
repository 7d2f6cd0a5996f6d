"""Which MicroScopiQ accelerator for LLaMA-2-7B: a grid, and gradients.

    python -m experiments.hardware_design_space \
        configs/hardware/design_space.gin

Prices a grid of designs by the exact `hardware.cost`, then looks for the same
Pareto front by gradients of `hardware.relaxed_cost`, many starts and weights
at once in one compiled program; found designs are rounded to legal ones and
priced exactly. As many random designs are the control.

The model has no price for off-chip bandwidth, so it is given, not chosen: a
front for each bandwidth.
"""

import functools
import itertools
import json
import sys
import time
from typing import Any, NamedTuple

import gin
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib import figure as mpl

from experiments import _pages
from mq_jax import hardware
from mq_jax.report import fronts

PHASES = ('prefill', 'decode')
KIB = 1024
STEEP = 10.0  # of a budget: more than any weight that it stands against
# Pairs of objectives that are drawn: columns of prices [d, 3], keys.
PAIRS = {
  'latency': ((0, 1), ('latency_ms', 'area_mm2')),
  'energy': ((2, 1), ('energy_mj', 'area_mm2')),
}


class Design(NamedTuple):
  """Designs [d]. Whole numbers; fractions while gradients move them.

  Attributes:
    rows: Of PEs.
    cols: Of PEs; a power of two, as ReCoN needs.
    units: ReCoN units.
    buffer_bytes: Weight buffer; those of inputs and sums are half of it, as
      in the paper.
    l2_bytes: L2.
  """

  rows: Any
  cols: Any
  units: Any
  buffer_bytes: Any
  l2_bytes: Any


class Setting(NamedTuple):
  """What a design is priced for; `m` and `dram` may be mapped.

  Attributes:
    work: Workload [l]; its rows are replaced by `m`.
    precision: Of all sites.
    m: Tokens of a pass.
    dram: Bytes a cycle from DRAM.
    link: Bytes a cycle from L2, relative to DRAM.
    area_scale: Of the compute area; 1 the paper's, 10.8 PLENA's.
    clock_ghz: Of the array.
  """

  work: hardware.Workload
  precision: hardware.Precision
  m: Any
  dram: Any
  link: float
  area_scale: float
  clock_ghz: float


def accelerator(design: Design, setting: Setting):
  """The accelerator of one design, or of designs [d, 1]."""
  memory = hardware.accelerators.buffers(
    design.rows,
    dram_bytes_per_cycle=setting.dram,
    link_bytes_per_cycle=setting.link * setting.dram,
    l2_bytes=design.l2_bytes,
    weight_bytes=design.buffer_bytes,
    input_bytes=design.buffer_bytes / 2,
    output_bytes=design.buffer_bytes / 2,
  )
  return hardware.accelerators.microscopiq(
    design.rows,
    design.cols,
    design.units,
    area_scale=setting.area_scale,
    memory=memory,
  )


def least_buffer(design: Design, setting: Setting):
  """Bytes of the weight buffer with which each buffer holds one tile.

  The rule of `hardware.cost`, which can't refuse traced values.
  """
  precision = setting.precision
  columns = design.cols * (4 / precision.weight_bits)
  need = design.rows * columns * (precision.ebw / 8)
  xp = jnp if isinstance(need, jax.Array) else np
  need = xp.maximum(need, design.rows * (2 * precision.activation_bits / 8))
  return xp.maximum(need, columns * (2 * 32 / 8))


def price(design: Design, setting: Setting, cost=hardware.cost) -> jax.Array:
  """ms, mm2 and mJ of one design for the whole workload. f32[3]."""
  work = hardware.Workload(
    setting.m, setting.work.k, setting.work.n, setting.work.count
  )
  found = cost(accelerator(design, setting), work, setting.precision)
  return jnp.stack(
    [
      found.total_cycles.sum() * (1e-6 / setting.clock_ghz),
      found.area_um2.total[0] * 1e-6,
      found.energy_pj.total.sum() * 1e-9,
    ]
  )


def price_exactly(design: Design, setting: Setting) -> np.ndarray:
  """The same of designs [d] by NumPy, checked by `cost`. f64[d, 3]."""
  design = Design(*(np.asarray(x)[:, None] for x in design))
  work = hardware.workload.gemm(
    setting.m, setting.work.k, setting.work.n, setting.work.count
  )
  found = hardware.cost(accelerator(design, setting), work, setting.precision)
  return np.stack(
    [
      found.total_cycles.sum(-1) * 1e-6 / setting.clock_ghz,
      found.area_um2.total[:, 0] * 1e-6,
      found.energy_pj.total.sum(-1) * 1e-9,
    ],
    axis=-1,
  )


def as_traced(design: Design) -> Design:
  """Rows and columns whole, so that tiles are counted in whole numbers."""
  whole = [jnp.asarray(x, jnp.int32) for x in design[:2]]
  return Design(*whole, *(jnp.asarray(x, jnp.float32) for x in design[2:]))


@functools.partial(jax.jit, static_argnames='batch')
def price_many(design: Design, setting: Setting, batch: int) -> jax.Array:
  """ms, mm2 and mJ of designs [d], `inf` where a tile does not fit.

  In chunks of `batch` designs. f32[d, 3].
  """

  def one(x):
    fits = x.buffer_bytes >= least_buffer(as_float(x), setting)
    return jnp.where(fits, price(x, setting), jnp.inf)

  return jax.lax.map(one, design, batch_size=batch)


def as_float(design: Design) -> Design:
  return Design(*(x.astype(jnp.float32) for x in design))


def grid(rows, cols, units, buffer_kib, l2_kib) -> Design:
  """Every combination. [d]."""
  axes = (rows, cols, units, np.array(buffer_kib) * KIB, np.array(l2_kib) * KIB)
  mesh = np.meshgrid(*axes, indexing='ij')
  return Design(*(x.reshape(-1) for x in mesh))


def legal(design: Design, setting: Setting, low, high) -> Design:
  """The nearest legal designs; two for each, of the next powers of two.

  Rows and units are rounded, columns go to the power of two below and above,
  memories up to whole KiB and to what a tile needs. [2 d].
  """
  up = lambda x: np.ceil(np.asarray(x, np.float64) / KIB - 1e-3) * KIB
  exponent = np.log2(np.asarray(design.cols, np.float64))
  both = lambda x: np.concatenate([np.asarray(x, np.float64)] * 2)
  cols = 2 ** np.concatenate(
    [np.floor(exponent + 1e-3), np.ceil(exponent - 1e-3)]
  )
  found = Design(
    np.maximum(np.round(both(design.rows)), 1),
    np.clip(cols, low.cols, high.cols),
    np.maximum(np.round(both(design.units)), 1),
    up(both(design.buffer_bytes)),
    up(both(design.l2_bytes)),
  )
  need = np.ceil(least_buffer(found, setting) / KIB) * KIB
  fits = np.maximum(found.buffer_bytes, need)
  found = found._replace(buffer_bytes=fits)
  return Design(*(x.astype(np.int64) for x in found))


class Aim(NamedTuple):
  """What runs minimize; logs of ms, mm2 and mJ. f32[w, 3] each.

  Attributes:
    weights: Of the logs.
    budget: Logs that are not to be exceeded; `inf` for none.
  """

  weights: Any
  budget: Any


@functools.partial(jax.jit, static_argnames='steps')
def descend(
  starts: jax.Array,
  aims: Aim,
  settings: Setting,
  low: jax.Array,
  high: jax.Array,
  *,
  steps: int,
  learning_rate: float,
  temperature: tuple[float, float],
) -> jax.Array:
  """Adam on log-parameters, all runs in one program.

  Minimizes the weighted sum of the logs of latency, area and energy, and
  STEEP times what they exceed a budget by. Maxima and thresholds of buffers
  go from one temperature to another, the learning rate to zero. Parameters
  are kept in their box.

  Args:
    starts: Logs of designs. f32[s, 5].
    aims: Of the runs [w].
    settings: With arrays m [p] and dram [b].
    low: Of the box, logs. f32[5].
    high: Of the box.
    steps: Gradients of one run.
    learning_rate: The first, in nats.
    temperature: Of maxima and thresholds, the first and the last.

  Returns:
    Logs of designs before each step and after the last.
    f32[p, b, w, s, steps + 1, 5].
  """
  ratio = temperature[1] / temperature[0]
  warmth = temperature[0] * ratio ** jnp.linspace(0.0, 1.0, steps)
  tx = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

  def run(m, dram, aim, start):
    setting = settings._replace(m=m, dram=dram)

    def loss(log, temperature):
      design = Design(*jnp.exp(log))
      # A buffer too small for a tile is as large as the tile.
      fits = jnp.maximum(design.buffer_bytes, least_buffer(design, setting))
      cost = functools.partial(hardware.relaxed_cost, temperature=temperature)
      design = design._replace(buffer_bytes=fits)
      logs = jnp.log(price(design, setting, cost))
      over = jnp.maximum(logs - aim.budget, 0.0)
      return jnp.sum(aim.weights * logs) + STEEP * jnp.sum(over)

    def step(carry, temperature):
      log, state = carry
      updates, state = tx.update(jax.grad(loss)(log, temperature), state)
      new = optax.projections.projection_box(
        optax.apply_updates(log, updates), low, high
      )
      return (new, state), log

    (last, _), path = jax.lax.scan(step, (start, tx.init(start)), warmth)
    return jnp.concatenate([path, last[None]])

  sizes = [len(x) for x in (settings.m, settings.dram, aims.budget, starts)]
  p, b, w, r = (x.reshape(-1) for x in np.indices(sizes))
  # One flat axis compiles faster than four nested.
  aims = jax.tree.map(lambda x: jnp.asarray(x)[w], aims)
  args = (jnp.asarray(settings.m)[p], jnp.asarray(settings.dram)[b], aims)
  found = jax.vmap(run)(*args, jnp.asarray(starts)[r])
  return found.reshape(*sizes, steps + 1, 5)


def pareto(points: np.ndarray) -> np.ndarray:
  """Indices of points [d, 2] that no other is better than in both."""
  order = np.lexsort((points[:, 1], points[:, 0]))
  second = points[order, 1]
  best = np.minimum.accumulate(np.concatenate([[np.inf], second[:-1]]))
  return order[(second < best) & np.isfinite(second)]


def hypervolume(points: np.ndarray, worst: np.ndarray) -> float:
  """Area between a front and a corner, in decades squared.

  Args:
    points: Objectives, smaller is better. [d, 2].
    worst: Corner; points beyond do not count. [2].
  """
  points = points[np.all(points < worst, axis=1)]
  points = points[pareto(points)]  # of 10^5 points few are left
  return fronts.hypervolume(
    np.log10(points).tolist(), tuple(np.log10(worst).tolist())
  )


def excess(front: np.ndarray, points: np.ndarray) -> np.ndarray:
  """By which factor a point misses each point of a front, less 1. [f].

  Below zero where a point is better in both.
  """
  points = points[pareto(points)]
  ratio = (points[None] / front[:, None]).max(-1)
  return ratio.min(1) - 1.0


def aims_of(lambdas, budgets) -> Aim:
  """Latency, energy, and both: each against area, and within areas.

  A sum of logs finds only designs where a front is convex (in logs); a budget
  finds all of them.

  Args:
    lambdas: Weights of the log of the area.
    budgets: Areas in mm2.
  """
  costs = np.array([(1, 0, 0), (0, 0, 1), (1, 0, 1)], np.float32)
  area = np.array([0, 1, 0], np.float32)
  sums = [cost + l * area for cost in costs for l in lambdas]
  # Of equal designs within a budget, the smaller.
  within = [cost + 0.01 * area for cost in costs for _ in budgets]
  none = np.full(3, np.inf, np.float32)
  bounds = [none] * len(sums)
  bounds += [
    np.array([np.inf, np.log(b), np.inf], np.float32)
    for _ in costs
    for b in budgets
  ]
  return Aim(np.array(sums + within), np.array(bounds))


def timed(function, *args, **kwargs):
  """Result, seconds of the first call and of the second."""
  seconds = []
  for _ in range(2):
    begun = time.perf_counter()
    found = jax.block_until_ready(function(*args, **kwargs))
    seconds.append(time.perf_counter() - begun)
  return found, *seconds


@gin.configurable
def design_space(
  out=gin.REQUIRED,
  model=gin.REQUIRED,
  batch=gin.REQUIRED,
  context=gin.REQUIRED,
  weight_bits=gin.REQUIRED,
  activation_bits=gin.REQUIRED,
  output_bits=gin.REQUIRED,
  ebw=gin.REQUIRED,
  outlier_blocks=gin.REQUIRED,
  rows=gin.REQUIRED,
  cols=gin.REQUIRED,
  units=gin.REQUIRED,
  buffer_kib=gin.REQUIRED,
  l2_kib=gin.REQUIRED,
  dram_bytes_per_cycle=gin.REQUIRED,
  link_over_dram=1.0,
  clock_ghz=1.0,
  area_scale=1.0,
  lambdas=gin.REQUIRED,
  budgets=gin.REQUIRED,
  starts=gin.REQUIRED,
  steps=gin.REQUIRED,
  learning_rate=0.1,
  temperature=(0.02, 0.02),
  checkpoints=gin.REQUIRED,
  published=(64, 64, 1, 256, 2048),
  chunk=512,
  seed=0,
):
  """Grid, gradients and random designs; writes a folder of results.

  Args:
    out: Folder.
    model: Name of published shapes.
    batch: Sequences.
    context: Tokens of each, in prefill.
    weight_bits: 2 or 4.
    activation_bits: 1 to 8.
    output_bits: Of results.
    ebw: Bits stored for a weight.
    outlier_blocks: Share of micro-blocks with outliers.
    rows: Of the grid; likewise `cols`, `units`, `buffer_kib` (of weights),
      `l2_kib`. First and last are the box of gradients and random designs.
    cols: See `rows`.
    units: See `rows`.
    buffer_kib: See `rows`.
    l2_kib: See `rows`.
    dram_bytes_per_cycle: A front for each.
    link_over_dram: Bandwidth between L2 and buffers over that of the DRAM.
    clock_ghz: Of the array.
    area_scale: Of the compute area.
    lambdas: Weights of log area against log latency and log energy.
    budgets: Number of areas within which latency and energy are sought.
    starts: Random starts of each weight and budget.
    steps: Gradients of one run.
    learning_rate: The first, in nats.
    temperature: Of maxima and thresholds, the first and the last.
    checkpoints: Steps after which gradients are compared with the rest.
    published: Rows, columns, units, KiB of buffer and L2 of the design that
      is marked.
    chunk: Designs of the grid at once.
    seed: Of starts and random designs.
  """
  begun = time.perf_counter()
  work = hardware.workload.model(model, 'decode', batch=batch)
  tokens = np.array([batch * context, batch])  # of PHASES
  precision = hardware.precision(
    weight_bits,
    activation_bits,
    output_bits=output_bits,
    ebw=ebw,
    outlier_blocks=outlier_blocks,
  )
  whole = Setting(
    hardware.Workload(work.m, work.k, work.n, work.count),
    precision,
    tokens,
    np.array(dram_bytes_per_cycle, np.float32),
    link_over_dram,
    area_scale,
    clock_ghz,
  )
  axes = (rows, cols, units, buffer_kib, l2_kib)
  bounds = [Design(*(end(a) for a in axes)) for end in (min, max)]
  low, high = (
    np.log(np.array([*b[:3], b[3] * KIB, b[4] * KIB], np.float32))
    for b in bounds
  )
  rng = np.random.default_rng(seed)
  uniform = lambda n: rng.uniform(low, high, (n, 5)).astype(np.float32)
  designs = grid(*axes)
  traced = as_traced(designs)

  # From the smallest area to the largest, by the corners of the box.
  corners = Design(*(np.array(x) for x in zip(*np.exp([low, high]))))
  corner = whole._replace(m=batch, dram=float(whole.dram[0]))
  corners = legal(corners, corner, *bounds)
  areas = price_exactly(corners, corner)[:, 1]
  areas = np.geomspace(areas.min(), areas.max(), budgets + 1)[:-1] * 1.1
  aims, first = aims_of(lambdas, areas), uniform(starts)
  paths, *search_seconds = timed(
    descend,
    first,
    aims,
    whole,
    low,
    high,
    steps=steps,
    learning_rate=learning_rate,
    temperature=temperature,
  )
  paths = np.asarray(paths)
  runs = len(aims.weights) * starts

  found, seconds = [], []
  for (p, phase), (b, dram) in itertools.product(
    enumerate(PHASES), enumerate(whole.dram)
  ):
    setting = whole._replace(m=int(tokens[p]), dram=float(dram))
    values, cold, warm = timed(price_many, traced, setting, chunk)
    seconds.append((cold, warm))
    entry = {'phase': phase, 'dram': float(dram), 'runs': runs}
    entry['grid'] = designs, np.asarray(values, np.float64)
    _check_float32(*entry['grid'], setting)
    priced = lambda x, setting=setting: (x, price_exactly(x, setting))
    # As many random designs as there are gradients.
    guess = Design(*np.exp(uniform(runs * steps // 2).T))
    entry['random'] = priced(legal(guess, setting, *bounds))
    for step in (*checkpoints, steps):
      path = Design(*np.exp(paths[p, b, :, :, step].reshape(-1, 5).T))
      entry[step] = priced(legal(path, setting, *bounds))
    # The first half of the aims are sums, the other budgets; and twice that,
    # as each design is rounded twice.
    sums = np.tile(np.arange(runs) < runs // 2, 2)
    for name, some in (('sums', sums), ('budgets', ~sums)):
      part, prices = entry[steps]
      entry[name] = Design(*(x[some] for x in part)), prices[some]
    entry['gradient'] = entry[steps]
    entry['published'] = priced(grid(*([x] for x in published)))
    found.append(entry)

  records = [_record(entry, (*checkpoints, steps)) for entry in found]
  rates = {
    'grid_designs': int(designs.rows.size),
    'sites': len(work.names),
    'grid_first_seconds': seconds[0][0],
    'grid_seconds': float(np.median([warm for _, warm in seconds])),
    'runs': runs * len(found),
    'steps': steps,
    'gradients': runs * steps * len(found),
    'search_first_seconds': search_seconds[0],
    'search_seconds': search_seconds[1],
  }
  rates['grid_designs_per_s'] = rates['grid_designs'] / rates['grid_seconds']
  rates['gradients_per_s'] = rates['gradients'] / rates['search_seconds']
  footnote = (
    f'design_space.gin, {model}, seed {seed}; {clock_ghz:g} GHz, batch '
    f'{batch}, prefill of {context} tokens; {weight_bits}-bit weights, '
    f'{100 * outlier_blocks:g} % of micro-blocks with outliers'
  )
  return _pages.write(
    out,
    title='Design space of MicroScopiQ: a grid and gradients',
    command='python -m experiments.hardware_design_space '
    'configs/hardware/design_space.gin',
    lines=_lines(records, rates),
    records={'rates': rates, 'fronts': records},
    config=gin.operative_config_str(),
    figure=draw(found, records, footnote),
    seed=seed,
    seconds=time.perf_counter() - begun,
  )


def _check_float32(designs, values, setting) -> None:
  """The compiled prices are the checked ones, on a part of the grid."""
  fits = np.flatnonzero(np.isfinite(values[:, 0]))
  some = fits[:: max(1, len(fits) // 200)]
  exact = price_exactly(Design(*(x[some] for x in designs)), setting)
  np.testing.assert_allclose(values[some], exact, rtol=1e-4)


def _record(entry, checkpoints) -> dict[str, Any]:
  """Of one phase and bandwidth: how near each search comes to the grid."""
  designs, values = entry['grid']
  record = {'phase': entry['phase'], 'dram_bytes_per_cycle': entry['dram']}
  record['feasible'] = int(np.isfinite(values[:, 0]).sum())
  record['published'] = _named(*entry['published'], [0])[0]
  for name, (pair, _) in PAIRS.items():
    front = values[pareto(values[:, pair])][:, pair]
    worst = front.max(0) * 1.1
    whole = hypervolume(front, worst)
    share = functools.partial(_share, pair=pair, worst=worst, whole=whole)
    mine = record[name] = {'grid': _front(designs, values, pair)}
    for search in ('gradient', 'sums', 'budgets', 'random'):
      miss = excess(front, entry[search][1][:, pair])
      mine[search] = {
        'hypervolume_ratio': share(entry[search][1]),
        'excess_median': float(np.median(miss)),
        'excess_worst': float(miss.max()),
        'beaten': float(np.mean(miss < -1e-6)),
      }
    mine['gradient']['front'] = _front(*entry['gradient'], pair)
    shuffled = np.random.default_rng(0).permutation(values)
    mine['curves'] = {
      # Each run's end is rounded and priced twice.
      'gradient': [
        (entry['runs'] * (step + 2), share(entry[step][1]))
        for step in checkpoints
      ],
      'random': _prefixes(entry['random'][1], share),
      'grid': _prefixes(shuffled, share),
    }
  return record


def _share(values, *, pair, worst, whole) -> float:
  return hypervolume(values[:, pair], worst) / whole


def _prefixes(values, share) -> list[tuple[int, float]]:
  total = len(values)
  sizes = {int(n) for n in np.geomspace(min(16, total), total, 14)}
  return [(n, share(values[:n])) for n in sorted(sizes)]


def _front(designs, values, pair) -> list[dict[str, float]]:
  return _named(designs, values, pareto(values[:, pair]))


def _named(designs, values, chosen) -> list[dict[str, float]]:
  prices = ('latency_ms', 'area_mm2', 'energy_mj')
  return [
    {k: int(x[i]) for k, x in zip(Design._fields, designs)}
    | {k: float(f'{v:.6g}') for k, v in zip(prices, values[i])}
    for i in chosen
  ]


def _knee(rows) -> dict[str, float]:
  return min(rows, key=lambda d: d['latency_ms'] * d['area_mm2'])


def _lines(records, rates) -> list[str]:
  percent = lambda x: f'{100 * x:+.1f} %'
  fronts, knees = [], []
  for record in records:
    where = [record['phase'], record['dram_bytes_per_cycle']]
    for name in PAIRS:
      r = record[name]
      ratios = (
        f'{r[k]["hypervolume_ratio"]:.3f}'
        for k in ('gradient', 'sums', 'budgets', 'random')
      )
      misses = (
        percent(r[k][f'excess_{x}'])
        for k in ('gradient', 'random')
        for x in ('median', 'worst')
      )
      beaten = f'{100 * r["gradient"]["beaten"]:.0f} %'
      fronts.append([*where, name, len(r['grid']), *ratios, *misses, beaten])
    for label, d in (
      ('published', record['published']),
      ('grid', _knee(record['latency']['grid'])),
      ('gradient', _knee(record['latency']['gradient']['front'])),
    ):
      shown = (
        f'{d["rows"]} x {d["cols"]}, U {d["units"]}, '
        f'{d["buffer_bytes"] // KIB}, {d["l2_bytes"] // KIB}'
      )
      prices = (d[k] for k in ('latency_ms', 'area_mm2', 'energy_mj'))
      knees.append([*where, label, shown, *prices])
  each = rates['gradients'] // len(records)
  dram = 'DRAM [B/cycle]'
  return [
    f'Grid: {rates["grid_designs"]} designs, each priced on '
    f'{rates["sites"]} matmuls, in {rates["grid_seconds"]:.3f} s '
    f'({rates["grid_first_seconds"]:.1f} s with compiling), once for each '
    'phase and bandwidth: '
    f'**{rates["grid_designs_per_s"]:.2g} designs a second**. Gradients: '
    f'{rates["runs"]} runs of {rates["steps"]} steps in one program, '
    f'{rates["gradients"]} gradients in {rates["search_seconds"]:.2f} s '
    f'({rates["search_first_seconds"]:.1f} s with compiling): '
    f'**{rates["gradients_per_s"]:.2g} gradients a second**; {each} for each '
    'phase and bandwidth, and as many random designs.',
    '',
    'How near to the front of the grid. Hypervolume: in logs, to a corner '
    "10 % beyond the grid's front, over the grid's own; of all gradient runs, "
    'of those that minimize sums of logs, of those with a budget of area, and '
    "of random designs. Excess: by how much the nearest design found misses "
    "one of the grid's front, in the worse of the two objectives; negative is "
    "better in both, `beaten` the share of the grid's front where it is.",
    '',
    _pages.table(
      [
        'phase', dram, 'area against', 'designs in front', 'hypervolume',
        'sums', 'budgets', 'random', 'excess, median', 'worst',
        'random, median', 'worst', 'beaten',
      ],
      fronts,
    ),
    'Designs of least latency times area, and the published one.',
    '',
    _pages.table(
      [
        'phase', dram, 'from', 'rows x cols, units, KiB of weights, of L2',
        'latency [ms]', 'area [mm2]', 'energy [mJ]',
      ],
      knees,
    ),
  ]  # fmt: skip


def draw(found, records, footnote: str) -> mpl.Figure:
  """Fronts of each phase, and how fast each search approaches the grid's."""
  drams = sorted({entry['dram'] for entry in found})
  middle = drams[len(drams) // 2]
  fig = mpl.Figure(figsize=(13, 7.6), dpi=120, layout='constrained')
  panels = fig.subplots(len(PHASES), 3)
  for row, phase in zip(panels, PHASES):
    mine = [(e, r) for e, r in zip(found, records) if e['phase'] == phase]
    for axes, (name, label) in zip(
      row, (('latency', 'latency of a pass [ms]'), ('energy', 'energy [mJ]'))
    ):
      _draw_fronts(axes, mine, name, drams, middle)
      axes.set(xlabel=label, ylabel='area [mm²]', title=phase)
    record = next(r for e, r in mine if e['dram'] == middle)
    _draw_curves(row[2], record['latency']['curves'])
    row[2].set_title(f'{phase}, latency and area, {middle:g} B/cycle')
  for axes in panels.flat:
    axes.grid(True, color='0.92', lw=0.6)
    axes.set_axisbelow(True)
  panels[1, 1].legend(
    fontsize=7, loc='lower right', title='DRAM [B/cycle]', title_fontsize=7
  )
  panels[1, 2].legend(fontsize=8, loc='upper left')
  fig.supxlabel(footnote, fontsize=7, color='0.3', ha='left', x=0.01)
  return fig


def _draw_fronts(axes, mine, name, drams, middle) -> None:
  pair, keys = PAIRS[name]
  columns = lambda rows: [[d[k] for d in rows] for k in keys]
  shown = []
  for entry, record in mine:
    at = drams.index(entry['dram'])
    if entry['dram'] == middle:
      values = entry['grid'][1]
      values = values[np.isfinite(values[:, 0])]
      # One in each cell of an image: a picture can't show more.
      cells = np.round(np.log(values[:, pair]) * 60)
      _, first = np.unique(cells, axis=0, return_index=True)
      axes.plot(
        *values[first][:, pair].T, ',', color='0.82', rasterized=True,
        zorder=0, label=f'grid, {middle:g}',
      )  # fmt: skip
      star = columns([record['published']])
      axes.plot(*star, 'k*', ms=11, label=f'64 x 64, U = 1, {middle:g}')
      shown.append(star)
    axes.plot(
      *columns(record[name]['grid']), ('-', '--', ':')[at % 3], color='k',
      lw=1.3, drawstyle='steps-post', label=f"grid's front, {entry['dram']:g}",
    )  # fmt: skip
    axes.plot(
      *columns(record[name]['gradient']['front']), 'osD'[at % 3], ms=4.5,
      mec='#d55e00', mfc='none', label=f'gradients, {entry["dram"]:g}',
    )  # fmt: skip
    shown.append(columns(record[name]['grid']))
  axes.set(xscale='log', yscale='log')
  x, y = np.concatenate(shown, axis=1)
  axes.set_xlim(x.min() / 1.3, x.max() * 1.3)
  axes.set_ylim(y.min() / 1.3, y.max() * 1.3)


def _draw_curves(axes, curves) -> None:
  looks = {
    'gradient': ('o-', '#d55e00', 'gradients: all runs after 0, 5, ... steps'),
    'random': ('s--', 'k', 'random designs'),
    'grid': ('^:', '0.45', 'a random part of the grid'),
  }
  for key, (look, color, label) in looks.items():
    n, share = zip(*curves[key])
    axes.plot(n, share, look, ms=4, lw=1.2, color=color, label=label)
  axes.axhline(1.0, color='0.6', lw=0.8)
  axes.set(
    xscale='log',
    xlabel='evaluations (gradients, or prices)',
    ylabel="hypervolume / grid's",
  )


def main(argv: list[str]) -> None:
  gin.parse_config_files_and_bindings(argv[:1], argv[1:])
  folder = design_space()
  rates = json.loads((folder / 'results.json').read_text())['rates']
  print(json.dumps(rates, indent=1))
  print(f'written to {folder}')


if __name__ == '__main__':
  main(sys.argv[1:])
