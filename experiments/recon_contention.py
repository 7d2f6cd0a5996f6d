"""Do rows of MicroScopiQ that share ReCoN units get in each other's way?

    python -m experiments.recon_contention configs/hardware/contention.gin

The paper: less than 3 % of the accesses conflict with one unit and 64 x 64
PEs, and none with eight. Here against the tokens of a pass, the share of
micro-blocks with outliers and the number of units, by `simulate.pipeline`
(every vector in every cycle) beside the closed form of `hardware.cost`;
latency and area against the number of units beside the published curves.
"""

import functools
import sys
import time
from typing import Any

import gin
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import figure as mpl

from experiments import _pages
from mq_jax import hardware
from mq_jax.hardware import _contention
from mq_jax.hardware.simulate import pipeline

CLAIM = 0.03
# MicroScopiQ, arXiv 2411.05282, figure 18a: LLaMA3-8B, compute area.
UNITS = (1, 2, 4, 8)
PUBLISHED_LATENCY = (1.0, 0.85, 0.82, 0.79)
PUBLISHED_AREA = (1.0, 1.17, 1.31, 1.58)
HOP = 2  # cycles from row to row, as in the cost model


def unit_latency(cols: int, sync: bool) -> int:
  """Cycles from a row's end through arbiter and network to the next row.

  Stages, arbiter, and with `sync` the wait that undoes the columns' skew.
  """
  return cols.bit_length() + 1 + sync * (cols - 1)


def asking_share(outlier_blocks: float, cols: int, micro_block: int) -> float:
  """Share of rows, in one lane, that hold an outlier in any micro-block."""
  return 1.0 - (1.0 - outlier_blocks) ** (cols / micro_block)


@functools.partial(jax.jit, static_argnames='latency')
def simulate(mask, m, units, *, latency: int) -> pipeline.PipelineRun:
  """Tiles of masks bool[t, rows, lanes], each with every number of units.

  Fields [u, t].
  """
  one = functools.partial(pipeline.run_tile, hop=HOP, latency=latency)
  over_tiles = jax.vmap(one, (0, None, None))
  return jax.vmap(over_tiles, (None, None, 0))(mask, m, units)


def modelled(m, units, x, *, size, lanes, micro_block, sync):
  """One tile by the closed form: conflicts, and cycles from end to end."""
  rho = asking_share(x, size, micro_block)
  any_lane = 1.0 - (1.0 - rho) ** lanes
  tile = (m, size, size * any_lane, size * rho * lanes, units)
  tile += (HOP, unit_latency(size, sync))
  return (
    _contention.conflict_rate(*tile, xp=np),
    _contention.tile_cycles(*tile, xp=np),
  )


def accelerator(size, units, micro_block, sync):
  return hardware.accelerators.microscopiq(
    size,
    size,
    units,
    micro_block=micro_block,
    sync=float(sync),
  )


def measure(
  case, ms, outlier_blocks, *, micro_block: int, tiles: int, seed: int
) -> list[dict[str, Any]]:
  """Conflicts and cycles by simulation and by model, a record a point.

  Args:
    case: Rows (and columns), lanes (2 for 2-bit weights, 1 for 4-bit),
      whether vectors wait in front of a unit until their columns are level,
      and numbers of ReCoN units.
    ms: Tokens of a pass.
    outlier_blocks: Shares of micro-blocks with outliers.
    micro_block: Outputs of a micro-block.
    tiles: Random tiles that are simulated; the same for all `ms` and `units`.
    seed: Of the tiles.
  """
  size, lanes, sync, units = case
  records = []
  for x in outlier_blocks:
    key = jax.random.fold_in(jax.random.key(seed), round(1e6 * x))
    asking = asking_share(x, size, micro_block)
    mask = jax.random.bernoulli(key, asking, (tiles, size, lanes))
    # The model is asked about the rows that were drawn, not about chance.
    drawn = 1.0 - (1.0 - float(mask.mean())) ** (micro_block / size)
    for m in ms:
      run = simulate(
        mask,
        jnp.int32(m),
        jnp.array(units, jnp.int32),
        latency=unit_latency(size, sync),
      )
      run = jax.tree.map(np.asarray, run)
      rate, cycles = modelled(
        m,
        np.array(units),
        drawn,
        size=size,
        lanes=lanes,
        micro_block=micro_block,
        sync=sync,
      )
      requests = np.maximum(run.requests.sum(1), 1)
      for i, u in enumerate(units):
        records.append(
          {
            'size': size,
            'lanes': lanes,
            'sync': bool(sync),
            'outlier_blocks': x,
            'm': m,
            'units': u,
            'asking_share': asking,
            'conflicts': float(run.delayed[i].sum() / requests[i]),
            'conflicts_model': float(rate[i]),
            'wait_cycles': float(run.waiting_cycles[i].sum() / requests[i]),
            'cycles': float(run.cycles[i].mean()),
            'cycles_model': float(cycles[i]),
          }
        )
  return records


def pick(records, **where):
  """Records with these fields."""
  return [r for r in records if all(r[k] == v for k, v in where.items())]


def holds_until(records, key: str, bound: float) -> int | None:
  """The largest m up to which all records stay at or below the bound."""
  last = None
  for record in sorted(records, key=lambda r: r['m']):
    if record[key] > bound:
      break
    last = record['m']
  return last


def passes(ms, x, *, model, lanes, micro_block, size, sync, ebw):
  """Cycles of a whole model by `hardware.cost` over UNITS. {m: [u]}."""
  found = {}
  for m in ms:
    work = hardware.workload.model(model, 'decode', batch=m)
    cycles = hardware.cost(
      accelerator(size, np.array(UNITS)[:, None], micro_block, sync),
      work,
      hardware.precision(4 // lanes, 8, outlier_blocks=x, ebw=ebw),
    )
    found[m] = cycles.sum().total_cycles.tolist()
  return found


def areas(size: int, micro_block: int) -> np.ndarray:
  """Compute area of UNITS, and its network's share. f64[2, u]."""
  made = accelerator(size, np.array(UNITS), micro_block, True)
  area = hardware.cost(
    made, hardware.workload.gemm(1, size, size), hardware.precision(4, 8)
  ).area_um2
  return np.stack([area.compute, area.noc / area.compute])


@gin.configurable
def contention(
  out=gin.REQUIRED,
  cases=gin.REQUIRED,
  ms=gin.REQUIRED,
  outlier_blocks=gin.REQUIRED,
  drawn_blocks=gin.REQUIRED,
  latency_ms=gin.REQUIRED,
  model='llama-3-8b',
  ebw=2.5475,
  micro_block=8,
  tiles=8,
  seed=0,
):
  """Simulate, compare with the model and the paper; write the results.

  Args:
    out: Folder.
    cases: Of `measure`, each for all that follows; the first is drawn and
      compared with the published curves, and has 1, 2, 4 and 8 units.
    ms: Tokens of a pass.
    outlier_blocks: Shares of micro-blocks with outliers.
    drawn_blocks: The one for latency, and for the figure over units.
    latency_ms: Tokens at which latency is compared, of `ms` or more.
    model: Of the latency by `hardware.cost`.
    ebw: Bits stored for a weight there.
    micro_block: Outputs of a micro-block.
    tiles: Random tiles of each point.
    seed: Of the tiles.
  """
  begun = time.perf_counter()
  records = []
  for case in cases:
    records += measure(
      case,
      ms,
      outlier_blocks,
      micro_block=micro_block,
      tiles=tiles,
      seed=seed,
    )
    print(case, f'{time.perf_counter() - begun:.0f} s', flush=True)
  size, lanes, sync, _ = cases[0]
  first = pick(records, size=size, lanes=lanes, sync=sync)
  whole = passes(
    latency_ms,
    drawn_blocks,
    model=model,
    lanes=lanes,
    micro_block=micro_block,
    size=size,
    sync=sync,
    ebw=ebw,
  )
  area = areas(size, micro_block)
  latency = _latency_rows(first, whole, drawn_blocks)
  footnote = (
    f'contention.gin, seed {seed}, {tiles} tiles a point; {size} x {size} PEs, '
    f'{4 // lanes}-bit weights, micro-blocks of {micro_block}, level: '
    f'{"yes" if sync else "no"}'
  )
  return _pages.write(
    out,
    title='Conflicts between rows that share ReCoN units',
    command='python -m experiments.recon_contention '
    'configs/hardware/contention.gin',
    lines=_lines(records, first, latency, area, drawn_blocks, model),
    records={
      'points': records,
      'latency_over_units': latency,
      'area_um2': area[0].tolist(),
      'network_share': area[1].tolist(),
      'published_latency': PUBLISHED_LATENCY,
      'published_area': PUBLISHED_AREA,
    },
    config=gin.operative_config_str(),
    figure=draw(first, latency, area, drawn_blocks, model, footnote),
    seed=seed,
    seconds=time.perf_counter() - begun,
  )


def _latency_rows(first, whole, x) -> list[dict[str, Any]]:
  """Latency relative to one unit: a tile simulated, a tile, a model."""
  rows = []
  for m, cycles in whole.items():
    row = {'m': m, 'model': [c / cycles[0] for c in cycles]}
    mine = pick(first, m=m, outlier_blocks=x)
    for name, key in (('tile', 'cycles'), ('tile_model', 'cycles_model')):
      found = {r['units']: r[key] for r in mine}
      if found:
        row[name] = [found[u] / found[1] for u in UNITS]
    rows.append(row)
  return rows


def _lines(records, first, latency, area, x, model) -> list[str]:
  claims, seen = [], set()
  for r in records:
    case = {k: r[k] for k in ('size', 'lanes', 'sync', 'outlier_blocks')}
    if tuple(case.values()) in seen:
      continue
    seen.add(tuple(case.values()))
    cells = []
    for u, bound in ((1, CLAIM), (2, CLAIM), (4, CLAIM), (8, CLAIM), (8, 0.0)):
      mine = pick(records, units=u, **case)
      by = [holds_until(mine, 'conflicts', bound)]
      # A smooth form is never quite zero.
      by.append(holds_until(mine, 'conflicts_model', max(bound, 0.001)))
      by = ['none' if m is None else str(m) for m in by]
      cells.append(' / '.join(by) if mine else '')
    claims.append(
      [
        f'{r["size"]} x {r["size"]}', 4 // r['lanes'],
        'yes' if r['sync'] else 'no', 100 * r['outlier_blocks'],
        100 * r['asking_share'], *cells,
      ]
    )  # fmt: skip
  conflicts = []
  for m in sorted({r['m'] for r in first}):
    row = [m]
    for u in UNITS:
      (r,) = pick(first, m=m, units=u, outlier_blocks=x)
      row.append(
        f'{100 * r["conflicts"]:.1f} / {100 * r["conflicts_model"]:.1f}'
      )
    (r,) = pick(first, m=m, units=1, outlier_blocks=x)
    load = r['size'] * r['lanes'] * r['asking_share'] * m / max(m, r['size'])
    row += [r['wait_cycles'], r['cycles'], r['cycles_model'], load]
    conflicts.append(row)
  rates = np.array([(r['conflicts'], r['conflicts_model']) for r in records])
  cycles = np.array([(r['cycles'], r['cycles_model']) for r in records])
  off = np.abs(cycles[:, 1] / cycles[:, 0] - 1)
  ratios = [['published', 'all', *PUBLISHED_LATENCY]]
  names = {
    'tile': 'tile, simulated',
    'tile_model': 'tile, closed form',
    'model': f'{model}, `cost`',
  }
  for key, name in names.items():
    ratios += [
      [name, str(row['m']), *(round(v, 3) for v in row[key])]
      for row in latency
      if key in row
    ]
  relative = area[0] / area[0, 0]
  each = (np.array(PUBLISHED_AREA)[1:] - 1) / (np.array(UNITS)[1:] - 1)
  heads = [f'U = {u}' for u in UNITS]
  (one,) = {(r['size'], r['lanes'], r['sync']) for r in first}
  return [
    f'{len(records)} points. Closed form against simulation: conflicts off by '
    f'{100 * np.abs(rates[:, 1] - rates[:, 0]).mean():.1f} points on average '
    f'(worst {100 * np.abs(rates[:, 1] - rates[:, 0]).max():.0f}), cycles of a '
    f'tile by {100 * off.mean():.1f} % (worst {100 * off.max():.0f} %).',
    '',
    'Largest M (tokens of a pass, of those simulated) up to which the claim '
    'holds, simulated / closed form: at most 3 % of the accesses are not '
    'granted at once, and, in the last column, none (the form: 0.1 %). '
    '`level`: vectors wait in front of a unit until their columns are level, '
    'which adds the number of columns less one to its latency.',
    '',
    _pages.table(
      [
        'PEs', 'bits', 'level', 'micro-blocks with outliers [%]',
        'rows asking [%]', *(f'{h}, 3 %' for h in heads), 'U = 8, none',
      ],
      claims,
    ),
    f'Conflicts [%], simulated / closed form, at {100 * x:g} % of '
    f'micro-blocks: {one[0]} x {one[0]}, {4 // one[1]} bits, level: '
    f'{"yes" if one[2] else "no"}; wait of an access and cycles of a tile '
    'with one unit. These are tiles that run alone. If tiles follow each '
    'other at the rate at which weights can be loaded (a row a cycle), the '
    'rows ask on average as often a cycle as the last column says: more than '
    'U can not be served without waiting.',
    '',
    _pages.table(
      [
        'M', *heads, 'wait [cycles]', 'tile [cycles]', 'closed form',
        'requests a cycle',
      ],
      conflicts,
    ),
    'Latency relative to one unit: of a tile that runs alone, and of all '
    f'matmuls of {model} whose tiles follow each other without a gap.',
    '',
    _pages.table(['by', 'M', *heads], ratios),
    'Compute area (no memories) relative to one unit.',
    '',
    _pages.table(
      ['by', *heads],
      [
        ['published, figure 18a', *PUBLISHED_AREA],
        ['table 5, `cost`', *(round(v, 3) for v in relative)],
        ['... networks, share [%]', *(round(100 * v, 2) for v in area[1])],
      ],
    ),
    f'A unit of table 5 adds {100 * (relative[1] - 1):.2f} % of the area with '
    f'one; the published curve {100 * each[-1]:.1f} to {100 * each[0]:.1f} %.',
    '',
  ]  # fmt: skip


def draw(first, latency, area, x, model, footnote: str) -> mpl.Figure:
  """Conflicts over tokens; latency and area over units."""
  fig = mpl.Figure(figsize=(10.5, 8), dpi=120, layout='constrained')
  panels = fig.subplots(2, 2)
  greys, marks = ('0.0', '0.35', '0.55', '0.72'), 'os^D'
  styles = ('-', '--', '-.', ':')
  blocks = sorted({r['outlier_blocks'] for r in first})[-4:]
  left = [(f'U = {u}', {'units': u, 'outlier_blocks': x}) for u in UNITS]
  right = [
    (f'{100 * b:g} % of micro-blocks', {'units': 1, 'outlier_blocks': b})
    for b in blocks
  ]
  for axes, lines, title in (
    (panels[0, 0], left, f'{100 * x:g} % of micro-blocks with outliers'),
    (panels[0, 1], right, 'one unit'),
  ):
    for i, (label, where) in enumerate(lines):
      rows = sorted(pick(first, **where), key=lambda r: r['m'])
      m = [r['m'] for r in rows]
      axes.plot(
        m, [100 * r['conflicts'] for r in rows], marks[i], ms=5,
        color=greys[i], label=f'{label}, simulated',
      )  # fmt: skip
      axes.plot(
        m, [100 * r['conflicts_model'] for r in rows], styles[i], lw=1.3,
        color=greys[i], label='... closed form',
      )  # fmt: skip
    axes.axhline(100 * CLAIM, color='#d55e00', lw=1)
    axes.annotate(
      'published: < 3 %', (1, 100 * CLAIM), (0, 3), color='#d55e00',
      textcoords='offset points', fontsize=8,
    )  # fmt: skip
    axes.set_xscale('log', base=2)
    axes.set(
      xlabel='M, tokens of a pass', ylabel='accesses that wait [%]', title=title
    )
    axes.legend(fontsize=7)
  axes = panels[1, 0]
  axes.plot(
    UNITS, PUBLISHED_LATENCY, '*-', color='#d55e00', ms=10, label='published'
  )
  for i, row in enumerate(latency):
    if 'tile' in row:
      axes.plot(
        UNITS, row['tile'], marks[i % 4], mfc='none', color='k',
        label=f'tile simulated, M = {row["m"]}',
      )  # fmt: skip
    axes.plot(
      UNITS, row['model'], styles[i % 4], lw=1.1, color='k' if i < 4 else '0.5',
      label=f'{model}, cost, M = {row["m"]}',
    )  # fmt: skip
  axes.set(ylabel='latency relative to U = 1', title='latency', ylim=(0, None))
  axes.legend(fontsize=6.5, loc='lower left')
  axes = panels[1, 1]
  axes.plot(
    UNITS, PUBLISHED_AREA, '*-', color='#d55e00', ms=10,
    label='published, figure 18a',
  )  # fmt: skip
  axes.plot(
    UNITS, area[0] / area[0, 0], 'ko--', label='components of table 5, cost'
  )
  axes.set(ylabel='compute area relative to U = 1', title='area')
  axes.legend(fontsize=8)
  for axes in panels[1]:
    axes.set_xscale('log', base=2)
    axes.set_xticks(UNITS, [str(u) for u in UNITS])
    axes.set_xlabel('U, ReCoN units')
  for axes in panels.flat:
    axes.grid(True, color='0.92', lw=0.6)
    axes.set_axisbelow(True)
  fig.supxlabel(footnote, fontsize=7, color='0.3', ha='left', x=0.01)
  return fig


def main(argv: list[str]) -> None:
  gin.parse_config_files_and_bindings(argv[:1], argv[1:])
  print(f'written to {contention()}')


if __name__ == '__main__':
  main(sys.argv[1:])
