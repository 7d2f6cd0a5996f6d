"""Folders of runs, written by what writes real ones, with numbers made up."""

import json
import math

from mq_jax.lab import config, runs
from mq_jax.report import hardware
from mq_jax.report.sources import Source

DATA = {
  'text': {'source': 'a text', 'sha256': '0123456789abcdef' * 4},
  'calibration': {'source': 'another', 'sha256': 'fedcba9876543210' * 4},
}
SITES = tuple(f'layers/{i}/up/kernel' for i in range(3))


def study(labels=('none', 'rtn w2', 'gptq w3'), seed=0, windows=4):
  return config.Study(
    models=('m',),
    rows=tuple(config.Row(x, x.split()[0]) for x in labels),
    text=None,
    calibration_text=None,
    windows=windows,
    calibration_windows=2,
    batch=1,
    artifact=None,
    seed=seed,
  )


def row(label, bits, loss, model='m'):
  """A record as `mq run` appends it; loss in bits per byte."""
  return {
    'model': model,
    'recipe': label,
    'family': label.split()[0],
    **{'bits': round(bits), 'ebw': bits, 'ebw_paper': float(round(bits))},
    **{'nll': 2 * loss, 'perplexity': math.exp(2 * loss)},
    **{'bits_per_byte': loss, 'tokens': 96, 'bytes': 300},
    **{'seconds': 1.5, 'eval_seconds': 0.5, 'options': {}, 'status': 'ok'},
  }


def sites(bits):
  return [
    {'site': name, 'ebw': bits + i / 8, 'output_error': 2.0**-bits}
    | {'status': 'ok'}
    for i, name in enumerate(SITES)
  ]


def run(path, rows, **options):
  """A folder of `mq run` with some of its rows done."""
  with runs.open_run(
    path,
    study(**options),
    operative='compare.seed = 0\n',
    data=DATA,
    device='cpu: test',
  ) as folder:
    for record in rows:
      folder.append(record, sites(record['ebw'] or 0.0))
  return path


def three(rtn=2.5, gptq=2.0):
  return [
    row('none', 16.0, 1.5),
    row('rtn w2', 2.25, rtn),
    row('gptq w3', 3.25, gptq),
  ]


def allocation(path, report):
  """A finished folder of `mq allocate`, of a report as its tests have it."""
  (path / 'state').mkdir(parents=True)
  setup = {
    'model': report['model'],
    'accelerator': None,
    'seed': report['seed'],
    'texts': {
      'search': DATA['calibration'] | {'windows': 8, 'tokens': 'a'},
      'test': DATA['text'] | {'windows': 16, 'tokens': 'b'},
    },
    'versions': {'jax': '1'},
    'device': 'cpu: test',
  }
  (path / 'state/setup.json').write_text(json.dumps(setup))
  (path / 'report.json').write_text(json.dumps(report | {'setup': setup}))
  return path


def many(count, rows=26, layers=6):
  """Sources of many runs, each of many recipes and sites."""
  names = [
    f'layers/{i}/{s}/kernel'
    for i in range(layers)
    for s in 'q k v o up down'.split()
  ]
  out = []
  for i in range(count):
    found, by_site = [], {}
    for j in range(rows):
      bits = 2 + (7 * i + 13 * j) % 41 / 10
      label = f'gptq w2 g{j} sigma={i // 2}'
      loss = 1.8 + 3 / bits**2 + ((i * j) % 17) / 50
      found.append(row(label, bits, loss) | {'text': '96 tokens of a text'})
      by_site['m', label] = {
        s: {'ebw': bits, 'output_error': 0.1 / bits} for s in names
      }
    out.append(
      Source(
        kind='run',
        name=f'study-{i:04d}',
        path=f'runs/study-{i:04d}',
        state='finished',
        finished=True,
        config={'models': ['m'], 'sigma': i // 2, 'seed': i % 2}
        | {'recipes': [r['recipe'] for r in found], 'device': 'cpu'},
        facts={'config': 'study.gin 0123abcd', 'commit': '0123abcd'}
        | {'begun': '2026-01-01 00:00'},
        operative=f'compare.sigma = {i}\n' * 90,
        rows=tuple(found),
        sites=by_site,
      )
    )
  return out


def cost(path, model='shapes', entries=('systolic', 'olive')):
  """A folder of `mq cost --out`."""

  def numbers(scale):
    parts = {p.field: scale for p in (*hardware.CYCLES, *hardware.ENERGY)}
    return parts | {
      **dict(m=8, k=16, n=32, count=2, recipe='rtn(bits=4)', macs=4096),
      **dict(noc_cycles=0.0, sram_cycles=0.0, dram_cycles=0.0),
      **dict(weight_bits=4, activation_bits=8, ebw=4.25, outlier_blocks=0.02),
      **dict(total_cycles=5 * scale, time_s=1e-6 * scale, total_pj=5 * scale),
      **dict(dram_bytes=3e6, utilization=0.5, conflict_rate=0.0),
      **dict(clock_ghz=1.0, array_um2=1e4, noc_um2=0.0, control_um2=100.0),
      **dict(sram_um2=1e6, total_um2=1.0101e6),
    }

  path.mkdir()
  report = {
    **dict(model=model, phase='prefill', batch=1, context=64, notes=['a note']),
    'entries': [
      {
        **dict(entry=name, clock_ghz=1.0, accelerator=name, activation_bits=8),
        'total': numbers(4e6 * (i + 1)) | {'entry': name},
        'sites': [numbers(2e6 * (i + 1)) | {'site': s} for s in SITES[:2]],
      }
      for i, name in enumerate(entries)
    ],
  }
  (path / 'cost.json').write_text(json.dumps(report))
  return path
