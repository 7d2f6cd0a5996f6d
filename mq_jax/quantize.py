"""One matrix: quantized, measured, packed."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax import clusters, compensation, layouts
from mq_jax._pytrees import pytree_dataclass, static
from mq_jax.compensation import Status
from mq_jax.layouts import Layout, Packed
from mq_jax.recipes import BlockParts, Recipe

_SIDE_BY_SIDE = 1 << 20  # weights quantized at a time on a CPU


@pytree_dataclass
class QuantizedMatrix:
  """A weight [*batch, k, n] as codes; takes the weight's place in params.

  Attributes:
    codes: Arrays of the layout, each with the batch axes in front.
    record: Arrays f32 or i32 [*batch]: `status`, `weight_mse` and
      `output_error` (both relative to the weight and its output), counts.
    layout: How the codes are decoded and packed.
    shape: (*batch, k, n).
    dtype: Of the weight that was given, and of what `dequantize` returns.
    site: The site whose parameter this is, to give it its shape back; None
      for a matrix on its own.
    recipe: Label of the recipe, for tables.
    inputs: Quantizer of the inputs that it meets, see `mq_jax.activations`;
      None for none. How they are scaled and rotated is in the layout.
  """

  codes: dict[str, jax.Array]
  record: dict[str, jax.Array]
  layout: Layout = static()
  shape: tuple[int, ...] = static()
  dtype: str = static('float32')
  site: Any = static(None)
  recipe: str = static('')
  inputs: Any = None

  def dequantize(self) -> jax.Array:
    """The values [*batch, k, n] that the codes stand for."""
    k, n = self.shape[-2:]
    decode = lambda codes: self.layout.decode(codes, k, n)
    for _ in self.shape[:-2]:
      decode = jax.vmap(decode)
    return decode(self.codes).astype(self.dtype)

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    del copy
    return np.asarray(self.dequantize(), dtype)

  def _matrices(self):
    """Codes of each matrix of the batch, on the host."""
    codes = jax.tree.map(np.asarray, self.codes)
    for index in np.ndindex(*self.shape[:-2]):
      yield index, {name: code[index] for name, code in codes.items()}

  @property
  def size(self) -> int:
    """Weights."""
    return int(np.prod(self.shape))

  @property
  def nbytes(self) -> int:
    """Bytes that `pack` produces."""
    k, n = self.shape[-2:]
    each = (self.layout.nbytes(codes, k, n) for _, codes in self._matrices())
    return sum(each)

  @property
  def ebw(self) -> float:
    """Effective bits a weight: all stored bits over all weights."""
    return 8 * self.nbytes / self.size

  @property
  def ebw_paper(self) -> float:
    """Bits a weight as the recipe's paper counts them."""
    k, n = self.shape[-2:]
    each = (self.layout.paper_bits(c, k, n) for _, c in self._matrices())
    return sum(each) / self.size

  @property
  def status(self) -> Status:
    """The worst status among the matrices."""
    return Status(int(np.max(np.asarray(self.record.get('status', 0)))))

  def pack(self) -> Packed:
    """The codes as bytes; one set of buffers for each matrix of a batch."""
    k, n = self.shape[-2:]
    buffers = {}
    for index, codes in self._matrices():
      prefix = ''.join(f'{i}.' for i in index)
      for name, buffer in self.layout.pack(codes, k, n).items():
        buffers[prefix + name] = buffer
    return Packed(self.layout, self.shape, self.dtype, buffers)


def from_packed(packed: Packed) -> QuantizedMatrix:
  """The matrix of packed buffers; codes are bit-exact, the record is empty.

  Raises:
    ValueError: for buffers that are missing or of the wrong size.
  """
  *batch, k, n = packed.shape
  parts = []
  for index in np.ndindex(*batch):
    prefix = ''.join(f'{i}.' for i in index)
    buffers = {
      name[len(prefix) :]: buffer
      for name, buffer in packed.buffers.items()
      if name.startswith(prefix)
    }
    try:
      parts.append(packed.layout.unpack(buffers, k, n))
    except KeyError as error:
      raise ValueError(f'packed matrix: buffer {error} is missing') from error
  codes = jax.tree.map(
    lambda *x: jnp.stack(x).reshape(*batch, *x[0].shape), *parts
  )
  return QuantizedMatrix(
    codes, {}, packed.layout, tuple(packed.shape), packed.dtype
  )


def split(matrix: QuantizedMatrix) -> tuple[QuantizedMatrix, ...]:
  """The blocks of a matrix, as matrices that share its codes.

  Their records are empty. A matrix not stored in blocks is its only block.
  """
  layout = matrix.layout
  if not isinstance(layout, layouts.Blocks):
    return (matrix,)
  *batch, k, n = matrix.shape
  return tuple(
    QuantizedMatrix(codes, {}, part, (*batch, *shape), matrix.dtype)
    for part, codes, *shape in layout.split(matrix.codes, k, n)
  )


def join(blocks: Sequence[QuantizedMatrix], axis: str) -> QuantizedMatrix:
  """Undo `split`: blocks of rows or columns as one matrix, without a record.

  Raises:
    ValueError: for no blocks, an unknown axis, or shapes that don't fit.
  """
  if not blocks or axis not in layouts.blocks.AXES:
    raise ValueError(
      f'join: {len(blocks)} blocks along axis={axis!r}; at least one, along '
      f'one of {layouts.blocks.AXES}, is needed'
    )
  along = layouts.blocks.AXES.index(axis) - 2
  sizes = tuple(block.shape[along] for block in blocks)
  shape = list(blocks[0].shape)
  shape[along] = sum(sizes)
  for block in blocks:
    other = list(block.shape)
    other[along] = shape[along]
    if other != shape or block.dtype != blocks[0].dtype:
      raise ValueError(
        f'join: a block of {block.dtype}{list(block.shape)} does not fit '
        f'{blocks[0].dtype}{list(blocks[0].shape)} along {axis}'
      )
  even = layouts.blocks.spans(shape[along], len(sizes))
  if sizes == tuple(span.stop - span.start for span in even):
    sizes = ()  # as a recipe without sizes has it
  layout = layouts.Blocks(tuple(b.layout for b in blocks), axis, sizes)
  codes = layouts.blocks.join([block.codes for block in blocks])
  return QuantizedMatrix(codes, {}, layout, tuple(shape), blocks[0].dtype)


def _codes(weight, hessian, rows, options, input_scales):
  """Codes and status of one matrix; pure, mapped and compiled by callers."""
  weight = weight.astype(jnp.float32)
  k = weight.shape[0]
  target, H, scale = weight, hessian, None
  if input_scales is not None and hessian is not None:
    scale = input_scales(weight, hessian, rows)
    target = weight * scale[:, None]
    H = hessian / (scale[:, None] * scale[None, :])
  whole, fitted, codes, status = compensation.solve(target, H, rows, options)
  codes = rows.collect(whole, fitted, codes)
  if input_scales is not None:
    if scale is None:
      scale = jnp.ones(k, jnp.float32)
      status = jnp.int32(Status.no_hessian)
    codes['input_scale'] = scale.astype(jnp.float16)
  return codes, status


def _error(weight, rows, codes):
  """Error f32[k, n] and counts of one matrix."""
  weight = weight.astype(jnp.float32)
  codes = dict(codes)
  target, scale = weight, codes.pop('input_scale', None)
  if scale is not None:
    scale = scale.astype(jnp.float32)[:, None]
    target = weight * scale
  value = rows.layout().decode(codes, *weight.shape)
  error = weight - (value if scale is None else value / scale)
  return error, rows.counts(target, codes)


def _sizes(weight, hessian, error):
  """Relative sizes of the error of one matrix."""
  weight = weight.astype(jnp.float32)
  share = lambda a, b: a / jnp.where(b > 0, b, 1.0)
  sizes = {'weight_mse': share(jnp.sum(error**2), jnp.sum(weight**2))}
  if hessian is not None:
    energy = lambda x: jnp.sum(x * (hessian @ x))
    sizes['output_error'] = share(energy(error), energy(weight))
  return sizes


def _record(weight, hessian, rows, codes):
  """Errors and counts of one matrix."""
  error, counts = _error(weight, rows, codes)
  return {**_sizes(weight, hessian, error), **counts}


def _each(f, *arrays):
  """Map over the batch, if there is one."""
  if arrays[0].ndim == 2:
    return f(*arrays)
  batch, k, n = arrays[0].shape
  if jax.default_backend() != 'cpu':
    return jax.vmap(f)(*arrays)
  # Large matrices one after the other: side by side they take the memory of
  # all at once, and a batched matmul is no library call there.
  size = clusters.batch_of(batch, _SIDE_BY_SIDE // (k * n))
  if size == batch:
    return jax.vmap(f)(*arrays)
  return jax.lax.map(lambda each: f(*each), arrays, batch_size=size)


# Two programs: in one, the compiler begins to measure while the solver still
# needs its memory, and ignores a barrier between them.
@jax.jit
def _quantize_batch(weights, hessians, rows, options, input_scales):
  f = lambda w, h: _codes(w, h, rows, options, input_scales)
  return _each(f, weights, hessians)


@jax.jit
def _record_batch(weights, hessians, rows, codes):
  f = lambda w, h, c: _record(w, h, rows, c)
  return _each(f, weights, hessians, codes)


# The same in two halves, between which the errors of blocks are joined.
@jax.jit
def _error_batch(weights, rows, codes):
  return _each(lambda w, c: _error(w, rows, c), weights, codes)


@jax.jit
def _sizes_batch(weights, hessians, errors):
  return _each(_sizes, weights, hessians, errors)


# A group as long as the widest layers: one scale per output in all of them.
_LARGE_GROUP = 1 << 15


def check_matrix(
  name: str,
  weight: jax.Array,
  hessian: jax.Array | None,
  recipe: Recipe | None = None,
) -> None:
  """Refuse what can't be quantized, by name.

  Raises:
    TypeError: for weights or Hessians that are not real floats.
    ValueError: for wrong shapes, values that are not finite, groups far
      beyond the inputs, blocks of the recipe that the matrix can't be cut
      into, or a recipe that is learned.
  """
  if recipe is not None and recipe.learning is not None:
    raise ValueError(
      f'{name}: {recipe.label}: is learned on calibration data; give a plan '
      'with it to mq_jax.learn.reconstruct'
    )
  if weight.ndim < 2:
    raise ValueError(
      f'{name}: weight has shape {weight.shape}; a matrix [k, n] is needed '
      '(leave vectors and scalars out of the plan)'
    )
  if 0 in weight.shape:
    raise ValueError(f'{name}: weight of shape {weight.shape} is empty')
  arrays = {'weight': weight} | (
    {} if hessian is None else {'hessian': hessian}
  )
  for kind, array in arrays.items():
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise TypeError(
        f'{name}: {kind} has dtype {array.dtype}; a real float is needed'
      )
    finite = jnp.isfinite(array)
    if not bool(jnp.all(finite)):
      where = tuple(int(i) for i in jnp.argwhere(~finite)[0])
      raise ValueError(
        f'{name}: {kind} has {int(jnp.sum(~finite))} values that are not '
        f'finite, the first at {where}: {float(array[where])}'
      )
  k = weight.shape[-2]
  if hessian is not None:
    need = (*weight.shape[:-2], k, k)
    if hessian.shape != need:
      raise ValueError(
        f'{name}: hessian has shape {hessian.shape}; weight of shape '
        f'{weight.shape} needs {need}'
      )
  group = getattr(recipe and recipe.rows, 'group', None)
  # The last group is filled up, in memory only, but that must be had.
  if isinstance(group, int) and group > max(_LARGE_GROUP, 8 * k):
    raise ValueError(
      f'{name}: {recipe.label}: group={group} is far more than the {k} inputs; '
      f'group={k} is one for all of them'
    )
  if recipe is not None and isinstance(recipe.rows, BlockParts):
    try:
      recipe.rows.check(*weight.shape[-2:])
    except ValueError as error:
      raise ValueError(f'{name}: {recipe.label}: {error}') from error


class _Done(NamedTuple):
  """What became of matrices [b, k, n] (or one, without the axis)."""

  codes: dict
  status: jax.Array
  errors: jax.Array
  counts: dict


def _by_block(weights, recipe: Recipe, hessians) -> _Done:
  """Matrices cut into blocks, the blocks of blocks too."""
  if not isinstance(recipe.rows, BlockParts):
    codes, status = _quantize_batch(
      weights, hessians, recipe.rows, recipe.compensation, recipe.input_scales
    )
    return _Done(codes, status, *_error_batch(weights, recipe.rows, codes))
  found = [
    _by_block(block, part, hessian)
    for part, block, hessian in recipe.rows.cut(weights, hessians)
  ]
  counts = {}
  for block in found:
    for name, count in block.counts.items():
      counts[name] = counts[name] + count if name in counts else count
  axis = layouts.blocks.AXES.index(recipe.rows.axis) - 2
  return _Done(
    layouts.blocks.join([block.codes for block in found]),
    functools.reduce(jnp.maximum, [block.status for block in found]),
    jnp.concatenate([block.errors for block in found], axis),
    counts,
  )


def quantize_batch(
  weights: jax.Array, recipe: Recipe, hessians: jax.Array | None = None
) -> tuple[dict, dict]:
  """Codes and records of matrices of one shape, by one compiled program.

  Args:
    weights: f32[b, k, n], or f32[k, n] of one; checked by the caller.
    recipe: The recipe; numbers in it don't recompile.
    hessians: f32[b, k, k] (or f32[k, k]), or None.

  A recipe of blocks takes a program for each shape and kind of its parts.
  """
  if isinstance(recipe.rows, BlockParts):
    done = _by_block(weights, recipe, hessians)
    sizes = _sizes_batch(weights, hessians, done.errors)
    return done.codes, {'status': done.status, **sizes, **done.counts}
  codes, status = _quantize_batch(
    weights, hessians, recipe.rows, recipe.compensation, recipe.input_scales
  )
  record = _record_batch(weights, hessians, recipe.rows, codes)
  return codes, {'status': status, **record}


def layout_of(recipe: Recipe) -> Layout:
  """The layout in which a recipe's result is stored."""
  if isinstance(recipe.rows, BlockParts):
    parts = tuple(map(layout_of, recipe.rows.parts))
    return layouts.Blocks(parts, recipe.rows.axis, recipe.rows.sizes)
  layout = recipe.rows.layout()
  return layout if recipe.input_scales is None else layouts.InputScaled(layout)


def quantize_matrix(
  weight: jax.Array,
  recipe: Recipe,
  *,
  hessian: jax.Array | None = None,
) -> QuantizedMatrix:
  """Quantize one weight matrix.

  Args:
    weight: Inputs by outputs, any real float dtype, computed in float32.
      Shape [k, n]. Sizes need not be multiples of the recipe's blocks.
    recipe: Made by a factory of `mq_jax.recipes`.
    hessian: X^T X of the layer's inputs X [tokens, k], up to a factor. Recipes
      that compensate errors or weigh them use it; without, they round, and
      the record's status says so. Shape [k, k].

  Returns:
    The quantized matrix.

  Raises:
    TypeError: if `weight` or `hessian` is not real floating point.
    ValueError: for shapes that don't fit, or values that are not finite.

  Examples:
    >>> from mq_jax import recipes
    >>> weight = jax.random.normal(jax.random.key(0), (64, 128))
    >>> q = quantize_matrix(weight, recipes.rtn(bits=4, group=64))
    >>> q.dequantize().shape, q.ebw, q.pack().nbytes
    ((64, 128), 4.3125, 4416)
  """
  weight = jnp.asarray(weight)
  hessian = None if hessian is None else jnp.asarray(hessian)
  if weight.ndim > 2:
    raise ValueError(
      f'quantize_matrix: weight has shape {weight.shape}; give one matrix '
      '[k, n] at a time, or use mq_jax.compress'
    )
  check_matrix('quantize_matrix', weight, hessian, recipe)
  if hessian is not None:
    hessian = hessian.astype(jnp.float32)
  # No batch axis: adding one would copy both.
  codes, record = quantize_batch(weight.astype(jnp.float32), recipe, hessian)
  return QuantizedMatrix(
    codes,
    record,
    layout_of(recipe),
    weight.shape,
    str(weight.dtype),
    recipe=recipe.label,
  )
