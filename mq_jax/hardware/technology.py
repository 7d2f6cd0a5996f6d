"""Physical constants and scaling between technology nodes.

Every constant carries value, unit, node and source. Absolute energies and
areas of published accelerators are rarely known: compare designs by ratios.
"""

from typing import NamedTuple

import numpy as np


class Constant(NamedTuple):
  """A number of the physical world.

  Attributes:
    value: In `unit`.
    unit: Its unit.
    node_nm: Technology node in nm; None where it means nothing.
    source: Who published it. A trailing * says that it was read in a
      secondary source only.
  """

  value: float
  unit: str
  node_nm: int | None
  source: str


_E3 = 'BitFusion synthesis table, 500 MHz'
_E1 = 'Horowitz, ISSCC 2014*'
_MQ = 'MicroScopiQ, arXiv 2411.05282, table 5'
_FIT = f'fit of ours to the fixed PEs of the {_E3}'

# One MAC with its registers on w-bit weights and a-bit activations takes
# MAC_PRODUCT w a + MAC_LINEAR (w + a) / 2 + MAC_CONSTANT.
MAC_PRODUCT_FJ = Constant(2.73, 'fJ/bit^2', 45, _FIT)
MAC_LINEAR_FJ = Constant(13.8, 'fJ/bit', 45, _FIT)
MAC_CONSTANT_FJ = Constant(19.3, 'fJ', 45, _FIT)
MAC_PRODUCT_UM2 = Constant(5.99, 'um2/bit^2', 45, _FIT)
MAC_LINEAR_UM2 = Constant(38.0, 'um2/bit', 45, _FIT)
MAC_CONSTANT_UM2 = Constant(25.9, 'um2', 45, _FIT)
# Its leakage, likewise of w a and (w + a) / 2; per cycle of 1 ns.
LEAK_PRODUCT_FJ = Constant(0.20, 'fJ/bit^2/ns', 45, _FIT)
LEAK_LINEAR_FJ = Constant(1.10, 'fJ/bit/ns', 45, _FIT)

ADD_8_PJ = Constant(0.03, 'pJ', 45, _E1)
ADD_32_PJ = Constant(0.1, 'pJ', 45, _E1)
SRAM_8KB_PJ_PER_BIT = Constant(10 / 64, 'pJ/bit', 45, _E1)
SRAM_1MB_PJ_PER_BIT = Constant(100 / 64, 'pJ/bit', 45, _E1)
# HBM2, device alone; with its interface 4 to 7. It does not scale with the
# node of the accelerator.
HBM2_PJ_PER_BIT = Constant(3.9, 'pJ/bit', None, "O'Connor et al., MICRO 2017*")
# 6 transistors and their wires; published cells at 7 nm: 0.027 um2, arrays
# some 60 % of which are cells.
SRAM_UM2_PER_BIT = Constant(0.045, 'um2/bit', 7, 'recalled, order of size')

MICROSCOPIQ_PE_UM2 = Constant(2.82, 'um2', 7, _MQ)
MICROSCOPIQ_MULTI_PRECISION_UM2 = Constant(0.22, 'um2', 7, _MQ)
MICROSCOPIQ_RECON_64_UM2 = Constant(204.68, 'um2', 7, _MQ)
MICROSCOPIQ_SYNC_64_UM2 = Constant(20.45, 'um2', 7, _MQ)
MICROSCOPIQ_CONTROL_UM2 = Constant(105.78, 'um2', 7, _MQ)
OLIVE_PE_UM2 = Constant(2.51, 'um2', 7, _MQ)
OLIVE_MULTI_PRECISION_UM2 = Constant(0.68, 'um2', 7, _MQ)
OLIVE_DECODER_4_UM2 = Constant(1.86, 'um2', 7, _MQ)
OLIVE_DECODER_8_UM2 = Constant(2.47, 'um2', 7, _MQ)
OLIVE_CONTROL_UM2 = Constant(95.49, 'um2', 7, _MQ)
GOBO_GROUP_PE_UM2 = Constant(36.56, 'um2', 7, _MQ)
GOBO_OUTLIER_PE_UM2 = Constant(96.42, 'um2', 7, _MQ)
GOBO_CONTROL_UM2 = Constant(115.36, 'um2', 7, _MQ)

# So that MicroScopiQ's array splits the power of LLaMA-2-7B as published: PEs
# 56.23, memory on chip 36.80, ReCoN 5.94 %; for prefill of 2048 tokens, W2A4,
# 9 % of the micro-blocks with outliers, without leakage. The workload is our
# choice. `experiments.hardware_tables` derives both again.
SRAM_SCALE = Constant(
  0.04563662, '', None, f'calibrated to {_MQ[:-9]}, power split'
)
RECON_SWITCH_PJ = Constant(
  2.210262e-4,
  'pJ a switch and vector',
  7,
  f'calibrated to {_MQ[:-9]}, power split',
)

# PE array against one of multipliers: the abstract's "-61.2 % area".
FINEQ_ARRAY_AREA_RATIO = Constant(
  0.388, '', None, 'FineQ, arXiv 2504.19746, abstract'
)
FINEQ_ENERGY_RATIO = Constant(
  1.79, '', None, 'FineQ, arXiv 2504.19746, abstract ("up to")'
)

# Power of one PE at 500 MHz by (high, low) precision, leakage and dynamic.
MIXPE_PE_NW = {
  (8, 4): Constant(344_300, 'nW', 28, 'MixPE simulator'),
  (16, 8): Constant(673_440, 'nW', 28, 'MixPE simulator'),
  (16, 16): Constant(1_032_924, 'nW', 28, 'MixPE simulator'),
}

_STILLMAKER = {
  # (from, to): energy at 0.8 V, area.
  (65, 28): (0.414, 0.253),
  (45, 28): (0.513, 0.377),
  (45, 16): (0.174, 0.190),
  (45, 7): (0.094, 0.059),
  (40, 7): (0.109, 0.086),
  (28, 7): (0.184, 0.180),
}


def _factor(start_nm: int, end_nm: int, column: int) -> float:
  if start_nm == end_nm:
    return 1.0
  if (start_nm, end_nm) in _STILLMAKER:
    return _STILLMAKER[start_nm, end_nm][column]
  if (end_nm, start_nm) in _STILLMAKER:
    return 1 / _STILLMAKER[end_nm, start_nm][column]
  known = ', '.join(f'{a}-{b}' for a, b in _STILLMAKER)
  raise ValueError(
    f'no scaling from {start_nm} nm to {end_nm} nm; there is {known} and back'
  )


def energy_factor(start_nm: int, end_nm: int) -> float:
  """Energy of logic at node `end_nm` over that at `start_nm`, both at 0.8 V.

  Optimistic: Horowitz (45 nm) against Jouppi (7 nm) gives 0.35 for an int8
  multiplication where this says 0.094. Carry the range, not the number.

  Raises:
    ValueError: for a pair of nodes that the source does not give.

  Source:
    Stillmaker and Baas, Integration 58 (2017), as coded in Accelergy.

  Examples:
    >>> energy_factor(45, 7), round(energy_factor(7, 45), 2)
    (0.094, 10.64)
  """
  return _factor(start_nm, end_nm, 0)


def area_factor(start_nm: int, end_nm: int) -> float:
  """Area of logic at node `end_nm` over that at `start_nm`.

  Raises:
    ValueError: for a pair of nodes that the source does not give.

  Source:
    As `energy_factor`.
  """
  return _factor(start_nm, end_nm, 1)


def mac_pj(weight_bits, activation_bits, node_nm: int = 45):
  """Energy of a multiply-accumulate with its registers, in pJ.

  Below 5 bits the linear and constant terms lead: two bits instead of four
  save a factor of 2.1, not 4.
  """
  product = weight_bits * activation_bits
  mean = 0.5 * (weight_bits + activation_bits)
  fj = MAC_PRODUCT_FJ.value * product + MAC_LINEAR_FJ.value * mean
  fj = fj + MAC_CONSTANT_FJ.value
  return 1e-3 * energy_factor(45, node_nm) * fj


def mac_um2(weight_bits, activation_bits, node_nm: int = 45):
  """Area of the same, in um2."""
  product = weight_bits * activation_bits
  mean = 0.5 * (weight_bits + activation_bits)
  um2 = MAC_PRODUCT_UM2.value * product + MAC_LINEAR_UM2.value * mean
  return area_factor(45, node_nm) * (um2 + MAC_CONSTANT_UM2.value)


def leak_pj(weight_bits, activation_bits, node_nm: int = 45):
  """Leakage of the same in one cycle of 1 ns, in pJ."""
  product = weight_bits * activation_bits
  mean = 0.5 * (weight_bits + activation_bits)
  fj = LEAK_PRODUCT_FJ.value * product + LEAK_LINEAR_FJ.value * mean
  return 1e-3 * energy_factor(45, node_nm) * fj


def sram_pj_per_bit(size_bytes, node_nm: int = 45, xp=np):
  """Energy of reading or writing a bit of a buffer: e0 + e1 sqrt(size).

  Through Horowitz' 8 KB and 1 MB at 45 nm. Between 45 and 7 nm small SRAM
  fell 1.3 times only (Jouppi et al., ISCA 2021*: 8 KB 7.5 pJ per 64 bit
  against 10), so it is not scaled like logic but by that.

  Args:
    size_bytes: Size of one buffer in bytes.
    node_nm: Node.
    xp: numpy or jax.numpy.
  """
  low, high = 8 * 1024, 1024 * 1024
  e_low, e_high = SRAM_8KB_PJ_PER_BIT.value, SRAM_1MB_PJ_PER_BIT.value
  slope = (e_high - e_low) / (high**0.5 - low**0.5)
  base = e_low - slope * low**0.5
  return _SRAM_SCALE[node_nm] * (base + slope * xp.sqrt(size_bytes))


# 7 nm: Jouppi et al., ISCA 2021*; the others interpolated by us.
_SRAM_SCALE = {65: 1.2, 45: 1.0, 40: 0.97, 28: 0.9, 16: 0.82, 7: 0.75}
