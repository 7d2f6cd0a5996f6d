"""Publish the study of weights and activations: quality by setting.

    mq run configs/studies/activations.gin --out runs/activations
    python -m experiments.activations_table \
        configs/studies/activations.gin runs/activations

Writes what `experiments.publish` does, with a table of recipes by setting
(W4A16, W4A8, ...) and a figure of it in place of quality over bits. Rows
without a setting of their own, as those of an ablation, are in the whole table
only.
"""

import argparse
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import figure as mpl

from experiments import _pages, publish
from mq_jax.report import style

SETTINGS = ('W4A16', 'W4A8', 'W4A4', 'W2A16', 'W2A8')

# How inputs are transformed, by what `activations` say of it.
TRANSFORMS = ('as they come', 'smooth', 'rotate')


def setting(record: Mapping[str, Any]) -> tuple[str, str] | None:
  """A record's setting and transform; None for what has none.

  Examples:
    >>> mx = {'format': 'mx_int', 'bits': 8, 'smooth': 0.7}
    >>> setting({'recipe': 'gptq w4', 'family': 'gptq',
    ...          'options': {'bits': 4, 'activations': mx}})
    ('W4A8', 'smooth')
  """
  options = dict(record['options'])
  found = options.pop('activations', {})
  plain = found.get('format', 'mx_int') == 'mx_int'
  rest = set(options) - {'bits', 'group'}
  kinds = [name for name in ('smooth', 'rotate') if found.get(name)]
  extra = set(found) - {'format', 'bits', 'smooth', 'rotate'}
  searched = isinstance(found.get('smooth'), str)
  if rest or extra or searched or not plain or len(kinds) > 1:
    return None
  weights = options.get('bits', 16)
  inputs = found.get('bits', 16)
  return f'W{weights}A{inputs}', kinds[0] if kinds else TRANSFORMS[0]


def _by_place(records) -> dict[tuple[str, str, str, str], float]:
  """Bits per byte by model, recipe, setting and transform."""
  found = {}
  for record in records:
    place = setting(record)
    if place is not None and record.get('bits_per_byte') is not None:
      key = (record['model'], record['family'], *place)
      found[key] = record['bits_per_byte']
  return found


def summary(records: Sequence[Mapping[str, Any]]) -> str:
  """A table a model: recipes and transforms by setting."""
  found = _by_place(records)
  lines = []
  for model in dict.fromkeys(r['model'] for r in records):
    plain = found.get((model, 'none', 'W16A16', TRANSFORMS[0]))
    lines += [f'Bits per byte, {model}, {plain:.4f} unquantized:', '']
    rows = []
    families = dict.fromkeys(f for m, f, *_ in found if m == model)
    shown = [s for s in SETTINGS if any(k[2] == s for k in found)]
    for family in (f for f in families if f != 'none'):
      for transform in TRANSFORMS:
        cells = [found.get((model, family, s, transform)) for s in shown]
        if any(cell is not None for cell in cells):
          rows.append([family, transform, *cells])
    lines.append(_pages.table(['weights', 'inputs', *shown], rows))
  return '\n'.join(lines)


def draw(
  records: Sequence[Mapping[str, Any]], *, footnote: str = ''
) -> mpl.Figure:
  """Bits per byte by setting: a panel a model, on one logarithmic axis.

  Colours are recipes, shapes transforms.
  """
  found = _by_place(records)
  models = list(dict.fromkeys(r['model'] for r in records))
  families = [f for f in dict.fromkeys(k[1] for k in found) if f != 'none']
  shown = [s for s in SETTINGS if any(k[2] == s for k in found)]
  fig = style.new(1.2 + 4.6 * len(models), 4.8)
  panels = fig.subplots(1, len(models), squeeze=False, sharey=True)[0]
  width = 0.8 / (len(families) * len(TRANSFORMS))
  for axes, model in zip(panels, models):
    for i, family in enumerate(families):
      for j, transform in enumerate(TRANSFORMS):
        spots = [
          (x + width * (i * len(TRANSFORMS) + j + 0.5) - 0.4, value)
          for x, s in enumerate(shown)
          if (value := found.get((model, family, s, transform))) is not None
        ]
        if spots:
          axes.plot(
            *zip(*spots), ls='none', marker='os^'[j], ms=6.5, mec='k', mew=0.5,
            color=style.COLORS[i + 1],
          )  # fmt: skip
    plain = found.get((model, 'none', 'W16A16', TRANSFORMS[0]))
    if plain is not None:
      axes.axhline(plain, color='0.35', lw=1, ls=style.DASHES)
    for x in range(1, len(shown)):
      axes.axvline(x - 0.5, color='0.85', lw=0.8)
    axes.set_xlim(-0.5, len(shown) - 0.5)
    axes.set_xticks(range(len(shown)), shown)
    axes.set_yscale('log')
    style.grid(axes, 'y')
    style.title(axes, model)
  panels[0].set_ylabel('bits per byte of text [bit/byte]')
  values = list(found.values())
  ticks = [t for t in (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)]
  inside = [t for t in ticks if 0.95 * min(values) < t < 1.05 * max(values)]
  panels[0].set_yticks(inside, [f'{t:g}' for t in inside])
  panels[0].set_yticks([], minor=True)
  dot = lambda **look: fig.axes[0].plot([], [], ls='none', mec='k', **look)[0]
  handles = [
    dot(marker='D', color=style.COLORS[i + 1], label=f'{f} weights')
    for i, f in enumerate(families)
  ]
  handles += [
    dot(marker='os^'[j], color='w', label=f'inputs: {t}')
    for j, t in enumerate(TRANSFORMS)
  ]
  handles.append(
    fig.axes[0].plot(
      [], [], color='0.35', ls=style.DASHES, label='unquantized'
    )[0]
  )
  fig.legend(
    handles=handles, loc='outside upper center', ncols=4, fontsize=8,
    frameon=False,
  )  # fmt: skip
  style.footnote(fig, footnote)
  return fig


def main(argv: list[str] | None = None) -> pathlib.Path:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('config', metavar='CONFIG.gin')
  parser.add_argument('run', metavar='RUN_DIR')
  parser.add_argument('--set', action='append', default=[], metavar='BINDING')
  options = parser.parse_args(argv)
  folder = publish.publish(
    options.config,
    options.run,
    bindings=options.set,
    draw=draw,
    summary=summary,
  )
  print(f'written to {folder}')
  return folder


if __name__ == '__main__':
  main()
