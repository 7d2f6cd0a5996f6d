"""OliVe: an outlier takes the place of its neighbour."""

import jax
import jax.numpy as jnp

from mq_jax import formats, layouts
from mq_jax._pytrees import pytree_dataclass, static
from mq_jax.layouts.olive import OUTLIER_LEVELS
from mq_jax.recipes._recipe import Recipe, recipe

_GRID = tuple(0.4 + 0.1 * i for i in range(17))


@pytree_dataclass
class OliveRows:
  """Pairs of neighbouring inputs of one output; see `olive`."""

  sigma: jax.typing.ArrayLike = 3.0
  bits: int = static(4)
  group: int = static(2)

  @property
  def _largest(self) -> float:
    return 2.0 ** (self.bits - 1) - 1.0

  def prepare(self, weight, saliency):
    """Scale of every output: that of least error around sigma / largest."""
    k, n = weight.shape
    real = (saliency > 0).astype(jnp.float32)[:, None]
    deviation = jnp.sqrt(jnp.sum(weight**2 * real, axis=0) / jnp.sum(real))
    cost = saliency[:, None]

    def attempt(share):
      scale = formats.stored_scale(
        share * self.sigma * deviation / self._largest
      )
      pairs = weight.reshape(k // 2, 2, n)
      value, _ = self._round(pairs, self._outlier(pairs, scale), scale)
      error = jnp.sum(cost * jnp.square(value.reshape(k, n) - weight), axis=0)
      return scale, error

    scales, errors = jax.lax.map(attempt, jnp.array(_GRID, jnp.float32))
    best = jnp.argmin(errors, axis=0)[None]
    return {'scale': jnp.take_along_axis(scales, best, axis=0)[0]}

  def _outlier(self, pairs, scale):
    """Outliers of pairs [..., 2, n]: beyond the normal range, one a pair."""
    magnitude = jnp.abs(pairs)
    limit = (self._largest + 0.5) * scale.astype(jnp.float32)
    beyond = magnitude > _leading(limit, magnitude)
    other = jnp.flip(magnitude, axis=-2)
    first = _leading(jnp.array([[True], [False]]), magnitude)
    larger = (magnitude > other) | ((magnitude == other) & first)
    return beyond & larger

  def _round(self, row, outlier, scale):
    """Values and codes of weights [..., 2, n], given the outliers."""
    victim = jnp.flip(outlier, axis=-2)
    return self._round_member(row, outlier, victim, scale)

  def _round_member(self, row, outlier, victim, scale):
    scale = _leading(scale.astype(jnp.float32), row)
    safe = jnp.where(scale > 0, scale, 1.0)
    unit = jnp.where(scale > 0, row / safe, 0.0)
    normal = jnp.clip(jnp.round(unit), -self._largest, self._largest)
    table = jnp.array(OUTLIER_LEVELS[self.bits], jnp.float32)
    magnitude = jnp.abs(unit)[..., None]
    distance = jnp.abs(magnitude - _leading(table, magnitude))
    # Code 0 of a negative one would read as a victim's, and of the 4-bit table
    # it stands for no number.
    first = jnp.where(unit < 0, 1, int(OUTLIER_LEVELS[self.bits][0] == 0))
    entry = jnp.arange(table.size)
    usable = _leading(entry, magnitude) >= first[..., None]
    index = jnp.argmin(jnp.where(usable, distance, jnp.inf), axis=-1)
    wide = jnp.where(unit < 0, -table[index], table[index])
    sign = 1 << (self.bits - 1)
    code = jnp.where(
      victim,
      sign,
      jnp.where(
        outlier,
        index + jnp.where(unit < 0, sign, 0),
        normal.astype(jnp.int32) & (2 * sign - 1),
      ),
    )
    level = jnp.where(victim, 0.0, jnp.where(outlier, wide, normal))
    return level * scale, code.astype(jnp.uint8)

  def fit(self, rows, saliency, whole):
    del saliency
    return {'outlier': self._outlier(rows, whole['scale'])}  # [2, n]

  def apply(self, row, saliency, whole, fitted, index):
    del saliency
    outlier = fitted['outlier'][index]
    victim = fitted['outlier'][1 - index]
    value, code = self._round_member(row, outlier, victim, whole['scale'])
    return value, {'code': code}

  def layout(self):
    return layouts.Olive(self.bits)

  def collect(self, whole, fitted, codes):
    del fitted
    return {**whole, **codes}

  def counts(self, weight, codes):
    del weight
    victims = codes['code'] == 1 << (self.bits - 1)
    count = jnp.sum(victims, dtype=jnp.int32)
    return {'outliers': count, 'pruned': count}


def _leading(x, like):
  """Unit axes in front of `x`, up to the rank of `like`."""
  return x.reshape((1,) * (like.ndim - x.ndim) + x.shape)


@recipe
def olive(bits: int = 4, sigma: float = 3.0) -> Recipe:
  """Pairs of weights, of which an outlier may take both places.

  Args:
    bits: 4 (int4 and abfloat E2M1 with bias 2) or 2 (ternary and 2 outlier
      magnitudes, our reading of an 'OliVe-like' 2-bit format).
    sigma: Centre of the search for the scale of an output.

  Source:
    Guo et al., OliVe, ISCA 2023, arXiv 2304.07493, from summaries: 3-sigma
    outliers, identifier code 1000b for the victim, abfloat. The scale's
    search is our choice.
  """
  if bits not in OUTLIER_LEVELS:
    raise ValueError(f'olive: bits={bits!r} is not one of {[*OUTLIER_LEVELS]}')
  return Recipe(rows=OliveRows(sigma, bits))
