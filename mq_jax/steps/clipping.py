"""Clipping of weights before they are rounded."""

import jax
import jax.numpy as jnp

from mq_jax._pytrees import pytree_dataclass
from mq_jax.clusters import Cluster


@pytree_dataclass
class Clip:
  """Clip the cluster's weights to `ratio` times their largest magnitude.

  Outliers that were marked before are left alone.
  """

  ratio: jax.typing.ArrayLike = 1.0

  def __call__(self, cluster: Cluster) -> Cluster:
    magnitude = jnp.where(cluster.inlier, jnp.abs(cluster.weight), 0.0)
    limit = self.ratio * jnp.max(magnitude)
    clipped = jnp.clip(cluster.weight, -limit, limit)
    weight = jnp.where(cluster.outlier, cluster.weight, clipped)
    return cluster._replace(weight=weight)
