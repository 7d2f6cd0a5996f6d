"""FineQ with the pattern of each pair of clusters learned."""

from mq_jax.recipes._learning import Learning
from mq_jax.recipes._recipe import Recipe, recipe
from mq_jax.recipes.fineq import fineq


@recipe
def learned_fineq(
  scales: int = 1,
  share: int = 2,
  cluster: int = 3,
  steps: int = 200,
  batch: int = 8,
) -> Recipe:
  """Begin with FineQ, errors compensated; learn patterns, weights, scales.

  Args:
    scales: See `fineq`.
    share: See `fineq`.
    cluster: See `fineq`.
    steps: Of Adam, for each block.
    batch: Windows a step.

  Returns:
    The recipe, for `mq_jax.learn.reconstruct`.

  Raises:
    ValueError: for options that don't fit together.

  Source:
    Format: FineQ, arXiv 2504.19746. Choosing a code by a softmax over the
    errors of the four is ours.

  Examples:
    >>> learned_fineq().learning.choices
    ('pattern',)
  """
  learning = Learning(
    steps=steps,
    batch=batch,
    optimizer='adam',
    learning_rate=0.002,
    choices=('pattern',),
  )
  found = fineq(scales=scales, share=share, cluster=cluster, compensate=True)
  return found.with_learning(learning)
