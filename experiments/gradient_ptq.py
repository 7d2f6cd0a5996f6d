"""What matters when rounding is learned: loss, variable, optimizer, data.

python -m experiments.gradient_ptq configs/learning/gradient_ptq.gin

The first block of a decoder, its matrices rounded to nearest and then learned,
with one thing changed at a time. The error is that of the block's outputs on
windows that nothing saw, over their size, whatever was learned by.
"""

import pathlib
import time
from typing import Any

import gin
import jax
import numpy as np
from matplotlib import figure as mpl

from experiments import _pages
from mq_jax import learn, plans, recipes, streaming
from mq_jax.lab import measure, opening
from mq_jax.learn import losses
from mq_jax.models import decoder
from mq_jax.report import style

_TEXTS = ('text', 'shuffled', 'random')


class Bench:
  """The first block of a model, and how well it does when it is learned."""

  def __init__(self, model: opening.LanguageModel, recipe: recipes.Recipe):
    self.model, self.recipe = model, recipe
    parts = decoder.parts(model.config)
    whole = streaming.of_params(parts, model.params)
    self.blocks = whole._replace(count=1)

  def windows(
    self, text: str, count: int, length: int, seed: int
  ) -> np.ndarray:
    """Windows i32[count, length] of a kind, drawn by the seed.

    Raises:
      ValueError: for an unknown kind, or fewer windows than asked for.
    """
    rng = np.random.default_rng(seed)
    if text not in _TEXTS:
      raise ValueError(f'gradient_ptq: text={text!r} is not one of {_TEXTS}')
    if text == 'random':
      size = self.model.config.vocab_size
      return rng.integers(0, size, (count, length)).astype(np.int32)
    found = measure.calibration_batches(
      self.model, measure.calibration_text(None), count, 1, seed
    )
    if len(found) < count:
      raise ValueError(
        f'gradient_ptq: {count} windows asked for; the text has {len(found)}'
      )
    tokens = np.concatenate(found)[:, :length]
    return rng.permuted(tokens, axis=1) if text == 'shuffled' else tokens

  def test(self, count: int, length: int) -> np.ndarray:
    """Windows of the text that models are evaluated on."""
    text = measure.evaluation_text(None)
    return measure.windows(self.model, text, count).tokens[:, :length]

  def errors(
    self, options: learn.Learning, tokens: np.ndarray, test: np.ndarray
  ) -> tuple[float, float]:
    """Relative errors on the test, rounded to nearest and learned."""
    (x,) = streaming.begin(self.blocks, [test])
    found = []
    learned = learn.refiner(options, {})

    def refine(index, f, params, packed, *streams):
      wanted = losses.targets(f, params, (x,))
      loss = jax.jit(losses.mse(f))
      error = lambda p: float(loss(plans.decode(p), ((x,), wanted)))
      done = learned(index, f, params, packed, *streams)
      found.extend([error(packed), error(done)])
      return done

    sites = streaming.find_sites(self.blocks, tokens[:1])
    plan = plans.uniform(sites, self.recipe)
    stream = streaming.begin(self.blocks, [tokens])
    list(streaming.quantize(self.blocks, plan, stream, refine=refine))
    nearest, after = found
    return nearest, after

  def left(
    self, options: dict[str, Any], length: int, test: np.ndarray, seeds: Any
  ) -> tuple[float, list[float]]:
    """The error rounded to nearest, and what is left of it, by seed.

    Args:
      options: Of learning, and `text` and `windows`, what it is learned on.
      length: Of windows.
      test: Windows that errors are measured on.
      seeds: Of windows and of training.
    """
    options = dict(options)
    text, windows = options.pop('text'), options.pop('windows')
    shares = []
    for seed in seeds:
      tokens = self.windows(text, windows, length, seed)
      learning = learn.Learning(**options, seed=seed)
      nearest, after = self.errors(learning, tokens, test)
      shares.append(after / nearest)
    return nearest, shares


def draw(records: list[dict], footnote: str) -> mpl.Figure:
  """Errors left, by axis, with the spread of seeds."""
  axes = list(dict.fromkeys(r['axis'] for r in records))
  fig = style.new(9.6, 5.4)
  panels = fig.subplots(1, len(axes), sharey=True, squeeze=False)[0]
  for panel, axis in zip(panels, axes):
    own = [r for r in records if r['axis'] == axis]
    at = np.arange(len(own))
    panel.errorbar(
      at,
      [r['left'] for r in own],
      yerr=[r['spread'] for r in own],
      fmt='o',
      color=style.COLORS[0],
      mfc='white',
      capsize=3,
    )
    panel.set_xticks(at, [r['setting'] for r in own], rotation=60, ha='right')
    style.title(panel, axis)
    style.grid(panel)
  panels[0].set_ylim(0, 1.1 * max(r['left'] for r in records))  # of all
  panels[0].set_ylabel('error left, of that of rounding to nearest')
  style.footnote(fig, footnote)
  return fig


@gin.configurable
def gradient_ptq(
  config=gin.REQUIRED,
  out=gin.REQUIRED,
  model='reference',
  recipe=gin.REQUIRED,
  base=gin.REQUIRED,
  axes=gin.REQUIRED,
  seeds=(0, 1, 2),
  tokens=128,
  test_windows=32,
) -> pathlib.Path:
  """Learn the block in every setting and write the page; returns its folder.

  Args:
    config: The file that says all this, for the page.
    out: Folder of the page.
    model: A decoder.
    recipe: Of the block's matrices, a mapping.
    base: Options of learning, and of data: `text`, 'text', 'shuffled' (in each
      window) or 'random' (tokens); `windows`, how many.
    axes: By axis, and there by name, what differs from `base`.
    seeds: Of the windows drawn, and of training.
    tokens: In a window.
    test_windows: To measure the error on.
  """
  start = time.perf_counter()
  bench = Bench(opening.open_any(model), recipes.from_json(recipe))
  test = bench.test(test_windows, tokens)
  records: list[dict[str, Any]] = []
  done: dict[str, dict[str, Any]] = {}
  for axis, cases in axes.items():
    for setting, case in cases.items():
      options = {**base, **case}
      key = repr(sorted(options.items()))
      if key not in done:  # the base is in every axis
        began = time.perf_counter()
        nearest, shares = bench.left(options, tokens, test, seeds)
        done[key] = {
          'nearest': nearest,
          'left': float(np.mean(shares)),
          'spread': float(np.std(shares)),
          'seconds': round(time.perf_counter() - began, 1),
        }
      records.append({'axis': axis, 'setting': setting, **done[key]})
      print(
        f'{axis} {setting}: {records[-1]["left"]:.3f} of the error left',
        flush=True,
      )
  heads = ('axis', 'setting', 'error left', 'spread of seeds', 'seconds')
  keys = ('axis', 'setting', 'left', 'spread', 'seconds')
  footnote = f'{config}, {len(seeds)} seeds'
  return _pages.write(
    out,
    title='What matters when rounding is learned',
    command=f'python -m experiments.gradient_ptq configs/learning/{config}',
    lines=[
      f'The first block of {model}, {recipe}: relative squared error of its '
      f'outputs {records[0]["nearest"]:.2e} rounded to nearest; the table has '
      'what learning leaves of it, on windows that nothing saw, the mean of '
      f'{len(seeds)} seeds. One thing is changed at a time.\n',
      _pages.table(heads, [[r[k] for k in keys] for r in records]),
    ],
    records=records,
    config=gin.operative_config_str(),
    figure=draw(records, footnote),
    seed=seeds[0],
    seconds=time.perf_counter() - start,
  )


def main(argv: list[str] | None = None) -> None:
  print(f'written to {_pages.main(__doc__, gradient_ptq, argv)}')


if __name__ == '__main__':
  main()
