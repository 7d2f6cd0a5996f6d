"""What is learned of a quantized matrix: where on its grid, and how wide.

Codes keep their structure (outliers, patterns, exponents) and so their bytes;
weights move from the value they were given to another of the grid.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax import layouts, plans
from mq_jax._pytrees import pytree_dataclass, static
from mq_jax.quantize import QuantizedMatrix
from mq_jax.recipes import Learning

# A factor that travels as far as an offset changes so much less: offsets are
# in steps of the grid, of which 2**bits make a range.
_FACTOR = 0.1


@pytree_dataclass
class Start:
  """A matrix as it was quantized, ready to be moved.

  Attributes:
    codes: Of the layout.
    target: Where weights are before they are rounded, which gives the codes'
      values. f32[*batch, k, n].
    spacing: Distance of neighbours on the grid. f32[*batch, k, n].
    layout: Of the codes.
    site: Of the model that is trained; None for a matrix on its own.
  """

  codes: dict[str, jax.Array]
  target: jax.Array
  spacing: jax.Array
  layout: layouts.Layout = static()
  site: Any = static(None)


class Leaves(NamedTuple):
  """What is learned of one matrix; all zero at the start.

  Attributes:
    offsets: How far weights go, in units of the spacing. f32[*batch, k, n].
    factors: Of codes that are real numbers, their logarithms by tenths.
  """

  offsets: jax.Array
  factors: dict[str, jax.Array]


def begin(
  matrix: QuantizedMatrix, weight: jax.Array, near: float = Learning.near
) -> tuple[Start, Leaves]:
  """Start from a quantized matrix, each weight as near to its own as can be.

  Args:
    matrix: What was made of the weight.
    weight: As it was. f32[*batch, k, n].
    near: How far towards its own value a weight begins from its place on the
      grid, at most, in units of the spacing; less than 0.5.

  Raises:
    ValueError: if its layout can't be learned.
  """
  layout = matrix.layout
  if not hasattr(layout, 'relax'):
    raise ValueError(
      f'{matrix.recipe}: layout {type(layout).__name__} has no `relax`; what '
      'it stores cannot be learned'
    )
  target, spacing = _placed(
    layout, matrix.shape, matrix.codes, weight.astype(jnp.float32), near
  )
  factors = {
    name: jnp.zeros(matrix.codes[name].shape, jnp.float32)
    for name in layout.learned(matrix.codes)
  }
  start = Start(matrix.codes, target, spacing, layout, matrix.site)
  return start, Leaves(jnp.zeros(target.shape, jnp.float32), factors)


def _batched(f, shape, *arguments):
  """A function of one matrix, of a batch of them."""
  for _ in shape[:-2]:
    f = jax.vmap(f)
  return f(*arguments)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _placed(layout, shape, codes, weight, near):
  """Targets and spacings; compiled once for matrices alike."""
  k, n = shape[-2:]

  def one(codes, weight):
    value = layout.place(codes, layout.decode(codes, k, n), k, n)
    spacing = layout.spacing(codes, k, n)
    own = layout.place(codes, weight, k, n)
    far = near * spacing
    target = value + jnp.clip(own - value, -far, far)
    relax = lambda target: layout.relax(codes, target, k, n)
    # What is clipped or pruned would not hear of it.
    heard = jax.grad(lambda t: jnp.sum(layout.place(codes, relax(t), k, n)))
    target = jnp.where(heard(target) != 0, target, value)
    same = jnp.all(relax(target) == layout.decode(codes, k, n))
    return jnp.where(same, target, value), spacing

  return _batched(one, shape, codes, weight)


def _real(start: Start, leaves: Leaves) -> dict[str, jax.Array]:
  """Codes with the real numbers as they are stored, differentiable."""
  moved = {}
  for name, factor in leaves.factors.items():
    code = start.codes[name]
    soft = code.astype(jnp.float32) * jnp.exp(_FACTOR * factor)
    stored = soft.astype(code.dtype).astype(jnp.float32)
    moved[name] = layouts.through(stored, soft)
  return start.codes | moved


def values(start: Start, leaves: Leaves) -> jax.Array:
  """What the matrix decodes to, differentiable in the leaves."""
  k, n = start.target.shape[-2:]
  relax = lambda codes, target: start.layout.relax(codes, target, k, n)
  return _batched(
    relax, start.target.shape, _real(start, leaves), _target(start, leaves)
  )


def _target(start: Start, leaves: Leaves) -> jax.Array:
  return start.target + start.spacing * leaves.offsets


def parameter(start: Start, leaves: Leaves) -> jax.Array:
  """`values` as the model has them."""
  found = values(start, leaves)
  return found if start.site is None else start.site.unmatrix(found)


@jax.jit
def _recoded(start: Start, leaves: Leaves) -> dict[str, jax.Array]:
  k, n = start.target.shape[-2:]
  real = _real(start, leaves)
  recode = lambda codes, target: start.layout.recode(codes, target, k, n)
  moved = _batched(recode, start.target.shape, real, _target(start, leaves))
  return {name: x.astype(start.codes[name].dtype) for name, x in moved.items()}


def harden(
  matrix: QuantizedMatrix, weight: jax.Array, start: Start, leaves: Leaves
) -> QuantizedMatrix:
  """The matrix with the codes that `values` decodes from, as many bytes.

  Args:
    matrix: As it was begun from.
    weight: What it stands for. f32[*batch, k, n].
    start: From `begin`.
    leaves: What was learned.

  Returns:
    The matrix; its record has `weight_mse` anew, `moved`, the share of weights
    whose value is another, and no `output_error`, of which Hessians know.
  """
  # The site only names it, and would make each a program of its own.
  codes = _recoded(dataclasses.replace(start, site=None), leaves)
  learned = dataclasses.replace(matrix, codes=codes)
  before, after = (np.asarray(plans.decode(m)) for m in (matrix, learned))
  if matrix.site is not None:
    before, after = (np.asarray(matrix.site.matrix(x)) for x in (before, after))
  weight = np.asarray(weight, np.float32)
  mean = lambda x: np.mean(x, axis=(-2, -1), dtype=np.float32)
  power = mean(weight**2)
  record = {n: x for n, x in matrix.record.items() if n != 'output_error'}
  record['weight_mse'] = jnp.asarray(
    mean((weight - after) ** 2) / np.where(power > 0, power, 1.0)
  )
  record['moved'] = jnp.asarray(mean(before != after))
  return dataclasses.replace(learned, record=record)
