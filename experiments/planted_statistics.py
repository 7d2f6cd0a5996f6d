"""Does the planted model have outliers where large language models have them?

    python -m experiments.planted_statistics [model] [--data ../shared/data]
        [--out runs/planted_statistics]

Compares a model with its planted twin (`mq_jax.models.bundled.plant`):

- weights, by kind of layer: share beyond 3 sigma of their group of 128, share
  of micro-blocks of 8 that hold at least one such outlier (what MicroScopiQ
  prunes for), excess kurtosis; along the outputs and along the inputs;
- activations: per input channel the largest |activation|, over the median
  channel, next to the profile of OPT-125M and OPT-1.3B where the data folder
  has it;
- perplexity, which planting must leave as it is.

Writes a table (printed, and as JSON) and a figure. One minute on one core.
"""

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from flax import nnx

from mq_jax.data import docs
from mq_jax.evaluation import cuts, perplexity
from mq_jax.models import bundled, decoder

KINDS = ('q', 'k', 'v', 'o', 'gate', 'up', 'down')
OPT_NAMES = {
  'q': 'self_attn.q_proj',
  'o': 'self_attn.out_proj',
  'gate': 'fc1',
  'down': 'fc2',
}


class Recorder(nnx.Module):
  """A layer that keeps the largest |input| of each channel it has seen."""

  def __init__(self, inner: nnx.Module, seen: list):
    self.inner, self.seen = inner, nnx.static(seen)

  def __call__(self, x: jax.Array) -> jax.Array:
    self.seen.append(np.abs(np.asarray(x)).max(axis=(0, 1)))
    return self.inner(x)


def weight_statistics(weight: np.ndarray, group: int = 128) -> dict:
  """Outlier statistics of groups along the last axis; a rest is left out."""
  size = min(group, weight.shape[-1] // 8 * 8)
  count = weight.shape[-1] // size
  groups = weight[..., : count * size].reshape(-1, size).astype(np.float64)
  centred = groups - groups.mean(-1, keepdims=True)
  sigma = groups.std(-1, keepdims=True)
  outlier = np.abs(centred) > 3 * sigma
  return {
    'beyond_3_sigma': outlier.mean(),
    'micro_blocks': outlier.reshape(-1, 8).any(-1).mean(),
    'kurtosis': ((centred / sigma) ** 4).mean() - 3,
  }


def all_weights(model) -> list[dict]:
  """Mean statistics of the layers of each kind, along both axes."""
  rows = []
  for axis, flip in (('out', False), ('in', True)):
    for kind in KINDS:
      block = 'self_attn' if kind in 'qkvo' else 'mlp'
      found = []
      for layer in model.params['layers'].values():
        w = np.asarray(layer[block][f'{kind}_proj']['kernel'])  # [k, n]
        found.append((w.size, weight_statistics(w.T if flip else w)))
      row = {key: np.mean([s[key] for _, s in found]) for key in found[0][1]}
      size = sum(n for n, _ in found)
      rows.append({'axis': axis, 'layer': kind, 'size': size, **row})
    mine = [r for r in rows if r['axis'] == axis]
    sizes = [r['size'] for r in mine]
    total = {
      key: np.average([r[key] for r in mine], weights=sizes)
      for key in ('beyond_3_sigma', 'micro_blocks', 'kurtosis')
    }
    rows.append({'axis': axis, 'layer': 'all', 'size': sum(sizes), **total})
  return rows


def channel_maxima(model, tokens: np.ndarray) -> dict[str, np.ndarray]:
  """Largest |input| of each channel, over its layer's median. [layer, k]."""
  graph = nnx.graphdef(
    nnx.eval_shape(lambda: decoder.Decoder(model.config, rngs=nnx.Rngs(0)))
  )
  network = nnx.merge(graph, model.params)
  seen = {kind: [] for kind in OPT_NAMES}
  for block in network.layers:
    for kind in seen:
      part = block.self_attn if kind in 'qo' else block.mlp
      inner = getattr(part, f'{kind}_proj')
      setattr(part, f'{kind}_proj', Recorder(inner, seen[kind]))
  network(jnp.asarray(tokens))
  maxima = {kind: np.stack(values) for kind, values in seen.items()}
  return {
    kind: m / np.median(m, axis=-1, keepdims=True) for kind, m in maxima.items()
  }


def activation_rows(maxima: dict[str, np.ndarray], name: str) -> list[dict]:
  return [
    {
      'model': name,
      'input of': kind,
      'p99 / median': np.quantile(m, 0.99, axis=-1).mean(),
      'max / median': m.max(-1).mean(),
      'over 6x': (m > 6).mean(),
      'over 20x': (m > 20).mean(),
    }
    for kind, m in maxima.items()
  ]


def opt_rows(path: pathlib.Path) -> list[dict]:
  profile = json.loads(path.read_text())
  levels = profile['quantile_levels']
  p99, median = levels.index(99), levels.index(50)
  rows = []
  for name, layers in profile['models'].items():
    for kind, suffix in OPT_NAMES.items():
      mine = [v for k, v in layers.items() if k.endswith(suffix)]
      q = np.array([v['abs_max_quantiles'] for v in mine])
      channels = sum(v['channels'] for v in mine)
      over = lambda x, mine=mine, n=channels: (
        sum(v[f'channels_over_{x}x_median'] for v in mine) / n
      )
      rows.append(
        {
          'model': name,
          'input of': kind,
          'p99 / median': (q[:, p99] / q[:, median]).mean(),
          'max / median': (q[:, -1] / q[:, median]).mean(),
          'over 6x': over(6),
          'over 20x': over(20),
        }
      )
  return rows


def table(rows: list[dict]) -> str:
  """Aligned text; shares in percent."""
  shares = {'beyond_3_sigma', 'micro_blocks', 'over 6x', 'over 20x'}

  def text(key, value):
    if key in shares:
      return f'{100 * value:.2f} %'
    return str(value) if isinstance(value, str | int) else f'{value:.3g}'

  cells = [list(rows[0])] + [[text(k, v) for k, v in r.items()] for r in rows]
  widths = [max(map(len, column)) for column in zip(*cells)]
  return '\n'.join(
    '  '.join(c.rjust(w) for c, w in zip(line, widths)) for line in cells
  )


def draw(models, weights, maxima, path: pathlib.Path) -> None:
  """Sorted channel maxima above, outlier shares of the weights below."""
  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(2, 4, figsize=(13, 6), layout='constrained')
  for ax, kind in zip(axes[0], OPT_NAMES):
    for model in models:
      m = np.sort(maxima[model.name][kind], axis=-1)[:, ::-1]
      rank = 100 * (np.arange(m.shape[1]) + 1) / m.shape[1]
      ax.loglog(rank, np.exp(np.log(m + 1e-6).mean(0)), label=model.name)
    ax.axhline(6, color='grey', lw=0.5)
    ax.set(title=f'input of {kind}_proj', xlabel='channels, largest first (%)')
  axes[0, 0].set_ylabel('max |activation| / median channel')
  axes[0, 0].legend()
  panels = [
    (axis, key)
    for axis in ('out', 'in')
    for key in ('beyond_3_sigma', 'micro_blocks')
  ]
  for ax, (axis, key) in zip(axes[1], panels):
    for i, model in enumerate(models):
      rows = [r for r in weights[model.name] if r['axis'] == axis]
      x = np.arange(len(rows)) + 0.4 * i
      ax.bar(x, [100 * r[key] for r in rows], 0.4, label=model.name)
    ax.set_xticks(np.arange(len(rows)) + 0.2, [r['layer'] for r in rows])
    ax.set(title=f'{key.replace("_", " ")}, along {axis}puts', ylabel='%')
  figure.savefig(path, dpi=120)
  plt.close(figure)


def main(argv: list[str] | None = None) -> dict:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('model', nargs='?', default='reference')
  parser.add_argument('--data', default='../shared/data')
  parser.add_argument('--text', help='text file; default: the docs corpus')
  parser.add_argument('--out', default='runs/planted_statistics')
  options = parser.parse_args(argv)
  out = pathlib.Path(options.out)
  out.mkdir(parents=True, exist_ok=True)

  plain = bundled.open_model(options.model)
  models = [plain, bundled.plant(plain)]
  if options.text:
    text = pathlib.Path(options.text).read_text(encoding='utf-8')
  else:
    text = docs.docs_text('valid', 60_000)
  windows = cuts.text_windows(
    plain.tokenizer,
    text,
    plain.config.max_position_embeddings - 1,
    plain.bos,
    limit=32,
  )
  weights = {m.name: all_weights(m) for m in models}
  maxima = {m.name: channel_maxima(m, windows.tokens[:, :-1]) for m in models}
  result = {
    'weights': [
      {'model': name, **row} for name, rows in weights.items() for row in rows
    ],
    'activations': [
      row for name, m in maxima.items() for row in activation_rows(m, name)
    ],
    'perplexity': {
      m.name: perplexity.evaluate(m.apply, m.params, windows.tokens).perplexity
      for m in models
    },
  }
  profile = pathlib.Path(options.data, 'opt-activation-profile/profile.json')
  if profile.is_file():
    result['activations'] += opt_rows(profile)
  print(table(result['weights']), table(result['activations']), sep='\n\n')
  print('\nperplexity:', result['perplexity'])
  (out / 'statistics.json').write_text(
    json.dumps(result, indent=1, default=float)
  )
  draw(models, weights, maxima, out / 'statistics.png')
  print(f'figure: {out / "statistics.png"}')
  return result


if __name__ == '__main__':
  main()
