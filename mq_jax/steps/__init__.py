"""Quantize-and-prune steps: pure functions of one cluster.

A step is a frozen pytree whose numbers are leaves, called on a `Cluster`.
"""

from mq_jax._pytrees import pytree_dataclass as step
from mq_jax._pytrees import static
from mq_jax.steps._ranks import rank
from mq_jax.steps.clipping import Clip
from mq_jax.steps.outliers import DetectOutliers, KeepLargestOutliers
from mq_jax.steps.patterns import (
  PATTERNS_3,
  PATTERNS_4,
  RoundToPattern,
  round_to_levels,
)
from mq_jax.steps.pruning import PruneForOutliers, slots_to_prune
from mq_jax.steps.rounding import (
  RoundInliers,
  RoundOutliers,
  RoundToFormat,
  RoundToNearest,
  outlier_exponent_range,
  round_inlier,
  round_outlier,
)
from mq_jax.steps.splitting import (
  SplitOutliers,
  merge_outliers,
  merge_unpruned,
  pair_slots,
  sign_magnitude,
  split_unpruned,
)

__all__ = [
  'PATTERNS_3',
  'PATTERNS_4',
  'Clip',
  'DetectOutliers',
  'KeepLargestOutliers',
  'PruneForOutliers',
  'RoundInliers',
  'RoundOutliers',
  'RoundToFormat',
  'RoundToNearest',
  'RoundToPattern',
  'SplitOutliers',
  'merge_outliers',
  'merge_unpruned',
  'outlier_exponent_range',
  'pair_slots',
  'rank',
  'round_inlier',
  'round_outlier',
  'round_to_levels',
  'slots_to_prune',
  'sign_magnitude',
  'split_unpruned',
  'static',
  'step',
]
