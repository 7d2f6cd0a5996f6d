"""What is trained together: blocks one after the other, sites, the model."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax import activations, calibration, plans, streaming
from mq_jax import sites as sites_lib
from mq_jax.learn import _training, losses
from mq_jax.models import decoder
from mq_jax.plans import Plan
from mq_jax.recipes import Learning

# Gram matrices that a site is trained on: more of them are more variety, and
# take more memory.
_GRAMS = 5


class Learned(NamedTuple):
  """What `reconstruct` found.

  Attributes:
    params: Parameters with quantized matrices, in as many bytes as without
      learning.
    traces: What training saw, by block, site, or 'model'.
  """

  params: Any
  traces: dict[str, _training.Trace]


def options_of(plan: Plan) -> Learning | None:
  """How the recipes of a plan learn; None if they don't.

  Raises:
    ValueError: if they differ in it.
  """
  found: dict[Learning | None, str] = {}
  for site, recipe in plan.entries:
    found.setdefault(recipe.learning, f'{site.name} ({recipe.label})')
  if len(found) > 1:
    raise ValueError(
      'plan: recipes that are learned together learn in one way; these differ: '
      f'{" and ".join(found.values())}'
    )
  return next(iter(found), None)


def without(plan: Plan) -> Plan:
  """The plan of what learning begins with."""
  return Plan(tuple((site, r.with_learning(None)) for site, r in plan.entries))


def reconstruct(
  f: Callable[..., jax.Array] | decoder.Parts,
  params: Any,
  plan: Plan,
  examples: Any,
  *,
  options: Learning | None = None,
  inputs: str = 'quantized',
  coverage: plans.Coverage = plans.COVERED,
  batch: int = 8,
  progress: Callable[[int, int], None] | None = None,
) -> Learned:
  """Quantize by a plan, and learn what its codes are best.

  Every weight keeps its structure (group, outliers, pattern, exponent) and so
  its bits; which place of its grid it takes is learned, and codes that are real
  numbers are: scales, clipping with them. Gradients pass rounding straight
  through; what is trained is what is packed, to the bit.

  Args:
    f: `f(params, *inputs)`; for the scope 'block', a decoder's parts
      (`mq_jax.models.decoder.parts`), which serve the other scopes as well.
    params: Its parameters.
    plan: The recipe of each site.
    examples: Array or tuple of arrays [e, ...]: the inputs of `f`, calibration
      data. Some of them are held back, to choose by.
    options: How to learn; None for what the plan's recipes say.
    inputs: Train and calibrate a block on what comes out of the 'quantized'
      blocks before it, or of the 'original' ones. What is wanted of it is
      always its output in the original model.
    coverage: What becomes of matrices that calibration hardly reached.
    batch: Examples at a time, in calibration.
    progress: Called with the steps done and their number.

  Returns:
    The parameters and what training saw.

  Raises:
    ValueError: if the scope doesn't fit `f` or the sites, nothing can be
      learned, or there are too few examples.

  Source:
    Block by block with sign descent: AutoRound, arXiv 2309.05516; before it
    BRECQ, arXiv 2102.05426 (both recalled). Gradients of scales: LSQ, arXiv
    1902.08153. That the start may be any recipe, with error compensation or
    outliers, is ours.
  """
  options = options or options_of(plan) or Learning()
  plan = without(plan)
  examples = examples if isinstance(examples, tuple) else (examples,)
  count = _training.count(examples)
  loss_of(options)  # what can't be done is found before anything is
  _training.check(count, options)
  parts = f if isinstance(f, decoder.Parts) else None
  if options.scope == 'block' and parts is None:
    raise ValueError(
      "learn: scope='block' needs the blocks of the model: give "
      "mq_jax.models.decoder.parts(config) for f, or scope='model' or 'site'"
    )
  whole = f if parts is None else decoder.joined(parts)
  batches = [
    tuple(x[i : i + batch] for x in examples) for i in range(0, count, batch)
  ]
  if options.scope == 'block':
    blocks = streaming.of_params(parts, params)
    at = _in_all(progress, options, blocks.count)
    found = _blocks(blocks, plan, batches, options, inputs, coverage, at)
  else:
    sites = [site for site, _ in plan.entries]
    rounds = 1 if options.scope == 'model' else len(sites)
    at = _in_all(progress, options, rounds)
    statistics = calibration.calibrate(
      whole, params, batches, sites=sites, least=0
    )
    chosen, statistics = activations.prepare(
      whole, params, plan.entries, batches, statistics
    )
    packed = plans.compress(
      params, plan, statistics=statistics, inputs=chosen, coverage=coverage
    )
    if options.scope == 'model':
      return _model(whole, params, packed, examples, options, at)
    found = _sites(whole, params, packed, batches, sites, options, at)
  if not options.finish:
    return found
  last = dataclasses.replace(
    options, scope='model', loss=None, steps=options.finish
  )
  done = _model(whole, params, found.params, examples, last, at)
  return Learned(done.params, found.traces | done.traces)


def _in_all(
  progress: Callable[[int, int], None] | None, options: Learning, rounds: int
) -> Callable[[int, int], None]:
  """Steps done in all, from those of one round of training after another."""
  finish = options.finish if options.scope != 'model' else 0
  total, before = rounds * options.steps + finish, 0

  def step(done: int, steps: int) -> None:
    nonlocal before
    if progress is not None:
      progress(before + done, total)
    if done == steps:
      before += steps

  return step


def _model(f, params, packed, examples, options, progress) -> Learned:
  """The predictions of the whole."""
  loss = loss_of(options)
  run, given = plans.runnable(f, packed)
  # Half of the bytes: predictions are as many as the vocabulary.
  small = jnp.float16 if loss is losses.divergence else jnp.float32
  wanted = jax.jit(lambda p, x: losses.targets(f, p, x, small))(
    params, examples
  )
  packed, trace = _training.train(
    loss(run),
    params,
    packed,
    (examples, wanted),
    options=options,
    inputs=given[1] if run is not f else None,
    progress=progress,
  )
  return Learned(packed, {'model': trace})


def loss_of(options: Learning) -> Callable[[Callable], losses.Loss]:
  """The loss that options name.

  Raises:
    ValueError: for a name that there is not.
  """
  name = options.loss
  if name is None:
    name = 'divergence' if options.scope == 'model' else 'mse'
  if callable(name):
    return name
  if name not in losses.LOSSES:
    raise ValueError(
      f'learning: loss={name!r} must be one of {", ".join(losses.LOSSES)}'
    )
  if name == 'divergence' and options.scope != 'model':
    raise ValueError(
      f"learning: loss='divergence' is of predictions, scope='model'; "
      f'scope={options.scope!r} compares activations'
    )
  return losses.LOSSES[name]


def refiner(
  options: Learning,
  traces: dict[str, _training.Trace],
  progress: Callable[[int, int], None] | None = None,
) -> streaming.Refine:
  """What `streaming.quantize` calls to learn a block.

  Args:
    options: How to learn.
    traces: Filled, by block.
    progress: Called with the steps done and their number.
  """
  loss = loss_of(options)

  def refine(index, f, params, packed, x, wanted):
    run, given = plans.runnable(f, packed)
    stack = lambda xs: np.concatenate([np.asarray(x) for x in xs])
    packed, traces[f'layers/{index}'] = _training.train(
      loss(run),
      params,
      packed,
      ((stack(x),), stack(wanted)),
      options=options,
      inputs=given[1] if run is not f else None,
      progress=progress,
    )
    return packed

  return refine


def _blocks(
  blocks, plan, batches, options, inputs, coverage, progress
) -> Learned:
  """One block after the other."""
  traces: dict[str, _training.Trace] = {}
  steps = streaming.quantize(
    blocks,
    plan,
    streaming.begin(blocks, [np.asarray(tokens) for (tokens,) in batches]),
    inputs=inputs,
    coverage=coverage,
    refine=refiner(options, traces, progress),
  )
  return Learned(streaming.assemble(blocks, list(steps)), traces)


def _sites(f, params, packed, batches, sites, options, progress) -> Learned:
  """Each site alone: the error of its outputs, from Gram matrices."""
  groups = np.array_split(np.arange(len(batches)), min(_GRAMS, len(batches)))
  found = [
    calibration.calibrate(
      f, params, [batches[i] for i in group], sites=sites, least=0
    )
    for group in groups
  ]
  learned, traces = {}, {}
  for name, matrix in plans.matrices(packed).items():
    if matrix.inputs is not None:
      raise ValueError(
        f"{name}: its inputs are quantized, which scope='site' does not see; "
        "use scope='block' or 'model'"
      )
    site = matrix.site
    weight = site.matrix(jnp.asarray(sites_lib.get(params, site), jnp.float32))
    bare = dataclasses.replace(matrix, site=None)
    # One name for all: sites of one shape share a program.
    new, traces[name] = _training.train(
      _output_error,
      {'learned': weight, 'original': weight},
      {'learned': bare, 'original': weight},
      jnp.stack([group[name].gram for group in found]),
      options=options,
      progress=progress,
    )
    learned[site] = dataclasses.replace(new['learned'], site=site)
  return Learned(sites_lib.put(packed, learned), traces)


def _output_error(params: dict[str, jax.Array], grams: jax.Array) -> jax.Array:
  """Squared error of a layer's outputs over their size, from X^T X."""
  gram = jnp.mean(grams, axis=0)
  power = lambda x: jnp.sum(x * (gram @ x))
  original = params['original']
  error = power(params['learned'] - original)
  return error / jnp.maximum(power(original), losses.SMALL)
