"""Round to nearest: grouped integers, no calibration."""

from mq_jax.recipes._integer import integer_rows
from mq_jax.recipes._recipe import Recipe, recipe


@recipe
def rtn(
  bits: int = 4,
  group: int = 128,
  symmetric: bool = False,
  clip: str | float = 'none',
) -> Recipe:
  """Round each weight to the nearest level of its group.

  Args:
    bits: Width, 2..8.
    group: Inputs that share a float16 scale (and a zero point of `bits` bits
      unless symmetric), per output; the last group may be short.
    symmetric: Levels -(2^(bits-1)-1)..2^(bits-1)-1, or min-max with all 2^bits.
    clip: 'none', a number for the share of the range that the levels span,
      or 'search' for the share of least squared error.

  Raises:
    ValueError: for a width or a group that can't be.
  """
  return Recipe(rows=integer_rows('rtn', bits, group, symmetric, clip))
