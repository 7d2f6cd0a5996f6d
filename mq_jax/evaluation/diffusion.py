"""How well a diffusion network predicts noise."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax import sharding
from mq_jax.evaluation import images as images_lib


class Scores(NamedTuple):
  """Errors of predicted noise, means over images and pixels.

  Attributes:
    mse: Squared error against the noise that was added.
    mse_error: Its standard error over images.
    mae: Absolute error, likewise.
    against: Squared difference to the prediction of a reference network; None
      without one.
    images: Number of images, each with its own step and noise.
    by_step: A row for each range of steps: (first, last + 1, images in it,
      mse, against). A range without images has None for both.
  """

  mse: float
  mse_error: float
  mae: float
  against: float | None
  images: int
  by_step: tuple[tuple[int, int, int, float | None, float | None], ...]


def signal_shares(
  steps: int = 1000, first: float = 1e-4, last: float = 0.02
) -> np.ndarray:
  """What is left of an image's variance after each step.

  Args:
    steps: Number of steps.
    first: Variance of the noise that the first step adds.
    last: Of the last; linear between them.

  Returns:
    The product of 1 - beta up to each step, in float64. Shape [steps].

  Source:
    DDPM, arXiv 2006.11239, section 2 and, for the numbers, section 4.
  """
  return np.cumprod(1 - np.linspace(first, last, steps))


def noisy(x: jax.Array, noise: jax.Array, share: jax.Array) -> jax.Array:
  """sqrt(share) x + sqrt(1 - share) noise, DDPM's equation 4.

  Args:
    x: Images [b, h, w, c].
    noise: Standard normal, [b, h, w, c].
    share: `signal_shares` at the step of each image. Shape [b].
  """
  share = share.astype(x.dtype)[:, None, None, None]
  return jnp.sqrt(share) * x + jnp.sqrt(1 - share) * noise


def draw(
  seed: jax.typing.ArrayLike,
  index: jax.Array,
  shape: tuple[int, ...],
  steps: int,
) -> tuple[jax.Array, jax.Array]:
  """A step and noise for each image; they depend on its number alone.

  Args:
    seed: Of all draws.
    index: Numbers of the images. i32[b].
    shape: Of an image.
    steps: Steps are drawn from 0 to one less.

  Returns:
    Steps i32[b] and noise f32[b, *shape].
  """

  def one(i):
    step, noise = jax.random.split(jax.random.fold_in(jax.random.key(seed), i))
    return (
      jax.random.randint(step, (), 0, steps),
      jax.random.normal(noise, shape),
    )

  return jax.vmap(one)(index)


def inputs(
  seed: jax.typing.ArrayLike,
  index: jax.Array,
  images: jax.Array,
  shares: jax.Array,
  mean: tuple[float, ...],
  std: tuple[float, ...],
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """What a network is asked about some images.

  Args:
    seed: Of steps and noise.
    index: Numbers of the images, which with the seed decide both. i32[b].
    images: Bytes. u8[b, h, w, c].
    shares: From `signal_shares`, f32[steps].
    mean: Of the network's normalization, a number a channel.
    std: Likewise.

  Returns:
    Noisy images f32[b, h, w, c], steps i32[b], the noise f32[b, h, w, c].
  """
  steps, noise = draw(seed, index, images.shape[1:], shares.shape[0])
  x = images_lib.normalized(images, mean, std)
  return noisy(x, noise, shares[steps]), steps, noise


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _image_errors(
  apply, original, pixels, seed, params, reference, shares, batch
):
  """Mean errors of each image, and its step."""
  index, images, labels = batch
  x, steps, noise = inputs(seed, index, images, shares, *pixels)
  found = apply(params, x, steps, labels).astype(jnp.float32)
  mean = lambda e: jnp.mean(e, axis=(1, 2, 3))
  against = None
  if original is not None:
    other = original(reference, x, steps, labels).astype(jnp.float32)
    against = mean(jnp.square(found - other))
  error = found - noise
  return steps, mean(jnp.square(error)), mean(jnp.abs(error)), against


def evaluate(
  apply: Callable[..., jax.Array],
  params: Any,
  images: np.ndarray,
  labels: np.ndarray,
  *,
  mean: tuple[float, ...],
  std: tuple[float, ...],
  reference: tuple[Callable[..., jax.Array], Any] | None = None,
  shares: np.ndarray | None = None,
  seed: int = 0,
  ranges: int = 5,
  batch: int = 64,
  progress: Callable[[int, int], None] | None = None,
) -> Scores:
  """Score a noise predictor on images, each at one random step.

  Steps and noise depend on `seed` and the number of the image alone: networks
  are asked the same, whatever the batch.

  Args:
    apply: `(params, x f32[b, h, w, c], steps i32[b], labels i32[b])`, the
      noise in x.
    params: Any tree of arrays.
    images: u8[n, h, w, c].
    labels: Classes from 0. i32[n].
    mean: Of the network's normalization, a number a channel.
    std: Likewise.
    reference: Function and parameters of a network to compare predictions
      with, usually the unquantized one.
    shares: Signal left at each step, see `signal_shares`.
    seed: Of steps and noise.
    ranges: Equal ranges of steps that `by_step` tells apart.
    batch: Images at a time; it does not change the result.
    progress: Called with the images done and their total after each batch.

  Raises:
    ValueError: if there are no images, or labels, `mean` or `std` do not fit
      them, or `batch` or `ranges` is less than 1.
  """
  images, labels = np.asarray(images), np.asarray(labels)
  images_lib.check(images, mean, std, batch)
  if labels.shape != images.shape[:1] or ranges < 1:
    raise ValueError(
      f'labels of shape {labels.shape} for {len(images)} images, and '
      f'ranges={ranges}; a label each and at least one range are needed'
    )
  shares = signal_shares() if shares is None else np.asarray(shares)
  pixels = (tuple(mean), tuple(std))
  device = jnp.asarray(shares, jnp.float32)
  index = np.arange(len(images), dtype=np.int32)
  original, kept = (None, None) if reference is None else reference
  columns: list[list] = [[], [], [], []]
  for start, count, chunk in images_lib.batches(
    batch, index, images, labels.astype(np.int32)
  ):
    found = _image_errors(
      apply, original, pixels, seed, params, kept, device, chunk
    )
    for column, value in zip(columns, found):
      if value is not None:
        column.append(sharding.to_host(value)[:count].astype(np.float64))
    if progress is not None:
      progress(start + count, len(images))
  steps, mse, mae = (np.concatenate(c) for c in columns[:3])
  against = np.concatenate(columns[3]) if columns[3] else None
  average = lambda x: None if x is None else math.fsum(x) / len(x)
  edges = [round(i * len(shares) / ranges) for i in range(ranges + 1)]
  rows = []
  for low, high in zip(edges, edges[1:]):
    inside = (steps >= low) & (steps < high)
    part = lambda x, inside=inside: (
      None if x is None or not inside.any() else average(x[inside])
    )
    rows.append((low, high, int(inside.sum()), part(mse), part(against)))
  return Scores(
    mse=average(mse),
    mse_error=images_lib.standard_error(mse),
    mae=average(mae),
    against=average(against),
    images=len(images),
    by_step=tuple(rows),
  )
