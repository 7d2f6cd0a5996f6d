"""Power-of-two scales shared by a block (microscaling, MX)."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from mq_jax.formats._grids import Format
from mq_jax.formats._numbers import check_option, f32, ldexp, split
from mq_jax.formats._rounding import Rounding, round_nearest
from mq_jax.formats._scales import span

E8M0_MIN, E8M0_MAX = -127, 127  # exponents of an MX scale; OCP MX v1.0, 5.4.1


EXPONENT_RULES = ('floor', 'ceil', 'nearest', 'ocp', 'mse')

# Nearest first, then up: argmin keeps the first of equals.
_MSE_SHIFTS = np.array([0, 1, -1, -2, -3], np.int32)


def shared_exponent(
  x: ArrayLike,
  fmt: Format,
  weight: ArrayLike | None = None,
  rule: str = 'mse',
) -> jax.Array:
  """The exponent of the power-of-two scale that a block shares.

  With r = max|x| / fmt.max, the range needed over the range there is:

  * 'floor' floor(log2 r), clips the largest values;
  * 'ceil' ceil(log2 r), never clips;
  * 'nearest' log2 r rounded;
  * 'ocp' floor(log2 max|x|) - floor(log2 fmt.max);
  * 'mse' floor(log2 r) + d, d in -3..1, of least squared error of x rounded
    to nearest. Ties go to the smaller |d|, then to the larger d.

  Exponents are compared as integers, so powers of two fall on the right side.

  Args:
    x: One block, shape [b].
    fmt: A format with negative values, at unit scale.
    weight: Cost of each squared error, >= 0, shape [b]; where 0 the value is
      ignored in every rule (padding, pruned). None weighs all equally.
    rule: One of the names above.

  Returns:
    int32 scalar in -127..127, the range of E8M0, and low enough for
    fmt.max * 2**exponent to be finite; -127 for an all-zero block.

  Raises:
    ValueError: if `x` has not one axis, `weight` not the shape of `x`, `rule`
      is unknown, or `fmt` is an asymmetric `Integer`.

  Source:
    'ocp': OCP Microscaling Formats v1.0, section 6.3. 'floor', 'ceil',
    'nearest': readings of MicroScopiQ, arXiv 2411.05282, equation 1, which
    does not give the rounding. 'mse' is ours.

  Examples:
    >>> x = jnp.array([0.1, -0.2, 3.0])
    >>> int(shared_exponent(x, Integer(2), rule='floor'))
    1
    >>> int(shared_exponent(x, Integer(2), rule='ceil'))
    2
  """
  check_option('exponent rule', rule, EXPONENT_RULES)
  x = f32(x)
  if x.ndim != 1:
    raise ValueError(f'x has shape {x.shape}; give one block [b], use vmap')
  if weight is not None:
    weight = f32(weight)
    if weight.shape != x.shape:
      raise ValueError(f'weight has shape {weight.shape}, x has {x.shape}')
    x = jnp.where(weight > 0, x, 0.0)

  absmax = jnp.max(jnp.abs(x))
  exponent, significand = split(absmax)
  fmt_exponent, fmt_significand = split(span(fmt))
  ocp = exponent - fmt_exponent  # log2 r = ocp + log2 of ratio, in (1/2, 2)
  ratio = significand / fmt_significand
  floor = ocp - (significand < fmt_significand).astype(jnp.int32)
  if rule == 'ocp':
    chosen = ocp
  elif rule == 'floor':
    chosen = floor
  elif rule == 'ceil':
    chosen = ocp + (significand > fmt_significand).astype(jnp.int32)
  elif rule == 'nearest':
    up, down = ratio > np.sqrt(2.0), ratio < np.sqrt(0.5)
    chosen = ocp + up.astype(jnp.int32) - down.astype(jnp.int32)
  else:
    # Relative to 2**floor, so that no square over- or underflows. [d, b]
    y = ldexp(x, -floor)[None, :]
    step = np.exp2(_MSE_SHIFTS).astype(np.float32)[:, None]
    error = jnp.square(fmt.round(y * (1 / step)) * step - y)
    if weight is not None:
      error *= weight[None, :]
    chosen = floor + jnp.asarray(_MSE_SHIFTS)[jnp.argmin(error.sum(axis=1))]
  highest = E8M0_MAX - jnp.maximum(fmt_exponent, 0)
  chosen = jnp.clip(chosen, E8M0_MIN, highest)
  return jnp.where(absmax > 0, chosen, E8M0_MIN)


def fake_quantize_mx(
  x: ArrayLike,
  fmt: Format,
  weight: ArrayLike | None = None,
  rule: str = 'mse',
  rounding: Rounding = round_nearest,
) -> tuple[jax.Array, jax.Array]:
  """Round one block to a format under a shared power-of-two scale, and back.

  Args:
    x: One block, shape [b].
    fmt: A format with negative values, at unit scale.
    weight: As in `shared_exponent`; ignored values are still rounded.
    rule: As in `shared_exponent`.
    rounding: From an array to its rounded values, see `rounder`. The exponent
      is always chosen with rounding to nearest, and has no gradient. At
      exponent -127 (an all-zero block) gradients may underflow to zero.

  Returns:
    f32 values [b] and the int32 exponent.

  Raises:
    ValueError: as `shared_exponent`.

  Examples:
    >>> values, exponent = fake_quantize_mx(jnp.array([3., -1.]), E2M1)
    >>> values, int(exponent)
    (Array([ 3., -1.], dtype=float32), -1)
  """
  exponent = shared_exponent(x, fmt, weight, rule)
  values = fmt.round(ldexp(x, -exponent), rounding)
  return ldexp(values, exponent), exponent
