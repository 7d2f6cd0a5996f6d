"""Casts, checks, and exact powers of two."""

import difflib

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike


def f32(x: ArrayLike) -> jax.Array:
  return jnp.asarray(x, jnp.float32)


def check_option(kind: str, name: str, options: tuple[str, ...]) -> None:
  if name not in options:
    near = difflib.get_close_matches(str(name), options, n=2) or options
    raise ValueError(
      f'unknown {kind} {name!r}; did you mean {" or ".join(map(repr, near))}?'
      f' (all: {", ".join(options)})'
    )


def whole(name: str, value: ArrayLike, low: int, high: int) -> jax.Array:
  """A width as int32 scalar, checked when it is a plain number."""
  if isinstance(value, int | float | np.number):
    if not low <= value <= high or value != round(value):
      raise ValueError(
        f'{name}={value} must be a whole number in {low}..{high}'
      )
  return jnp.asarray(jnp.round(jnp.asarray(value)), jnp.int32)


# Exact powers of two. `exp2` and `log2` may be off by an ulp on an
# accelerator, which would move a value to the wrong side of a binade.


def exp2i(exponent: ArrayLike) -> jax.Array:
  """2**exponent, exactly, for integer exponents.

  Args:
    exponent: Integers, any shape; below -149 the result is 0, above 127 inf.

  Returns:
    float32 powers of two, subnormal below 2**-126. Same shape.

  Examples:
    >>> exp2i(jnp.array([-1, 0, 10]))
    Array([5.000e-01, 1.000e+00, 1.024e+03], dtype=float32)
  """
  exponent = jnp.asarray(exponent, jnp.int32)
  normal = (jnp.clip(exponent, -126, 128) + 127) << 23
  subnormal = 0x400000 >> jnp.clip(-127 - exponent, 0, 31)
  bits = jnp.where(exponent < -126, subnormal, normal)
  return lax.bitcast_convert_type(bits, jnp.float32)


def ldexp(x: ArrayLike, exponent: ArrayLike) -> jax.Array:
  """x * 2**exponent for |exponent| <= 252, exact unless it over/underflows.

  Args:
    x: Values, any shape.
    exponent: Integers, of a shape that broadcasts against `x`.

  Returns:
    float32 products; differentiable in `x`.
  """
  exponent = jnp.asarray(exponent, jnp.int32)
  half = exponent >> 1  # both factors stay normal where 2**exponent is not
  return f32(x) * exp2i(half) * exp2i(exponent - half)


def split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """|x| = significand * 2**exponent, significand in [1, 2).

  Zeros and subnormals have exponent -127, infinities and NaN 128.
  """
  bits = lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
  significand = lax.bitcast_convert_type(
    (bits & 0x7FFFFF) | 0x3F800000, jnp.float32
  )
  return (bits >> 23) - 127, significand


def saturate(x: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
  # Not `jnp.clip`: its gradient at the ends is 1/2, and a scale taken from the
  # largest value puts that value exactly there. Comparisons let NaN through.
  return jnp.where(x > high, high, jnp.where(x < low, low, x))
