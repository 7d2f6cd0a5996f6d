"""KIVI: keys in groups along tokens, values in groups along channels.

Source: Liu et al., KIVI, arXiv 2402.02750. Read in public copies of its code:
new tokens are attended to exactly and quantized afterwards; keys wait until
`residual` of them are there and then all are quantized; of values, exactly the
newest `residual` stay as they are. Defaults (groups of 32, residual 128) are
those of its repository, from memory.
"""

from mq_jax.caches import kivi_packed, kivi_simulated


def kivi(
  bits: int = 2,
  value_bits: int | None = None,
  group: int = 32,
  value_group: int | None = None,
  residual: int = 128,
  packed: bool = False,
) -> kivi_simulated.Kivi | kivi_packed.PackedKivi:
  """A cache of few bits with a residual window in full precision.

  Args:
    bits: Of keys, 1..8, and of values unless they have their own.
    value_bits: Of values, 1..8.
    group: Tokens of keys, and channels of values, under one scale.
    value_group: Channels of values, if it differs.
    residual: Newest tokens left as they are; a multiple of `group`, or 0.
    packed: Keep codes as bytes; the same numbers in less memory.

  Raises:
    ValueError: for numbers out of range.
  """
  value_bits = bits if value_bits is None else value_bits
  for name, number in (('bits', bits), ('value_bits', value_bits)):
    if not isinstance(number, int) or not 1 <= number <= 8:
      raise ValueError(f'kivi: {name}={number!r} is not a whole number in 1..8')
  value_group = group if value_group is None else value_group
  policy = kivi_simulated.Kivi(bits, value_bits, group, value_group, residual)
  return kivi_packed.PackedKivi(policy) if packed else policy
