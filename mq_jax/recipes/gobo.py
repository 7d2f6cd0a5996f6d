"""GOBO: a dictionary for the inliers, float32 for the outliers."""

import jax
import jax.numpy as jnp

from mq_jax import layouts
from mq_jax._pytrees import pytree_dataclass, static
from mq_jax.recipes._recipe import Recipe, recipe

_ITERATIONS = 30


@pytree_dataclass
class GoboRows:
  """One table of centroids for the whole weight; see `gobo`."""

  log_probability: jax.typing.ArrayLike = -4.0
  bits: int = static(3)
  group: int = static(1)

  def prepare(self, weight, saliency):
    real = jnp.broadcast_to((saliency > 0)[:, None], weight.shape)
    count = jnp.sum(real, dtype=jnp.float32)
    mean = jnp.sum(jnp.where(real, weight, 0.0)) / count
    variance = jnp.sum(jnp.where(real, (weight - mean) ** 2, 0.0)) / count
    safe = jnp.where(variance > 0, variance, 1.0)
    # log N(w; mean, variance) < log_probability, solved for the distance.
    room = -2.0 * self.log_probability - jnp.log(2.0 * jnp.pi * safe)
    distance = jnp.sqrt(safe * jnp.maximum(room, 1.0))
    distance = jnp.where(variance > 0, distance, jnp.inf)
    inlier = real & (jnp.abs(weight - mean) <= distance)

    size = 2**self.bits
    flat = jnp.sort(jnp.where(inlier, weight, jnp.inf).reshape(-1))
    total = jnp.sum(inlier, dtype=jnp.int32)
    # Bins of equal population, then Lloyd's iterations.
    middle = (2 * jnp.arange(size, dtype=jnp.float32) + 1) / (2 * size)
    start = (middle * total.astype(jnp.float32)).astype(jnp.int32)
    centroids = flat[jnp.clip(start, 0, flat.size - 1)]
    # Sorted, a cluster is a run: its sum is a difference of running sums.
    running = jnp.cumsum(jnp.where(jnp.isfinite(flat), flat, 0.0))
    running = jnp.concatenate([jnp.zeros(1, jnp.float32), running])

    def lloyd(_, centroids):
      middle = 0.5 * (centroids[1:] + centroids[:-1])
      ends = jnp.searchsorted(flat, middle, side='right').astype(jnp.int32)
      ends = jnp.minimum(ends, total)
      ends = jnp.concatenate([jnp.zeros(1, jnp.int32), ends, total[None]])
      number = jnp.diff(ends).astype(jnp.float32)
      sums = jnp.diff(running[ends])
      return jnp.where(number > 0, sums / jnp.maximum(number, 1), centroids)

    centroids = jax.lax.fori_loop(0, _ITERATIONS, lloyd, centroids)
    return {'centroids': centroids, 'mean': mean, 'distance': distance}

  def fit(self, rows, saliency, whole):
    del rows, saliency, whole
    return ()

  def apply(self, row, saliency, whole, fitted, index):
    del saliency, fitted, index
    index = _nearest(row, whole['centroids'])
    outlier = jnp.abs(row - whole['mean']) > whole['distance']
    value = jnp.where(outlier, row, whole['centroids'][index])
    code = {
      'index': index.astype(jnp.uint8),
      'outlier': outlier,
      'value': jnp.where(outlier, row, 0.0),
    }
    return value, code

  def layout(self):
    return layouts.Gobo(self.bits)

  def collect(self, whole, fitted, codes):
    del fitted
    return {'centroids': whole['centroids'], **codes}

  def counts(self, weight, codes):
    del weight
    return {'outliers': jnp.sum(codes['outlier'], dtype=jnp.int32)}


def _nearest(x, centroids):
  """Index of the nearest of increasing centroids, ties to the lower."""
  middle = 0.5 * (centroids[1:] + centroids[:-1])
  middle = middle.reshape((1,) * x.ndim + middle.shape)
  return jnp.sum(x[..., None] > middle, axis=-1, dtype=jnp.int32)


@recipe
def gobo(bits: int = 3, log_probability: float = -4.0) -> Recipe:
  """A table of 2^bits values per matrix, outliers kept in float32.

  Args:
    bits: Width of an index, 2..8.
    log_probability: Weights with less, under a normal distribution fitted to
      the matrix, are outliers.

  Source:
    Zadeh et al., GOBO, MICRO 2020, arXiv 2005.03842, from summaries: threshold
    -4, bins of equal population as start. It stops when the L1 norm grows; we
    run a fixed number of Lloyd iterations.
  """
  if not isinstance(bits, int) or not 2 <= bits <= 8:
    raise ValueError(f'gobo: bits={bits!r} is not a whole number in 2..8')
  return Recipe(rows=GoboRows(log_probability, bits))
