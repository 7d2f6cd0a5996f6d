"""Rotary positions in the spellings of transformers 4 and 5."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from mq_jax.models.decoder import DecoderConfig, rotary
from mq_jax.models.options import Options

_NEEDED = {
  'default': frozenset(),
  'linear': frozenset({'factor'}),
  'dynamic': frozenset({'factor'}),
  'llama3': frozenset({'factor', 'low_freq_factor', 'high_freq_factor'}),
  'yarn': frozenset({'factor'}),
  'longrope': frozenset({'short_factor', 'long_factor'}),
}
_ALLOWED = {
  'llama3': frozenset({'original_max_position_embeddings'}),
  'yarn': frozenset({
    'original_max_position_embeddings', 'attention_factor', 'beta_fast',
    'beta_slow', 'mscale', 'mscale_all_dim', 'truncate',
  }),
  'longrope': frozenset({
    'original_max_position_embeddings', 'attention_factor', 'factor',
  }),
}  # fmt: skip
_ALWAYS = frozenset({'rope_type', 'type', 'rope_theta'})
_FIELDS = ('rope_scaling', 'rope_parameters')  # of transformers 4 and 5


class Rope(NamedTuple):
  """What a config says of rotary positions."""

  theta: float
  scaling: rotary.Scaling | None
  size: int | None  # channels of a head that turn, None for all


def read(
  options: Options, *, head_dim: int, theta: float, partial: bool, phi: bool
) -> Rope:
  """Rotary positions of a config.

  Args:
    options: The config.
    head_dim: Channels of a head.
    theta: Base where the config has none.
    partial: Whether the architecture can turn a part of each head.
    phi: Whether it is Phi-3, which writes 'su' and once wrote 'yarn' for
      'longrope'.

  Raises:
    ValueError: for a type or field that is not known, or a contradiction.
  """
  raw, where = options.raw, options.where
  inner, field = {}, 'rope_scaling'
  for name in _FIELDS:
    value = raw.get(name)
    if value is None:
      continue
    if not isinstance(value, dict):
      raise options.wrong(name, 'an object or null', value)
    value = dict(value)
    kind = value.pop('type', 'default')
    value.setdefault('rope_type', kind)
    for key in inner.keys() & value.keys():
      if inner[key] != value[key]:
        raise _contradiction(options, f'{field}.{key}', f'{name}.{key}')
    inner, field = {**inner, **value}, name
  for key in ('rope_theta', 'partial_rotary_factor'):
    outer = raw.get(key)
    if outer is not None and inner.get(key, outer) != outer:
      raise ValueError(
        f'{where}: {key}={str(outer)[:40]} and {field}.{key}='
        f'{str(inner[key])[:40]} contradict each other'
      )
    if outer is not None:
      inner[key] = outer
  kind = inner.get('rope_type', 'default')
  if phi and kind in ('su', 'yarn'):
    kind = 'longrope'
  share = inner.pop('partial_rotary_factor', None)
  extra = sorted(
    inner.keys()
    - _ALWAYS
    - _NEEDED.get(str(kind), frozenset())
    - _ALLOWED.get(str(kind), frozenset())
  )
  if not isinstance(kind, str) or kind not in _NEEDED or extra:
    raise ValueError(
      f'{where}: {field} of type {str(kind)[:40]!r}'
      f'{f" with {extra}" if extra else ""} is not supported; supported are '
      f'{", ".join(_NEEDED)}, with the fields of transformers 5'
    )
  given = Options(inner, f'{where}: {field}')
  size = head_dim
  if share not in (None, 1, 1.0):
    if not partial:
      raise options.unsupported('partial_rotary_factor', share, (None, 1.0))
    factor = Options({'partial_rotary_factor': share}, where).positive(
      'partial_rotary_factor'
    )
    size = int(head_dim * factor)
    if not 0 < size <= head_dim or size % 2:
      raise options.wrong(
        'partial_rotary_factor',
        f'a share that turns an even number of the {head_dim} channels',
        share,
      )
  found = Options(inner, where).positive('rope_theta', theta)
  if kind == 'yarn' and found <= 1:
    raise options.wrong('rope_theta', 'above 1 for yarn', found)
  scaling = _scaling(kind, given, options, size)
  return Rope(found, scaling, None if size == head_dim else size)


def _contradiction(options: Options, one: str, other: str) -> ValueError:
  return ValueError(f'{options.where}: {one} and {other} contradict each other')


def _scaling(
  kind: str, given: Options, options: Options, size: int
) -> rotary.Scaling | None:
  longest = options.whole('max_position_embeddings')
  # Outside the object (as Phi-3 has it) it goes before the one inside.
  name = 'original_max_position_embeddings'
  outside = options.raw.get(name) is not None
  length = (options if outside else given).whole(name, longest)
  match kind:
    case 'default':
      return None
    case 'linear':
      return rotary.Linear(given.positive('factor'))
    case 'dynamic':
      if size <= 2:
        raise options.wrong('head_dim', 'above 2 for dynamic positions', size)
      return rotary.Dynamic(given.positive('factor'), longest)
    case 'llama3':
      low, high = (
        given.positive(f'{which}_freq_factor') for which in ('low', 'high')
      )
      if low >= high:
        raise given.wrong('high_freq_factor', f'above low={low}', high)
      return rotary.Llama3(given.positive('factor'), low, high, length)
    case 'yarn':
      factor = given.positive('factor')
      return rotary.Yarn(
        factor,
        length,
        given.positive('attention_factor', _yarn_attention(given, factor)),
        given.positive('beta_fast', 32.0),
        given.positive('beta_slow', 1.0),
        given.flag('truncate', True),
      )
    case 'longrope':
      if length <= 1:
        raise options.wrong(name, 'above 1', length)
      factor = given.positive('factor', longest / length)
      return rotary.LongRope(
        given.numbers('short_factor', size // 2),
        given.numbers('long_factor', size // 2),
        length,
        given.positive('attention_factor', _long_attention(factor, length)),
      )
  raise AssertionError(kind)


def _yarn_attention(given: Options, factor: float) -> float:
  """YaRN's temperature, equation 22, and DeepSeek's ratio of two of them."""
  warm = lambda m: 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0
  both = ('mscale', 'mscale_all_dim')
  if all(given.raw.get(name) for name in both):
    one, two = map(given.positive, both)
    return warm(one) / warm(two)
  return warm(1.0)


def _long_attention(factor: float, length: int) -> float:
  if factor <= 1.0:
    return 1.0
  return math.sqrt(1 + math.log(factor) / math.log(length))


def write(config: DecoderConfig, *, phi: bool) -> dict[str, Any]:
  """The fields that `read` takes, in the spelling that both versions read.

  Raises:
    ValueError: for what the architecture cannot say.
  """
  c, fields = config, {'rope_theta': config.rope_theta, 'rope_scaling': None}
  if c.rotary_dim is not None:
    fields['partial_rotary_factor'] = c.rotary_dim / c.head_dim
  s = c.rope_scaling
  inner: Mapping[str, Any]
  match s:
    case None:
      return fields
    case rotary.Linear(factor):
      kind, inner = 'linear', {'factor': factor}
    case rotary.Dynamic(factor, length):
      if length != c.max_position_embeddings:
        raise ValueError(
          f'dynamic rotary positions of length={length} cannot be stored: '
          f'checkpoints have max_position_embeddings='
          f'{c.max_position_embeddings} for it'
        )
      kind, inner = 'dynamic', {'factor': factor}
    case rotary.Llama3(factor, low, high, length):
      kind, inner = (
        'llama3',
        {
          'factor': factor,
          'low_freq_factor': low,
          'high_freq_factor': high,
        },
      )
    case rotary.Yarn():
      kind, inner = (
        'yarn',
        {
          'factor': s.factor,
          'attention_factor': s.attention,
          'beta_fast': s.fast,
          'beta_slow': s.slow,
          'truncate': s.truncate,
        },
      )
    case rotary.LongRope():
      kind = 'longrope'
      inner = {'short_factor': list(s.short), 'long_factor': list(s.long)}
      implied = c.max_position_embeddings / s.length
      # transformers 4 refuses a fourth field in Phi-3, so only where needed.
      if s.attention != _long_attention(implied, s.length):
        inner['attention_factor'] = s.attention
  inner = {'rope_type': kind, **inner}
  length = getattr(s, 'length', None)
  if length is not None and kind != 'dynamic':
    target = fields if phi else inner
    target['original_max_position_embeddings'] = length
  if phi:
    inner['type'] = inner.pop('rope_type')
  return {**fields, 'rope_scaling': inner}
