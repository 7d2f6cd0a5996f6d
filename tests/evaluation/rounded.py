"""Round-to-nearest as the READMEs of the test data say it; NumPy only."""

import jax
import numpy as np


def nearest(weight, bits):
  """Symmetric, a scale for 128 inputs of an output; the last may be fewer.

  Args:
    weight: [out, ...], all further axes being inputs.
    bits: 2 or more.
  """
  top = 2 ** (bits - 1) - 1
  rows = np.array(weight).reshape(len(weight), -1)
  for start in range(0, rows.shape[1], 128):
    group = rows[:, start : start + 128]
    scale = np.abs(group).max(1, keepdims=True) / top
    scale[scale == 0] = 1
    group[:] = np.round(group / scale) * scale
  return rows.reshape(weight.shape)


def kernels(params, bits, which):
  """Parameters with the kernels rounded whose name `which` accepts.

  Inputs are flattened in PyTorch's order: channel, height, width.
  """

  def one(path, x):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    if not name.endswith('kernel') or not which(name):
      return x
    order = (1, 0) if x.ndim == 2 else (3, 2, 0, 1)
    rounded = nearest(np.asarray(x).transpose(order), bits)
    return rounded.transpose(np.argsort(order))

  return jax.tree_util.tree_map_with_path(one, params)
