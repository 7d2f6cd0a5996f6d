"""No quantization: bfloat16, the reference of every table."""

import jax.numpy as jnp

from mq_jax import layouts
from mq_jax._pytrees import pytree_dataclass, static
from mq_jax.recipes._recipe import Recipe, recipe


@pytree_dataclass
class Bfloat16Rows:
  """Each weight rounded to bfloat16."""

  group: int = static(1)

  def prepare(self, weight, saliency):
    del weight, saliency
    return ()

  def fit(self, rows, saliency, whole):
    del rows, saliency, whole
    return ()

  def apply(self, row, saliency, whole, fitted, index):
    del saliency, whole, fitted, index
    value = row.astype(jnp.bfloat16)
    return value.astype(jnp.float32), {'value': value}

  def layout(self):
    return layouts.Dense()

  def collect(self, whole, fitted, codes):
    del whole, fitted
    return codes

  def counts(self, weight, codes):
    del weight, codes
    return {}


@recipe
def none() -> Recipe:
  """Leave the weight in bfloat16, 16 bits."""
  return Recipe(rows=Bfloat16Rows())
