"""Tables of what each candidate of each site may cost in loss.

All f32[l, c], lower is better, from the weights that candidates stand for:
`values` has, by the site's name, all of them stacked [c, *shape of the
parameter]. Entries of sites are to be added up, so they are sums over
weights, not means. They rank; none is a loss: second-order ones lack, as in
their papers, the factor of a half.

Compiled for sites: one program for all sites and candidates.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax.allocation import _blocks
from mq_jax.allocation._blocks import Estimate
from mq_jax.allocation.hessians import Eigenvalues
from mq_jax.calibration import Statistics
from mq_jax.sites import Site

Values = Mapping[str, jax.Array]


def _table(
  params: Any,
  sites: Sequence[Site],
  values: Values,
  measure: Callable[[Site, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
  """`measure(site, weight, error)` of all candidates, one after the other."""
  leaves = _blocks.site_leaves(params, sites)
  _blocks.check_leaves('values', leaves, values, axes=1)
  rows = []
  for site in sites:
    weight = leaves[site.name]
    # One at a time, so that errors take the memory of one candidate.
    one = lambda value, site=site, weight=weight: measure(
      site, weight, value.astype(jnp.float32) - weight
    )
    rows.append(jax.lax.map(one, jnp.asarray(values[site.name])))
  return jnp.stack(rows)


def _share(part: jax.Array, whole: jax.Array) -> jax.Array:
  return part / jnp.where(whole > 0, whole, 1.0)


@_blocks.compiled('relative')
def weight_mse_table(
  params: Any,
  sites: Sequence[Site],
  values: Values,
  *,
  relative: bool = False,
) -> jax.Array:
  """Squared error of the weights, |dW|^2.

  Args:
    params: The model's parameters.
    sites: Sites with a parameter, l of them.
    values: Candidates by site, [c, *shape of the parameter].
    relative: Over |W|^2 of the site.

  Returns:
    f32[l, c].

  Raises:
    KeyError, ValueError: for sites without a parameter of their own, or
      candidates that don't fit.

  Examples:
    >>> from mq_jax.sites import find
    >>> params = {'w': jnp.ones((2, 3))}
    >>> sites = find(lambda p, x: x @ p['w'], params, jnp.ones((1, 2)))
    >>> values = {'w': jnp.stack([jnp.zeros((2, 3)), jnp.full((2, 3), 1.5)])}
    >>> weight_mse_table(params, sites, values)
    Array([[6. , 1.5]], dtype=float32)
  """

  def measure(site, weight, error):
    total = jnp.sum(error**2)
    return _share(total, jnp.sum(weight**2)) if relative else total

  return _table(params, sites, values, measure)


@_blocks.compiled()
def output_sqnr_table(
  params: Any,
  sites: Sequence[Site],
  values: Values,
  statistics: Mapping[str, Statistics | jax.Array],
) -> jax.Array:
  """Noise over signal of the outputs, |X dW|^2 / |X W|^2.

  That is one over the ratio of signal to quantization noise: -10 log10 of an
  entry is the SQNR in decibel. A site that stacks several matrices adds up
  their ratios, as it would if they were sites of their own.

  Args:
    params: The model's parameters.
    sites: Sites with a parameter, l of them.
    values: Candidates by site, [c, *shape of the parameter].
    statistics: From `calibrate`, or the matrices X^T X themselves, by site.

  Returns:
    f32[l, c].

  Raises:
    KeyError, ValueError: for sites without a parameter of their own or
      without statistics, or candidates or statistics that don't fit.
  """
  grams = {}
  for site in sites:
    if site.name not in statistics:
      raise ValueError(f'{site.name}: there are no statistics of this site')
    found = statistics[site.name]
    gram = found.gram if isinstance(found, Statistics) else found
    *batch, k, _ = site.matrix_shape
    if np.shape(gram) != (*batch, k, k):
      raise ValueError(
        f'{site.name}: gram has shape {np.shape(gram)}, needed is '
        f'{(*batch, k, k)}'
      )
    grams[site.name] = jnp.asarray(gram, jnp.float32)

  def energy(site, leaf):
    matrix, gram = site.matrix(leaf), grams[site.name]
    product = jnp.matmul(gram, matrix, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(matrix * product, axis=(-2, -1))  # [*batch]

  def measure(site, weight, error):
    return jnp.sum(_share(energy(site, error), energy(site, weight)))

  return _table(params, sites, values, measure)


def _scaled(params, sites, values, total: jax.Array) -> jax.Array:
  """A number of each site over its weights, times |dW|^2."""
  if np.shape(total) != (len(sites),):
    raise ValueError(
      f'sensitivity: {np.shape(total)} numbers for {len(sites)} sites'
    )
  weights = [np.prod(site.shape, dtype=np.float32) for site in sites]
  average = jnp.asarray(total, jnp.float32) / jnp.asarray(weights)
  return average[:, None] * weight_mse_table(params, sites, values)


@_blocks.compiled()
def trace_table(
  params: Any,
  sites: Sequence[Site],
  values: Values,
  traces: Estimate | jax.Array,
) -> jax.Array:
  """Average trace of the Hessian block times |dW|^2.

  Args:
    params: The model's parameters.
    sites: Sites with a parameter, l of them.
    values: Candidates by site, [c, *shape of the parameter].
    traces: From `hutchinson_trace`, or f32[l]. Negative ones count as 0.

  Returns:
    max(trace_l, 0) / n_l |dW_l|^2. f32[l, c].

  Raises:
    KeyError, ValueError: as `weight_mse_table`, or for another number of
      traces.

  Source:
    HAWQ-V2, arXiv 1911.03852, its Omega. The clip is ours.
  """
  total = traces.mean if isinstance(traces, Estimate) else traces
  total = jnp.maximum(jnp.asarray(total, jnp.float32), 0.0)
  return _scaled(params, sites, values, total)


@_blocks.compiled()
def eigenvalue_table(
  params: Any,
  sites: Sequence[Site],
  values: Values,
  eigenvalues: Eigenvalues | jax.Array,
) -> jax.Array:
  """Largest eigenvalue of the Hessian block over its size, times |dW|^2.

  Args:
    params: The model's parameters.
    sites: Sites with a parameter, l of them.
    values: Candidates by site, [c, *shape of the parameter].
    eigenvalues: From `top_eigenvalue`, or f32[l], of which the magnitude.

  Returns:
    |lambda_l| / n_l |dW_l|^2. f32[l, c].

  Raises:
    KeyError, ValueError: as `weight_mse_table`, or for another number of
      eigenvalues.

  Source:
    HAWQ, arXiv 1905.03696: lambda / n for bits, times |dW|^2 for the order.
    The table for a search is ours.
  """
  one = eigenvalues
  total = one.magnitude if isinstance(one, Eigenvalues) else jnp.abs(one)
  return _scaled(params, sites, values, total)


def _weighted(params, sites, values, what, weights, measure):
  leaves = _blocks.site_leaves(params, sites)
  _blocks.check_leaves(what, leaves, weights)
  f = lambda site, _, error: jnp.sum(
    measure(jnp.asarray(weights[site.name], jnp.float32), error)
  )
  return _table(params, sites, values, f)


@_blocks.compiled()
def fisher_table(
  params: Any,
  sites: Sequence[Site],
  values: Values,
  fisher: Mapping[str, jax.Array],
) -> jax.Array:
  """Squared errors weighted by the diagonal of the Fisher matrix.

  Args:
    params: The model's parameters.
    sites: Sites with a parameter, l of them.
    values: Candidates by site, [c, *shape of the parameter].
    fisher: From `fisher_diagonal`.

  Returns:
    sum_i F_ii dW_i^2. f32[l, c].

  Raises:
    KeyError, ValueError: as `weight_mse_table`, or for a Fisher matrix that
      does not fit.
  """
  return _weighted(
    params, sites, values, 'fisher', fisher, lambda f, error: f * error**2
  )


@_blocks.compiled()
def gradient_error_table(
  params: Any,
  sites: Sequence[Site],
  values: Values,
  gradient: Mapping[str, jax.Array],
) -> jax.Array:
  """Squared gradient times squared error, weight by weight.

  `fisher_table` on the gradient of the mean loss in place of those of single
  examples: all that a trained model leaves of it is noise of the batch.

  Args:
    params: The model's parameters.
    sites: Sites with a parameter, l of them.
    values: Candidates by site, [c, *shape of the parameter].
    gradient: From `site_gradient`.

  Returns:
    sum_i g_i^2 dW_i^2. f32[l, c].

  Raises:
    KeyError, ValueError: as `weight_mse_table`, or for a gradient that does
      not fit.
  """
  return _weighted(
    params, sites, values, 'gradient', gradient, lambda g, e: (g * e) ** 2
  )


@_blocks.compiled()
def first_order_table(
  params: Any,
  sites: Sequence[Site],
  values: Values,
  gradient: Mapping[str, jax.Array],
) -> jax.Array:
  """First-order change of the loss, g . dW; of either sign.

  With half of `pair_table` it is the loss to second order. Args and errors
  are those of `gradient_error_table`.

  Returns:
    In units of the loss. f32[l, c].
  """
  return _weighted(
    params, sites, values, 'gradient', gradient, lambda g, error: g * error
  )
