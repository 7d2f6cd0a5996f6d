"""Balanced integers: an odd number of levels around zero, densely packed."""

from mq_jax.compensation import Compensation
from mq_jax.recipes._integer import balanced_rows
from mq_jax.recipes._recipe import Recipe, recipe


@recipe
def balanced(
  levels: int = 5,
  group: int = 128,
  clip: str | float = 'search',
  compensate: bool = True,
  damping: float = 0.01,
) -> Recipe:
  """Round to -h .. h times a scale, without a zero point.

  Args:
    levels: 3, 5 or 11, at 1.6, 2.33 and 3.5 bits; other odd numbers take no
      fewer bits than the next more.
    group: Inputs that share a float16 scale, per output; the last group may be
      short.
    clip: See `rtn`.
    compensate: Use error compensation when there is a Hessian.
    damping: See `gptq`.

  Raises:
    ValueError: for levels or a group that can't be.

  Source:
    Bit balance: ABQ-LLM, arXiv 2408.08554, section on W2*, -2 .. 2 in three
    bits. That three weights of 5 levels share 7 bits is ours; so are other
    numbers of levels.
  """
  return Recipe(
    rows=balanced_rows('balanced', levels, group, clip),
    compensation=Compensation(damping) if compensate else None,
  )
