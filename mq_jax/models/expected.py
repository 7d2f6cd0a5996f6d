"""Tensors against those that a config calls for."""

import difflib
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

_DTYPES = ('float32', 'float16', 'bfloat16')
_SHOWN = 20  # problems; a wrong config has as many as there are tensors


def check(
  found: Mapping[str, np.ndarray],
  shapes: Mapping[str, tuple[int, ...]],
  where: str,
  called: Callable[[str], str] = str,
) -> None:
  """Refuse tensors that are not those expected; no weight is read.

  Args:
    found: Arrays by name.
    shapes: Shape of each that must be there; no other may be.
    where: For messages.
    called: What the checkpoint calls a tensor of `found`.

  Raises:
    ValueError: for tensors that are missing, too many, of the wrong shape or
      dtype: all at once, by name.
  """
  unused = found.keys() - shapes.keys()
  problems = []
  for name, shape in shapes.items():
    if name not in found:
      near = difflib.get_close_matches(name, unused, 1)
      there = f' (there is {called(near[0])})' if near else ''
      problems.append(f'{name} is missing{there}')
      continue
    array = found[name]
    if array.shape != shape:
      problems.append(
        f'{called(name)} is of shape {array.shape}, expected {shape}'
      )
    elif array.dtype.name not in _DTYPES:
      problems.append(
        f'{called(name)} is {array.dtype}, supported are {", ".join(_DTYPES)}'
      )
  problems += [
    f'{called(name)} is not part of the architecture' for name in sorted(unused)
  ]
  if problems:
    more = len(problems) - _SHOWN
    shown = problems[:_SHOWN] + ([f'and {more} more'] if more > 0 else [])
    raise ValueError(
      f'{where}: the tensors are not those the config calls for:\n  '
      + '\n  '.join(shown)
    )


def finite(array: np.ndarray, dtype: Any, what: str) -> np.ndarray:
  """A copy in another type, without NaN and infinities.

  Args:
    array: Weights of any float dtype.
    dtype: Type of the copy.
    what: For messages.

  Raises:
    ValueError: for weights that are not finite in that type.
  """
  # Overflow shows as inf, and is reported with its tensor just below.
  with np.errstate(over='ignore'):
    copy = array.astype(jnp.dtype(dtype))
  bad = int(np.size(copy) - np.isfinite(copy).sum())
  if bad:
    raise ValueError(
      f'{what}: {bad} of {copy.size} weights are not finite as {copy.dtype}'
    )
  return copy
