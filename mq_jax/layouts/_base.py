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

  def relax(self, codes: dict, target: jax.Array, k: int, n: int) -> jax.Array:
    """`decode(recode(codes, target))`, the same bits, differentiable.

    Straight-through in `target` within its range, and in the codes that are
    real numbers (`learned`), which may be traced: for scales these are the
    gradients of LSQ (arXiv 1902.08153, equations 3 and 5, without its factor).
    """

  def recode(self, codes: dict, target: jax.Array, k: int, n: int) -> dict:
    """The codes with each weight at the place of the grid nearest to it."""

  def spacing(self, codes: dict, k: int, n: int) -> jax.Array:
    """Distance of a weight's neighbours on the grid, as `place` has it."""

  def learned(self, codes: dict) -> tuple[str, ...]:
    """Names of codes that are real numbers and may be learned."""


def through(value: jax.Array, soft: jax.Array) -> jax.Array:
  """`value`, to the bit, with the gradient of `soft`."""
  return jax.lax.stop_gradient(value) + (soft - jax.lax.stop_gradient(soft))


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

  def level(self, target: jax.Array) -> jax.Array:
    """The nearest whole numbers as f32, straight-through within the range."""
    safe = jnp.where(self.step > 0, self.step, 1.0)
    inside = jnp.clip(target / safe, self.low, self.high)
    return through(jnp.round(inside), inside)

  def relax(self, target: jax.Array) -> jax.Array:
    """Their values."""
    return self.level(target) * self.step


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
