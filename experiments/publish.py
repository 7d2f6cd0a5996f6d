"""Keep what is worth keeping of a finished study under experiments/results/.

    mq run configs/studies/microscopiq_sigma_sweep.gin --out runs/sigma
    python -m experiments.publish configs/studies/microscopiq_sigma_sweep.gin \
        runs/sigma --over sigma

Writes README.md (command, versions, the table with the sites' errors),
results.csv and figure.png into a folder named as the config. A run of another
study than the config describes is refused.

--over OPTION draws quality and bits over an option of the recipe; --below EBW
leaves out of the figure what has more bits.
"""

import argparse
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib import figure as mpl

from experiments import _pages
from mq_jax.lab import config
from mq_jax.report import figures, style, tables

RESULTS = pathlib.Path(__file__).parent / 'results'

# What papers report over an option, drawn beside our `ebw_paper`.
PAPER_EBW = {
  # MicroScopiQ, arXiv 2411.05282, figure 14, LLaMA3-8B; read off the figure's
  # text, order inferred.
  'micro_block': {
    2: 2.1, 4: 2.29, 8: 2.42, 16: 3.17, 32: 4.65, 64: 4.93, 128: 6.28, 256: 7.53
  },
}  # fmt: skip

_COLUMNS = tuple(
  c for c in tables.COLUMNS if c.field not in ('bits', 'nll', 'seconds')
)
_ERRORS = (
  tables.Column('output_error', 'output error', '', '.5f'),
  tables.Column('weight_mse', 'weight error', '', '.5f'),
  tables.Column('outliers', 'outliers [%]', '', '.2f'),
)
COLUMNS = (*_COLUMNS[:-1], *_ERRORS, _COLUMNS[-1])


def read(path: pathlib.Path, name: str) -> list[dict]:
  lines = (path / name).read_text(encoding='utf-8').splitlines()
  return [json.loads(line) for line in lines]


def with_errors(records: list[dict], sites: list[dict]) -> list[dict]:
  """Records with the mean of their sites' relative errors, and outliers.

  `output_error` and `weight_mse` are means over sites; `outliers` is the
  share of all weights, in percent.
  """
  found = []
  for record in records:
    key = record['model'], record['recipe']
    mine = [s for s in sites if (s['model'], s['recipe']) == key]
    extra = {}
    for field in ('output_error', 'weight_mse'):
      values = [s[field] for s in mine if s.get(field) is not None]
      if values:
        extra[field] = sum(values) / len(values)
    if mine and all('outliers' in s for s in mine):
      weights = sum(math.prod(s['shape']) for s in mine)
      extra['outliers'] = 100 * sum(s['outliers'] for s in mine) / weights
    found.append({**record, **extra})
  return found


def markdown(records: Sequence[Mapping[str, Any]]) -> str:
  """The records as a Markdown table with the sites' errors."""
  shown = [
    c for c in COLUMNS if any(r.get(c.field) is not None for r in records)
  ]
  line = lambda cells: '| ' + ' | '.join(cells) + ' |'
  rows = [line(c.heading for c in shown)]
  rows.append(line('---:' if c.format else '---' for c in shown))
  for record in records:
    rows.append(line(tables.cell(record, c).replace('|', '\\|') for c in shown))
  return '\n'.join(rows) + '\n'


def over_option(
  records: Sequence[Mapping[str, Any]], option: str, *, footnote: str = ''
) -> mpl.Figure:
  """Bits per byte, and bits a weight, over an option of a recipe.

  One column of panels a model, one line a width (`bits`).

  Raises:
    ValueError: if no record has the option.
  """
  drawn = [
    r
    for r in records
    if option in r.get('options', {}) and r.get('bits_per_byte') is not None
  ]
  if not drawn:
    raise ValueError(f'no figure: no record has the option {option!r}')
  values = sorted({r['options'][option] for r in drawn})
  place = {value: i for i, value in enumerate(values)}
  models = list(dict.fromkeys(r['model'] for r in drawn))
  widths = sorted({r['bits'] for r in drawn})
  fig = mpl.Figure(
    figsize=(1.2 + 4.2 * len(models), 6.0), dpi=150, layout='constrained'
  )
  panels = fig.subplots(
    2, len(models), squeeze=False, sharex='col', sharey='row'
  )
  paper = PAPER_EBW.get(option, {})
  for (quality, bits), model in zip(panels.T, models):
    for width, marker, color in zip(widths, style.MARKERS, style.COLORS):
      rows = sorted(
        (r for r in drawn if r['model'] == model and r['bits'] == width),
        key=lambda r: r['options'][option],
      )
      x = [place[r['options'][option]] for r in rows]
      look = {'marker': marker, 'color': color, 'ms': 5}
      quality.plot(
        x, [r['bits_per_byte'] for r in rows], label=f'{width} bits', **look
      )
      bits.plot(x, [r['ebw'] for r in rows], label=f'ebw, {width} bits', **look)
      bits.plot(
        x,
        [r['ebw_paper'] for r in rows],
        ls='--',
        label=f'ebw_paper, {width} bits',
        **look,
      )
    plain = [
      r['bits_per_byte']
      for r in records
      if r['model'] == model and r.get('family') == 'none'
    ]
    if plain:
      quality.axhline(
        plain[0], color='0.35', lw=1, ls=(0, (5, 3)), label='unquantized'
      )
    known = [v for v in values if v in paper]
    if known:
      bits.plot(
        [place[v] for v in known],
        [paper[v] for v in known],
        'kx:',
        label='published, LLaMA3-8B',
      )
    quality.set_title(model, fontsize=10)
    bits.set_xlabel(option)
    bits.set_xticks(
      range(len(values)),
      ['none' if v >= 100 and option == 'sigma' else f'{v:g}' for v in values],
    )
    for axes in (quality, bits):
      axes.grid(True, color='0.9', lw=0.6)
      axes.set_axisbelow(True)
  panels[0, 0].set_ylabel('bits per byte of text [bit/byte]')
  panels[1, 0].set_ylabel('effective bit width [bit/weight]')
  panels[0, -1].legend(fontsize=7)
  panels[1, -1].legend(fontsize=7)
  if footnote:
    fig.supxlabel(footnote, fontsize=7, color='0.3', ha='left', x=0.01)
  return fig


def _tick(option: str, value: Any) -> str:
  # A threshold that no weight exceeds: gin and JSON have no infinity.
  return 'none' if option == 'sigma' and value >= 100 else f'{value:g}'


def publish(
  path: str | os.PathLike,
  run: str | os.PathLike,
  *,
  bindings: Sequence[str] = (),
  over: str | None = None,
  below: float | None = None,
  results: pathlib.Path = RESULTS,
  draw: Callable[..., mpl.Figure] | None = None,
  summary: Callable[..., str] | None = None,
) -> pathlib.Path:
  """Write the folder of one study; returns it.

  Args:
    path: Of the config.
    run: Folder of the run.
    bindings: That it was run with.
    over: Draws quality and bits over an option.
    below: Leaves wider rows out of the figure.
    results: Where the study's folder is made.
    draw: Another figure, `draw(records, footnote=...)`.
    summary: Text of the records that stands above their table.

  Raises:
    ValueError: if the run is not of this config, or not finished.
  """
  path, run = pathlib.Path(path), pathlib.Path(run)
  study, _ = config.load(path, bindings)
  begun = json.loads((run / 'versions.json').read_text(encoding='utf-8'))
  if begun['run'] != study.digest:
    raise ValueError(
      f'{run}: is run {begun["run"]}, {path} describes {study.digest}; give '
      'the bindings that it was run with'
    )
  records = with_errors(read(run, 'results.jsonl'), read(run, 'sites.jsonl'))
  order = {
    (model, row.label): i
    for i, (model, row) in enumerate(
      (model, row) for model in study.models for row in study.rows
    )
  }
  latest = {(r['model'], r['recipe']): r for r in records}
  if set(latest) != set(order):
    raise ValueError(f'{run}: {len(latest)} of {len(order)} rows are there')
  records = [latest[key] for key in order]
  records = [{**r, 'model': pathlib.Path(r['model']).name} for r in records]
  footnote = f'{path.name} ({study.digest}), seed {study.seed}'
  if draw is not None:
    figure = draw(records, footnote=footnote)
  elif over is not None:
    figure = over_option(records, over, footnote=footnote)
  else:
    kept = [
      r
      for r in records
      if below is None or r['family'] == 'none' or (r['ebw'] or 99) < below
    ]
    figure = figures.quality_over_bits(kept, footnote=footnote)
  folder = results / path.stem
  folder.mkdir(parents=True, exist_ok=True)
  figure.savefig(folder / 'figure.png')
  (folder / 'results.csv').write_text(tables.csv_text(records))
  page = _page(path, begun, bindings, records)
  if summary is not None:
    page = page.replace('\n| model |', f'\n{summary(records)}\n| model |', 1)
    page += f'\n{_pages.MEANING}{_pages.meaning_of(folder / "README.md")}'
  (folder / 'README.md').write_text(page)
  return folder


def _page(path, begun, bindings, records) -> str:
  options = ''.join(f" --set '{b}'" for b in bindings)
  seconds = sum((r['seconds'] or 0) + (r['eval_seconds'] or 0) for r in records)
  versions = ', '.join(
    f'{name} {begun["versions"][name]}' for name in ('mq_jax', 'jax', 'numpy')
  )
  git = begun.get('git') or {}
  commit = git.get('commit', 'unknown')[:10]
  if git.get('changed'):
    commit += ' with changes'
  return '\n'.join(
    [
      f'# {path.stem}',
      '',
      f'    mq run configs/studies/{path.name}{options}',
      '',
      f'{seconds:.0f} s on {begun["device"]}; {versions}; commit {commit}; '
      f'seed {begun["seed"]}; text: {begun["data"]["text"]["source"]}; '
      f'calibration: {begun["data"]["calibration"]["source"]}. `output error` '
      'and `weight error` are relative squared errors, means over sites.',
      '',
      markdown(records),
      '![figure](figure.png)',
      '',
    ]
  )


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('config', metavar='CONFIG.gin')
  parser.add_argument('run', metavar='RUN_DIR')
  parser.add_argument('--set', action='append', default=[], metavar='BINDING')
  parser.add_argument('--over', metavar='OPTION')
  parser.add_argument('--below', type=float, metavar='EBW')
  options = parser.parse_args(argv)
  folder = publish(
    options.config,
    options.run,
    bindings=options.set,
    over=options.over,
    below=options.below,
  )
  print(f'written to {folder}')


if __name__ == '__main__':
  main()
