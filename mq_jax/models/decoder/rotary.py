"""Rotary positions and the ways in which long contexts stretch them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Linear:
  """Positions divided by `factor` (position interpolation).

  Source:
    Chen et al. 2023, arXiv 2306.15595, equation 4.
  """

  factor: float


@dataclasses.dataclass(frozen=True)
class Dynamic:
  """A base that grows with the text once it is longer than `length`.

  The base is multiplied by (factor t / length - factor + 1)^(d / (d - 2)),
  with t the largest position in use plus one. Keys of a cache stay as they
  were rotated when they were written, as in transformers.

  Source:
    The NTK-aware rule as transformers 5.23 computes it (rope type 'dynamic').
  """

  factor: float
  length: int


@dataclasses.dataclass(frozen=True)
class Llama3:
  """Long waves stretched by `factor`, short ones kept, a ramp between.

  Waves longer than length / low are stretched, those shorter than
  length / high kept.

  Source:
    The rule of Llama 3.1 as transformers 5.23 computes it (type 'llama3').
  """

  factor: float
  low: float
  high: float
  length: int


@dataclasses.dataclass(frozen=True)
class Yarn:
  """Like `Llama3` with a ramp over channels, and warmer attention.

  Channels that turn more than `fast` times in `length` positions are kept,
  those that turn fewer than `slow` times are stretched. Queries and keys are
  multiplied by `attention`.

  Source:
    YaRN, Peng et al. 2023, arXiv 2309.00071, sections 3.2 to 3.4; defaults
    and the rounding of the ramp's ends (`truncate`) as in transformers 5.23.
  """

  factor: float
  length: int
  attention: float
  fast: float = 32.0
  slow: float = 1.0
  truncate: bool = True


@dataclasses.dataclass(frozen=True)
class LongRope:
  """A factor for each channel, one set of them for texts beyond `length`.

  Queries and keys are multiplied by `attention`.

  Source:
    LongRoPE, Ding et al. 2024, arXiv 2402.13753; the choice between the two
    sets by the largest position in use is that of transformers 5.23.
  """

  short: tuple[float, ...]
  long: tuple[float, ...]
  length: int
  attention: float


Scaling = Linear | Dynamic | Llama3 | Yarn | LongRope


def frequencies(
  theta: float, size: int, scaling: Scaling | None, positions: jax.Array
) -> tuple[jax.Array, float]:
  """Radians that each pair of channels turns per position.

  Args:
    theta: Base of the geometric series of wavelengths.
    size: Channels that turn, d; even.
    scaling: How the series is stretched.
    positions: All positions in use; only `Dynamic` and `LongRope` look at
      them. Integers of any shape.

  Returns:
    f32[d / 2], and the factor on queries and keys.
  """
  half = size // 2
  base = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  match scaling:
    case None:
      return base, 1.0
    case Linear(factor):
      return base / factor, 1.0
    case Dynamic(factor, length):
      used = jnp.maximum(jnp.max(positions) + 1, length).astype(jnp.float32)
      growth = factor * used / length - (factor - 1)
      # (theta g^(d/(d-2)))^(-i / half), taken apart: theta^... is `base`.
      power = -jnp.arange(half, dtype=jnp.float32) / half * size / (size - 2)
      return base * growth**power, 1.0
    case Llama3(factor, low, high, length):
      turns = base * (length / (2 * math.pi))  # length over wavelength
      kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
      return base * (kept + (1 - kept) / factor), 1.0
    case Yarn(factor, attention=attention):
      kept = jnp.asarray(_yarn_ramp(theta, size, scaling), jnp.float32)
      return base * (kept + (1 - kept) / factor), attention
    case LongRope(short, long, length, attention):
      factors = jnp.where(
        jnp.max(positions) + 1 > length,
        jnp.asarray(long, jnp.float32),
        jnp.asarray(short, jnp.float32),
      )
      return base / factors, attention
  raise TypeError(f'{scaling!r} is no way to scale rotary positions')


def _yarn_ramp(theta: float, size: int, yarn: Yarn) -> np.ndarray:
  """Share of each channel's frequency that is kept. [d / 2]."""
  # The channel that turns n times in `length` positions, as a real number.
  channel = lambda n: (
    size * math.log(yarn.length / (n * 2 * math.pi)) / (2 * math.log(theta))
  )
  first, last = channel(yarn.fast), channel(yarn.slow)
  if yarn.truncate:
    first, last = math.floor(first), math.ceil(last)
  first, last = max(first, 0), min(last, size - 1)
  if first == last:
    last += 1e-3
  ramp = (np.arange(size // 2) - first) / (last - first)
  return 1 - np.clip(ramp, 0.0, 1.0)


def rotate(
  x: jax.Array,
  positions: jax.Array,
  theta: float,
  scaling: Scaling | None = None,
  size: int | None = None,
) -> jax.Array:
  """Rotary position embedding, halves of the head dimension paired.

  Args:
    x: Queries or keys. Shape [b, t, h, d].
    positions: Token positions. Shape [b, t] or [1, t].
    theta: Base of the geometric series of wavelengths.
    scaling: How the wavelengths are stretched.
    size: Channels of a head that turn, the first of them; None for all. Even.

  Returns:
    `x` with channels i and i + size/2 rotated by `positions *
    frequencies[i]`, in its dtype.

  Source:
    RoFormer, arXiv 2104.09864, equation 34; the half-split pairing is that of
    Hugging Face's Llama.
  """
  size = x.shape[-1] if size is None else size
  frequency, factor = frequencies(theta, size, scaling, positions)
  angle = positions.astype(jnp.float32)[..., None] * frequency[None, None]
  cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
  if factor != 1.0:
    cos, sin = cos * factor, sin * factor
  still = x[..., size:]
  x1, x2 = jnp.split(x[..., :size].astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)
  rotated = rotated.astype(x.dtype)
  if still.shape[-1]:
    rotated = jnp.concatenate([rotated, still], -1)
  return rotated
