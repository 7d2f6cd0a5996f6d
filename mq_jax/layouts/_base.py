"""What every layout offers, and buffers ready for a file."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np


class Packed(NamedTuple):
  """A quantized matrix as bytes.

  Attributes:
    layout: How to read the buffers.
    shape: (*batch, k, n) of the matrix.
    dtype: Name of the dtype that the weight had.
    buffers: Byte arrays u8[*] by name; nothing else needs to be stored.
  """

  layout: Any
  shape: tuple[int, ...]
  dtype: str
  buffers: dict[str, np.ndarray]

  @property
  def nbytes(self) -> int:
    return sum(buffer.nbytes for buffer in self.buffers.values())


class Layout(Protocol):
  """Bit-exact storage of one matrix [k, n].

  Layouts are frozen dataclasses of plain numbers and strings. `decode` is
  pure and may be traced, also in the layout's numbers; `pack`, `unpack` and
  what counts run on the host.

  The last four methods move weights on the grid that codes leave them: which
  weights are outliers, pruned or of which pattern stays as it is, and so does
  the number of bytes. A layout without them can't be learned.
  """

  def decode(self, codes: dict, k: int, n: int) -> jax.Array:
    """Values f32[k, n] of the codes."""

  def pack(self, codes: dict, k: int, n: int) -> dict[str, np.ndarray]:
    """Codes as byte buffers."""

  def unpack(self, buffers: dict, k: int, n: int) -> dict:
    """Undo `pack`; ValueError for buffers of the wrong size."""

  def nbytes(self, codes: dict, k: int, n: int) -> int:
    """Bytes that `pack` will produce, without producing them."""

  def paper_bits(self, codes: dict, k: int, n: int) -> float:
    """Bits of the matrix as the paper counts them."""

  def place(self, codes: dict, values: jax.Array, k: int, n: int) -> jax.Array:
    """Values f32[k, n] where the layout rounds them: scaled, rotated."""

  def relax(
    self,
    codes: dict,
    target: jax.Array,
    k: int,
    n: int,
    hard: bool = True,
    shares: dict | None = None,
  ) -> jax.Array:
    """`decode(recode(codes, target))`, the same bits, differentiable.

    Straight-through in `target` within its range, and in the codes that are
    numbers (`learned`), which may be traced: for scales these are the gradients
    of LSQ (arXiv 1902.08153, equations 3 and 5, without its factor). With
    `hard=False` targets are cut to their range but not rounded. For `shares`
    see `Choosing`.
    """

  def recode(self, codes: dict, target: jax.Array, k: int, n: int) -> dict:
    """The codes with each weight at the place of the grid nearest to it."""

  def spacing(self, codes: dict, k: int, n: int) -> jax.Array:
    """Distance of a weight's neighbours on the grid, as `place` has it."""

  def learned(self, codes: dict) -> tuple[str, ...]:
    """Names of codes that are numbers and may be learned.

    Whole numbers among them may be traced as real ones, which `relax` and
    `recode` round.
    """


class Choice(NamedTuple):
  """Options of which each cell of a matrix has one.

  Attributes:
    now: 1 at what codes have. f32[options, *cells].
    error: Mean squared distance of the cell's weights from their targets under
      each option, in units of the spacing. f32[options, *cells].
  """

  now: jax.Array
  error: jax.Array


class Choosing(Protocol):
  """What layouts offer besides that can learn more than numbers.

  The pattern of a pair of clusters, the exponent of a block, the role of an
  element are choices. Their names, and `shares` of options f32[options,
  *cells], may be given to `relax`, which gives them the gradients of the mean
  over options; values are those of the codes.
  """

  def choices(
    self, codes: dict, target: jax.Array, k: int, n: int
  ) -> dict[str, Choice]:
    """All of them by name."""

  def settle(
    self, codes: dict, logits: dict, target: jax.Array, k: int, n: int
  ) -> dict:
    """The codes with the options of the largest logits, in as many bytes.

    They are for `relax` and `recode`, at the same target; `decode` would read
    weights as they were under other options.
    """


def choices(layout, codes, target, k, n) -> dict[str, Choice]:
  """Those of any layout."""
  found = getattr(layout, 'choices', None)
  return {} if found is None else found(codes, target, k, n)


def settle(layout, codes, logits, target, k, n) -> dict:
  """`settle` of any layout."""
  return layout.settle(codes, logits, target, k, n) if logits else codes


def through(value: jax.Array, soft: jax.Array) -> jax.Array:
  """`value`, to the bit, with the gradient of `soft`."""
  return jax.lax.stop_gradient(value) + (soft - jax.lax.stop_gradient(soft))


def lean(shares: jax.Array, values: jax.Array) -> jax.Array:
  """Zero, with the gradient of the mean of options' values in the shares."""
  soft = jnp.sum(shares * jax.lax.stop_gradient(values), axis=0)
  return soft - jax.lax.stop_gradient(soft)


class Grid(NamedTuple):
  """Where weights may be: `step` times the whole numbers from low to high.

  Attributes:
    step: f32[k, n]; 0 where a group is all zero.
    low: f32, broadcasts.
    high: f32, broadcasts.
  """

  step: jax.Array
  low: jax.Array
  high: jax.Array

  def level(self, target: jax.Array, hard: bool = True) -> jax.Array:
    """The nearest whole numbers as f32, straight-through within the range."""
    safe = jnp.where(self.step > 0, self.step, 1.0)
    inside = jnp.clip(target / safe, self.low, self.high)
    return through(jnp.round(inside), inside) if hard else inside

  def relax(self, target: jax.Array, hard: bool = True) -> jax.Array:
    """Their values."""
    return self.level(target, hard) * self.step


def as_bytes(array: Any, dtype: Any) -> np.ndarray:
  """An array's little-endian bytes."""
  dtype = np.dtype(dtype).newbyteorder('<')
  return (
    np.ascontiguousarray(np.asarray(array), dtype).reshape(-1).view(np.uint8)
  )


def from_bytes(buffer: np.ndarray, dtype: Any, shape) -> np.ndarray:
  """Undo `as_bytes`; ValueError if the length is not that of `shape`."""
  dtype = np.dtype(dtype).newbyteorder('<')
  need = int(np.prod(shape)) * dtype.itemsize
  if buffer.size != need:
    raise ValueError(
      f'buffer of {buffer.size} bytes; {shape} of {dtype} need {need}'
    )
  return np.ascontiguousarray(buffer).view(dtype).reshape(shape)
