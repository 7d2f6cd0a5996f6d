"""FineQ: clusters of three weights with 2 + 2 + 2 or 3 + 3 + 0 bits."""

from typing import Any

import jax
import jax.numpy as jnp

from mq_jax import clusters, formats, layouts, steps
from mq_jax._pytrees import pytree_dataclass, static
from mq_jax.compensation import Compensation
from mq_jax.recipes._recipe import Recipe, recipe
from mq_jax.steps.patterns import RULES

_PATTERNS = {3: steps.PATTERNS_3, 4: steps.PATTERNS_4}

# Grid of the scale in standard deviations of a channel; optimum near 0.9 for
# Gaussian, Student t5 and Laplace weights.
_GRID = tuple(0.5 + 0.05 * i for i in range(31))

# With two scales, that of pattern 0 over that of the others.
_RATIOS = (1.0, 0.7, 0.85, 1.2, 1.4, 1.7, 2.0)


@pytree_dataclass
class FineQRows:
  """Groups of `share` clusters along the inputs; see `fineq`."""

  threshold: jax.typing.ArrayLike = 4.0
  cluster: int = static(3)
  share: int = static(2)
  rule: str = static('mse')
  scale: str = static('grid')
  scales: int = static(1)

  @property
  def group(self) -> int:
    return self.cluster * self.share

  @property
  def patterns(self):
    return _PATTERNS[self.cluster]

  def _by_pattern(self, scale):
    """Scales f32[s, n] by pattern: f32[p, n]."""
    scale = scale.astype(jnp.float32)
    rest = len(self.patterns) - 1
    return jnp.concatenate([scale[:1]] + [scale[-1:]] * rest)

  def _each(self, what, rows, saliency, scale, deviation):
    """`what(step, cluster)` for every output's group of rows [g, n]."""

    def one(column, by_pattern, deviation):
      step = steps.RoundToPattern(
        by_pattern, deviation, self.threshold, self.patterns, self.rule
      )
      return what(step, clusters.new_cluster(column, saliency))

    by_pattern = self._by_pattern(scale)
    return jax.vmap(one, in_axes=(1, 1, 0))(rows, by_pattern, deviation)

  def prepare(self, weight, saliency):
    """Scale f16[s, n] and standard deviation f32[n] of every output."""
    k, n = weight.shape
    real = (saliency > 0).astype(jnp.float32)[:, None]
    count = jnp.sum(real)
    mean = jnp.sum(weight * real, axis=0) / count
    deviation = jnp.sqrt(
      jnp.sum(jnp.square(weight - mean[None]) * real, axis=0) / count
    )
    # A constant channel deviates by nothing: its size serves as well.
    spread = jnp.where(deviation > 0, deviation, jnp.abs(mean))
    if self.scale == 'absmax':
      scale = jnp.max(jnp.abs(weight), axis=0)[None] / 3.0
      scale = formats.stored_scale(jnp.tile(scale, (self.scales, 1)))
      return {'scale': scale, 'deviation': deviation}

    groups = weight.reshape(k // self.group, self.group, n)
    costs = saliency.reshape(k // self.group, self.group)

    def attempt(share):
      scale = formats.stored_scale(share[:, None] * spread[None])

      def error(arrays):
        what = lambda step, cluster: step.error(cluster)
        return self._each(what, *arrays, scale, deviation)  # [n]

      batch = min(len(groups), max(1, (1 << 18) // (self.group * n)))
      total = jax.lax.map(error, (groups, costs), batch_size=batch)
      return scale, jnp.sum(total, axis=0)

    grid = jnp.array(_GRID, jnp.float32)
    ratios = _RATIOS if self.scales == 2 else (1.0,)
    shares = jnp.stack(
      [
        jnp.stack([grid * ratio] * (self.scales - 1) + [grid], axis=1)
        for ratio in ratios
      ]
    ).reshape(-1, self.scales)
    scales, errors = jax.lax.map(attempt, shares)
    best = jnp.argmin(errors, axis=0)[None, None]
    scale = jnp.take_along_axis(scales, best, axis=0)[0]
    return {'scale': scale, 'deviation': deviation}

  def fit(self, rows, saliency, whole) -> Any:
    pattern = self._each(
      lambda step, cluster: step(cluster).code['pattern'],
      rows,
      saliency,
      whole['scale'],
      whole['deviation'],
    )
    return {'pattern': pattern}

  def apply(self, row, saliency, whole, fitted, index):
    del saliency
    pattern = fitted['pattern'].astype(jnp.int32)
    table = jnp.array(self.patterns, jnp.float32)
    levels = table[pattern, index % self.cluster]
    by_pattern = self._by_pattern(whole['scale'])
    scale = jnp.take_along_axis(by_pattern, pattern[None], axis=0)[0]
    level = steps.round_to_levels(row, scale, levels)
    return level * scale, {'level': level.astype(jnp.int8)}

  def layout(self):
    return layouts.FineQ(self.patterns, self.share, self.scales)

  def collect(self, whole, fitted, codes):
    return {'scale': whole['scale'], **fitted, **codes}

  def counts(self, weight, codes):
    k = weight.shape[0]
    level = jnp.abs(codes['level'][:k].astype(jnp.int32))
    scale = codes['scale'][-1:].astype(jnp.float32)
    saturated = (level == 3) & (jnp.abs(weight) > 3.5 * scale)
    wide = jnp.sum(codes['pattern'] != 0, dtype=jnp.int32)
    return {
      'outliers': jnp.sum(level > 1, dtype=jnp.int32),
      'wide_patterns': wide,
      'saturated': jnp.sum(saturated, dtype=jnp.int32),
    }


@recipe
def fineq(
  rule: str = 'mse',
  scale: str = 'grid',
  scales: int = 1,
  share: int = 2,
  cluster: int = 3,
  threshold: float = 4.0,
  compensate: bool = False,
  damping: float = 0.01,
) -> Recipe:
  """Clusters along the inputs in which outliers take a neighbour's bits.

  Args:
    rule: How a group's pattern is chosen: 'mse', 'ratio' or 'sigma', see
      `steps.RoundToPattern`.
    scale: 'grid', searched per output for the least saliency-weighted error,
      or 'absmax', the largest weight over 3.
    scales: 1, or 2 for a scale of its own for pattern 0.
    share: Clusters that share one code, 1, 2 or 4.
    cluster: Weights in a cluster: 3 (2+2+2 or 3+3+0 bits) or 4 (2+2+2+2 or
      3+3+2+0, our extension).
    threshold: Of the rules 'ratio' and 'sigma'.
    compensate: Use error compensation (not in the paper as far as known).
    damping: See `gptq`.

  Raises:
    ValueError: for an unknown rule, scale, or size.

  Source:
    Xie et al., FineQ, DATE 2025, arXiv 2504.19746: abstract read, the rest
    from memory of the paper or our choice.
  """
  for name, value, allowed in (
    ('rule', rule, RULES),
    ('scale', scale, ('grid', 'absmax')),
    ('scales', scales, (1, 2)),
    ('share', share, (1, 2, 4)),
    ('cluster', cluster, tuple(_PATTERNS)),
  ):
    if value not in allowed:
      raise ValueError(f'fineq: {name}={value!r} is not one of {allowed}')
  rows = FineQRows(threshold, cluster, share, rule, scale, scales)
  compensation = Compensation(damping) if compensate else None
  return Recipe(rows=rows, compensation=compensation)
