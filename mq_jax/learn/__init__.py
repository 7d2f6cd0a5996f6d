"""Learning what rounding throws away, on a little calibration data.

Any recipe may be where learning begins. `reconstruct` quantizes a model by a
plan and moves each weight to the place of its grid that serves the outputs of
its block, site or model best; the bytes stay as many. `train` does it for any
loss of any function.
"""

from mq_jax.learn import losses
from mq_jax.learn._matrices import Leaves, Start, begin, harden, values
from mq_jax.learn._scopes import (
  Learned,
  loss_of,
  options_of,
  reconstruct,
  refiner,
  without,
)
from mq_jax.learn._training import Trace, train
from mq_jax.recipes import Learning

__all__ = [
  'Learned',
  'Learning',
  'Leaves',
  'Start',
  'Trace',
  'begin',
  'harden',
  'loss_of',
  'losses',
  'options_of',
  'reconstruct',
  'refiner',
  'train',
  'values',
  'without',
]
