"""What candidates make of a model's sites, and choices carried out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax import plans
from mq_jax import sites as sites_lib
from mq_jax._pytrees import pytree_dataclass, static
from mq_jax.calibration import Statistics
from mq_jax.recipes import Recipe
from mq_jax.sites import Site


@pytree_dataclass
class Candidates:
  """What every candidate makes of every site.

  Attributes:
    values: By site name, the parameter under each candidate.
      [c, *parameter's shape].
    overlap: Inner products of the candidates' errors under the Gram matrix
      of the site's inputs: tr(e_c^T A e_d). f32[l, c, c].
    sites: The sites, l of them.
    labels: Of the candidates, c of them.
  """

  values: dict[str, jax.Array]
  overlap: jax.Array
  sites: tuple[Site, ...] = static()
  labels: tuple[str, ...] = static()


class Made(NamedTuple):
  """Candidates, and the packed parameters that they stand for.

  Attributes:
    candidates: For the search.
    packed: By candidate, the parameters with packed matrices.
    bits: Stored bits, metadata included. f64[l, c].
  """

  candidates: Candidates
  packed: tuple[Any, ...]
  bits: np.ndarray


def make(
  params: Any,
  sites: Sequence[Site],
  recipes: Sequence[Recipe],
  *,
  statistics: Mapping[str, Statistics] | None = None,
  progress: Callable[[int, int], None] | None = None,
) -> Made:
  """Quantize every site by every recipe.

  Args:
    params: The model's parameters.
    sites: Sites to allocate for, each with a parameter of its own.
    recipes: The candidates; `recipes.none()` leaves a site in bfloat16.
    statistics: From `calibrate`. Without, errors are weighed alike.
    progress: Called with the candidates done and their number.

  Raises:
    ValueError: for no recipes, recipes with the same label, and whatever
      `plans.compress` refuses.
  """
  labels = tuple(recipe.label for recipe in recipes)
  if not labels or len(set(labels)) < len(labels):
    raise ValueError(
      f'allocation: candidates {list(labels)}; at least one is needed, and '
      'no label twice'
    )
  sites = tuple(entry[0] for entry in plans.uniform(sites, recipes[0]).entries)
  packed = []
  for i, recipe in enumerate(recipes):
    plan = plans.uniform(sites, recipe, exclude=())
    packed.append(plans.compress(params, plan, statistics=statistics))
    if progress is not None:
      progress(i + 1, len(labels))
  values, overlap, bits = {}, [], []
  for site in sites:
    matrices = [sites_lib.get(p, site) for p in packed]
    bits.append([8 * matrix.nbytes for matrix in matrices])
    stacked = jnp.stack([m.dequantize() for m in matrices])
    gram = None if statistics is None else statistics[site.name].gram
    original = site.matrix(sites_lib.get(params, site))
    overlap.append(_overlap(stacked, original, gram))
    values[site.name] = jax.vmap(site.unmatrix)(stacked)
  return Made(
    Candidates(values, jnp.stack(overlap), sites, labels),
    tuple(packed),
    np.array(bits, np.float64),
  )


@jax.jit
def _overlap(stacked, original, gram):
  """tr(e_c^T A e_d) over candidates; A the identity without statistics."""
  error = stacked.astype(jnp.float32) - original.astype(jnp.float32)[None]
  weighed = error if gram is None else gram @ error
  both = jnp.einsum('c...,d...->cd', error, weighed)
  return 0.5 * (both + both.T)


def mixed(params: Any, candidates: Candidates, probabilities: jax.Array) -> Any:
  """Parameters with the mean of its candidates at each site.

  What probabilities lack to 1 is the share of the original parameter: rows of
  zeros leave a site as it is.

  Args:
    params: The model's parameters.
    candidates: Of each site.
    probabilities: f32[l, c].
  """
  new = {}
  for row, site in zip(probabilities, candidates.sites, strict=True):
    stack = candidates.values[site.name]
    mean = jnp.tensordot(row, stack.astype(jnp.float32), axes=1)
    original = sites_lib.get(params, site).astype(jnp.float32)
    mean = mean + (1.0 - jnp.sum(row)) * original
    new[site] = mean.astype(stack.dtype)
  return sites_lib.put(params, new)


def assemble(made: Made, params: Any, choice: Sequence[int]) -> Any:
  """Packed parameters of a whole choice i[l]: the plan carried out."""
  new = {
    site: sites_lib.get(made.packed[int(c)], site)
    for site, c in zip(made.candidates.sites, choice, strict=True)
  }
  return sites_lib.put(params, new)


def plan_of(
  made: Made, recipes: Sequence[Recipe], choice: Sequence[int]
) -> plans.Plan:
  """The plan of a whole choice i[l], to be saved."""
  return plans.Plan(
    tuple(
      (site, recipes[int(c)])
      for site, c in zip(made.candidates.sites, choice, strict=True)
    )
  )
