"""How many bits a cache takes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Bits(NamedTuple):
  """Stored bits of a cache by what they are for; f32 scalars, summable.

  Attributes:
    codes: Of quantized keys and values.
    scales: And lowest values.
    full: Keys and values that are not quantized.
    side: All else that must be kept to go on: tiers, scores, balancers.
    elements: Numbers that a cache without compression would hold. Tokens
      that were evicted count.
  """

  codes: jax.Array
  scales: jax.Array
  full: jax.Array
  side: jax.Array
  elements: jax.Array

  @property
  def total(self) -> jax.Array:
    return self.codes + self.scales + self.full + self.side

  @property
  def ebw(self) -> jax.Array:
    """Bits an element, of all that is stored; 0 of an empty cache."""
    return self.total / jnp.maximum(self.elements, 1.0)

  @property
  def ebw_paper(self) -> jax.Array:
    """The same without `side`, as papers count."""
    return (self.total - self.side) / jnp.maximum(self.elements, 1.0)


def width(array: jax.Array) -> int:
  """Bits of an element of an array's dtype."""
  return 8 * array.dtype.itemsize


def count(x: jax.Array) -> jax.Array:
  """A sum of whole numbers as f32."""
  return jnp.sum(x).astype(jnp.float32)
