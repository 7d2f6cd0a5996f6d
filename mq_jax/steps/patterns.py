"""Bit patterns: clusters whose members get 0, 2 or 3 bits."""

import itertools

import jax
import jax.numpy as jnp

from mq_jax import formats
from mq_jax._pytrees import pytree_dataclass, static
from mq_jax.clusters import Cluster

# Largest level of each member, by pattern; widths 0, 2, 3 bits hold 0, 1, 3.
# Pattern 0 is the one without outliers; every pattern has as many bits.
PATTERNS_3 = ((1, 1, 1), (0, 3, 3), (3, 0, 3), (3, 3, 0))
PATTERNS_4 = (
  (1, 1, 1, 1),
  *sorted(set(itertools.permutations((0, 1, 3, 3)))),
)

RULES = ('mse', 'ratio', 'sigma')


def round_to_levels(
  weight: jax.Array, scale: jax.Array, levels: jax.Array
) -> jax.Array:
  """Signed levels `clip(round(weight / scale), -levels, levels)` as f32."""
  safe = jnp.where(scale > 0, scale, 1.0)
  level = formats.round_nearest(jnp.where(scale > 0, weight / safe, 0.0))
  return jnp.clip(level, -levels, levels)


@pytree_dataclass
class RoundToPattern:
  """Give the members of a cluster 0, 2 or 3 bits by one of a few patterns.

  The cluster may hold several groups of the pattern's size, which then share
  one pattern (FineQ: two groups of three).

  Attributes:
    scale: Step of the grid by pattern. f32[p] (all alike: one grid).
    deviation: Standard deviation of the channel, for `rule='sigma'`.
    threshold: Ratio of `rule='ratio'`, or multiple of `rule='sigma'`.
    patterns: Largest level of each member by pattern.
    rule: 'mse' takes the pattern of least saliency-weighted error; 'ratio'
      and 'sigma' let each group of members ask for pattern 0 or one that
      drops its smallest member, by max > threshold * min or max > threshold *
      deviation, and take the better of what the groups ask for.

  Codes: `pattern` u8[], `level` i8[n].

  Source:
    FineQ, arXiv 2504.19746 (abstract only); patterns and sharing from memory
    of the paper, 'mse' is our choice, the other rules are unverified.
  """

  scale: jax.Array
  deviation: jax.typing.ArrayLike = 1.0
  threshold: jax.typing.ArrayLike = 4.0
  patterns: tuple[tuple[int, ...], ...] = static(PATTERNS_3)
  rule: str = static('mse')

  def __call__(self, cluster: Cluster) -> Cluster:
    rounded, scale, error = self._attempts(cluster)
    pattern = jnp.argmin(error)
    level = rounded[pattern]
    code = {
      'pattern': pattern.astype(jnp.uint8),
      'level': level.astype(jnp.int8),
    }
    levels = jnp.array(self.patterns, jnp.float32)[pattern]
    wide = jnp.tile(levels, cluster.weight.shape[0] // levels.shape[0]) > 0
    return cluster._replace(
      value=level * scale[pattern],
      kept=cluster.kept & wide,
      code={**cluster.code, **code},
    )

  def error(self, cluster: Cluster) -> jax.Array:
    """Saliency-weighted squared error of the step, without taking it. f32[]."""
    return jnp.min(self._attempts(cluster)[2])

  def _attempts(self, cluster):
    """Levels [p, n], scales [p, 1] and errors [p] of every pattern.

    The error of a pattern that the rule does not allow is infinite.
    """
    size = len(self.patterns[0])
    n = cluster.weight.shape[0]
    if n % size:
      raise ValueError(
        f'RoundToPattern: a cluster of {n} weights is not a multiple of the '
        f'patterns of {size}'
      )
    if self.rule not in RULES:
      raise ValueError(
        f'RoundToPattern: rule={self.rule!r} is not one of {RULES}'
      )
    table = jnp.array(self.patterns, jnp.float32)
    levels = jnp.tile(table, (1, n // size))  # [p, n]
    scale = jnp.broadcast_to(self.scale, (len(self.patterns),))[:, None]
    rounded = round_to_levels(cluster.weight[None], scale, levels)
    error = cluster.saliency[None] * jnp.square(
      cluster.weight[None] - rounded * scale
    )
    total = jnp.sum(error, axis=1)
    if self.rule != 'mse':
      allowed = self._asked_for(cluster.weight, error, table)
      total = jnp.where(allowed, total, jnp.inf)
    return rounded, scale, total

  def _asked_for(self, weight, error, table):
    """Patterns that at least one group of members asks for. bool[p]."""
    size = table.shape[1]
    magnitude = jnp.abs(weight).reshape(-1, size)  # [group, member]
    largest = jnp.max(magnitude, axis=1)
    if self.rule == 'ratio':
      limit = self.threshold * jnp.min(magnitude, axis=1)
    else:
      limit = self.threshold * self.deviation
    has_outlier = largest > limit
    smallest = jnp.argmin(magnitude, axis=1)
    drops = jnp.argmin(table, axis=1)  # dropped member by pattern
    plain = jnp.arange(table.shape[0])[None] == 0
    dropping = (drops[None] == smallest[:, None]) & ~plain
    wanted = jnp.where(has_outlier[:, None], dropping, plain)
    own = error.reshape(table.shape[0], -1, size).sum(-1).T  # [group, pattern]
    own = jnp.where(wanted, own, jnp.inf)
    choice = jnp.argmin(own, axis=1)
    return jnp.any(choice[:, None] == jnp.arange(table.shape[0])[None], axis=0)
