"""Checkpoints of packed integers, in the format `pack-quantized`.

In place of `NAME.weight`, which was [out, in], such a checkpoint holds

    NAME.weight_packed      i32[out, ceil(in * bits / 32)]: levels from 0,
                            2^(bits-1) more than the integer; the first in the
                            lowest bits
    NAME.weight_scale       [out, groups] of the model's type
    NAME.weight_shape       i64[2]: out, in
    NAME.weight_zero_point  i32[ceil(out * bits / 32), groups], levels packed
                            along the outputs; only where not symmetric

and stands for (level - zero point) * scale, in the scales' type. A group is a
run of inputs of equal length, or all of them ('channel'). config.json says
which modules are stored so, and how, in `quantization_config`.

Widths are 4 and 8 here. Others exist, but their packing changed: old versions
of the library left bits of a word unused, new ones split levels over words.

Source:
  compressed-tensors 0.20.0 (Apache-2.0), read: compressors/pack_quantized,
  quantization/quant_args.py, quant_scheme.py, quant_config.py; that versions
  before packed other widths differently is from memory.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

METHOD, FORMAT = 'compressed-tensors', 'pack-quantized'
WIDTHS = (4, 8)

_PARTS = ('packed', 'scale', 'shape', 'zero_point')


class Scheme(NamedTuple):
  """How a module's weight is stored.

  Attributes:
    bits: Width of a level, 4 or 8.
    symmetric: Whether there are no zero points.
    group: Inputs under a scale; None for all of them.
  """

  bits: int
  symmetric: bool
  group: int | None


def pack(levels: np.ndarray, bits: int) -> np.ndarray:
  """Levels [rows, n] from 0 as words i32[rows, ceil(n * bits / 32)]."""
  each = 32 // bits
  rows, n = levels.shape
  padded = np.zeros((rows, -(-n // each) * each), np.uint32)
  padded[:, :n] = levels
  shifts = np.arange(each, dtype=np.uint32) * np.uint32(bits)
  words = padded.reshape(rows, -1, each) << shifts
  return np.bitwise_or.reduce(words, axis=-1).view(np.int32)


def unpack(words: np.ndarray, bits: int, n: int) -> np.ndarray:
  """Undo `pack`: the first n levels u8[rows, n]."""
  shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
  words = np.ascontiguousarray(words).view(np.uint32)
  fields = words[..., None] >> shifts & np.uint32((1 << bits) - 1)
  return fields.astype(np.uint8).reshape(len(words), -1)[:, :n]


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
  """A weight that is unpacked when it is read; looks like an array.

  Attributes:
    levels: i32[out, ceil(in * bits / 32)].
    scale: [out, groups].
    zero: i32[ceil(out * bits / 32), groups], or None.
    shape: (out, in).
    bits: Width of a level.
  """

  levels: np.ndarray
  scale: np.ndarray
  zero: np.ndarray | None
  shape: tuple[int, int]
  bits: int

  @property
  def dtype(self) -> np.dtype:
    return self.scale.dtype

  def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
    del copy
    n, k = self.shape
    # Integers of 9 bits times 11 or fewer are exact in float32, so this is
    # rounded once, as arithmetic in the scales' type would.
    levels = unpack(self.levels, self.bits, k).astype(np.float32)
    zero = np.float32(1 << (self.bits - 1))
    if self.zero is not None:
      zero = unpack(self.zero.T, self.bits, n).T.astype(np.float32)[..., None]
    groups = levels.reshape(n, self.scale.shape[1], -1)
    values = (groups - zero) * self.scale.astype(np.float32)[..., None]
    values = values.reshape(n, k).astype(self.dtype)
    return values if dtype is None else values.astype(dtype)

  def astype(self, dtype: Any) -> np.ndarray:
    return self.__array__(dtype)

  @property
  def parts(self) -> tuple[np.ndarray, ...]:
    """The arrays that lie in the file."""
    return tuple(
      x for x in (self.levels, self.scale, self.zero) if x is not None
    )


def read_schemes(raw: Any, where: str) -> frozenset[Scheme]:
  """The schemes of a `quantization_config`.

  Args:
    raw: That field of config.json.
    where: For messages.

  Raises:
    ValueError: for anything else than weights packed as described above, by
      the name of the option.
  """
  where = f'{where}: quantization_config'
  _expect(where, raw, 'quant_method', (METHOD,))
  _expect(where, raw, 'format', (FORMAT,))
  _expect(where, raw, 'quantization_status', ('compressed', None))
  for name in ('kv_cache_scheme', 'sparsity_config', 'transform_config'):
    _expect(where, raw, name, (None, {}))
  groups = raw.get('config_groups')
  if not isinstance(groups, dict) or not groups:
    raise ValueError(
      f'{where}: config_groups must say how weights are stored, found '
      f'{str(groups)[:60]}'
    )
  found = set()
  for name, group in groups.items():
    inner = f'{where}: config_groups.{name}'
    if not isinstance(group, dict) or not isinstance(
      group.get('weights'), dict
    ):
      raise ValueError(f'{inner}: weights must be an object')
    for field in ('input_activations', 'output_activations'):
      _expect(inner, group, field, (None,))
    _expect(inner, group, 'format', (FORMAT, None))
    weights = group['weights']
    inner += '.weights'
    _expect(inner, weights, 'num_bits', WIDTHS)
    _expect(inner, weights, 'type', ('int', None))
    _expect(inner, weights, 'symmetric', (True, False, None))
    _expect(inner, weights, 'dynamic', (False, None))
    _expect(inner, weights, 'strategy', ('group', 'channel'))
    _expect(inner, weights, 'block_structure', (None,))
    # Reordered groups need an index of their own; other orders leave none.
    _expect(inner, weights, 'actorder', (None, False, 'weight', 'static'))
    size = None
    if weights['strategy'] == 'group':
      size = weights.get('group_size')
      if type(size) is not int or size < 1:
        raise ValueError(
          f'{inner}: group_size must be a whole number >= 1, found '
          f'{str(size)[:60]}'
        )
    symmetric = weights.get('symmetric') is not False
    found.add(Scheme(weights['num_bits'], symmetric, size))
  return frozenset(found)


def _expect(where: str, raw: Any, name: str, values: Sequence[Any]) -> None:
  value = raw.get(name) if isinstance(raw, dict) else raw
  if not any(type(value) is type(v) and value == v for v in values):
    raise ValueError(
      f'{where}: {name}={str(value)[:60]} is not supported; supported: '
      f'{", ".join(map(str, values))}'
    )


def unpacked(
  found: Mapping[str, np.ndarray], schemes: frozenset[Scheme], where: str
) -> dict[str, Any]:
  """A checkpoint's tensors with weights in place of their parts.

  Args:
    found: Tensors by name.
    schemes: What the config allows.
    where: For messages.

  Returns:
    Tensors by name; weights that are packed are `Packed`. Nothing but shapes
    has been read.

  Raises:
    ValueError: if parts of a weight are missing or don't fit each other or
      the schemes, by name.
  """
  marker = '.weight_packed'
  modules = [name[: -len(marker)] for name in found if name.endswith(marker)]
  rest = dict(found)
  for module in modules:
    parts = {p: rest.pop(f'{module}.weight_{p}', None) for p in _PARTS}
    name = f'{module}.weight'
    if name in rest:
      raise ValueError(f'{where}: {name} is there beside {name}_packed')
    rest[name] = _packed(parts, schemes, f'{where}: {name}')
  return rest


def _packed(
  parts: Mapping[str, np.ndarray | None],
  schemes: frozenset[Scheme],
  where: str,
) -> Packed:
  words, scale, shape, zero = (parts[p] for p in _PARTS)
  for name, part, kinds, axes in (
    ('packed', words, ('int32',), 2),
    ('scale', scale, ('float32', 'float16', 'bfloat16'), 2),
    ('shape', shape, ('int64', 'int32'), 1),
    ('zero_point', zero, ('int32',), 2),
  ):
    if part is None and name == 'zero_point':
      continue
    if part is None or part.dtype.name not in kinds or part.ndim != axes:
      what = 'nothing' if part is None else f'{part.dtype}{list(part.shape)}'
      raise ValueError(
        f'{where}_{name} must be {" or ".join(kinds)} of {axes} axes, found '
        f'{what}'
      )
  n, k = (int(x) for x in shape) if shape.shape == (2,) else (0, 0)
  groups = scale.shape[1]
  fits = [
    s
    for s in schemes
    if s.symmetric == (zero is None)
    and min(n, k, groups) > 0
    and k == groups * (k if s.group is None else s.group)
    and scale.shape[0] == n
    and words.shape == (n, -(-k * s.bits // 32))
    and (zero is None or zero.shape == (-(-n * s.bits // 32), groups))
  ]
  if len({s.bits for s in fits}) != 1:
    known = '; '.join(sorted(str(tuple(scheme)) for scheme in schemes))
    raise ValueError(
      f'{where}: packed {list(words.shape)}, scale {list(scale.shape)}, zero '
      f'point {"none" if zero is None else list(zero.shape)} of a weight '
      f'{[n, k]} are of none of the schemes (bits, symmetric, group) in the '
      f'config: {known}'
    )
  return Packed(words, scale, zero, (n, k), fits[0].bits)


def quantization_config(
  schemes: Mapping[str, Scheme], others: Sequence[str]
) -> dict[str, Any]:
  """The field of config.json that describes packed modules.

  Args:
    schemes: Of each packed module, by name.
    others: Linear modules that are not packed.
  """
  groups: dict[Scheme, list[str]] = {}
  for module, scheme in schemes.items():
    groups.setdefault(scheme, []).append(module)
  described = {}
  for i, (scheme, modules) in enumerate(groups.items()):
    described[f'group_{i}'] = {
      'targets': ['Linear'] if len(groups) == 1 else modules,
      'weights': {
        'num_bits': scheme.bits,
        'type': 'int',
        'symmetric': scheme.symmetric,
        'strategy': 'channel' if scheme.group is None else 'group',
        'group_size': scheme.group,
        'dynamic': False,
      },
      'input_activations': None,
      'output_activations': None,
      'format': FORMAT,
    }
  return {
    'quant_method': METHOD,
    'format': FORMAT,
    'quantization_status': 'compressed',
    'config_groups': described,
    'ignore': sorted(others),
    'kv_cache_scheme': None,
    'global_compression_ratio': None,
  }
