"""AWQ: a scale per input, searched, before grouped rounding."""

import jax
import jax.numpy as jnp

from mq_jax import formats
from mq_jax._pytrees import pytree_dataclass, static
from mq_jax.compensation import damped, rounded
from mq_jax.recipes._integer import integer_rows
from mq_jax.recipes._recipe import Recipe, recipe


@pytree_dataclass
class ActivationScales:
  """Scales s = a^alpha, a the inputs' size, of least output error.

  The inputs' size is their root mean square, which the Hessian's diagonal
  holds (AWQ takes the mean magnitude); the output error of each alpha on a
  grid of `steps` in 0..1 is exact, tr(D^T H D), with plain rounding.
  """

  steps: int = static(20)

  def __call__(self, weight, hessian, rows) -> jax.Array:
    """Scales f32[k], as stored, for a weight f32[k, n]."""
    size = jnp.sqrt(jnp.diagonal(damped(hessian, 1e-4)))

    def attempt(alpha):
      scale = size**alpha
      scale = scale / jnp.sqrt(jnp.max(scale) * jnp.min(scale))
      scale = formats.stored_scale(scale).astype(jnp.float32)
      cost = size**2 / scale**2
      value = rounded(weight * scale[:, None], cost, rows) / scale[:, None]
      error = weight - value
      return scale, jnp.sum(error * (hessian @ error))

    grid = jnp.arange(self.steps, dtype=jnp.float32) / self.steps
    scales, errors = jax.lax.map(attempt, grid)
    return scales[jnp.argmin(errors)]


@recipe
def awq(
  bits: int = 4,
  group: int = 128,
  symmetric: bool = False,
  clip: str | float = 'search',
  steps: int = 20,
) -> Recipe:
  """Search a scale per input, then round (and clip) group by group.

  Without a Hessian nothing is known of the inputs and no scale is applied.

  Args:
    bits: Width, 2..8.
    group: Inputs that share a scale, per output.
    symmetric: See `rtn`.
    clip: See `rtn`.
    steps: Exponents tried.

  Source:
    Lin et al., AWQ, MLSys 2024, arXiv 2306.00978, section 3.2; the size of an
    input is our choice, see `ActivationScales`.
  """
  return Recipe(
    rows=integer_rows('awq', bits, group, symmetric, clip),
    input_scales=ActivationScales(steps),
  )
