"""Candidates with other numbers, made as plans are, and their bits."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax import plans
from mq_jax import sites as sites_lib
from mq_jax.allocation._learnable import Leaves
from mq_jax.allocation._secants import overlaps
from mq_jax.allocation.candidates import Made
from mq_jax.calibration import Statistics
from mq_jax.quantize import QuantizedMatrix
from mq_jax.recipes import Recipe

_NODES = 9  # where stored bits are measured, from -_SPAN to _SPAN
_SPAN = 1.0  # of a coordinate: a factor of e for a positive number


class Bits(NamedTuple):
  """Stored bits of candidates as their numbers change.

  Layouts count their bytes on the host. So they are measured once at a few
  values of each number, all others as they were, and interpolated: this is
  exact at the start and near it elsewhere, and constant beyond the outermost
  values; what is rounded to a budget is measured again.

  Attributes:
    start: Of the recipes as they are. f32[l, c].
    nodes: Coordinates of each number. f32[e, g].
    change: What is added to `start` there. f32[e, g, l].
    candidates: Candidate of each number. i32[e].
  """

  start: jax.Array
  nodes: jax.Array
  change: jax.Array
  candidates: jax.Array

  def at(self, raw: jax.Array) -> jax.Array:
    """Bits f32[l, c] for coordinates f32[e, l] or f32[e, 1]."""
    raw = jnp.broadcast_to(raw, (raw.shape[0], self.start.shape[0]))
    each = jax.vmap(jax.vmap(jnp.interp, (0, None, 1)))
    added = each(raw, self.nodes, self.change)  # [e, l]
    return self.start.at[:, self.candidates].add(added.T)


def measure_bits(
  params: Any,
  made: Made,
  leaves: Leaves,
  *,
  statistics: Mapping[str, Statistics] | None = None,
) -> Bits:
  """Measure the bits of candidates at several values of each number.

  A number whose ends store what its start does is taken to change nothing.
  """
  sites = made.candidates.sites
  offsets = np.linspace(-_SPAN, _SPAN, _NODES)
  nodes = leaves.begin() + offsets[None]
  change = np.zeros((len(leaves.entries), _NODES, len(sites)))
  for e, leaf in enumerate(leaves.entries):
    start = made.bits[:, leaf.candidate]

    def bits(g, e=e, leaf=leaf):
      number = float(leaf.number(np.float64(nodes[e, g])))
      recipe = leaves.remade(leaf.candidate, {leaf.option: number})
      plan = plans.uniform(sites, recipe, exclude=())
      packed = plans.compress(params, plan, statistics=statistics)
      return np.array([8 * sites_lib.get(packed, s).nbytes for s in sites])

    for g in (0, _NODES - 1):
      change[e, g] = bits(g) - start
    if change[e].any():
      for g in range(1, _NODES - 1):
        if g != _NODES // 2:
          change[e, g] = bits(g) - start
  return Bits(
    jnp.asarray(made.bits, jnp.float32),
    jnp.asarray(nodes, jnp.float32),
    jnp.asarray(change, jnp.float32),
    jnp.array([leaf.candidate for leaf in leaves.entries], jnp.int32),
  )


class Remade(NamedTuple):
  """Candidates with learned numbers, and as they were before.

  Attributes:
    made: Candidates c with what they learned, followed by those that learned
      as they were at the start, so what was feasible stays so.
    recipes: Of each site and candidate in `made`.
    origin: Number of each candidate in the recipes given. i64[c + learned].
  """

  made: Made
  recipes: tuple[tuple[Recipe, ...], ...]
  origin: np.ndarray


def remake(
  params: Any,
  made: Made,
  leaves: Leaves,
  raw: jax.Array,
  *,
  statistics: Mapping[str, Statistics] | None = None,
) -> Remade:
  """Quantize with learned numbers, as `plans.compress` does.

  Numbers are rounded to four digits, so that plans stay readable; values and
  bits are those of the rounded numbers.

  Args:
    params: The model's parameters.
    made: Candidates of the recipes as they are.
    leaves: From `learnable`.
    raw: Coordinates of the numbers. f32[e, l] or f32[e, 1].
    statistics: As `made` was made with.
  """
  old = made.candidates
  raw = np.broadcast_to(np.asarray(raw, np.float64), (len(raw), len(old.sites)))
  learned = sorted({leaf.candidate for leaf in leaves.entries})
  origin = np.array([*range(len(leaves.recipes)), *learned])
  rows = [list(leaves.recipes) for _ in old.sites]
  packed = list(made.packed)
  for c in learned:
    for i in range(len(old.sites)):
      numbers = {
        leaf.option: float(f'{leaf.number(raw[e, i]):.4g}')
        for e, leaf in enumerate(leaves.entries)
        if leaf.candidate == c
      }
      rows[i][c] = leaves.remade(c, numbers)
    entries = zip(old.sites, (row[c] for row in rows), strict=True)
    plan = plans.Plan(tuple(entries))
    packed[c] = plans.compress(params, plan, statistics=statistics)
  matrices, values, bits = [], {}, []
  for site in old.sites:
    ours = [sites_lib.get(p, site) for p in packed]
    bits.append([8 * matrix.nbytes for matrix in ours])
    new = jnp.stack([_values(m) for m in ours])
    start = old.values[site.name][jnp.array(learned, jnp.int32)]
    values[site.name] = jnp.concatenate([new, start])
    matrices.append(site.matrix(sites_lib.get(params, site)))
  grams = grams_of(statistics, old.sites)
  again = dataclasses.replace(
    old,
    values=values,
    overlap=overlaps(values, old.sites, matrices, grams),
    labels=(*old.labels, *(f'{old.labels[c]}, start' for c in learned)),
  )
  return Remade(
    made._replace(
      candidates=again,
      packed=(*packed, *(made.packed[c] for c in learned)),
      bits=np.concatenate([np.array(bits, float), made.bits[:, learned]], 1),
      recipes=tuple(leaves.recipes[c] for c in origin),
    ),
    tuple((*row, *(leaves.recipes[c] for c in learned)) for row in rows),
    origin,
  )


def grams_of(statistics, sites):
  if statistics is None:
    return None
  return {site.name: statistics[site.name].gram for site in sites}


def _values(matrix: QuantizedMatrix) -> jax.Array:
  # One program for all sites: what they differ in is left out.
  bare = dataclasses.replace(matrix, site=None, recipe='', record={})
  return matrix.site.unmatrix(_decoded(bare))


@jax.jit
def _decoded(matrix: QuantizedMatrix) -> jax.Array:
  return matrix.dequantize()
