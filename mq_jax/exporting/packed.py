"""A model written with its integers packed, as compressed-tensors."""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax import layouts
from mq_jax.exporting import plain
from mq_jax.models import expected, huggingface
from mq_jax.models.huggingface import compressed_tensors
from mq_jax.quantize import QuantizedMatrix

_WEIGHT = '.weight'


def to_compressed_tensors(
  folder: str | os.PathLike,
  model: huggingface.LanguageModel,
  *,
  dtype: Any = jnp.float16,
  max_shard_bytes: int = huggingface.SHARD_BYTES,
  progress: plain.Progress | None = None,
) -> None:
  """Write a model with its integers packed; see `compressed_tensors`.

  What can be written are matrices of 4 or 8 bits with a scale (and a zero
  point) per output or per group of inputs: of `rtn` and `gptq`, and of `awq`
  without scales of inputs. Matrices of `none` and what is not quantized are
  written as they are.

  Args:
    folder: New, or an empty folder.
    model: With packed matrices.
    dtype: Of scales and of all that is not packed: float16 or float32. Ours
      are float16, which bfloat16 can't hold.
    max_shard_bytes: Most bytes of tensors in one file (but at least one).
    progress: Called with the tensors read back and their number.

  Raises:
    FileExistsError: if `folder` holds anything.
    ValueError: for another dtype, or a model that the format can't hold, by
      site and recipe, before anything is written.
    OSError: if it can't be written. Nothing is left in any of these cases.
  """
  stored = jnp.dtype(dtype)
  if stored.name not in ('float16', 'float32'):
    raise ValueError(
      f'{folder}: scales are float16, which {stored.name} cannot hold; '
      'compressed-tensors are written as float16 or float32'
    )
  _check_architecture(model, folder)
  entries = huggingface.expected_tensors(model.config)
  dense = plain.dense(model)
  like: dict[str, jax.ShapeDtypeStruct] = {}
  sources: dict[str, Callable[[], np.ndarray]] = {}
  schemes: dict[str, compressed_tensors.Scheme] = {}
  others = {'lm_head'}  # tied ones are modules without a tensor
  for name, entry in entries.items():
    module = name.removesuffix(_WEIGHT)
    matrices = _matrices(model, name, entry)
    if matrices:
      scheme = _scheme(name, matrices, entry)
      schemes[module] = scheme
      for part, shape, kind in _parts(entry.shape, scheme, stored):
        like[f'{module}.{part}'] = jax.ShapeDtypeStruct(shape, kind)
        sources[f'{module}.{part}'] = functools.partial(
          _part, part, matrices, scheme, stored
        )
      continue
    if entry.transposed:
      others.add(module)
    like[name] = jax.ShapeDtypeStruct(entry.shape, stored)
    sources[name] = lambda name=name: expected.finite(
      dense(name), stored, f'{folder}: {name}'
    )
  if not schemes:
    raise ValueError(
      f'{folder}: {model.name} has no packed matrix of integers; nothing to '
      'write in this format'
    )
  raw = {
    **huggingface.write_config(model.config),
    'bos_token_id': model.bos,
    'eos_token_id': model.eos,
    'torch_dtype': stored.name,
    'quantization_config': compressed_tensors.quantization_config(
      schemes, others - schemes.keys()
    ),
  }
  with plain.staged(folder) as work:
    huggingface.write_tensors(
      work,
      raw,
      like,
      lambda name: sources[name](),
      tokenizer=model.tokenizer,
      max_shard_bytes=max_shard_bytes,
    )
    plain.verify(work, model, dtype, progress)


def _check_architecture(
  model: huggingface.LanguageModel, folder: str | os.PathLike
) -> None:
  config = model.config
  why = None
  if config.family == 'gpt2':
    why = 'matmuls of GPT-2 are Conv1D modules, which the format leaves out'
  elif config.num_experts:
    why = 'transformers keeps experts stacked, not as Linear modules'
  if why is not None:
    raise ValueError(
      f'{folder}: {model.name} can not be written as compressed-tensors: '
      f'{why}; write plain weights (--to hf)'
    )


def _matrices(
  model: huggingface.LanguageModel, name: str, entry: huggingface.Entry
) -> list[QuantizedMatrix]:
  """The packed matrices of a tensor that holds integers; else none."""
  leaves = [huggingface.leaf(model.params, p.path) for p in entry.pieces]
  packed = [
    leaf
    for leaf in leaves
    if isinstance(leaf, QuantizedMatrix)
    and not (isinstance(leaf.layout, layouts.Dense) and leaf.inputs is None)
  ]
  if packed and len(packed) < len(leaves):
    raise ValueError(
      f'{name}: {packed[0].recipe} shares a tensor with weights that are not '
      'packed; compressed-tensors hold all of it or nothing'
    )
  return packed


def _scheme(
  name: str,
  matrices: list[QuantizedMatrix],
  entry: huggingface.Entry,
) -> compressed_tensors.Scheme:
  """How the matrices of one tensor are stored; ValueError if they can't be."""
  found = set()
  for matrix in matrices:
    why, layout = None, matrix.layout
    if matrix.inputs is not None:
      why = 'quantizes inputs, which this exporter does not write'
    elif isinstance(layout, layouts.InputScaled) and isinstance(
      layout.inner, layouts.Integer
    ):
      if np.all(np.asarray(matrix.codes['input_scale']) == 1):
        layout = layout.inner
      else:
        why = 'has a scale for each input, for which the format has no place'
    if why is None and not isinstance(layout, layouts.Integer):
      why = (
        f'is stored as {type(layout).__name__}; the format holds integers with '
        'a scale for a group of inputs'
      )
    elif why is None and layout.bits not in compressed_tensors.WIDTHS:
      why = f'has {layout.bits} bits; the format is written with 4 or 8'
    if why is None and not entry.transposed:
      why = 'is no weight of a Linear module'
    k = matrix.shape[-2]
    if why is None and layout.group <= k and k % layout.group:
      why = (
        f'has {k} inputs, no multiple of its group of {layout.group}; the '
        'format has no short groups'
      )
    if why is not None:
      site = matrix.site.name if matrix.site is not None else name
      raise ValueError(
        f'{site}: {matrix.recipe} {why}; write plain weights (--to hf)'
      )
    group = layout.group if layout.group <= k else None
    found.add(compressed_tensors.Scheme(layout.bits, layout.symmetric, group))
  if len(found) > 1:
    kinds = ', '.join(sorted(map(str, found)))
    raise ValueError(
      f'{name}: holds matrices of {len(found)} kinds, {kinds}; the format '
      'needs one; write plain weights (--to hf)'
    )
  return found.pop()


def _parts(
  shape: tuple[int, int], scheme: compressed_tensors.Scheme, stored: np.dtype
) -> list[tuple[str, tuple[int, ...], Any]]:
  """Names, shapes and dtypes of what stands for a weight [n, k]."""
  n, k = shape
  words = lambda count: -(-count * scheme.bits // 32)
  groups = 1 if scheme.group is None else k // scheme.group
  parts = [
    ('weight_packed', (n, words(k)), np.int32),
    ('weight_scale', (n, groups), stored),
    ('weight_shape', (2,), np.int64),
  ]
  if not scheme.symmetric:
    parts.append(('weight_zero_point', (words(n), groups), np.int32))
  return parts


def _part(
  part: str,
  matrices: list[QuantizedMatrix],
  scheme: compressed_tensors.Scheme,
  stored: np.dtype,
) -> np.ndarray:
  """One of the parts of a weight [n, k], the matrices being side by side."""
  n, k = sum(m.shape[-1] for m in matrices), matrices[0].shape[-2]
  if part == 'weight_shape':
    return np.array([n, k], np.int64)
  code = {'weight_packed': 'level', 'weight_scale': 'scale'}.get(part, 'zero')
  value = np.concatenate([np.asarray(m.codes[code]) for m in matrices], axis=-1)
  if part == 'weight_scale':
    return value.T.astype(stored)
  if part == 'weight_zero_point':
    return compressed_tensors.pack(value, scheme.bits).T
  # Signed levels and the format's are this far apart; ours with a zero point
  # begin at 0 as its words do.
  shift = 1 << (scheme.bits - 1) if scheme.symmetric else 0
  levels = value[:k].T.astype(np.int32) + shift
  assert levels.min() >= 0 and levels.max() < 1 << scheme.bits
  return compressed_tensors.pack(levels, scheme.bits)
