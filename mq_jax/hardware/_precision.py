"""What the bits of a matmul are, as far as hardware costs depend on them."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax import layouts
from mq_jax._pytrees import pytree_dataclass
from mq_jax.quantize import QuantizedMatrix, quantize_matrix, split
from mq_jax.recipes import Recipe


@pytree_dataclass
class Precision:
  """Bits of one matmul, or of sites [l]; all fields broadcast.

  Attributes:
    weight_bits: Width of a weight in the multiplier.
    activation_bits: Width of an activation.
    output_bits: Width of a result as it is written back.
    ebw: Bits stored for a weight, metadata included.
    outlier_blocks: Share of micro-blocks that hold outliers.
    two: Share of weights of magnitude 2 or more (temporal coding).
    three: Share of weights of magnitude 3.
    mean_magnitude: Mean magnitude of the weights.
  """

  weight_bits: jax.typing.ArrayLike
  activation_bits: jax.typing.ArrayLike
  output_bits: jax.typing.ArrayLike
  ebw: jax.typing.ArrayLike
  outlier_blocks: jax.typing.ArrayLike = 0.0
  two: jax.typing.ArrayLike = 0.0
  three: jax.typing.ArrayLike = 0.0
  mean_magnitude: jax.typing.ArrayLike = 1.0


def precision(
  weight_bits: jax.typing.ArrayLike,
  activation_bits: jax.typing.ArrayLike,
  *,
  output_bits: jax.typing.ArrayLike | None = None,
  ebw: jax.typing.ArrayLike | None = None,
  outlier_blocks: jax.typing.ArrayLike = 0.0,
  two: jax.typing.ArrayLike = 0.0,
  three: jax.typing.ArrayLike = 0.0,
  mean_magnitude: jax.typing.ArrayLike = 1.0,
) -> Precision:
  """A precision by its numbers.

  Args:
    weight_bits: Width of a weight in the multiplier, in (0, 64].
    activation_bits: Width of an activation, in (0, 64].
    output_bits: Of results written back; the activations' by default.
    ebw: Stored bits of a weight; `weight_bits` by default, that is, without
      any metadata.
    outlier_blocks: Share of micro-blocks with outliers, for MicroScopiQ.
    two: Share of weights of magnitude >= 2, for temporal coding.
    three: Share of weights of magnitude 3.
    mean_magnitude: Mean magnitude.

  Returns:
    The precision; fields may be arrays [l] and may be traced.

  Raises:
    ValueError: for widths that are not positive or shares outside [0, 1].

  Examples:
    >>> precision(4, 8).ebw
    4
  """
  ebw = weight_bits if ebw is None else ebw
  output_bits = activation_bits if output_bits is None else output_bits
  _check('weight_bits', weight_bits, 0, 64, open_below=True)
  _check('activation_bits', activation_bits, 0, 64, open_below=True)
  _check('output_bits', output_bits, 0, 64, open_below=True)
  _check('ebw', ebw, 0, math.inf, open_below=True)
  for name, share in (
    ('outlier_blocks', outlier_blocks),
    ('two', two),
    ('three', three),
  ):
    _check(name, share, 0, 1)
  _check('mean_magnitude', mean_magnitude, 0, math.inf)
  return Precision(
    weight_bits,
    activation_bits,
    output_bits,
    ebw,
    outlier_blocks,
    two,
    three,
    mean_magnitude,
  )


def _check(name, value, low, high, open_below=False):
  if isinstance(value, jax.core.Tracer):
    return
  value = np.asarray(value)
  below = value <= low if open_below else value < low
  bad = below | (value > high) | ~np.isfinite(value)
  if bad.any():
    bracket = '(' if open_below else '['
    raise ValueError(
      f'precision: {name} = {value[bad].flat[0]} is not in '
      f'{bracket}{low}, {high}]'
    )


def stack(precisions: Sequence[Precision]) -> Precision:
  """Precisions of several sites as one of arrays [l]."""
  return jax.tree.map(lambda *x: np.stack(np.broadcast_arrays(*x)), *precisions)


def _inner(layout: layouts.Layout) -> layouts.Layout:
  while isinstance(layout, layouts.InputScaled | layouts.Rotated):
    layout = layout.inner
  return layout


def weight_bits(layout: layouts.Layout) -> int:
  """Width of a weight of a layout in the multiplier.

  That of the widest block, where a matrix is stored in blocks: an array that
  takes the matrix as one matmul has to be that wide.
  """
  layout = _inner(layout)
  if isinstance(layout, layouts.Blocks):
    return max(map(weight_bits, layout.parts))
  # Levels of -3 to 3; what has no width of its own is bfloat16.
  return 3 if isinstance(layout, layouts.FineQ) else getattr(layout, 'bits', 16)


def of_matrix(
  matrix: QuantizedMatrix, activation_bits: int = 8, output_bits: int = 16
) -> Precision:
  """The precision of a quantized matrix, measured on its codes.

  Args:
    matrix: With any layout.
    activation_bits: Width of the activations that meet it.
    output_bits: Width of the results.

  Returns:
    Scalars: the exact stored bits (`ebw`), share of micro-blocks with
    outliers, and magnitudes of the levels. Of a matrix stored in blocks, the
    width of the widest and means over weights of the rest: one matmul on an
    array that does not change its width in between. To price each block at
    its own width, give the blocks (`quantize.split`) a matmul each.
  """
  layout, bits = _inner(matrix.layout), weight_bits(matrix.layout)
  numbers = {}
  codes = matrix.codes
  if isinstance(layout, layouts.Blocks):
    whole = dataclasses.replace(matrix, layout=layout)
    blocks = [(of_matrix(b), b.size) for b in split(whole)]
    for name in ('outlier_blocks', 'two', 'three', 'mean_magnitude'):
      total = sum(float(getattr(b, name)) * size for b, size in blocks)
      numbers[name] = total / matrix.size
  elif isinstance(layout, layouts.MicroScopiQ):
    k, n = matrix.shape[-2:]
    flags = np.stack([layout.flagged(code) for _, code in matrix._matrices()])
    length = n if layout.axis == 'out' else k
    stored = -(-length // layout.micro_block)
    numbers['outlier_blocks'] = float(flags[..., :stored].mean())
  elif isinstance(layout, layouts.FineQ):
    level = np.abs(np.asarray(codes['level']))[..., : matrix.shape[-2], :]
    numbers = {
      'two': float((level >= 2).mean()),
      'three': float((level >= 3).mean()),
      'mean_magnitude': float(level.mean()),
    }
  return precision(
    bits,
    activation_bits,
    output_bits=output_bits,
    ebw=matrix.ebw,
    **numbers,
  )


def of_recipe(
  recipe: Recipe, activation_bits: int = 8, output_bits: int = 16
) -> Precision:
  """What a recipe comes to on a Gaussian matrix of 512 x 512.

  For workloads without weights. Real layers have more outliers: use
  `of_matrix` where there are weights, or replace `outlier_blocks` and `ebw`.
  """
  weight = jax.random.normal(jax.random.key(0), (512, 512), jnp.float32)
  return of_matrix(
    quantize_matrix(weight, recipe), activation_bits, output_bits
  )
