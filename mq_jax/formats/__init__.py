"""Number formats, rounding and scales.

A format is a frozen pytree which rounds values to its own grid, at unit
scale. Scales stand beside it: a real one (`fake_quantize`) or a power of two
shared by a block (`fake_quantize_mx`). Everything is pure and works under
`jit`, `vmap` and `grad`; computations and results are float32, whatever the
input, so a caller who wants bfloat16 back casts once, knowingly.

Three facts hold for every format:

* Values beyond the range, infinities included, saturate. With a rounding that
  passes gradients, they pass within the range, its two ends included, and go
  to the range (hence to the scale) outside of it.
* NaN stays NaN in `round`, so that a diverged run shows. Only a format with a
  code for NaN can `encode` it; the others give the code of zero (`Grid`: some
  index).
* Widths are leaves, used as whole numbers without a gradient. A traced width
  is not checked.

float32 subnormals may count as zero, as XLA flushes them on most devices.
"""

from mq_jax.formats._grids import (
  E2M1,
  E2M3,
  E3M2,
  E4M3,
  E5M2,
  Balanced,
  Float,
  Format,
  Grid,
  Integer,
  Ternary,
)
from mq_jax.formats._microscaling import (
  E8M0_MAX,
  E8M0_MIN,
  EXPONENT_RULES,
  fake_quantize_mx,
  shared_exponent,
)
from mq_jax.formats._numbers import exp2i, ldexp
from mq_jax.formats._rounding import (
  Rounding,
  round_nearest,
  round_stochastic,
  round_straight_through,
  rounder,
)
from mq_jax.formats._scales import (
  absmax_scale,
  fake_quantize,
  minmax_scale,
  stored_scale,
)

__all__ = [
  'exp2i',
  'ldexp',
  'Rounding',
  'round_nearest',
  'round_stochastic',
  'round_straight_through',
  'rounder',
  'E2M1',
  'E2M3',
  'E3M2',
  'E4M3',
  'E5M2',
  'Balanced',
  'Float',
  'Format',
  'Grid',
  'Integer',
  'Ternary',
  'absmax_scale',
  'fake_quantize',
  'minmax_scale',
  'stored_scale',
  'E8M0_MAX',
  'E8M0_MIN',
  'EXPONENT_RULES',
  'fake_quantize_mx',
  'shared_exponent',
]
