"""Layer-wise error compensation: the GPTQ order as one rolled scan.

Weights are quantized row by row along the reduction axis, and the error of
each row is moved into the rows that are still to come, so that the error of
the layer's output grows least.

With a factor H = R R^T, R upper triangular, and D = W - Q the error so far,

    tr(D^T H D) = |R^T D|^2 = sum_j R_jj^2 |t_j - q_j|^2,
    t_j = w_j + sum_{i<j} (R_ij / R_jj) d_i,

so the best that can be done for row j, given the rows before it, is to round
its *target* t_j, and R_jj^2 is the cost of its error. This is GPTQ (Frantar
et al. 2023, arXiv 2210.17323) without the inverse of H: with U the upper
Cholesky factor of H^-1, R = U^-1, so U_jj = 1 / R_jj, and its updates of all
later rows add up to the sum above. Pulling the sum when a row's turn comes,
block by block, reads the errors once and writes nothing but the row.
"""

import enum
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from mq_jax import clusters
from mq_jax._pytrees import pytree_dataclass, static

ORDERS = ('natural', 'activation')
_BLOCK = 128  # rows whose errors stay in cache between two matrix products


class Status(enum.IntEnum):
  """How the quantization of a site ended."""

  ok = 0
  no_hessian = 1
  factorization_failed = 2

  @property
  def sentence(self) -> str:
    return {
      Status.ok: 'done as asked',
      Status.no_hessian: (
        'the recipe compensates errors but got no Hessian; rounded without'
      ),
      Status.factorization_failed: (
        'the damped Hessian is not positive definite; rounded without '
        'compensation; use more damping or more calibration data'
      ),
    }[self]


class RowRecipe(Protocol):
  """How the rows of a weight are quantized, a group of `group` at a time."""

  group: int

  def prepare(self, weight: jax.Array, saliency: jax.Array) -> Any:
    """Chosen once on the whole weight f32[k, n]; saliency f32[k]."""

  def fit(self, rows: jax.Array, saliency: jax.Array, whole: Any) -> Any:
    """Chosen for a group on its current values f32[g, n]; saliency f32[g]."""

  def apply(
    self, row: jax.Array, saliency: jax.Array, whole: Any, fitted: Any, index
  ) -> tuple[jax.Array, dict]:
    """Values f32[n] and codes of row `index` (in the group), as it is now."""


@pytree_dataclass
class Compensation:
  """Options of the solver.

  Attributes:
    damping: Added to the Hessian's diagonal, as a share of its mean.
    order: 'natural', or 'activation' for rows by falling Hessian diagonal;
      groups of several rows are then fitted beforehand, on the weights as
      they came, so that nothing about the order has to be stored.
  """

  damping: jax.typing.ArrayLike = 0.01
  order: str = static('natural')


def damped(hessian: jax.Array, damping: jax.typing.ArrayLike) -> jax.Array:
  """Symmetrize, and add `damping` times the mean diagonal; [k, k].

  An input that was never active has no say in the others, and is left with
  the damping alone. An all-zero Hessian becomes the identity.
  """
  hessian = 0.5 * (hessian + hessian.T)
  mean = jnp.mean(jnp.diagonal(hessian))
  shift = jnp.where(mean > 0, damping * mean, 1.0)
  return hessian + shift * jnp.eye(hessian.shape[0], dtype=hessian.dtype)


def factorize(hessian: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Feedback coefficients of a positive definite Hessian.

  Returns:
    `feedback` f32[k, k], strictly upper, R_ij / R_jj for H = R R^T;
    `saliency` f32[k] = R_jj^2, the cost of a unit error in each row;
    `failed` bool[], True where there is no such factor: then `feedback` is
    zero and `saliency` the diagonal of H where that is positive.
  """
  lower = jax.lax.linalg.cholesky(hessian[::-1, ::-1], symmetrize_input=False)
  R = lower[::-1, ::-1]
  diagonal = jnp.diagonal(R)
  failed = ~jnp.all(jnp.isfinite(diagonal) & (diagonal > 0))
  feedback = jnp.triu(R / diagonal[None, :], 1)
  feedback = jnp.where(failed, 0.0, feedback)
  plain = jnp.diagonal(hessian)
  plain = jnp.where(jnp.isfinite(plain) & (plain > 0), plain, 1.0)
  return feedback, jnp.where(failed, plain, diagonal**2), failed


def _dot(a, b):
  return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _slice(x, start, size):
  return jax.lax.dynamic_slice_in_dim(x, start, size)


def sweep(
  weight: jax.Array,
  feedback: jax.Array,
  saliency: jax.Array,
  rows: RowRecipe,
  whole: Any,
  labels: jax.Array | None = None,
) -> tuple[Any, Any]:
  """Quantize row after row, each with the feedback of those before it.

  Args:
    weight: f32[k, n], k a multiple of `rows.group`.
    feedback: f32[k, k], strictly upper, see `factorize`.
    saliency: f32[k].
    rows: What is done to a group of rows.
    whole: What `rows.prepare` returned.
    labels: Index that `rows.apply` is given for each row; None for its
      position in its group. i32[k].

  Returns:
    `fitted`, stacked over groups, and the codes, stacked over rows.
  """
  k, n = weight.shape
  g = rows.group
  groups = max(1, min(_BLOCK, k) // g)  # in a block
  size = groups * g
  pad = -k % size
  # Padding is inert: no feedback goes in or out, and its codes are dropped.
  weight = jnp.pad(weight, ((0, pad), (0, 0)))
  feedback = jnp.pad(feedback, ((0, pad), (0, pad)))
  saliency = jnp.pad(saliency, (0, pad))
  if labels is None:
    labels = jnp.arange(k) % g
  labels = jnp.pad(labels, (0, pad))

  def group_step(block, j):
    """One group, given the errors of its block so far."""
    target, into_block, errors, first = block
    start = j * g
    into = jax.lax.dynamic_slice_in_dim(into_block, start, g, axis=1)
    pulled = _slice(target, start, g) + _dot(into.T, errors)
    original = _slice(weight, first + start, g)
    costs = _slice(saliency, first + start, g)
    into_group = _slice(into, start, g)  # [g, g]
    current = pulled
    if g > 1:
      # Rows of a group pull at each other, too: what is fitted are the values
      # that all of them together would take to make up for the rows before.
      current = original + jax.lax.linalg.triangular_solve(
        into_group,
        pulled - original,
        left_side=True,
        transpose_a=True,
        unit_diagonal=True,
      )
    fitted = rows.fit(current, costs, whole)

    def row_step(group_errors, i):
      row = pulled[i]
      if g > 1:
        row = row + _dot(into_group[:, i], group_errors)
      label = labels[first + start + i]
      value, code = rows.apply(row, costs[i], whole, fitted, label)
      error = (original[i] - value)[None]
      return jax.lax.dynamic_update_slice(group_errors, error, (i, 0)), code

    start_errors = jnp.zeros((g, n), weight.dtype)
    group_errors, codes = jax.lax.scan(row_step, start_errors, jnp.arange(g))
    errors = jax.lax.dynamic_update_slice(errors, group_errors, (start, 0))
    return (target, into_block, errors, first), (fitted, codes)

  def block_step(errors, b):
    """One block, given the errors [k, n] of all blocks before it."""
    first = b * size
    into = jax.lax.dynamic_slice_in_dim(feedback, first, size, axis=1)
    target = _slice(weight, first, size) + _dot(into.T, errors)
    block = (
      target,
      _slice(into, first, size),
      jnp.zeros((size, n), weight.dtype),
      first,
    )
    block, out = jax.lax.scan(group_step, block, jnp.arange(groups))
    return jax.lax.dynamic_update_slice(errors, block[2], (first, 0)), out

  blocks = (k + pad) // size
  _, (fitted, codes) = jax.lax.scan(
    block_step, jnp.zeros_like(weight), jnp.arange(blocks)
  )
  flat = lambda axes, length: lambda x: x.reshape(-1, *x.shape[axes:])[:length]
  return jax.tree.map(flat(2, k // g), fitted), jax.tree.map(flat(3, k), codes)


def round_rows(
  weight: jax.Array, saliency: jax.Array, rows: RowRecipe, whole: Any
) -> tuple[Any, Any]:
  """What `sweep` does when there is no feedback, for all groups at once."""
  k, n = weight.shape
  g = rows.group

  def group(arrays):
    current, costs = arrays
    fitted = rows.fit(current, costs, whole)
    apply = lambda row, cost, i: rows.apply(row, cost, whole, fitted, i)[1]
    return fitted, jax.vmap(apply)(current, costs, jnp.arange(g))

  arrays = (weight.reshape(k // g, g, n), saliency.reshape(k // g, g))
  # A few groups at a time: intermediate results are several times a weight.
  batch = clusters.batch_of(k // g, (1 << 19) // (g * n))
  fitted, codes = jax.lax.map(group, arrays, batch_size=batch)
  return fitted, jax.tree.map(lambda x: x.reshape(k, *x.shape[2:]), codes)


def rounded(weight: jax.Array, saliency: jax.Array, rows: Any) -> jax.Array:
  """Values f32[k, n] that rows of a recipe take without feedback.

  Args:
    weight: f32[k, n].
    saliency: What an error of each row costs. f32[k].
    rows: A row recipe with a layout, see `mq_jax.recipes.Rows`.
  """
  k, n = weight.shape
  pad = -k % rows.group
  padded = jnp.pad(weight, ((0, pad), (0, 0)))
  saliency = jnp.pad(saliency, (0, pad))
  whole = rows.prepare(padded, saliency)
  fitted, codes = round_rows(padded, saliency, rows, whole)
  return rows.layout().decode(rows.collect(whole, fitted, codes), k, n)


@pytree_dataclass
class _FittedBefore:
  """Rows taken one by one, in any order, whose groups were fitted before."""

  rows: Any
  whole: Any
  fitted: Any  # by group
  group: int = static(1)

  def fit(self, rows, saliency, whole):
    del rows, saliency, whole
    return ()

  def apply(self, row, saliency, whole, fitted, index):
    del whole, fitted
    group, i = index // self.rows.group, index % self.rows.group
    fitted = jax.tree.map(lambda x: x[group], self.fitted)
    return self.rows.apply(row, saliency, self.whole, fitted, i)


def solve(
  weight: jax.Array,
  hessian: jax.Array | None,
  rows: RowRecipe,
  options: Compensation | None,
) -> tuple[Any, Any, Any, jax.Array]:
  """Quantize a weight with a row recipe.

  Args:
    weight: f32[k, n]; k is padded to a multiple of `rows.group`.
    hessian: f32[k, k], X^T X of the layer's inputs up to a factor, or None.
    rows: The recipe.
    options: Options of the compensation; None for none, whatever the Hessian
      (which then only weighs errors).

  Returns:
    What was prepared for the whole, `fitted` by group, codes by row (padding
    included), and the `Status` as i32[].

  Raises:
    ValueError: for shapes that don't fit, or an unknown order.
  """
  k = weight.shape[0]
  pad = -k % rows.group
  padded = jnp.pad(weight, ((0, pad), (0, 0)))
  # Saliency 0 says of a row that it is padding.
  extend = lambda saliency: jnp.pad(saliency, (0, pad))

  def plainly(saliency):
    saliency = extend(saliency)
    whole = rows.prepare(padded, saliency)
    return whole, *round_rows(padded, saliency, rows, whole)

  if hessian is None:
    status = Status.ok if options is None else Status.no_hessian
    return *plainly(jnp.ones(k, jnp.float32)), jnp.int32(status)
  if hessian.shape != (k, k):
    raise ValueError(
      f'solve: hessian has shape {hessian.shape}, weight [k={k}, n] needs '
      f'({k}, {k})'
    )
  if options is None:
    diagonal = jnp.diagonal(damped(hessian, 0.01))
    return *plainly(diagonal), jnp.int32(Status.ok)
  if options.order not in ORDERS:
    raise ValueError(f'solve: order={options.order!r} is not one of {ORDERS}')

  H = damped(hessian, options.damping)
  diagonal = jnp.diagonal(H)
  if options.order == 'natural':
    feedback, saliency, failed = factorize(H)
    feedback = jnp.pad(feedback, ((0, pad), (0, pad)))
    whole = rows.prepare(padded, extend(diagonal))
    fitted, codes = sweep(padded, feedback, extend(saliency), rows, whole)
  else:
    order = jnp.argsort(-diagonal)
    feedback, saliency, failed = factorize(H[order][:, order])
    whole, fitted, _ = plainly(diagonal)
    # Padding comes last and is not swept; its codes are those of zeros.
    before = _FittedBefore(rows, whole, fitted)
    _, codes = sweep(weight[order], feedback, saliency, before, (), order)
    back = jnp.argsort(order)
    filled = lambda x: jnp.pad(x[back], [(0, pad)] + [(0, 0)] * (x.ndim - 1))
    codes = jax.tree.map(filled, codes)
  status = jnp.where(failed, Status.factorization_failed, Status.ok)
  return whole, fitted, codes, status.astype(jnp.int32)
