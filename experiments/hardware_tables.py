"""The hardware tables of three papers, derived again from the cost model.

    python -m experiments.hardware_tables configs/hardware/tables.gin

Each row: what was published, what the model says, and the assumption that
explains the difference.
"""

import pathlib
from typing import NamedTuple

import gin
import matplotlib.pyplot as plt
import numpy as np

from experiments import _pages
from mq_jax import hardware as hw
from mq_jax.hardware import accelerators


class Row(NamedTuple):
  """One published number beside ours."""

  quantity: str
  published: float | None
  ours: float
  why: str = ''


def _micro(bits, activation_bits, outliers):
  return hw.precision(
    bits, activation_bits, ebw=bits + 4 * outliers, outlier_blocks=outliers
  )


def areas(outliers: float, context: int) -> list[Row]:
  """MicroScopiQ, table 5, and the labels of figure 17."""
  one = hw.workload.gemm(1, 64, 64)
  area = lambda a, bits: hw.cost(a, one, bits).area_um2
  tile = hw.precision(4, 8)
  micro = area(accelerators.microscopiq(64, 64, 1), tile)
  olive = area(accelerators.olive(64, 64), tile)
  gobo = area(accelerators.gobo(64, 64), hw.precision(3, 16))
  rows = [
    Row(
      'MicroScopiQ 64x64, one ReCoN: compute area, um2',
      12_783,
      micro.compute,
      'the components of table 5, added again; the table rounds to 0.012 mm2',
    ),
    Row(
      'OliVe 64x64: compute area, um2',
      11_000,
      olive.compute,
      'components add up to 11,469; the table rounds to 0.011 mm2',
    ),
    Row(
      'GOBO 64x64: compute area, um2',
      216_000,
      gobo.compute,
      'the components of the table do not add up to its total',
    ),
  ]
  for side, label in ((8, 387.86), (16, 1305.40), (128, 74_000)):
    found = area(accelerators.microscopiq(side, side, 1), tile)
    rows.append(
      Row(
        f'MicroScopiQ {side}x{side}: total area, um2 (figure 17)',
        label,
        found.compute,
        'a label of the figure; what it includes beyond PEs, ReCoN and '
        'control is not said',
      )
    )
  for units, share in ((1, 3.0), (8, 11.0)):
    found = area(accelerators.microscopiq(128, 128, units), tile)
    rows.append(
      Row(
        f'ReCoN share of compute area at 128x128, {units} units, %',
        share,
        100 * found.noc / found.compute,
        'ReCoN scaled by its switches from table 5',
      )
    )
  peak = lambda lanes, a: 2e-3 * 4096 * lanes / (1e-6 * a)
  rows += [
    Row(
      'peak density over OliVe at 2 bits',
      367.51 / 184.30,
      peak(2, micro.compute) / peak(1, olive.compute),
      'the paper compares what LLaMA-3-8B reaches, not peaks',
    ),
    Row(
      'peak density over GOBO at 2 bits',
      367.51 / 28.28,
      peak(2, micro.compute) / peak(1, gobo.compute),
      'with 0.216 mm2 for GOBO it is 34; at 4 bits 12',
    ),
  ]
  work = hw.workload.model('llama-3-8b', 'prefill', context=context)
  for units in (1, 8, 128):
    found = hw.cost(
      accelerators.microscopiq(64, 64, units), work, _micro(2, 4, outliers)
    ).sum()
    tops = 2e-3 * found.macs / found.total_cycles
    rows.append(
      Row(
        f'TOPS/mm2 reached on LLaMA-3-8B, {units} units',
        367.51 if units == 1 else None,
        tops / (1e-6 * found.area_um2.compute),
        'with the outliers of 2.36 bits one unit gets 68 requests a cycle; '
        'the published value needs less than 4'
        if units == 1
        else '',
      )
    )
  return rows


def power(outliers: float, context: int) -> list[Row]:
  """The power split of LLaMA-2-7B (calibrated) and VILA-7B (predicted)."""
  rows = []
  published = {
    'LLaMA-2-7B': (outliers, (56.23, 36.80, 5.94), 'by calibration'),
    'VILA-7B': (
      0.134,
      (55.98, 35.32, 7.65),
      'its outliers are not published: 13.4 % of the blocks assumed; from 12 '
      'to 20 % the ReCoN share goes from 7.1 to 9.0',
    ),
  }
  work = hw.workload.model('llama-2-7b', 'prefill', context=context)
  for name, (share, split, why) in published.items():
    energy = (
      hw.cost(accelerators.microscopiq(64, 64, 1), work, _micro(2, 4, share))
      .sum()
      .energy_pj
    )
    parts = np.array([energy.array, energy.sram, energy.noc])
    parts = 98.97 * parts / parts.sum()  # the published split leaves 1.03 %
    for part, value, ours in zip(
      ('PE array', 'memory on chip', 'ReCoN'), split, parts, strict=True
    ):
      rows.append(Row(f'{name}: {part}, % of power', value, ours, why))
  return rows


def speedups(outliers: float, context: int) -> list[Row]:
  """MicroScopiQ against OliVe, GOBO and an A100."""
  rows = []
  designs = {
    'v1': (_micro(4, 4, outliers), 1.50, 1.2),
    'v2': (_micro(2, 4, outliers), 2.47, 1.7),
  }
  baselines = {
    'OliVe W4A4': (accelerators.olive(64, 64), hw.precision(4, 4)),
    'OliVe W8A8': (accelerators.olive(64, 64), hw.precision(8, 8)),
    'GOBO': (accelerators.gobo(64, 64), hw.precision(3, 16, ebw=15.6)),
  }
  for phase in ('prefill', 'decode'):
    work = hw.workload.model('llama-2-7b', phase, context=context)
    total = lambda a, p, work=work: hw.cost(a, work, p).sum().total_cycles
    for version, (bits, mean, _) in designs.items():
      for units in (1, 128):
        ours = total(accelerators.microscopiq(64, 64, units), bits)
        for name, (array, precision) in baselines.items():
          rows.append(
            Row(
              f'{phase}, {version}, {units} ReCoN: speed-up over {name}',
              mean if units == 1 else None,
              total(array, precision) / ours,
              'published: a mean over baselines at equal accuracy'
              if units == 1
              else 'as many units as requests: no contention',
            )
          )
  # Equal multipliers and bandwidth: 55,296 PEs, 2 TB/s.
  for phase in ('prefill', 'decode'):
    work = hw.workload.model('llama-2-7b', phase, context=context)
    a100 = hw.cost(
      accelerators.gpu_roofline('a100'), work, hw.precision(4, 4)
    ).sum()
    seconds = a100.total_cycles / 1.41e9
    memory = accelerators.buffers(
      216, dram_bytes_per_cycle=2039.0, link_bytes_per_cycle=4096.0
    )
    for version, (bits, _, published) in designs.items():
      for units in (1, 1024):
        array = accelerators.microscopiq(216, 256, units, memory=memory)
        ours = hw.cost(array, work, bits).sum().total_cycles / 1e9
        rows.append(
          Row(
            f'{phase}, {version}, {units} ReCoN: speed-up over A100 W4A4',
            published if units == 1 else None,
            seconds / ours,
            'at peak an A100 does 1,248 TOPS at 4 bits, these PEs 111 or 221; '
            'decode waits for weights to be shifted in, a row a cycle',
          )
        )
  return rows


def temporal(outliers: float, context: int) -> list[Row]:
  """FineQ's ratios to an array of multipliers."""
  work = hw.workload.model('llama-2-7b', 'prefill', context=context)
  bits = hw.precision(
    3, 8, ebw=7 / 3, two=0.11, three=0.03, mean_magnitude=0.65
  )
  plain = hw.cost(
    accelerators.systolic(
      'ws', 64, 64, double_buffered=True, multiplier=(3, 8)
    ),
    work,
    bits,
  ).sum()
  rows = []
  for pulse in ('unary', 'weighted'):
    found = hw.cost(accelerators.fineq(64, 64, pulse=pulse), work, bits).sum()
    energy = lambda c: c.energy_pj.array + c.energy_pj.leakage
    saved = 100 * (1 - found.area_um2.array / plain.area_um2.array)
    rows += [
      Row(
        f'{pulse}: array area saved, %',
        61.2,
        saved,
        'by construction: the ratio is the input',
      ),
      Row(
        f'{pulse}: energy efficiency of the array',
        1.79,
        energy(plain) / energy(found),
        'calibrated for unary; published as "up to"'
        if pulse == 'unary'
        else 'predicted: shorter frames',
      ),
      Row(
        f'{pulse}: throughput at equal area',
        None,
        plain.compute_cycles
        / found.compute_cycles
        * (plain.area_um2.array / found.area_um2.array),
        'not published; unary frames of 3 lose what the area gains',
      ),
    ]
  return rows


# Blocks, width, width of the MLP, patches (positions, inputs) where there are.
_MIXPE_MODELS = {
  'ViT': (12, 768, 3072, (196, 768)),
  'ViT-Huge': (32, 1280, 5120, (256, 588)),
  'OPT-6.7B': (32, 4096, 16384, None),
  'LLaMA-2-13B': (40, 5120, 13824, None),
}
_MIXPE_TIMES = {  # of FP16, from the released results
  'ViT': (0.15, 0.61, 0.70, 0.82, 0.53),
  'ViT-Huge': (0.12, 0.47, 0.67, 0.82, 0.32),
  'OPT-6.7B': (0.10, 0.40, 0.68, 0.86, 0.19),
  'LLaMA-2-13B': (0.10, 0.40, 0.68, 0.86, 0.19),
}
_MIXPE_CORE = {'w4a8': 0.143, 'ant': 0.143, 'bitfusion': 0.333, 'int8': 0.333}
_MIXPE_CORE['w4a16'] = 0.143
_MIXPE_ORDER = ('w4a8', 'ant', 'bitfusion', 'int8', 'w4a16')


def mixpe_cost(
  name: str, design: str, *, fair: bool = False, grouped: bool = False
):
  """A model on one of MixPE's designs, batch 64, as its simulator runs it.

  Dequantization is a matmul more for each: of K/8 by N/128 for MixPE, of K by
  N/8 for all others. ANT has four fifths of the blocks at 4 bits, BitFusion
  the o projection of half of them; patches stay at the design's full width.
  With `fair`, operands have widths of their own; with `grouped`, all designs
  dequantize once a group, as MixPE does.
  """
  blocks, d, wide, patches = _MIXPE_MODELS[name]
  mixed = design in ('w4a8', 'w4a16')
  # Widths (weights, activations) of quantized and other layers.
  narrow, full = {
    'w4a8': ((4, 8), (8, 8)),
    'w4a16': ((4, 16) if fair else (8, 16), (16, 16)),
    'int8': ((8, 8), (8, 8)),
    'bitfusion': ((4, 4), (8, 8)),
    'ant': ((4, 4), (8, 8)),
    'fp16': ((16, 16), (16, 16)),
  }[design]
  entries = []
  for part, (k, n) in {
    'qkv': (d, 3 * d),
    'o': (d, d),
    'up': (d, wide),
    'down': (wide, d),
  }.items():
    share = {
      'ant': 0.8,
      'bitfusion': 0.5 if part == 'o' else 0.0,
    }.get(design, 1.0)
    low = round(share * blocks)
    entries += [(64, k, n, low, narrow), (64, k, n, blocks - low, full)]
    if mixed or grouped:
      entries.append((64, k // 8, max(1, n // 128), blocks, narrow))
    else:
      entries.append((64, k, n // 8, blocks, full))
  if patches:
    entries.append((64 * patches[0], patches[1], d, 1, full))
  entries = [e for e in entries if e[3]]
  m, k, n, count, bits = map(np.array, zip(*entries, strict=True))
  return hw.cost(
    accelerators.mixpe(design, as_published=not fair),
    hw.workload.gemm(m, k, n, count),
    hw.precision(bits[:, 0], bits[:, 1]),
  ).sum()


def mixpe(outliers: float, context: int) -> list[Row]:
  """MixPE's published times and core energies, FP16 = 1."""
  del outliers, context
  rows = []
  for name, times in _MIXPE_TIMES.items():
    base = mixpe_cost(name, 'fp16')
    for design, published in zip(_MIXPE_ORDER, times, strict=True):
      found = mixpe_cost(name, design)
      rows.append(
        Row(
          f'{name}, {design}: time',
          published,
          found.compute_cycles / base.compute_cycles,
          'compute cycles alone',
        )
      )
  name = 'LLaMA-2-13B'
  base = mixpe_cost(name, 'fp16')
  for design, published in _MIXPE_CORE.items():
    found = mixpe_cost(name, design)
    rows.append(
      Row(
        f'{name}, {design}: core energy',
        published,
        found.energy_pj.array / base.energy_pj.array,
        'one PE power for MixPE, INT8, BitFusion and ANT, as its simulator',
      )
    )
  for grouped in (False, True):
    base = mixpe_cost(name, 'fp16', fair=True, grouped=grouped)
    for design in ('w4a8', 'w4a16', 'int8', 'ant'):
      found = mixpe_cost(name, design, fair=True, grouped=grouped)
      rows.append(
        Row(
          f'{name}, {design}: time, operands at their own widths'
          + (', all dequantize once a group' if grouped else ''),
          None,
          found.compute_cycles / base.compute_cycles,
          'W4A16 takes twice as long with its activations at 16 bits'
          if design == 'w4a16'
          else '',
        )
      )
  return rows


SECTIONS = {
  'MicroScopiQ: area and density': areas,
  'MicroScopiQ: power': power,
  'MicroScopiQ: speed': speedups,
  'FineQ': temporal,
  'MixPE': mixpe,
}


def markdown(rows: list[Row]) -> str:
  """A table; differences relative to the published value."""
  number = lambda x: '' if x is None else f'{float(x):,.4g}'
  lines = ['| quantity | published | ours | difference | assumption |']
  lines.append('|---|---|---|---|---|')
  for row in rows:
    difference = ''
    if row.published is not None:
      difference = f'{100 * (float(row.ours) / row.published - 1):+.0f} %'
    lines.append(
      f'| {row.quantity} | {number(row.published)} | {number(row.ours)} | '
      f'{difference} | {row.why} |'
    )
  return '\n'.join(lines) + '\n'


def figure(sections: dict[str, list[Row]]):
  """Ours over published, one point a row."""
  fig, axes = plt.subplots(figsize=(7.2, 4.2), layout='constrained')
  markers = dict(zip(sections, 'osD^v', strict=True))
  for name, rows in sections.items():
    known = [r for r in rows if r.published is not None]
    axes.plot(
      [r.published for r in known],
      [float(r.ours) for r in known],
      markers[name],
      mfc='none',
      label=name,
    )
  line = np.array([0.05, 3e5])
  axes.plot(line, line, color='0.4', lw=1, label='equal')
  axes.set(
    xscale='log',
    yscale='log',
    xlabel='published [unit of the row]',
    ylabel='ours [unit of the row]',
  )
  axes.grid(True, color='0.9')
  axes.legend(fontsize=8)
  return fig


@gin.configurable
def tables(out=gin.REQUIRED, outlier_blocks=gin.REQUIRED, context=gin.REQUIRED):
  """Write the page and the figure; returns rows by section."""
  found = {n: f(outlier_blocks, context) for n, f in SECTIONS.items()}
  path = pathlib.Path(out)
  path.mkdir(parents=True, exist_ok=True)
  text = '# Published hardware tables, derived again\n\n'
  text += (
    '    python -m experiments.hardware_tables configs/hardware/tables.gin\n\n'
    f'Exact cost model (`mq_jax.hardware.cost`), {context} tokens of prefill '
    f'or one of decode, {100 * outlier_blocks:g} % of the micro-blocks with '
    'outliers. Absolute energies are not published; ratios are.\n\n'
    'Areas, the power split and all of MixPE come out. The speeds of '
    'MicroScopiQ do not with one ReCoN: a 64 x 64 array of 2-bit weights asks '
    'it for 68 vectors a cycle. With as many units as requests its speed-up '
    'over OliVe at 4 bits is the 2x of twice the lanes, and 4-bit weights '
    'gain nothing.\n\n'
  )
  for name, rows in found.items():
    text += f'## {name}\n\n{markdown(rows)}\n'
  text += '![ours over published](figure.png)\n'
  (path / 'README.md').write_text(text, encoding='utf-8')
  fig = figure(found)
  fig.savefig(path / 'figure.png', dpi=120)
  plt.close(fig)
  return found


def main(argv: list[str] | None = None) -> None:
  for name, rows in _pages.main(__doc__, tables, argv).items():
    print(f'{name}\n{markdown(rows)}')


if __name__ == '__main__':
  main()
