"""Which weights of a cluster are outliers."""

import jax
import jax.numpy as jnp

from mq_jax._pytrees import pytree_dataclass
from mq_jax.clusters import Cluster
from mq_jax.steps._ranks import rank


@pytree_dataclass
class DetectOutliers:
  """Mark weights further than `sigma` standard deviations from the mean.

  Mean and population standard deviation are those of the cluster's real
  weights as they are now; `sigma=inf` marks none.

  Source:
    MicroScopiQ, arXiv 2411.05282: the 3-sigma rule per macro-block. Centring
    and the population form are our choice.
  """

  sigma: jax.typing.ArrayLike = 3.0

  def __call__(self, cluster: Cluster) -> Cluster:
    real = cluster.real
    count = jnp.maximum(jnp.sum(real, dtype=jnp.float32), 1.0)
    mean = jnp.sum(jnp.where(real, cluster.weight, 0.0)) / count
    centred = jnp.where(real, cluster.weight - mean, 0.0)
    deviation = jnp.sqrt(jnp.sum(centred**2) / count)
    # Strict and away from zero deviation: a constant cluster has no outliers
    # even where rounding leaves a remainder of the centring.
    noise = 1e-6 * jnp.abs(mean)
    outlier = jnp.abs(centred) > self.sigma * jnp.maximum(deviation, noise)
    return cluster._replace(outlier=real & outlier)


@pytree_dataclass
class KeepLargestOutliers:
  """Let only the `most` outliers of largest magnitude stay outliers.

  The rest are quantized as inliers (and clipped). MicroScopiQ can hold n / 2
  outliers in a micro-block of n.
  """

  most: jax.typing.ArrayLike

  def __call__(self, cluster: Cluster) -> Cluster:
    size = jnp.where(cluster.outlier, jnp.abs(cluster.weight), -1.0)
    largest = rank(-size) < self.most
    return cluster._replace(outlier=cluster.outlier & largest)
