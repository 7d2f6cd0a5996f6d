"""Curvature of a loss at a model's sites, by products with the Hessian.

The Hessian H of a loss with respect to the parameters of all sites is never
formed. Its blocks H_lm couple the parameters of two sites; a parameter that
stacks several matrices is one site. What is measured is the curvature on one
batch: for more data, give a loss that averages over parts of its batch.

Functions that take sites are compiled for a loss and sites: give the same
function object again, and nothing is compiled again. Parameters of fewer
bits are differentiated in float32 around the cast to their own type; sums
are in float32.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mq_jax.allocation import _blocks
from mq_jax.allocation._blocks import Estimate, Leaves, Loss
from mq_jax.sites import Site


class Eigenvalues(NamedTuple):
  """Eigenvalues of largest magnitude, one a site.

  Attributes:
    magnitude: |H_l v| of the last unit vector v: it never falls from one
      product to the next, and never exceeds the largest |eigenvalue|. f32[l].
    rayleigh: v . H_l v: the eigenvalue with its sign, where the magnitude is
      about the same; less where two of opposite signs are as large. f32[l].
    products: Products with the Hessian that were taken. i32[l].
    converged: Whether the last changed the magnitude by less than asked for.
      bool[l].
  """

  magnitude: jax.Array
  rayleigh: jax.Array
  products: jax.Array
  converged: jax.Array


def hessian_vector_product(
  loss: Loss, params: Any, batch: Any, vector: Any
) -> Any:
  """H v, by forward over reverse differentiation.

  Takes about four times as long as a gradient, and twice its memory.

  Args:
    loss: (params, batch) -> scalar.
    params: Any tree of float arrays.
    batch: Data of the loss.
    vector: v, of the structure, shapes and dtypes of `params`.

  Returns:
    H v, a tree like `params`.

  Source:
    Pearlmutter, Neural Computation 6 (1994), 147-160.

  Examples:
    >>> loss = lambda w, x: jnp.sum(x * w**3)
    >>> w, x = jnp.array([1.0, 2.0]), jnp.array([1.0, 0.5])
    >>> hessian_vector_product(loss, w, x, jnp.ones(2))
    Array([6., 6.], dtype=float32)
  """
  slope = jax.grad(lambda p: loss(p, batch))
  return jax.jvp(slope, (params,), (vector,))[1]


def _products(loss: Loss, params: Any, batch: Any, sites: Sequence[Site]):
  """v -> H v for many v, and the leaves.

  What does not depend on v is computed once and kept: a product takes half
  the time of `hessian_vector_product`, all of them twice its memory.
  """
  f, leaves = _blocks.at_sites(loss, params, sites)
  _, hvp = jax.linearize(jax.grad(lambda leaves: f(leaves, batch)), leaves)
  return hvp, leaves


@_blocks.compiled('draws', 'at_once')
def hutchinson_trace(
  loss: Loss,
  params: Any,
  batch: Any,
  sites: Sequence[Site],
  *,
  key: jax.Array,
  draws: int = 64,
  at_once: int | None = None,
) -> Estimate:
  """Traces of the Hessian blocks of all sites, with their standard errors.

  One draw v of signs, one product Hv, and v_l . (Hv)_l is a sample of the
  trace of H_ll for every site l at once. The blocks that couple l to other
  sites add no bias, but their squares to the variance,

    2 (|H_ll|^2 - sum_i (H_ll)_ii^2) + sum_{m != l} |H_lm|^2,

  which costs less than a product a site where these are many.

  Args:
    loss: (params, batch) -> scalar.
    params: The model's parameters.
    batch: Data of the loss.
    sites: Sites with a parameter, l of them.
    key: Randomness of the draws.
    draws: Samples, s.
    at_once: Draws taken side by side, for a device that one does not fill.

  Returns:
    Traces, in loss over squared weight; the errors are those of the draws on
    this batch, not of the data.

  Raises:
    KeyError, ValueError: for sites without a parameter of their own, or
      `draws` or `at_once` less than 1.

  Source:
    Hutchinson (1989), as in HAWQ-V2, arXiv 1911.03852; all sites from one
    product is ours.
  """
  _blocks.at_least_one(draws=draws, at_once=at_once)
  hvp, leaves = _products(loss, params, batch, sites)

  def draw(key):
    v = _blocks.drawn(jax.random.rademacher, key, leaves)
    return _blocks.dots(v, hvp(v), leaves)

  keys = jax.random.split(key, draws)
  return _blocks.estimate(jax.lax.map(draw, keys, batch_size=at_once))


@_blocks.compiled('iterations')
def top_eigenvalue(
  loss: Loss,
  params: Any,
  batch: Any,
  sites: Sequence[Site],
  *,
  key: jax.Array,
  iterations: int = 100,
  tolerance: jax.typing.ArrayLike = 1e-3,
) -> Eigenvalues:
  """The eigenvalue of largest magnitude of each site's Hessian block.

  Power iteration from a normal draw, one site after the other, all other
  parameters held fixed; one program serves all sites.

  Args:
    loss: (params, batch) -> scalar.
    params: The model's parameters.
    batch: Data of the loss.
    sites: Sites with a parameter, l of them.
    key: Randomness of the starts.
    iterations: Most products of a site.
    tolerance: Relative change of the magnitude at which to stop.

  Returns:
    The eigenvalues, in loss over squared weight, and how they were reached.

  Raises:
    KeyError, ValueError: for sites without a parameter of their own, or
      `iterations` less than 1.

  Source:
    HAWQ, arXiv 1905.03696, algorithm 1; limits as in MQBench. It stops by
    the magnitude rather than the Rayleigh quotient, which settles at a wrong
    value where two eigenvalues are opposite.
  """
  _blocks.at_least_one(iterations=iterations)
  hvp, leaves = _products(loss, params, batch, sites)

  def unit(v):
    # Divided first by the largest: squares of small numbers vanish.
    top = jnp.max(jnp.stack([jnp.max(jnp.abs(x)) for x in v.values()]))
    v = {name: x / jnp.where(top > 0, top, 1.0) for name, x in v.items()}
    norm = jnp.sqrt(jnp.sum(_blocks.dots(v, v, leaves)))
    norm_or_one = jnp.where(norm > 0, norm, 1.0)
    return {name: x / norm_or_one for name, x in v.items()}, top * norm

  def one(argument):
    index, key = argument
    start = _blocks.drawn(jax.random.normal, key, leaves)

    def moved(state):
      _, magnitude, _, before, _ = state
      return jnp.abs(magnitude - before) > tolerance * magnitude

    def product(state):
      v, before, _, _, count = state
      u = _blocks.only(index, hvp(v), leaves)
      rayleigh = jnp.sum(_blocks.dots(v, u, leaves))
      v, magnitude = unit(u)
      return v, magnitude, rayleigh, before, count + 1

    v, _ = unit(_blocks.only(index, start, leaves))
    # Infinite: there is no change to judge before the second product.
    state = (v, jnp.float32(jnp.inf), jnp.float32(0.0), jnp.float32(0.0), 0)
    state = jax.lax.while_loop(
      lambda state: (state[4] < iterations) & ((state[4] < 2) | moved(state)),
      product,
      state,
    )
    _, magnitude, rayleigh, _, count = state
    converged = jnp.isfinite(magnitude) & ~moved(state) & (count > 1)
    return Eigenvalues(magnitude, rayleigh, count, converged)

  keys = jax.random.split(key, len(leaves))
  return jax.lax.map(one, (jnp.arange(len(leaves)), keys))


def _changes(leaves: Leaves, delta: Mapping[str, jax.Array]) -> Leaves:
  _blocks.check_leaves('delta', leaves, delta)
  return {name: jnp.asarray(delta[name], jnp.float32) for name in leaves}


@_blocks.compiled()
def row_interaction(
  loss: Loss,
  params: Any,
  batch: Any,
  sites: Sequence[Site],
  delta: Mapping[str, jax.Array],
) -> jax.Array:
  """A_l = D_l . (H D)_l: a site's curvature and its couplings to all others.

  By one product. Half of it is site l's share of the second-order change of
  the loss if all sites change by D.

  Args:
    loss: (params, batch) -> scalar.
    params: The model's parameters.
    batch: Data of the loss.
    sites: Sites with a parameter, l of them.
    delta: D: changes of the parameters by site, of their shapes.

  Returns:
    A, in units of the loss. f32[l].

  Raises:
    KeyError, ValueError: for sites without a parameter of their own, or
      changes that don't fit.

  Source:
    After arXiv 2306.04879; the form is ours (the paper's is not known).
  """
  hvp, leaves = _products(loss, params, batch, sites)
  delta = _changes(leaves, delta)
  return _blocks.dots(delta, hvp(delta), leaves)


def _pairs(hvp, deltas: Leaves) -> jax.Array:
  """D_lc . H_lm D_md for changes [c, ...] of each site. f32[l, c, l, c]."""
  count = next(iter(deltas.values())).shape[0]
  rows = len(deltas) * count

  def row(index):
    mine = {name: delta[index % count] for name, delta in deltas.items()}
    product = hvp(_blocks.only(index // count, mine, deltas))
    return jnp.stack(
      [
        jnp.sum(delta * product[name][None], axis=tuple(range(1, delta.ndim)))
        for name, delta in deltas.items()
      ]
    )

  table = jax.lax.map(row, jnp.arange(rows)).reshape(rows, rows)
  # H is symmetric; products with it are, up to rounding.
  table = 0.5 * (table + table.T)
  return table.reshape(len(deltas), count, len(deltas), count)


@_blocks.compiled()
def pairwise_interaction(
  loss: Loss,
  params: Any,
  batch: Any,
  sites: Sequence[Site],
  delta: Mapping[str, jax.Array],
) -> jax.Array:
  """P_lm = D_l . H_lm D_m for all pairs of sites, by a product a site.

  Rows add up to `row_interaction`; half of all is the second-order change of
  the loss if all sites change by D.

  Args and errors are those of `row_interaction`.

  Returns:
    P, symmetric, in units of the loss. f32[l, l].

  Source:
    After arXiv 2306.04879, as CLADO (arXiv 2307.05657) has it from measured
    pairs.
  """
  hvp, leaves = _products(loss, params, batch, sites)
  delta = _changes(leaves, delta)
  return _pairs(hvp, {n: d[None] for n, d in delta.items()})[:, 0, :, 0]


@_blocks.compiled()
def pair_table(
  loss: Loss,
  params: Any,
  batch: Any,
  sites: Sequence[Site],
  values: Mapping[str, jax.Array],
) -> jax.Array:
  """`pairwise_interaction` of all candidates: l times c products.

  Args:
    loss: (params, batch) -> scalar.
    params: The model's parameters.
    batch: Data of the loss.
    sites: Sites with a parameter, l of them.
    values: Candidates by site: weights [c, *shape of the parameter].

  Returns:
    P, symmetric, in units of the loss: for one-hot choices x, the
    second-order change of the loss is x . P x / 2. f32[l, c, l, c].

  Raises:
    KeyError, ValueError: as `row_interaction`.
  """
  hvp, leaves = _products(loss, params, batch, sites)
  _blocks.check_leaves('values', leaves, values, axes=1)
  deltas = {
    name: jnp.asarray(values[name], jnp.float32) - leaf[None]
    for name, leaf in leaves.items()
  }
  return _pairs(hvp, deltas)
