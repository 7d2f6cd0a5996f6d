"""Which weights of a cluster are pruned."""

import jax
import jax.numpy as jnp

from mq_jax._pytrees import pytree_dataclass
from mq_jax.clusters import Cluster
from mq_jax.steps._ranks import rank


def slots_to_prune(
  saliency: jax.Array, n_outliers: jax.typing.ArrayLike
) -> jax.Array:
  """Choose as many inlier slots of a cluster to prune as it has outliers.

  The freed slots hold the low halves of the outliers, so every cluster keeps
  its size. Ties go to the lower index, which makes the choice reproducible.

  Args:
    saliency: Cost of pruning each slot, squared layer-output error; `inf`
      marks slots that may not go. Shape [b].
    n_outliers: Outliers in the cluster, at most b // 2; may be traced.

  Returns:
    True where a slot is pruned, `n_outliers` times True. Shape [b].

  Raises:
    ValueError: if `saliency` has more than one axis (use `lift` or `vmap`).

  Source:
    MicroScopiQ, arXiv 2411.05282, algorithm 1, the pruning of a micro-block:
    w_p^2 / [H^-1]_pp on weights not yet quantized. The tie rule is ours.

  Examples:
    >>> slots_to_prune(jnp.array([3., 1., 2., 4.]), 1)
    Array([False,  True, False, False], dtype=bool)
  """
  if saliency.ndim != 1:
    raise ValueError(
      f'slots_to_prune: saliency has shape {saliency.shape}, one axis is '
      'needed; map over the others with vmap'
    )
  return rank(saliency) < n_outliers


@pytree_dataclass
class PruneForOutliers:
  """Prune the least salient inliers, one for each outlier of the cluster.

  Padding goes first, at no cost. With more outliers than inliers all inliers
  go; use `KeepLargestOutliers` before.
  """

  def __call__(self, cluster: Cluster) -> Cluster:
    cost = cluster.weight**2 * cluster.saliency
    cost = jnp.where(cluster.outlier, jnp.inf, cost)
    count = jnp.sum(cluster.outlier, dtype=jnp.int32)
    pruned = slots_to_prune(cost, count) & ~cluster.outlier
    return cluster._replace(kept=cluster.kept & ~pruned)
