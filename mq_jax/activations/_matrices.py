"""The other half of what is done to inputs: in the weight they meet."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mq_jax import layouts, rotations
from mq_jax.activations._inputs import Inputs
from mq_jax.sites import Site


def as_seen(
  inputs: Inputs | None, site: Site, leaf: jax.Array, gram: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
  """A site's matrix and its inputs' Gram matrix, for inputs as seen.

  Args:
    inputs: What is done to the inputs; None for nothing.
    site: The site.
    leaf: Its parameter.
    gram: X^T X of the inputs as they come, [*batch, k, k], or None.

  Returns:
    R^T s W of the matrix W [*batch, k, n], and R^T X^T X R / s s^T; as they
    are where nothing is done.
  """
  matrix = site.matrix(leaf)
  if inputs is not None and inputs.scale is not None:
    scale = inputs.scale.astype(jnp.float32)
    scale = jnp.broadcast_to(_batched(scale, matrix.shape), matrix.shape[:-1])
    matrix = matrix.astype(jnp.float32) * scale[..., None]
    if gram is not None:
      gram = gram / (scale[..., :, None] * scale[..., None, :])
  if inputs is not None and inputs.signs is not None:
    matrix = rotations.rotate(matrix, inputs.signs, -2)
    if gram is not None:
      gram = rotations.rotate(gram, inputs.signs, -1)
      gram = rotations.rotate(gram, inputs.signs, -2)
  return matrix, gram


def _batched(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """With the axes [*batch] that a matrix of this shape has in front."""
  return x.reshape(*[1] * (len(shape) - 1 - x.ndim), *x.shape)


def attach(matrix: Any, inputs: Inputs | None) -> Any:
  """A quantized matrix that meets inputs as seen, as one that knows of them.

  Its layout then decodes to the weight of the model's own basis.
  """
  if inputs is None:
    return matrix
  codes, layout, shape = dict(matrix.codes), matrix.layout, matrix.shape
  if inputs.signs is not None:
    layout = layouts.Rotated(layout, inputs.signs.shape[0])
    codes['input_sign'] = jnp.broadcast_to(
      inputs.signs, (*shape[:-2], *inputs.signs.shape)
    )
  if inputs.scale is not None:
    layout = layouts.InputScaled(layout)
    scale = _batched(inputs.scale, shape)
    codes['input_scale'] = jnp.broadcast_to(scale, shape[:-1])
  return dataclasses.replace(
    matrix, codes=codes, layout=layout, inputs=inputs.quantizer
  )


def of_matrix(matrix: Any) -> Inputs | None:
  """What is done to the inputs of a quantized matrix.

  None where they are not quantized: of transforms alone nothing is left in
  the product.
  """
  if matrix.inputs is None:
    return None
  scale = signs = None
  layout = matrix.layout
  if isinstance(layout, layouts.InputScaled):
    scale, layout = matrix.codes['input_scale'], layout.inner
    scale = scale[0] if matrix.site.repeats > 1 else scale
  if isinstance(layout, layouts.Rotated):
    signs = matrix.codes['input_sign']
    signs = signs[(0,) * (signs.ndim - 1)]
  return Inputs(matrix.inputs, scale, signs)
