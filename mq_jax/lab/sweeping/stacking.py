"""Recipes that differ in numbers only, side by side in one compiled program.

Numbers of a recipe are leaves of a pytree. Recipes of equal structure are
stacked leaf by leaf, and `vmap` over the stack quantizes a matrix by all of
them: what the numbers don't change (a factor of the Hessian, when only a
threshold varies) is computed once.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax import plans, quantize, recipes
from mq_jax import sites as sites_lib
from mq_jax.recipes import Recipe

# Most of what a program may hold at a time, in numbers f32: settings times
# the largest weight and Hessian of a matrix (it keeps a handful of copies),
# and settings times all weights, which wait as codes to be evaluated.
IN_PROGRAM = 1 << 24
WAITING = 1 << 28


def structure(recipe: Recipe) -> Any:
  """What recipes that can be stacked have in common; hashable."""
  return jax.tree.structure(_bare(recipe))


def stackable(recipe: Recipe) -> bool:
  """Whether a recipe is one program: not of blocks, activations, learned."""
  blocks = isinstance(recipe.rows, recipes.BlockParts)
  alone = recipe.activations is None and recipe.learning is None
  return alone and not blocks


def _bare(recipe: Recipe) -> Recipe:
  """Without the options that only name it."""
  return dataclasses.replace(recipe, options=(), name='')


def varying(given: Sequence[Recipe]) -> dict[Any, frozenset[int]]:
  """By structure, which leaves differ among recipes.

  Programs are made for these leaves: taken from the whole of a sweep, they
  don't depend on which of its settings are done together.
  """
  leaves: dict[Any, list[list[Any]]] = {}
  for recipe in given:
    leaves.setdefault(structure(recipe), []).append(
      jax.tree.leaves(_bare(recipe))
    )
  return {
    key: frozenset(
      i for i, column in enumerate(zip(*rows)) if len(set(column)) > 1
    )
    for key, rows in leaves.items()
  }


def stack(
  given: Sequence[Recipe], vary: frozenset[int], size: int
) -> tuple[Recipe, tuple[int | None, ...]]:
  """One recipe with a leading axis in the leaves that vary, and its axes.

  Args:
    given: Recipes of one structure.
    vary: Numbers of leaves that get the axis; those that differ do anyway.
    size: Of the axis; the last recipe fills it up.

  Returns:
    The stacked recipe, and of each leaf the axis that `vmap` maps.
  """
  given = [*given, *[given[-1]] * (size - len(given))]
  bare = [_bare(recipe) for recipe in given]
  stacked, axes = [], []
  for i, column in enumerate(zip(*map(jax.tree.leaves, bare))):
    mapped = i in vary or len(set(column)) > 1
    stacked.append(_column(column) if mapped else column[0])
    axes.append(0 if mapped else None)
  return jax.tree.unflatten(jax.tree.structure(bare[0]), stacked), tuple(axes)


def _column(values: Sequence[Any]) -> jax.Array:
  """Numbers as an array, as little given to promotion as they were alone."""
  array = np.asarray(values)
  kind = {'b': bool, 'i': int, 'f': float}[array.dtype.kind]
  # Of a Python type: the result is weakly typed, as a Python number is.
  return jax.lax.convert_element_type(jnp.asarray(array), kind)


@functools.partial(jax.jit, static_argnames='axes')
def _quantize(weights, hessians, recipe, axes):
  one = lambda r: quantize.quantize_batch(weights, r, hessians)
  if all(axis is None for axis in axes):
    return jax.tree.map(lambda x: x[None], one(recipe))
  along = jax.tree.unflatten(jax.tree.structure(recipe), axes)
  return jax.vmap(one, in_axes=(along,))(recipe)


def programs() -> int:
  """Programs that this process has compiled for stacked settings."""
  return _quantize._cache_size()


def quantize_stacked(
  weights: jax.Array,
  given: Sequence[Recipe],
  hessians: jax.Array | None = None,
  *,
  vary: frozenset[int] = frozenset(),
  size: int | None = None,
) -> tuple[dict, dict]:
  """`quantize.quantize_batch` by several recipes, in one program.

  Args:
    weights: f32[b, k, n], or f32[k, n] of one; checked by the caller.
    given: Recipes of one structure.
    hessians: f32[b, k, k] (or f32[k, k]), or None.
    vary: See `stack`.
    size: Settings that the program is made for; as many as given by default.

  Returns:
    Codes and records, with the settings in front; those that fill up `size`
    are left in.

  Examples:
    >>> from mq_jax import recipes
    >>> weight = jax.random.normal(jax.random.key(0), (32, 64))
    >>> settings = [recipes.rtn(2, 16, clip=c) for c in (0.7, 0.8, 0.9)]
    >>> codes, record = quantize_stacked(weight, settings)
    >>> codes['level'].shape, record['weight_mse'].shape
    ((3, 32, 64), (3,))
  """
  recipe, axes = stack(given, vary, len(given) if size is None else size)
  return _quantize(weights, hessians, recipe, axes)


def most_at_once(
  params: Any, sites: Sequence[sites_lib.Site], recipe: Recipe, limit: int
) -> int:
  """Settings that a program may take on, `limit` at most, for its memory."""
  total, largest = 0, 1
  for site, _ in plans.uniform(sites, recipe).entries:
    *batch, k, n = site.matrix(sites_lib.get(params, site)).shape
    count = int(np.prod(batch, dtype=np.int64))
    total += count * k * n
    largest = max(largest, count * k * (n + k))
  room = min(IN_PROGRAM // largest, WAITING // max(1, total))
  return max(1, min(limit, room))


def compress_stacked(
  params: Any,
  sites: Sequence[sites_lib.Site],
  given: Sequence[Recipe],
  *,
  statistics: Mapping[str, Any],
  vary: frozenset[int],
  size: int,
  progress: Callable[[int, int], None] | None = None,
) -> list[Any]:
  """`plans.compress` by each of several recipes of one structure.

  A site at a time, all recipes at once: one program for each shape.

  Args:
    params: The model's parameters.
    sites: Of the model; `plans.uniform` says which are quantized.
    given: Distinct recipes of one structure, `size` at most.
    statistics: From `calibrate`, of all sites.
    vary: See `stack`.
    size: Settings that programs are made for.
    progress: Called with the sites done and their number.

  Returns:
    For each recipe, `params` with packed matrices.
  """
  found = [site for site, _ in plans.uniform(sites, given[0]).entries]
  new: list[dict] = [{} for _ in given]
  for done, site in enumerate(found):
    leaf = jnp.asarray(sites_lib.get(params, site))
    matrix = site.matrix(leaf)
    hessian = statistics[site.name].gram
    quantize.check_matrix(site.name, matrix, hessian, given[0])
    batch = matrix.shape[:-2]
    flat = lambda x: x.astype(jnp.float32).reshape(-1, *x.shape[-2:])
    codes, record = jax.block_until_ready(
      quantize_stacked(flat(matrix), given, flat(hessian), vary=vary, size=size)
    )
    for i, recipe in enumerate(given):
      mine = lambda x, i=i, batch=batch: x[i].reshape(*batch, *x.shape[2:])
      new[i][site] = quantize.QuantizedMatrix(
        jax.tree.map(mine, codes),
        jax.tree.map(mine, record),
        quantize.layout_of(recipe),
        matrix.shape,
        str(leaf.dtype),
        site=site,
        recipe=recipe.label,
      )
    if progress is not None:
      progress(done + 1, len(found))
  return [sites_lib.put(params, matrices) for matrices in new]
