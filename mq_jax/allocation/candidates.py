"""What candidates make of a model's sites, and choices carried out.

What gets a candidate is a site, or each of several blocks of rows or columns
of a site's matrix: the *rows* of an allocation problem. A block is quantized
without regard to the others (see `recipes.blocks`), so that choices are
independent and their bits add up exactly.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax import layouts, plans, quantize, sharding
from mq_jax import recipes as recipes_lib
from mq_jax import sites as sites_lib
from mq_jax._pytrees import pytree_dataclass, static
from mq_jax.calibration import Statistics
from mq_jax.recipes import Recipe
from mq_jax.sites import Site


@pytree_dataclass
class Candidates:
  """What every candidate makes of every site, or of every block of it.

  Attributes:
    values: By site name, the parameter under each candidate.
      [c, *parameter's shape].
    overlap: Inner products of the candidates' errors under the Gram matrix
      of the inputs: tr(e_c^T A e_d), A the diagonal block of them for blocks
      of rows. f32[l, c, c], l the sites times `blocks`, blocks of one site
      next to each other.
    sites: The sites.
    labels: Of the candidates, c of them.
    blocks: Blocks of each site.
    axis: What they are blocks of, 'rows' or 'columns'.
  """

  values: dict[str, jax.Array]
  overlap: jax.Array
  sites: tuple[Site, ...] = static()
  labels: tuple[str, ...] = static()
  blocks: int = static(1)
  axis: str = static('rows')

  @property
  def names(self) -> tuple[str, ...]:
    """Of all that gets a candidate, l: 'q', or 'q[rows 0:64]' for blocks."""
    if self.blocks == 1:
      return tuple(site.name for site in self.sites)
    return tuple(
      f'{site.name}[{self.axis} {span.start}:{span.stop}]'
      for site in self.sites
      for span in self.spans(site)
    )

  def spans(self, site: Site) -> tuple[slice, ...]:
    """Rows or columns of each block of a site."""
    return layouts.blocks.spans(_length(site, self.axis), self.blocks)


def _length(site: Site, axis: str) -> int:
  return site.k if axis == 'rows' else site.n


class Made(NamedTuple):
  """Candidates, and the packed parameters that they stand for.

  Attributes:
    candidates: For the search.
    packed: By candidate, the parameters with packed matrices.
    bits: Stored bits, metadata included; with blocks each counts its own, and
      they add up to what is packed. f64[l, c].
    recipes: The candidates' recipes, of a site or a block.
  """

  candidates: Candidates
  packed: tuple[Any, ...]
  bits: np.ndarray
  recipes: tuple[Recipe, ...]


def make(
  params: Any,
  sites: Sequence[Site],
  recipes: Sequence[Recipe],
  *,
  statistics: Mapping[str, Statistics] | None = None,
  blocks: int = 1,
  axis: str = 'rows',
  progress: Callable[[int, int], None] | None = None,
) -> Made:
  """Quantize every site by every recipe.

  Args:
    params: The model's parameters.
    sites: Sites to allocate for, each with a parameter of its own.
    recipes: The candidates; `recipes.none()` leaves a site in bfloat16.
    statistics: From `calibrate`. Without, errors are weighed alike.
    blocks: How many blocks of equal size each site's matrix is cut into, each
      with a candidate of its own. Candidates are then quantized block by
      block, see `recipes.blocks` for what that loses. 1 for whole sites.
    axis: 'rows' (inputs) or 'columns' (outputs) for the blocks.
    progress: Called with the candidates done and their number.

  Raises:
    ValueError: for no recipes, recipes with the same label, a site with
      fewer rows or columns than blocks, and whatever `plans.compress` refuses.
  """
  recipes = tuple(recipes)
  labels = tuple(recipe.label for recipe in recipes)
  if not labels or len(set(labels)) < len(labels):
    raise ValueError(
      f'allocation: candidates {list(labels)}; at least one is needed, and '
      'no label twice'
    )
  if axis not in layouts.blocks.AXES or type(blocks) is not int or blocks < 1:
    raise ValueError(
      f'allocation: blocks={blocks!r} of axis={axis!r}; a whole number >= 1 '
      f'and one of {layouts.blocks.AXES} are needed'
    )
  sites = tuple(entry[0] for entry in plans.uniform(sites, recipes[0]).entries)
  packed = []
  for i, recipe in enumerate(recipes):
    if blocks > 1:
      recipe = recipes_lib.blocks([recipe] * blocks, axis)
    plan = plans.uniform(sites, recipe, exclude=())
    packed.append(plans.compress(params, plan, statistics=statistics))
    if progress is not None:
      progress(i + 1, len(labels))
  values, overlap, bits = {}, [], []
  for site in sites:
    matrices = [sites_lib.get(p, site) for p in packed]
    stacked = jnp.stack([m.dequantize() for m in matrices])
    gram = None if statistics is None else statistics[site.name].gram
    original = site.matrix(sites_lib.get(params, site))
    gram, original = sharding.whole((gram, original))
    values[site.name] = jax.vmap(site.unmatrix)(stacked)
    if blocks == 1:
      bits.append([8 * matrix.nbytes for matrix in matrices])
      overlap.append(overlap_of(stacked, original, gram))
      continue
    by_block = zip(*map(quantize.split, matrices), strict=True)
    bits += [[8 * block.nbytes for block in each] for each in by_block]
    for span in layouts.blocks.spans(_length(site, axis), blocks):
      # Errors of blocks chosen independently have no product to expect, so
      # blocks of rows meet the diagonal blocks of A alone.
      if axis == 'columns':
        each = stacked[..., span], original[..., span], gram
      else:
        inner = None if gram is None else gram[..., span, span]
        each = stacked[..., span, :], original[..., span, :], inner
      overlap.append(overlap_of(*each))
  return Made(
    Candidates(values, jnp.stack(overlap), sites, labels, blocks, axis),
    tuple(packed),
    np.array(bits, np.float64),
    recipes,
  )


@jax.jit
def overlap_of(stacked, original, gram):
  """tr(e_c^T A e_d) over candidates; A the identity without statistics."""
  error = stacked.astype(jnp.float32) - original.astype(jnp.float32)[None]
  weighed = error if gram is None else gram @ error
  both = jnp.einsum('c...,d...->cd', error, weighed)
  return 0.5 * (both + both.T)


def mixed(params: Any, candidates: Candidates, probabilities: jax.Array) -> Any:
  """Parameters with the mean of its candidates at each site, or block.

  What probabilities lack to 1 is the share of the original parameter: rows of
  zeros leave a site as it is.

  Args:
    params: The model's parameters.
    candidates: Of each site.
    probabilities: f32[l, c], rows named `candidates.names`.

  Raises:
    ValueError: for another shape of them.
  """
  sites, blocks = candidates.sites, candidates.blocks
  need = (len(sites) * blocks, len(candidates.labels))
  if probabilities.shape != need:
    raise ValueError(
      f'allocation: probabilities of shape {probabilities.shape}; '
      f'{need} are needed'
    )
  new = {}
  for site, rows in zip(sites, probabilities.reshape(-1, blocks, need[1])):
    stack = candidates.values[site.name]
    original = sites_lib.get(params, site).astype(jnp.float32)
    share = rows[0] if blocks == 1 else _spread(candidates, site, rows)
    mean = (1.0 - jnp.sum(share, axis=0)) * original + _mean(share, stack)
    new[site] = mean.astype(stack.dtype)
  return sites_lib.put(params, new)


# One candidate after the other, forward and backward: of a contraction, or of
# slices, the compiler copies all of them for the backward pass.
@jax.custom_vjp
def _mean(share: jax.Array, stack: jax.Array) -> jax.Array:
  """Sum over candidates of share [c] or [c, ...] times values [c, ...]."""

  def add(i, total):
    return total + share[i] * stack[i].astype(jnp.float32)

  zero = jnp.zeros(stack.shape[1:], jnp.float32)
  return jax.lax.fori_loop(0, stack.shape[0], add, zero)


def _mean_forward(share, stack):
  return _mean(share, stack), (share, stack)


def _mean_backward(kept, slope):
  share, stack = kept
  each = lambda value: slope * value.astype(jnp.float32)
  if share.ndim == 1:
    d_share = jax.lax.map(lambda value: jnp.sum(each(value)), stack)
    weights = share.reshape(-1, *[1] * slope.ndim)
  else:
    d_share, weights = jax.lax.map(each, stack), share
  return d_share, (weights * slope[None]).astype(stack.dtype)


_mean.defvjp(_mean_forward, _mean_backward)


def _spread(candidates: Candidates, site: Site, rows: jax.Array) -> jax.Array:
  """Probabilities f32[blocks, c] at every weight: [c, *parameter's shape]."""
  sizes = [span.stop - span.start for span in candidates.spans(site)]
  share = rows[np.repeat(np.arange(len(sizes)), sizes)].T  # [c, k or n]
  lead = (1,) * (len(site.matrix_shape) - 2)
  tail = (-1, 1) if candidates.axis == 'rows' else (1, -1)
  share = share.reshape(share.shape[0], *lead, *tail)
  share = jnp.broadcast_to(share, (share.shape[0], *site.matrix_shape))
  return jax.vmap(site.unmatrix)(share)


def assemble(made: Made, params: Any, choice: Sequence[int]) -> Any:
  """Packed parameters of a whole choice i[l]: the plan carried out.

  Matrices that were put together from blocks have a record of less: the
  status is the worst of the candidates from which they took a block, and the
  output error is left out. `compress` with `plan_of` gives the same bits and
  the whole record.
  """
  new = {}
  for site, row in _by_site(made, choice):
    matrices = [sites_lib.get(made.packed[c], site) for c in row]
    if made.candidates.blocks == 1:
      new[site] = matrices[0]
      continue
    parts = [quantize.split(m)[i] for i, m in enumerate(matrices)]
    whole = quantize.join(parts, made.candidates.axis)
    weight = site.matrix(sites_lib.get(params, site))
    status = [matrix.record['status'] for matrix in matrices]
    new[site] = dataclasses.replace(
      whole,
      record={
        'status': jnp.max(jnp.stack(status), axis=0),
        'weight_mse': _relative_error(weight, whole.dequantize()),
      },
      site=site,
      recipe=_recipe(made, row).label,
    )
  return sites_lib.put(params, new)


@jax.jit
def _relative_error(weight, value):
  weight, value = weight.astype(jnp.float32), value.astype(jnp.float32)
  size = lambda x: jnp.sum(jnp.square(x), axis=(-2, -1))
  whole = size(weight)
  return size(value - weight) / jnp.where(whole > 0, whole, 1.0)


def _by_site(made: Made, choice: Sequence[int]):
  """Sites and the choices of their blocks."""
  choice = np.asarray(choice)
  need = (len(made.candidates.sites) * made.candidates.blocks,)
  if choice.shape != need:
    raise ValueError(
      f'allocation: a choice of shape {choice.shape}; {need} is needed'
    )
  rows = choice.reshape(-1, made.candidates.blocks).tolist()
  return zip(made.candidates.sites, rows, strict=True)


def _recipe(made: Made, row: Sequence[int]) -> Recipe:
  """The recipe of a site with these choices of its blocks."""
  parts = [made.recipes[c] for c in row]
  if made.candidates.blocks == 1:
    return parts[0]
  return recipes_lib.blocks(parts, made.candidates.axis)


def plan_of(
  made: Made, recipes: Sequence[Recipe], choice: Sequence[int]
) -> plans.Plan:
  """The plan of a whole choice i[l], to be saved.

  Args:
    made: The candidates.
    recipes: Those that they were made of.
    choice: Of each site, or block.
  """
  made = made._replace(recipes=tuple(recipes))
  rows = _by_site(made, choice)
  return plans.Plan(tuple((site, _recipe(made, row)) for site, row in rows))
