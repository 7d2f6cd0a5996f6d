"""Models a block at a time: of the weights only one block is in memory.

Activations of the calibration data wait on the host between two blocks. They
are carried through the blocks as they are quantized, so that a block is
calibrated on what it will be given (GPTQ, arXiv 2210.17323, section 4 "Setup"
does the same; the section is recalled), or through the original ones.
"""

import collections
import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax import activations, calibration, plans, sharding
from mq_jax import sites as sites_lib
from mq_jax.evaluation import perplexity, predictions
from mq_jax.plans import Plan
from mq_jax.sites import Site

INPUTS = ('quantized', 'original')

Apply = Callable[[Any, jax.Array], jax.Array]

# Of a block's number, function, parameters, packed parameters (sites named as
# in the block), what enters it, a batch each, and what the original gives for
# it: the packed parameters to go on with.
Refine = Callable[[int, Apply, Any, Any, list, list], Any]


class Blocks(NamedTuple):
  """A model that gives its blocks one at a time.

  Attributes:
    count: Number of blocks.
    read: Of a block's number: its parameters, plain or packed.
    rest: Gives the parameters outside the blocks.
    block: Of a block's number: `f(params, x [b, t, d]) -> x`, the same object
      for blocks that are computed alike.
    embed: `f(rest, tokens i32[b, t]) -> x`.
    head: `f(rest, x) -> logits [b, t, v]`.
  """

  count: int
  read: Callable[[int], Any]
  rest: Callable[[], Any]
  block: Callable[[int], Apply]
  embed: Apply
  head: Apply


def of_params(parts: Any, params: dict) -> Blocks:
  """The blocks of a model that is in memory.

  Args:
    parts: From `models.decoder.parts`.
    params: Of the model: `layers` by number, and the rest.
  """
  layers = params['layers']
  rest = {name: x for name, x in params.items() if name != 'layers'}
  return Blocks(
    count=len(layers),
    read=lambda i: layers[i],
    rest=lambda: rest,
    block=parts.block,
    embed=parts.embed,
    head=parts.head,
  )


def on_mesh(blocks: Blocks, mesh: jax.sharding.Mesh | None) -> Blocks:
  """Blocks that compute on a mesh, see `sharding.on_mesh`."""
  if mesh is None:
    return blocks
  place = lambda params: sharding.place(plans.decode(params), mesh)
  return blocks._replace(
    read=lambda i: place(blocks.read(i)),
    rest=lambda: place(blocks.rest()),
    block=lambda i: sharding.divided(blocks.block(i), mesh),
    embed=sharding.divided(blocks.embed, mesh),
    head=sharding.divided(blocks.head, mesh),
  )


def find_sites(blocks: Blocks, tokens: np.ndarray) -> tuple[Site, ...]:
  """Sites of all blocks, named as in the whole model: 'layers/0/...'.

  One block of each kind is read. Products of activations and sites outside
  the blocks are left out.

  Args:
    blocks: The model.
    tokens: A batch of its inputs. i32[b, t].
  """
  x = jax.eval_shape(blocks.embed, blocks.rest(), tokens)
  kinds: dict[Apply, tuple[Site, ...]] = {}
  found: list[Site] = []
  for i in range(blocks.count):
    f = blocks.block(i)
    if f not in kinds:
      kinds[f] = sites_lib.find(f, plans.decode(blocks.read(i)), x)
    found += [_outside(s, i) for s in kinds[f] if s.kind != 'attention']
  return tuple(found)


def _prefix(index: int) -> tuple[Any, ...]:
  key = jax.tree_util.DictKey
  return (key('layers'), key(index))


def _outside(site: Site, index: int) -> Site:
  """A site of a block as one of the model."""
  return dataclasses.replace(
    site,
    name=f'layers/{index}/{site.name}',
    path=None if site.path is None else (*_prefix(index), *site.path),
  )


def _inside(site: Site, index: int) -> Site:
  """Undo `_outside`: the same for all blocks alike, so nothing recompiles."""
  return dataclasses.replace(
    site,
    name=site.name.removeprefix(f'layers/{index}/'),
    path=site.path[len(_prefix(index)) :],
  )


def by_block(plan: Plan, count: int) -> dict[int, Plan]:
  """A plan's entries by the number of their block.

  Raises:
    ValueError: for a site outside of the blocks.
  """
  found = collections.defaultdict(list)
  for site, recipe in plan.entries:
    keys = [getattr(key, 'key', None) for key in site.path[:2]]
    if keys[0] != 'layers' or keys[1] not in range(count):
      raise ValueError(
        f'{site.name}: is in none of the {count} blocks; only their sites can '
        'be quantized a block at a time'
      )
    found[keys[1]].append((site, recipe))
  return {i: Plan(tuple(entries)) for i, entries in found.items()}


class Step(NamedTuple):
  """A block that is done.

  Attributes:
    index: Its number.
    params: Its parameters, quantized where the plan says.
    carried: Activations that enter the next block, a batch each. f32[b, t, d].
    originals: Those of the original model, where they are another stream.
    seconds: Spent on reading, calibrating, solving, learning and carrying on.
  """

  index: int
  params: Any
  carried: list[np.ndarray]
  originals: list[np.ndarray]
  seconds: dict[str, float]


def begin(blocks: Blocks, batches: Sequence[np.ndarray]) -> list[np.ndarray]:
  """Activations that enter the first block, of batches of tokens i32[b, t]."""
  rest, embed = blocks.rest(), _compiled(blocks.embed)
  return [sharding.to_host(embed(rest, tokens)) for tokens in batches]


def quantize(
  blocks: Blocks,
  plan: Plan,
  carried: Sequence[np.ndarray],
  *,
  start: int = 0,
  inputs: str = 'quantized',
  coverage: plans.Coverage = plans.COVERED,
  refine: Refine | None = None,
  originals: Sequence[np.ndarray] = (),
  progress: Callable[[int, int], None] | None = None,
) -> Iterator[Step]:
  """Quantize one block after the other.

  Blocks computed alike share their compiled programs. The same arguments give
  the same bits, from whichever block one starts.

  Args:
    blocks: The model, not quantized yet.
    plan: Recipes of the blocks' sites, see `find_sites`.
    carried: Activations that enter block `start`: from `begin`, or of the step
      before. None of them: nothing is calibrated.
    start: Number of the first block to do.
    inputs: Calibrate a block on what comes out of the 'quantized' blocks
      before it, or of the 'original' ones.
    coverage: What becomes of matrices that calibration hardly reached.
    refine: Called for each block once it is quantized, as `mq_jax.learn` does.
    originals: For `refine`, of a `start` other than 0: activations of the
      original model that enter block `start`, from the step before.
    progress: Called with the batches calibrated or matrices done and their
      number.

  Yields:
    A step for each block.

  Raises:
    ValueError: for a plan or inputs that don't fit, or weights or activations
      that are not finite, by site.
  """
  if inputs not in INPUTS:
    raise ValueError(f'inputs={inputs!r}: must be one of {", ".join(INPUTS)}')
  mine = by_block(plan, blocks.count)
  carried, originals = list(carried), list(originals)
  if refine is not None and not carried:
    raise ValueError('refine: there is no calibration data to learn from')
  for i in range(start, blocks.count):
    seconds: dict[str, float] = {}
    f, entries = blocks.block(i), mine.get(i, Plan(()))
    with _timed(seconds, 'read'):
      params = blocks.read(i)
    with _timed(seconds, 'calibrate'):
      statistics, chosen = _calibrate(f, params, entries, i, carried, progress)
    with _timed(seconds, 'solve'):
      packed = plans.compress(
        {'layers': {i: params}},
        entries,
        statistics=statistics,
        inputs=chosen,
        coverage=coverage,
        progress=progress,
      )['layers'][i]
    wanted = []
    if refine is not None:
      with _timed(seconds, 'learn'):
        # Where nothing is quantized before it, there is one stream.
        wanted = carry(f, params, i, originals or carried)
        packed = refine(i, f, params, _own(packed, i), carried, wanted)
        packed = _renamed(packed, functools.partial(_outside, index=i))
    with _timed(seconds, 'carry'):
      if carried and i + 1 < blocks.count:
        if inputs == 'original' and wanted:
          carried = wanted
        else:
          after = packed if inputs == 'quantized' else params
          carried = carry(f, after, i, carried)
    originals = wanted if inputs == 'quantized' else []
    yield Step(i, packed, carried, originals, seconds)


def _calibrate(f, params, plan, index, carried, progress):
  """Of a block's sites statistics, and what is done to their inputs.

  By their names in the model.
  """
  if not (carried and plan.entries):
    return None, None
  mine = [(_inside(site, index), recipe) for site, recipe in plan.entries]
  found = calibration.calibrate(
    f,
    params,
    carried,
    sites=[site for site, _ in mine],
    least=0,  # `plans.compress` decides
    progress=progress,
  )
  done = activations.prepare(f, params, mine, carried, found, progress)
  outside = lambda xs: {f'layers/{index}/{n}': x for n, x in xs.items()}
  return outside(done.statistics), outside(done.inputs)


def carry(
  f: Apply, params: Any, index: int, carried: Sequence[np.ndarray]
) -> list[np.ndarray]:
  """Activations behind a block, weights and inputs quantized as they are.

  Args:
    f: The block.
    params: Its parameters, plain or packed.
    index: Its number.
    carried: What enters it. f32[b, t, d] each.
  """
  f, given = plans.runnable(f, _own(params, index))
  run = _compiled(f)
  return [sharding.to_host(run(given, jnp.asarray(x))) for x in carried]


def _own(params: Any, index: int) -> Any:
  """A block's parameters with sites named as in the block by itself."""
  return _renamed(params, functools.partial(_inside, index=index))


def _renamed(params: Any, rename: Callable[[Site], Site]) -> Any:
  """Parameters whose packed matrices have other sites."""

  def one(leaf):
    if not plans.is_matrix(leaf) or leaf.site is None:
      return leaf
    return dataclasses.replace(leaf, site=rename(leaf.site))

  return jax.tree.map(one, params, is_leaf=plans.is_matrix)


def assemble(blocks: Blocks, steps: Sequence[Step]) -> dict:
  """The parameters of the whole model, where it fits into memory."""
  return {'layers': {s.index: s.params for s in steps}, **blocks.rest()}


@functools.cache
def _compiled(f: Apply) -> Apply:
  return jax.jit(f)


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
  start = time.perf_counter()
  yield
  seconds[name] = time.perf_counter() - start


def evaluate(
  blocks: Blocks,
  windows: np.ndarray,
  *,
  batch: int = 16,
  n_bytes: int | None = None,
  counted: np.ndarray | None = None,
  progress: Callable[[int, int], None] | None = None,
) -> perplexity.Scores:
  """`perplexity.evaluate`, with the weights of one block in memory.

  Args:
    blocks: The model, plain or packed.
    windows: Tokens; each window predicts all but its first. i32[w, t + 1].
    batch: Windows at a time.
    n_bytes: Length of the predicted text, for bits per byte.
    counted: Which predicted tokens count; None for all. bool[w, t].
    progress: Called with the blocks done and their number.

  Returns:
    The scores, equal but for rounding.

  Raises:
    ValueError: as `perplexity.evaluate`.
  """
  counted = perplexity.checked(windows, counted, batch)
  pieces = list(perplexity.batches(windows, counted, batch))
  rest = blocks.rest()
  embed = _compiled(blocks.embed)
  x = [sharding.to_host(embed(rest, w[:, :-1])) for _, w, _ in pieces]
  for i in range(blocks.count):
    x = carry(blocks.block(i), blocks.read(i), i, x)
    if progress is not None:
      progress(i + 1, blocks.count)
  sums = [
    sharding.to_host(_head_nll(blocks.head, rest, last, w, mask))[:size]
    for (size, w, mask), last in zip(pieces, x, strict=True)
  ]
  total = math.fsum(np.concatenate(sums).astype(np.float64))
  return perplexity.scores(total, int(counted.sum()), n_bytes)


@functools.partial(jax.jit, static_argnums=0)
def _head_nll(head, rest, x, windows, counted):
  """Sums over the counted tokens of each window, behind the last block."""
  each = predictions.nll_per_token(head(rest, x), windows[:, 1:])
  return each.sum(axis=-1, where=counted)
