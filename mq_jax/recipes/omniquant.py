"""OmniQuant: clipping and scales of inputs learned, block by block."""

from mq_jax.recipes._integer import integer_rows
from mq_jax.recipes._learning import Learning
from mq_jax.recipes._recipe import Recipe, recipe
from mq_jax.recipes.awq import ActivationScales


@recipe
def omniquant(
  bits: int = 4,
  group: int = 128,
  symmetric: bool = False,
  transform: bool = True,
  steps: int = 200,
  batch: int = 8,
) -> Recipe:
  """Learn where the range ends and how inputs are scaled; round to nearest.

  Args:
    bits: Width of a weight, 2 to 8.
    group: Inputs under one scale.
    symmetric: Without zero points.
    transform: Scale inputs (learnable equivalent transformation), from AWQ's
      scales on. They are stored, 16 bits an input, and counted.
    steps: Of Adam without decay, for each block.
    batch: Windows a step.

  Returns:
    The recipe, for `mq_jax.learn.reconstruct`.

  Raises:
    ValueError: for options out of range.

  Source:
    OmniQuant, arXiv 2308.13137 (recalled). Different here: clipping is that
    of a scale and zero point which are learned themselves, by the gradients of
    LSQ (arXiv 1902.08153), not that of two shares of the range; inputs are
    scaled, not shifted; 200 steps, not 20 epochs of 128 windows; one rate for
    scales and clipping.

  Examples:
    >>> omniquant(bits=2).learning.rounding
    'nearest'
  """
  learning = Learning(
    steps=steps,
    batch=batch,
    optimizer='adam',
    learning_rate=0.05,
    rounding='nearest',
  )
  found = Recipe(
    rows=integer_rows('omniquant', bits, group, symmetric, 'search'),
    input_scales=ActivationScales() if transform else None,
  )
  return found.with_learning(learning)
