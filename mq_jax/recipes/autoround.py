"""AutoRound: rounding and clipping learned by sign descent, block by block."""

from mq_jax.recipes._learning import Learning
from mq_jax.recipes._recipe import Recipe, recipe
from mq_jax.recipes.rtn import rtn


@recipe
def autoround(
  bits: int = 4,
  group: int = 128,
  symmetric: bool = False,
  steps: int = 200,
  batch: int = 8,
) -> Recipe:
  """Round to nearest, then learn which way weights and how far scales go.

  Args:
    bits: Width of a weight, 2 to 8.
    group: Inputs under one scale.
    symmetric: Without zero points.
    steps: Of sign descent, for each block; the learning rate is 1 / steps, so
      that a weight can go half a step of its grid.
    batch: Windows a step.

  Returns:
    The recipe, for `mq_jax.learn.reconstruct`.

  Raises:
    ValueError: for options out of range.

  Source:
    Optimize Weight Rounding via Signed Gradient Descent, arXiv 2309.05516
    (recalled): steps, batch, learning rate and its fall along a line. Different
    here: offsets are not bounded by half a step; scales are learned by the
    gradients of LSQ (arXiv 1902.08153), zero points are not; and a fifth of
    the windows is held back to choose the best state by, where AutoRound takes
    the one of least training loss.

  Examples:
    >>> autoround(bits=2, group=32).learning.learning_rate
    0.005
  """
  learning = Learning(steps=steps, learning_rate=1.0 / steps, batch=batch)
  found = rtn(bits=bits, group=group, symmetric=symmetric)
  return found.with_learning(learning)
