"""How well a network classifies images."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax import sharding
from mq_jax.evaluation import predictions


class Scores(NamedTuple):
  """How well classes were predicted.

  Attributes:
    top1: Share of images whose label has the best score. Ties count as
      misses for all but the lowest class.
    top1_error: Standard error of `top1` over images.
    top5: Share of images with the label among the five best; all of them with
      five classes or fewer.
    nll: Mean negative log likelihood of the labels, in nats.
    nll_error: Standard error of `nll` over images.
    images: Number of images.
  """

  top1: float
  top1_error: float
  top5: float
  nll: float
  nll_error: float
  images: int


def normalized(
  pixels: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]
) -> jax.Array:
  """Bytes [..., c] as (byte / 255 - mean) / std in float32."""
  shape = (1,) * (pixels.ndim - 1) + (-1,)
  of = lambda x: jnp.asarray(x, jnp.float32).reshape(shape)
  return (pixels.astype(jnp.float32) / 255 - of(mean)) / of(std)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _image_scores(apply, pixels, params, images, labels):
  """Rank of the label and its negative log likelihood, of each image."""
  scores = apply(params, normalized(images, *pixels)).astype(jnp.float32)
  nll = predictions.nll_per_token(scores, labels)
  own = jnp.take_along_axis(scores, labels[:, None], axis=1)
  before = jnp.arange(scores.shape[1])[None] < labels[:, None]
  rank = jnp.sum((scores > own) | ((scores == own) & before), axis=1)
  return rank, nll


def evaluate(
  apply: Callable[[Any, jax.Array], jax.Array],
  params: Any,
  images: np.ndarray,
  labels: np.ndarray,
  *,
  mean: tuple[float, ...],
  std: tuple[float, ...],
  batch: int = 64,
  progress: Callable[[int, int], None] | None = None,
) -> Scores:
  """Score a classifier on images.

  Compiled once for an `apply` and the shapes of parameters and images.

  Args:
    apply: `(params, pixels f32[b, h, w, c]) -> scores [b, classes]`.
    params: Any tree of arrays.
    images: u8[n, h, w, c].
    labels: Classes from 0. i32[n].
    mean: Of the network's normalization, a number a channel.
    std: Likewise.
    batch: Images at a time; it does not change the result.
    progress: Called with the images done and their total after each batch.

  Returns:
    The scores, summed in float64. A label outside the classes makes the
    likelihood NaN.

  Raises:
    ValueError: if there are no images, or labels do not fit them, or `mean`
      and `std` do not fit channels, or `batch` is less than 1.
  """
  images, labels = np.asarray(images), np.asarray(labels)
  check(images, mean, std, batch)
  if labels.shape != images.shape[:1] or labels.min() < 0:
    raise ValueError(
      f'labels of shape {labels.shape} from {labels.min(initial=0)} for '
      f'{len(images)} images; one from 0 is needed for each'
    )
  pixels = (tuple(mean), tuple(std))
  ranks, nlls = [], []
  for start, count, chunk in batches(batch, images, labels.astype(np.int32)):
    found = _image_scores(apply, pixels, params, *chunk)
    rank, nll = (sharding.to_host(x)[:count] for x in found)
    ranks.append(rank)
    nlls.append(nll.astype(np.float64))
    if progress is not None:
      progress(start + count, len(images))
  ranks, nlls = np.concatenate(ranks), np.concatenate(nlls)
  hit = (ranks == 0).astype(np.float64)
  return Scores(
    top1=float(hit.mean()),
    top1_error=standard_error(hit),
    top5=float((ranks < 5).mean()),
    nll=math.fsum(nlls) / len(nlls),
    nll_error=standard_error(nlls),
    images=len(images),
  )


def check(
  images: np.ndarray,
  mean: tuple[float, ...],
  std: tuple[float, ...],
  batch: int,
) -> None:
  """Raises ValueError unless images are bytes that all the rest fits."""
  if images.ndim != 4 or images.dtype != np.uint8 or not images.size:
    raise ValueError(
      f'images must be bytes [n, h, w, c], found {images.dtype}'
      f'{list(images.shape)}'
    )
  if not len(mean) == len(std) == images.shape[-1]:
    raise ValueError(
      f'images have {images.shape[-1]} channels, the normalization '
      f'{len(mean)} means and {len(std)} deviations'
    )
  if batch < 1:
    raise ValueError(f'batch={batch} must be at least 1')


def batches(size: int, *arrays: np.ndarray):
  """Cut arrays into batches of one shape, the last filled up with zeros.

  Yields:
    The first index, how many entries are real, and the arrays [size, ...].
  """
  total = len(arrays[0])
  size = min(size, total)
  for start in range(0, total, size):
    count = min(size, total - start)
    chunk = []
    for array in arrays:
      padded = np.zeros((size, *array.shape[1:]), array.dtype)
      padded[:count] = array[start : start + count]
      chunk.append(padded)
    yield start, count, tuple(chunk)


def standard_error(values: np.ndarray) -> float:
  """Of a mean of independent values; 0 of a single one."""
  if len(values) < 2:
    return 0.0
  return float(np.std(values, ddof=1) / math.sqrt(len(values)))
