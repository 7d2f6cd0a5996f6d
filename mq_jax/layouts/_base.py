"""What every layout offers, and buffers ready for a file."""

from typing import Any, NamedTuple, Protocol

import jax
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
  pure and may be traced, also in the layout's numbers; the rest runs on the
  host.
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
