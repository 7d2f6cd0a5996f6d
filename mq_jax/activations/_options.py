"""What a plan says of a site's inputs: plain data, beside its recipe."""

import dataclasses
import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from mq_jax._pytrees import pytree_dataclass, static
from mq_jax.activations._quantizers import MXInt, Tensor, Token
from mq_jax.formats import EXPONENT_RULES

FORMATS = {'mx_int': MXInt, 'token': Token, 'tensor': Tensor, 'none': None}
SEEN = ('transformed', 'quantized')

# Set by calibration, not by people.
_HIDDEN = ('largest',)


@pytree_dataclass
class Activations:
  """How the inputs of a site are transformed and quantized.

  Transforms leave x W as it is: what is done to x is undone in W before W is
  quantized. Their order is scale, rotate, quantize.

  Attributes:
    quantizer: `Token`, `Tensor` or `MXInt`; None leaves inputs as they are,
      and transforms then serve the weights alone.
    smooth: Migration exponent alpha in 0..1 of a scale for each input, s_j =
      max|x_j|^alpha / max|w_j|^(1 - alpha): x / s, s W. 'search' takes the
      exponent of least output error from a grid that has "none" in it.
    fold: Move the scales into what writes the channels, where that is exact;
      see `fold`, which has to be called before weights are quantized.
    rotate: Multiply inputs by a randomised Hadamard matrix, see
      `mq_jax.rotations`.
    seed: Of the signs of the rotation.
    sees: What the error compensation of weights is given as the inputs'
      statistics: 'transformed', or also 'quantized' ones.
  """

  quantizer: Any = None
  smooth: float | str | None = static(None)
  fold: bool = static(False)
  rotate: bool = static(False)
  seed: int = static(0)
  sees: str = static('transformed')

  def __post_init__(self):
    number = isinstance(self.smooth, int | float) and not isinstance(
      self.smooth, bool
    )
    if not (
      self.smooth in (None, 'search') or (number and 0 <= self.smooth <= 1)
    ):
      raise ValueError(
        f'activations: smooth={self.smooth!r} is not an exponent in 0..1, '
        "'search' or None"
      )
    if self.fold and self.smooth is None:
      raise ValueError('activations: fold=True has nothing to fold; set smooth')
    if self.sees not in SEEN:
      raise ValueError(f'activations: sees={self.sees!r} is not one of {SEEN}')
    if self.sees == 'quantized' and self.quantizer is None:
      raise ValueError("activations: sees='quantized' needs a quantizer")
    if self.rotate and isinstance(self.quantizer, Tensor):
      if not self.quantizer.dynamic:
        raise ValueError(
          'activations: static scales of rotated inputs are not gathered; use '
          'dynamic=True or another format'
        )

  @property
  def transforms(self) -> bool:
    """Whether inputs are scaled or rotated."""
    return self.smooth is not None or self.rotate

  def to_json(self) -> dict[str, Any]:
    """Plain data: 'format', and what differs from the defaults."""
    return {'format': _name(self.quantizer)} | _given(self)

  @property
  def label(self) -> str:
    """Short: 'a8 mx_int smooth=0.7'."""
    given = _given(self)
    words = [] if self.quantizer is None else [f'a{self.quantizer.bits}']
    words.append('no quantizer' if not words else _name(self.quantizer))
    for name, value in given.items():
      if name != 'bits':
        on = value is True
        words.append(name if on else f'{name}={value}')
    return ' '.join(words)


def _name(quantizer: Any) -> str:
  kind = None if quantizer is None else type(quantizer)
  return next(name for name, cls in FORMATS.items() if cls is kind)


def _given(options: Any) -> dict[str, Any]:
  found = {}
  for part in (options.quantizer, options):
    if part is None:
      continue
    for field in dataclasses.fields(part):
      value = getattr(part, field.name)
      if field.name in ('quantizer', *_HIDDEN):
        continue
      if field.name == 'bits' or value != field.default:
        found[field.name] = value
  return found


def _names(cls: Any) -> list[str]:
  return [name for name in inspect.signature(cls).parameters]


def make(format: str, **options: Any) -> Activations:
  """Options by the name of a format.

  Args:
    format: 'mx_int', 'token', 'tensor', or 'none' for transforms alone.
    **options: Of the format (`MXInt`, `Token`, `Tensor`) and of
      `Activations`.

  Raises:
    ValueError: for unknown names, or numbers out of range.

  Examples:
    >>> make('mx_int', bits=4, smooth=0.7).label
    'a4 mx_int smooth=0.7'
  """
  if format not in FORMATS:
    near = difflib.get_close_matches(str(format), FORMATS, n=2) or FORMATS
    raise ValueError(
      f'activations: unknown format {format!r}; nearest are {", ".join(near)}'
    )
  cls = FORMATS[format]
  inner = [] if cls is None else [n for n in _names(cls) if n not in _HIDDEN]
  outer = [name for name in _names(Activations) if name != 'quantizer']
  for name in options:
    if name not in (*inner, *outer):
      known = (*inner, *outer)
      near = difflib.get_close_matches(name, known, n=3) or known
      raise ValueError(
        f'activations {format}: unknown option {name!r}; nearest are '
        f'{", ".join(near)}'
      )
  quantizer = None
  if cls is not None:
    quantizer = cls(**{n: x for n, x in options.items() if n in inner})
    _check(format, quantizer)
  return Activations(
    quantizer, **{n: x for n, x in options.items() if n in outer}
  )


def _check(format: str, quantizer: Any) -> None:
  """Numbers, which classes don't check because they may be traced."""
  bits = quantizer.bits
  if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 8:
    raise ValueError(
      f'activations {format}: bits={bits!r} is not a whole number in 2..8'
    )
  if isinstance(quantizer, MXInt):
    if not isinstance(quantizer.group, int) or quantizer.group < 1:
      raise ValueError(
        f'activations {format}: group={quantizer.group!r} is not a whole '
        'number >= 1'
      )
    if quantizer.exponent not in EXPONENT_RULES:
      raise ValueError(
        f'activations {format}: exponent={quantizer.exponent!r} is not one of '
        f'{", ".join(EXPONENT_RULES)}'
      )
    return
  for name in ('symmetric', 'dynamic'):
    if not isinstance(getattr(quantizer, name, True), bool):
      raise ValueError(f'activations {format}: {name} is not True or False')
  clip = quantizer.clip
  if not isinstance(clip, int | float) or not 0 < clip <= 1:
    raise ValueError(
      f'activations {format}: clip={clip!r} is not a share, 0 < .. <= 1'
    )


def quantizer_to_json(quantizer: Any) -> dict[str, Any]:
  """A quantizer as plain data, with what calibration found."""
  data = Activations(quantizer).to_json()
  largest = getattr(quantizer, 'largest', None)
  if largest is not None:  # float32 values are exact as Python's
    data['largest'] = np.asarray(largest, np.float32).tolist()
  return data


def quantizer_from_json(data: Any) -> Any:
  """Undo `quantizer_to_json`; None for None.

  Raises:
    ValueError: for anything else.
  """
  if data is None:
    return None
  if not isinstance(data, Mapping):
    raise ValueError(f'inputs {data!r:.60} are no quantizer')
  found = from_json({n: x for n, x in data.items() if n != 'largest'})
  quantizer = found.quantizer
  if quantizer is None or found != Activations(quantizer):
    raise ValueError(f'inputs {data!r:.60} are no quantizer')
  if isinstance(quantizer, Tensor) and not quantizer.dynamic:
    largest = np.asarray(data.get('largest'), np.float32)
    if not np.all(np.isfinite(largest)):
      raise ValueError(f'inputs: largest={data.get("largest")!r:.60}')
    return dataclasses.replace(quantizer, largest=jnp.asarray(largest))
  return quantizer


def from_json(data: Any) -> Activations:
  """Undo `Activations.to_json`; a bare name is a format with its defaults.

  Raises:
    ValueError: for anything else, and whatever `make` refuses.
  """
  if isinstance(data, Activations):
    return data
  if isinstance(data, str):
    data = {'format': data}
  if not isinstance(data, Mapping) or 'format' not in data:
    raise ValueError(
      "activations are a format or {'format': name, option: value, ...}, got "
      f'{data!r:.60}'
    )
  return make(**data)
