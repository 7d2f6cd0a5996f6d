"""Bit streams: fields of a few bits, first field in the lowest bits."""

import numpy as np


def to_bits(fields: np.ndarray, width: int) -> np.ndarray:
  """Spread unsigned fields into bits, lowest first: [...] -> u8[..., width]."""
  fields = np.asarray(fields)
  dtype = np.uint8 if width <= 8 else np.uint32
  shifts = np.arange(width, dtype=dtype)
  return (fields.astype(dtype)[..., None] >> shifts).astype(np.uint8) & 1


def from_bits(bits: np.ndarray) -> np.ndarray:
  """Undo `to_bits`: u8[..., width] -> u8[...] (u32 above 8 bits)."""
  width = bits.shape[-1]
  dtype = np.uint8 if width <= 8 else np.uint32
  shifts = np.arange(width, dtype=dtype)
  return np.bitwise_or.reduce(
    bits.astype(dtype) << shifts, axis=-1, dtype=dtype
  )


def pack_bits(fields: np.ndarray, width: int) -> np.ndarray:
  """Fields of any shape, in C order, as a byte stream u8[ceil(n w / 8)]."""
  return np.packbits(to_bits(fields, width).reshape(-1), bitorder='little')


def unpack_bits(stream: np.ndarray, width: int, shape) -> np.ndarray:
  """Undo `pack_bits`.

  Raises:
    ValueError: if the stream's length is not that of `shape` fields.
  """
  count = int(np.prod(shape))
  need = nbytes(count, width)
  if stream.size != need:
    raise ValueError(
      f'bit stream of {stream.size} bytes; {count} fields of {width} bits '
      f'need {need}'
    )
  bits = np.unpackbits(stream, count=count * width, bitorder='little')
  return from_bits(bits.reshape(*shape, width))


def nbytes(count: int, width: int) -> int:
  """Bytes of `count` fields of `width` bits."""
  return -(-count * width // 8)
