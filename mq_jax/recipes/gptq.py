"""GPTQ: grouped integers with error compensation."""

from mq_jax.compensation import Compensation
from mq_jax.recipes._integer import integer_rows
from mq_jax.recipes._recipe import Recipe, recipe


@recipe
def gptq(
  bits: int = 4,
  group: int = 128,
  symmetric: bool = False,
  clip: str | float = 'none',
  damping: float = 0.01,
  order: str = 'natural',
) -> Recipe:
  """Round row after row, moving errors into the rows still to come.

  Args:
    bits: Width, 2..8.
    group: Inputs that share a scale, per output.
    symmetric: See `rtn`.
    clip: See `rtn`; the search weighs errors by what they cost the output.
    damping: Share of the Hessian's mean diagonal that is added to it.
    order: 'natural', or 'activation' for inputs by falling activity, with
      scales fitted beforehand.

  Source:
    Frantar et al., GPTQ, ICLR 2023, arXiv 2210.17323.
  """
  return Recipe(
    rows=integer_rows('gptq', bits, group, symmetric, clip),
    compensation=Compensation(damping, order=order),
  )
