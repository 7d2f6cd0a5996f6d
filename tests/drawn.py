"""Weights drawn by the names of tensors, the same in this and other programs.

So golden outputs can be kept without the checkpoints they are of.
"""

import math
import zlib

import numpy as np


def tensor(name: str, shape: tuple[int, ...], dtype=np.float32) -> np.ndarray:
  """A tensor that depends on its name and shape alone.

  Gains and variances lie around 1, biases and means around 0, matrices keep
  the size of what they multiply: nothing vanishes, nothing overflows.
  """
  if np.issubdtype(dtype, np.integer):
    return np.zeros(shape, dtype)
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  last = name.rsplit('.', 1)[-1]
  if last == 'running_var' or (last == 'weight' and len(shape) == 1):
    value = rng.uniform(0.5, 1.5, shape)
  else:
    value = rng.standard_normal(shape)
    matrix = last == 'weight' and 'embeddings.' not in name.lower()
    matrix |= 'projection' in name and last == 'weight'
    value *= 1.2 / math.sqrt(math.prod(shape[1:])) if matrix else 0.4
  return value.astype(dtype)


def tensors(shapes: dict[str, list]) -> dict[str, np.ndarray]:
  """Tensors of a list of names, each with its shape and dtype."""
  return {
    name: tensor(name, tuple(shape), np.dtype(dtype))
    for name, (shape, dtype) in shapes.items()
  }
