"""What a search works on: model, sites, texts; and what identifies it."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax import calibration, hardware, sharding
from mq_jax.allocation import candidates as candidates_lib
from mq_jax.allocation import losses
from mq_jax.evaluation import cuts
from mq_jax.lab import costing, measure, opening, runs
from mq_jax.lab.allocating import asking, budgets
from mq_jax.sites import Site

# Windows of a step of the search.
_STEP = 2

Progress = Callable[..., None]


# What a search goes by; plans are tested by both in any case.
LOSSES = ('divergence', 'next_token')


def objective(bench: 'Bench') -> tuple[Callable, Any]:
  """The loss that is searched on, and its batches: a tree, [b, ...]."""
  apply, windows = bench.model.apply, jnp.asarray(bench.windows.search)
  if bench.ask.loss == 'next_token':
    return losses.next_token(apply), windows
  inputs = windows[:, :, :-1]
  return (
    losses.divergence(apply),
    losses.reference(apply, bench.model.params, inputs),
  )


def exam(bench: 'Bench') -> tuple[Callable, Any]:
  """Loss of the text and divergence, f32[2], and the batches to test on."""
  apply, windows = bench.model.apply, jnp.asarray(bench.windows.test)
  source = losses.reference(apply, bench.model.params, windows[:, :, :-1])
  return losses.both(apply), (source, windows[:, :, 1:])


@dataclasses.dataclass(frozen=True)
class Ask:
  """A command line, checked as far as that goes without a model."""

  model: str
  budgets: tuple[budgets.Budget, ...]
  candidates: tuple[asking.Candidate, ...]
  solvers: tuple[str, ...]  # the one whose plan is written first
  ties: tuple[str, ...] = ()
  exclude: tuple[str, ...] = ()
  design: costing.Design | None = None
  accelerator: str | None = None  # as it was written, with what --set changes
  phase: str = 'prefill'
  sequences: int = 1
  context: int | None = None
  activation_bits: int | None = None
  loss: str = LOSSES[0]
  front: int | tuple[float, ...] = 8
  steps: int = 16
  seed: int = 0
  text: str | None = None
  calibration_text: str | None = None
  calibration_windows: int = 64
  search_windows: int = 8
  test_windows: int = 48
  batch: int = 8
  blocks: int | None = None
  axis: str | None = None
  mesh: str | None = None


class Windows(NamedTuple):
  """Tokens; no window is in two of them.

  Attributes:
    calibration: Batches of inputs, each i32[b, t].
    search: i32[steps, b, t + 1].
    test: i32[batches, b, t + 1].
    scored: The test windows with the bytes that they stand for.
    texts: Where they are from, with digests, for the fingerprint.
  """

  calibration: list[np.ndarray]
  search: np.ndarray
  test: np.ndarray
  scored: cuts.TextWindows
  texts: dict[str, dict[str, Any]]


class Bench(NamedTuple):
  """A model ready to be allocated for.

  Attributes:
    ask: What was asked for.
    model: With its parameters.
    sites: Those to allocate for, l of them.
    workload: Their matmuls on the accelerator, [l].
    by_site: Candidates that a site may have. bool[l, c].
    ties: Groups of names.
    windows: Texts.
    left_out: Names of sites that stay as they are.
    context: Tokens of a sequence on the accelerator.
  """

  ask: Ask
  model: opening.LanguageModel
  sites: tuple[Site, ...]
  workload: hardware.Workload
  by_site: np.ndarray
  ties: list[list[str]]
  windows: Windows
  left_out: tuple[str, ...]
  context: int

  @property
  def allowed(self) -> np.ndarray:
    """Candidates of all that chooses: sites, or blocks of them."""
    return np.repeat(self.by_site, self.ask.blocks or 1, axis=0)


def _each(count: int, most: int) -> int:
  """Windows of a batch: the most that leave none over."""
  return max(n for n in range(1, min(count, most) + 1) if count % n == 0)


def _runs(windows: np.ndarray, length: int) -> np.ndarray:
  """All runs of so many tokens in windows, as bytes. [w, runs]."""
  found = np.lib.stride_tricks.sliding_window_view(windows, length, axis=1)
  found = np.ascontiguousarray(found)
  return found.view(f'V{found.dtype.itemsize * length}')[..., 0]


def disjoint(windows: np.ndarray, test: np.ndarray) -> np.ndarray:
  """Which windows share no run of half a window with the test windows.

  Args:
    windows: i32[w, t + 1].
    test: i32[v, t + 1].

  Returns:
    bool[w].
  """
  length = max((windows.shape[1] - 1) // 2, 1)
  seen = {x.tobytes() for row in _runs(test[:, 1:], length) for x in row}
  return np.array(
    [
      not any(x.tobytes() in seen for x in row)
      for row in _runs(windows[:, 1:], length)
    ],
    bool,
  )


def cut(model: opening.LanguageModel, ask: Ask) -> Windows:
  """Windows for calibration, search and test, with no text in common.

  Raises:
    ValueError: if a text is too short, or calibration and test are the same.
  """
  text = measure.evaluation_text(ask.text)
  other = measure.calibration_text(ask.calibration_text)
  scored = measure.windows(model, text, ask.test_windows)
  found = measure.windows(model, other).tokens
  order = np.random.default_rng(ask.seed).permutation(len(found))
  needed = ask.search_windows + ask.calibration_windows
  # Half as many again: few or none of them repeat what is tested on.
  chosen, looked = np.zeros(0, np.int64), 0
  while len(chosen) < needed and looked < len(order):
    part = order[looked : looked + needed + needed // 2]
    chosen = np.concatenate(
      [chosen, part[disjoint(found[part], scored.tokens)]]
    )
    looked += len(part)
  if len(chosen) < needed:
    repeated = looked - len(chosen)
    raise ValueError(
      f'{other.source}: {len(found)} windows, of which {repeated} repeat the '
      f'test text {text.source}; needed are {ask.search_windows} to search on '
      f'and {ask.calibration_windows} to calibrate on: give more text '
      '(--calibration), or ask for fewer windows'
    )
  search = found[chosen[: ask.search_windows]].astype(np.int32)
  calibrate = found[chosen[ask.search_windows : needed], :-1]
  test = scored.tokens.astype(np.int32)
  stacked = lambda x, most: x.reshape(-1, _each(len(x), most), *x.shape[1:])
  record = lambda source, windows: {
    'source': source.source,
    'sha256': source.sha256,
    'windows': len(windows),
    'tokens': hashlib.sha256(windows.tobytes()).hexdigest(),
  }
  return Windows(
    list(stacked(calibrate, ask.batch)),
    stacked(search, _STEP),
    stacked(test, ask.batch),
    scored,
    {
      'calibration': record(other, calibrate),
      'search': record(other, search),
      'test': record(text, test),
    },
  )


def open_bench(ask: Ask) -> Bench:
  """Open the model and check what was asked against it.

  Raises:
    ValueError, FileNotFoundError: for whatever can't be used.
  """
  if ask.text is not None and ask.text == ask.calibration_text:
    raise ValueError(
      f'{ask.text}: is both --text and --calibration; test on another text'
    )
  opened = costing.open_model(
    ask.model,
    ask.phase,
    batch=ask.sequences,
    context=ask.context,
    mesh=ask.mesh,
  )
  if opened.kind != 'weights':
    what = 'has only shapes' if opened.kind == 'shapes' else 'is quantized'
    raise ValueError(
      f'{ask.model}: {what}; an allocation needs a model with plain weights'
    )
  model, names = opened.language_model, list(opened.workload.names)
  kept = asking.exclude(ask.exclude, names)
  sites = tuple(opened.sites[i] for i in kept)
  own = [site.name for site in sites]
  allowed = asking.allowed(ask.candidates, own)
  ties = asking.ties(ask.ties, own)
  asking.check(allowed, own, ties)
  work = opened.workload
  part = lambda x: np.broadcast_to(x, len(names))[kept]
  workload = dataclasses.replace(
    work,
    **{field: part(getattr(work, field)) for field in ('m', 'k', 'n', 'count')},
    names=tuple(own),
  )
  left = [name for i, name in enumerate(names) if i not in set(kept)]
  return Bench(
    ask,
    model,
    sites,
    workload,
    allowed,
    ties,
    cut(model, ask),
    (*opened.left_out, *left),
    opened.context,
  )


def make_candidates(
  bench: Bench, calibrating: Progress, quantizing: Progress
) -> candidates_lib.Made:
  """Calibrate, and quantize every site by every recipe."""
  params = bench.model.params
  statistics = calibration.calibrate(
    bench.model.apply,
    params,
    bench.windows.calibration,
    sites=bench.sites,
    progress=calibrating,
  )
  more = {}
  if bench.ask.blocks is not None:
    more['blocks'] = bench.ask.blocks
    if bench.ask.axis is not None:
      more['axis'] = bench.ask.axis
  return candidates_lib.make(
    params,
    bench.sites,
    [candidate.recipe for candidate in bench.ask.candidates],
    statistics=statistics,
    progress=quantizing,
    **more,
  )


def _digest(params: Any) -> str:
  """Of names, shapes, types and values."""
  found = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    array = sharding.to_host(leaf)
    head = f'{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n'
    found.update(head.encode())
    found.update(np.ascontiguousarray(array).tobytes())
  return found.hexdigest()


def digest_of(made: candidates_lib.Made) -> str:
  """Of the candidates themselves: what a search goes by."""
  return _digest((made.candidates.overlap, jnp.asarray(made.bits)))


def width(bench: Bench) -> int:
  """Bits of an activation on the accelerator."""
  return bench.ask.activation_bits or bench.ask.design.default.activation_bits


def fingerprint(bench: Bench) -> dict[str, Any]:
  """All that a result depends on, as plain JSON data."""
  ask = bench.ask
  patterns: Sequence[Any] = [
    {
      'recipe': c.recipe.name,
      **dict(c.recipe.options),
      **({} if c.patterns == ('*',) else {'sites': list(c.patterns)}),
    }
    for c in ask.candidates
  ]
  on = None
  if ask.design is not None:
    on = {
      'name': ask.accelerator,
      'phase': ask.phase,
      'sequences': ask.sequences,
      'context': bench.context,
      'activation_bits': width(bench),
    }
  return {
    'model': bench.model.name,
    'parameters': _digest(bench.model.params),
    'budgets': {b.quantity: b.asked for b in ask.budgets},
    'candidates': patterns,
    'ties': list(ask.ties),
    'exclude': list(ask.exclude),
    'accelerator': on,
    'solvers': list(ask.solvers),
    'loss': ask.loss,
    'front': ask.front if isinstance(ask.front, int) else list(ask.front),
    'steps': ask.steps,
    'seed': ask.seed,
    'batch': ask.batch,
    'blocks': ask.blocks,
    'axis': ask.axis,
    'mesh': ask.mesh,
    'texts': bench.windows.texts,
    'versions': runs.versions(),
    'device': f'{jax.default_backend()}: {jax.devices()[0].device_kind}',
  }
