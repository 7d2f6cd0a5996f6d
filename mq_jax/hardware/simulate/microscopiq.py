"""MicroScopiQ's datapath in integers: PEs, merging, scales, butterfly.

Weight stationary: row k of the array holds the elements of input k, its
activation goes along the row, and running sums go down from row to row. A PE
multiplies the element's magnitude and sign by the activation. In a row
without outliers it adds the product to the running sum; from a row with
outliers {Res, iAcc} of all its columns goes through ReCoN (`recon`), which
joins the halves.

Sums of inputs with different scales are only right once these are aligned
(the paper shows one shift at the end): a macro-block of outputs has one unit
2^E0, E0 = min over k of (Isf, Osf - mb) with mb = `bits` mantissa bits. The
activation is shifted left by Isf - E0 as it enters a row, a merged outlier by
a further Osf - mb - Isf, which may go to the right and then drops only zeros.

Lanes: a PE holds 4 / bits elements, which share its activation. Lane l of PE
column c in tile t of the outputs is output (t lanes + l) columns + c, so a
micro-block is `micro_block` neighbouring PEs in one lane, and each lane of a
tile is one ReCoN vector.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax import layouts
from mq_jax.hardware.simulate import recon

_INLIER, _UPPER, _LOWER = range(3)


class Product(NamedTuple):
  """What the array hands out, and what it took.

  Attributes:
    accumulator: Sums; output j of token i is accumulator[i, j] 2^exponent[j].
      i64[m, n].
    exponent: E0 of each output's macro-block. i32[n].
    inlier_shift: Largest left shift of an activation at a row's entrance;
      the smallest shift of a macro-block is 0.
    outlier_shift: Largest left shift of a merged outlier, Osf - mb - E0.
    passes: Passes through ReCoN of one token, zero in a row without outliers.
      u8[k, vectors]; vectors are `columns` outputs each.
  """

  accumulator: np.ndarray
  exponent: np.ndarray
  inlier_shift: int
  outlier_shift: int
  passes: np.ndarray

  def values(self) -> np.ndarray:
    """The product as numbers, exact up to 53 bits. f64[m, n]."""
    return np.ldexp(self.accumulator.astype(np.float64), self.exponent)


def multiply(
  word: jax.Array, activation: jax.Array, bits: int
) -> tuple[jax.Array, ...]:
  """The PE's multiplier: four products of 2 by 4 bits, shifted and added.

  The weight word is cut in W[3:2] and W[1:0], the activation in a signed
  A[7:4] and an unsigned A[3:0]. Elements are {sign, magnitude}, so the 2-bit
  inputs are unsigned and the sign is applied to the sum.

  Args:
    word: One 4-bit element, or two of 2 bits, lane 0 in the lower half. Any
      integers 0..15.
    activation: -128..127, i32 of the same shape.
    bits: 4 or 2.

  Returns:
    Products of the lanes: one i32 at 4 bits, two at 2 bits.

  Raises:
    ValueError: for other `bits`.

  Source:
    MicroScopiQ, figure 7 and equation 5. The shifts there fit halves of 2
    bits, those of 4-bit activations; these fit 8-bit ones:
    4b: (P11 << 6) + (P10 << 2) + (P01 << 4) + P00, 2b: (P11 << 4) + P10 and
    (P01 << 4) + P00.

  Examples:
    >>> i = jnp.int32
    >>> [int(x) for x in multiply(i(0b1110), i(-77), 4)]  # -6
    [462]
    >>> [int(x) for x in multiply(i(0b1101), i(-77), 2)]  # 1 and -1
    [-77, 77]
  """
  if bits not in (2, 4):
    raise ValueError(f'PE: bits={bits!r} is not 2 or 4')
  i32 = lambda x: jnp.asarray(x, jnp.int32)
  word, activation = i32(word), i32(activation)
  if bits == 4:
    signs = (word >> 3,)
    high, low = (word >> 2) & 1, word & 3
  else:
    signs = ((word >> 1) & 1, word >> 3)
    high, low = (word >> 2) & 1, word & 1
  top, bottom = activation >> 4, activation & 15
  p11, p10, p01, p00 = high * top, high * bottom, low * top, low * bottom
  if bits == 4:
    products = ((p11 << 6) + (p10 << 2) + (p01 << 4) + p00,)
  else:
    products = ((p01 << 4) + p00, (p11 << 4) + p10)
  signed = lambda s, x: jnp.where(s > 0, -x, x)
  return tuple(signed(s, x) for s, x in zip(signs, products))


class _Table(NamedTuple):
  """Distinct permutation lists and what they mean; list 0 is empty."""

  moves: jax.Array  # u8[list, wave, stage, b]
  sum_wave: jax.Array  # u8[list, b]
  res_wave: jax.Array  # u8[list, b]
  role: jax.Array  # u8[list, b]
  waves: jax.Array  # i32[list], 0 for an empty one


class _Rows(NamedTuple):
  """What the rows of the array hold and receive; the first axis is k."""

  element: jax.Array  # u8[k, outputs]
  lists: jax.Array  # i32[k, micro], rows of the table
  activation: jax.Array  # i64[k, m]
  row_shift: jax.Array  # i64[k, micro], of activations
  merge_shift: jax.Array  # i64[k, micro], of merged outliers, further


@functools.partial(jax.jit, static_argnames=('bits', 'columns'))
def _run(rows: _Rows, table: _Table, *, bits: int, columns: int) -> jax.Array:
  """Sums i64[m, outputs] after the last row of the array."""
  m, outputs = rows.activation.shape[1], rows.element.shape[1]
  b = table.moves.shape[-1]
  vectors, blocks = outputs // columns, columns // b
  # Tokens are last: machine vectors run along them, not along columns that
  # change places.
  vector = lambda x: x.reshape(vectors, columns, -1)
  nothing = jnp.zeros((), jnp.int64)

  def row(acc, at: _Rows):
    sign = at.element.reshape(-1, b, 1) >> (bits - 1) > 0  # [micro, b, 1]
    magnitude = at.element & jnp.uint8((1 << (bits - 1)) - 1)
    weight = magnitude.astype(jnp.int64).reshape(-1, b, 1)
    weight = jnp.where(sign, -weight, weight)
    # The row's shifters; columns of a micro-block share one. [micro, m]
    shifted = jnp.left_shift(at.activation[None], at.row_shift[:, None])
    each = jnp.broadcast_to(shifted[:, None], (*sign.shape[:2], m))
    res = vector(each * weight)  # [vectors, columns, m]
    hidden = vector(jnp.where(sign, -each, each))
    merge_shift = jnp.repeat(at.merge_shift, b).reshape(vectors, columns)

    # The instruction buffer: commands of every switch.
    moves = table.moves[at.lists]
    moves = moves.reshape(vectors, blocks, *moves.shape[1:])
    commands = recon.encode(recon.widen(moves, columns))
    sum_wave = vector(table.sum_wave[at.lists])
    res_wave = vector(table.res_wave[at.lists])
    waves = table.waves[at.lists]  # 0 without outliers
    present = waves.reshape(vectors, columns // b).max(axis=1) > 0

    def send(wave, total):
      leaves = recon.execute(
        jax.lax.dynamic_index_in_dim(commands, wave, 1, keepdims=False),
        jnp.where(res_wave == wave.astype(jnp.uint8), res, nothing),
        jnp.where(sum_wave == wave.astype(jnp.uint8), acc, nothing),
        hidden,
        merge_shift,
        bits // 2,
      )
      return total + leaves

    first = jnp.zeros((), jnp.int32)
    merged = jax.lax.fori_loop(first, waves.max(), send, jnp.zeros_like(acc))
    return jnp.where(present[:, None, None], merged, acc + res), None

  start = jnp.zeros((vectors, columns, m), jnp.int64)
  acc, _ = jax.lax.scan(row, start, rows)
  return acc.reshape(outputs, m).T


def _checked(codes, layout, activations, k, n, columns):
  """Codes and activations as arrays; refuse what the array can't hold."""
  if not isinstance(layout, layouts.MicroScopiQ):
    raise TypeError(
      f'simulate.microscopiq: layout is {type(layout).__name__}; a '
      'MicroScopiQ layout is needed'
    )
  need = {'axis': 'out', 'pruned': True}
  for name, value in need.items():
    if getattr(layout, name) != value:
      raise ValueError(
        f'simulate.microscopiq: layout has {name}={getattr(layout, name)!r}; '
        f'the datapath needs {name}={value!r}'
      )
  if layout.bits not in (2, 4):
    raise ValueError(
      f'simulate.microscopiq: bits={layout.bits}; a PE holds elements of 2 '
      'or 4 bits'
    )
  b = layout.micro_block
  power = lambda x: x > 1 and not x & (x - 1)
  if not power(b) or not power(columns) or columns < b:
    raise ValueError(
      f'simulate.microscopiq: columns={columns} with micro-blocks of {b}; '
      'both must be powers of two, and a micro-block fit in a row'
    )
  blocks = -(-n // layout.block)
  micros = blocks * layout.block // b
  shapes = {
    'element': (k, blocks * layout.block),
    'isf': (k, blocks),
    'osf': (k, micros),
    'upper': (k, micros, b // 2),
    'lower': (k, micros, b // 2),
  }
  codes = {name: np.asarray(codes[name]) for name in shapes}
  for name, shape in shapes.items():
    if codes[name].shape != shape:
      raise ValueError(
        f'simulate.microscopiq: code {name!r} has shape {codes[name].shape}; '
        f'k={k}, n={n} need {shape}'
      )
  activations = np.asarray(activations)
  if not np.issubdtype(activations.dtype, np.integer):
    raise TypeError(
      f'simulate.microscopiq: activations are {activations.dtype}; integers '
      'are needed'
    )
  if activations.ndim != 2 or activations.shape[1] != k:
    raise ValueError(
      f'simulate.microscopiq: activations have shape {activations.shape}; '
      f'[m, {k}] is needed'
    )
  if activations.size == 0:
    raise ValueError('simulate.microscopiq: there are no activations')
  low, high = int(activations.min()), int(activations.max())
  if low < -(2**31) or high >= 2**31:
    raise ValueError(
      f'simulate.microscopiq: activations {low}..{high} are not within i32'
    )
  return codes, activations.astype(np.int64)


def _tabulate(upper, lower, link_values):
  """Distinct lists, routed; which list each micro-block has; its passes."""
  k, micros, pairs = upper.shape
  b = 2 * pairs
  both = np.concatenate([upper, lower], axis=-1).reshape(k * micros, b)
  filled = (upper != lower).any(axis=-1).reshape(-1)
  index = np.zeros(k * micros, np.int32)
  # First an empty list, so that there always is one.
  some = np.concatenate([np.zeros((1, b), both.dtype), both[filled]])
  lists, inverse = np.unique(some, axis=0, return_inverse=True)
  inverse = inverse.reshape(-1)
  swap = np.arange(len(lists))
  swap[[0, inverse[0]]] = swap[[inverse[0], 0]]
  lists, index[filled] = lists[swap], swap[inverse[1:]]
  route = recon.route(
    lists[:, :pairs], lists[:, pairs:], b, link_values=link_values
  )
  role = np.full((len(lists), b), _INLIER, np.uint8)
  at, pair = np.nonzero(lists[:, :pairs] != lists[:, pairs:])
  role[at, lists[at, pair]] = _UPPER
  role[at, lists[at, pairs + pair]] = _LOWER
  used = np.arange(len(lists)) > 0
  waves = np.where(used, route.waves, 0)
  # Room for two waves, needed or not, for the sake of fewer programs.
  room = max(0, 2 - route.moves.shape[1])
  moves = np.pad(route.moves, ((0, 0), (0, room), (0, 0), (0, 0)))
  table = _Table(moves, route.sum_wave, route.res_wave, role, waves)
  passes = np.where(used, route.passes, 0).astype(np.uint8)
  # Lists differ from layer to layer: few sizes, and few compilations.
  extra = max(64, 1 << (len(lists) - 1).bit_length()) - len(lists)
  grow = lambda x: np.pad(x, ((0, extra),) + ((0, 0),) * (x.ndim - 1))
  table = _Table(*(grow(x) for x in table))
  return table, index.reshape(k, micros), passes


class _Scales(NamedTuple):
  unit: np.ndarray  # i64[c], E0
  inlier: np.ndarray  # i64[k, c], shift of activations
  outlier: np.ndarray  # i64[k, micro], shift of merged outliers, in all
  bound: float  # of the magnitude of any sum


def _align(codes, layout, role, activations) -> _Scales:
  """Units of the macro-blocks, and every shift to them."""
  bits, b = layout.bits, layout.micro_block
  k, blocks = codes['isf'].shape
  per = layout.block // b
  isf, osf = (codes[name].astype(np.int64) for name in ('isf', 'osf'))
  least = osf - bits
  magnitude = codes['element'] & ((1 << (bits - 1)) - 1)
  magnitude = magnitude.reshape(k, blocks, per * b)
  # A scale that no value uses does not decide: that of a row of zeros may lie
  # anywhere.
  plain = (magnitude > 0) & (role == _INLIER).reshape(magnitude.shape)
  plain = plain.any(axis=-1)
  wide = (role == _UPPER).any(axis=-1)  # [k, micro]
  far = np.int64(1 << 20)
  group = lambda x: x.reshape(k, blocks, per)
  lowest = np.where(wide, least, far)
  lowest = np.minimum(group(lowest).min(axis=-1), np.where(plain, isf, far))
  unit = lowest.min(axis=0)
  unit = np.where(unit == far, 0, unit)
  inlier = np.where(plain, isf - unit, 0)
  outlier = np.where(wide, least - np.repeat(unit, per)[None], 0)

  # Before a shift to the right, a merge is as far left as its row.
  highest = np.maximum(group(outlier).max(axis=-1), inlier)
  largest = np.abs(activations).max(axis=0).astype(np.float64)  # [k]
  most = (1 << (bits - 1)) - 1, (2 << bits) - 1  # of inliers, of outliers
  factor = np.where(group(wide).any(axis=-1), most[1], most[0])
  terms = largest[:, None] * factor * np.exp2(highest.astype(np.float64))
  bound = terms.sum(axis=0).max() * (1 + k * 2.0**-52)  # rounded up
  return _Scales(unit, inlier, outlier, float(bound))


def matmul(
  codes: dict,
  layout: layouts.MicroScopiQ,
  activations: np.ndarray,
  k: int,
  n: int,
  *,
  link_values: int = 2,
  columns: int = 64,
) -> Product:
  """Multiply integers by a quantized matrix as the accelerator does.

  The result equals activations @ values of the codes exactly. One compiled
  program serves all layers of a shape (and of about as many distinct
  permutation lists); its size does not depend on k.

  Args:
    codes: Codes of one matrix, as `QuantizedMatrix.codes`, or
      `layouts.unpack(packed).codes`.
    layout: Their layout: blocks along the outputs, pruned, 2 or 4 bits.
    activations: Any integers within i32. [m, k].
    k: Inputs.
    n: Outputs; need not fill the last macro-block or tile.
    link_values: Values on a ReCoN link; with 1, lists whose routes collide
      take two passes.
    columns: Columns of the array, and of ReCoN; a power of two.

  Returns:
    Sums, their units, shifts and passes.

  Raises:
    TypeError: for another layout, or activations that are not integers.
    ValueError: for shapes and options that don't fit, permutation lists that
      use a slot twice, or scales so far apart that a sum could need more than
      63 bits.

  Source:
    MicroScopiQ, arXiv 2411.05282, section 5. Alignment of scales, signed
    hidden bit, fractional bits and lanes are our corrections or choices.

  Examples:
    >>> from mq_jax import quantize, recipes
    >>> weight = jax.random.normal(jax.random.key(0), (16, 40))
    >>> q = quantize.quantize_matrix(weight, recipes.microscopiq(bits=2))
    >>> x = np.arange(32).reshape(2, 16)
    >>> product = matmul(q.codes, q.layout, x, 16, 40)
    >>> want = x @ np.asarray(q.dequantize(), np.float64)
    >>> bool((product.values() == want).all())
    True
  """
  codes, activations = _checked(codes, layout, activations, k, n, columns)
  bits, b = layout.bits, layout.micro_block
  table, lists, passes = _tabulate(codes['upper'], codes['lower'], link_values)
  scales = _align(codes, layout, table.role[lists], activations)
  shifts = int(scales.inlier.max()), int(scales.outlier.max())
  if scales.bound >= 2.0**63:
    raise ValueError(
      'simulate.microscopiq: scales need left shifts of 0..'
      f'{shifts[0]} (inliers) and 0..{shifts[1]} (outliers), and sums of up '
      f'to {np.log2(scales.bound):.1f} bits; 63 are available'
    )

  # Outputs fill tiles of lanes by columns; a last, part micro-block stays
  # whole, for a lower half may lie beyond n.
  tile = columns * (4 // bits)
  outputs = -(-n // tile) * tile
  fit = lambda x, size: np.pad(x, ((0, 0), (0, max(0, size - x.shape[1]))))[
    :, :size
  ]
  micro = lambda x: fit(x, outputs // b)
  # Block by block, in units of micro-blocks.
  inlier = np.repeat(scales.inlier, layout.block // b, axis=1)
  further = np.where(table.waves[lists] > 0, scales.outlier - inlier, 0)
  lists = micro(lists)
  rows = _Rows(
    fit(codes['element'], outputs),
    lists,
    activations.T,
    micro(inlier),
    micro(further),
  )
  with jax.enable_x64(True):
    rows, table = jax.tree.map(jnp.asarray, (rows, table))
    acc = np.asarray(_run(rows, table, bits=bits, columns=columns))
  vectors = passes[lists].reshape(k, outputs // columns, columns // b)
  return Product(
    acc[:, :n],
    np.repeat(scales.unit, layout.block)[:n].astype(np.int32),
    *shifts,
    vectors.max(axis=-1),
  )
