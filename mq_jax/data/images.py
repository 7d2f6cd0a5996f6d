"""Images with labels, from .npz files and MNIST's IDX files."""

import gzip
import math
import os
import pathlib
import zipfile
import zlib
from typing import NamedTuple

import numpy as np

_IDX = {1: 'labels', 3: 'images'}  # number of axes: what the file holds


class Images(NamedTuple):
  """Images and their classes.

  Attributes:
    pixels: u8[n, h, w, c].
    labels: i32[n]; None where the source has none.
  """

  pixels: np.ndarray
  labels: np.ndarray | None


def read_images(path: str | os.PathLike) -> Images:
  """Images of a file.

  Args:
    path: An .npz file with `x` u8[n, h, w] or u8[n, h, w, c] and perhaps `y`
      [n], or an IDX file of images (.gz or not), whose labels lie beside it
      under the name with 'labels-idx1' for 'images-idx3'.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is neither, damaged, or labels do not fit images.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'images {path}: no such file')
  if path.suffix == '.npz':
    found = _read_npz(path)
    pixels, labels = found.get('x'), found.get('y')
    if pixels is None:
      raise ValueError(
        f'images {path}: has no array x, only {sorted(found)}; x are images, '
        'y their labels'
      )
  else:
    pixels = _read_idx(path, 3)
    beside = path.with_name(path.name.replace('images-idx3', 'labels-idx1'))
    labels = None
    if beside != path and beside.is_file():
      labels = _read_idx(beside, 1)
  return _checked(str(path), pixels, labels)


def _checked(
  where: str, pixels: np.ndarray, labels: np.ndarray | None
) -> Images:
  if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or not pixels.size:
    raise ValueError(
      f'images {where}: needs bytes [n, h, w] or [n, h, w, c], found '
      f'{pixels.dtype}{list(pixels.shape)}'
    )
  pixels = pixels.reshape(*pixels.shape[:3], -1)
  if labels is None:
    return Images(pixels, None)
  whole = np.issubdtype(labels.dtype, np.integer)
  if not whole or labels.shape != pixels.shape[:1] or labels.min() < 0:
    raise ValueError(
      f'images {where}: labels must be {len(pixels)} whole numbers from 0, '
      f'found {labels.dtype}{list(labels.shape)}'
    )
  return Images(pixels, labels.astype(np.int32))


def _read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
  try:
    with np.load(path, allow_pickle=False) as file:
      return {name: file[name] for name in ('x', 'y') if name in file} | {
        name: np.empty(0) for name in file if name not in ('x', 'y')
      }
  except (zipfile.BadZipFile, ValueError, EOFError, OSError) as error:
    raise ValueError(f'images {path}: not a whole .npz file: {error}') from None


def _read_idx(path: pathlib.Path, axes: int) -> np.ndarray:
  """An array of bytes in the format of MNIST.

  Layout: two zero bytes, the type (8: bytes), the number of axes, their sizes
  as big-endian u32, the values. (Source: the page of MNIST by LeCun, recalled.)
  """
  raw = path.read_bytes()
  if path.suffix == '.gz':
    try:
      raw = gzip.decompress(raw)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
      raise ValueError(f'images {path}: not a whole gzip file') from error
  start = 4 + 4 * axes
  if len(raw) < start or raw[:4] != bytes([0, 0, 8, axes]):
    raise ValueError(
      f'images {path}: not an IDX file of {_IDX[axes]} (bytes, {axes} axes); '
      'it begins with '
      f'{raw[:4].hex(" ") or "nothing"}'
    )
  shape = [int.from_bytes(raw[i : i + 4], 'big') for i in range(4, start, 4)]
  if len(raw) - start != math.prod(shape):
    raise ValueError(
      f'images {path}: {math.prod(shape)} values of shape {shape} announced, '
      f'{len(raw) - start} follow'
    )
  return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)
