"""MicroScopiQ with scales, outliers and pruning learned, block by block."""

from mq_jax.recipes._learning import Learning
from mq_jax.recipes._recipe import Recipe, recipe
from mq_jax.recipes.awq import ActivationScales
from mq_jax.recipes.microscopiq import microscopiq


@recipe
def omni_microscopiq(
  bits: int = 2,
  sigma: float = 3.0,
  block: int = 128,
  micro_block: int = 8,
  transform: bool = True,
  steps: int = 200,
  batch: int = 8,
) -> Recipe:
  """Begin with MicroScopiQ; learn weights, roles, exponents, input scales.

  Args:
    bits: See `microscopiq`.
    sigma: See `microscopiq`.
    block: See `microscopiq`.
    micro_block: See `microscopiq`.
    transform: Scale inputs, from AWQ's scales on; they are stored, 16 bits an
      input, and counted.
    steps: Of Adam, for each block.
    batch: Windows a step.

  Returns:
    The recipe, for `mq_jax.learn.reconstruct`.

  Raises:
    ValueError: for options that don't fit together.

  Source:
    MicroScopiQ, arXiv 2411.05282v4, table 8 and its text: the scale factors of
    inliers and outliers are learned as OmniQuant (arXiv 2308.13137) learns
    clipping, and an equivalent transformation in the place of its fixed one.
    Here the scale factors stay powers of two, those of outliers chosen by
    softmax (learning those of inliers so did harm); that weights move on the
    grid, and which of them are outliers and pruned is learned, is ours.

  Examples:
    >>> omni_microscopiq(bits=4).learning.choices
    ('role', 'osf')
  """
  learning = Learning(
    steps=steps,
    batch=batch,
    optimizer='adam',
    learning_rate=0.002,
    choices=('role', 'osf'),
  )
  found = microscopiq(
    bits=bits, sigma=sigma, block=block, micro_block=micro_block
  )
  scales = ActivationScales() if transform else None
  found = Recipe(
    rows=found.rows, compensation=found.compensation, input_scales=scales
  )
  return found.with_learning(learning)
