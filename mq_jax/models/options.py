"""Fields of a config that nobody vouches for, read one by one."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# Activations by the names of transformers, and how ours are stored.
ACTIVATIONS = {
  'silu': 'silu',
  'swish': 'silu',
  'gelu': 'gelu',
  'gelu_new': 'gelu_tanh',
  'gelu_pytorch_tanh': 'gelu_tanh',
  'gelu_fast': 'gelu_tanh',
  'relu': 'relu',
}
STORED = {
  'silu': 'silu',
  'gelu': 'gelu',
  'gelu_tanh': 'gelu_new',
  'relu': 'relu',
}


class Options(NamedTuple):
  """An object of a config, with the place that messages name.

  Attributes:
    raw: The parsed JSON object.
    where: Its file, and the path inside it if it is not the outermost.
  """

  raw: Mapping[str, Any]
  where: str

  def whole(self, name: str, default: int | None = None) -> int:
    """A positive whole number; `default` where it is absent or null."""
    value = self.raw.get(name)
    value = default if value is None else value
    # No real size comes near 2**31; beyond it products would overflow.
    if type(value) is not int or not 0 < value < 2**31:
      raise self.wrong(name, 'a positive whole number', value)
    return value

  def positive(self, name: str, default: float | None = None) -> float:
    """A positive finite number; `default` where it is absent or null."""
    value = self.raw.get(name)
    value = default if value is None else value
    if type(value) not in (int, float) or not 0 < value < math.inf:
      raise self.wrong(name, 'a positive number', value)
    return float(value)

  def flag(self, name: str, default: bool = False) -> bool:
    """True or false; `default` where it is absent or null."""
    value = self.raw.get(name)
    value = default if value is None else value
    if not isinstance(value, bool):
      raise self.wrong(name, 'true or false', value)
    return value

  def numbers(self, name: str, count: int) -> tuple[float, ...]:
    """A list of `count` positive numbers."""
    value = self.raw.get(name)
    good = isinstance(value, list) and all(
      type(v) in (int, float) and 0 < v < math.inf for v in value
    )
    if not good or len(value) != count:
      raise self.wrong(name, f'a list of {count} positive numbers', value)
    return tuple(map(float, value))

  def choice(self, name: str, choices: Mapping[str, Any]) -> Any:
    """What `choices` has for the field."""
    value = self.raw.get(name)
    if not isinstance(value, str) or value not in choices:
      raise self.unsupported(name, value, tuple(choices))
    return choices[value]

  def neutral(self, allowed: Mapping[str, Sequence[Any]]) -> None:
    """Refuse options that change the function in a way not built here.

    Args:
      allowed: Values of each option under which it has no effect; the first
        is what it stands for where it is absent.
    """
    for name, values in allowed.items():
      value = self.raw.get(name, values[0])
      if not any(type(value) is type(n) and value == n for n in values):
        raise self.unsupported(name, value, values)

  def wrong(self, name: str, needed: str, value: Any) -> ValueError:
    found = 'nothing' if value is None else str(value)[:80]
    return ValueError(f'{self.where}: {name} must be {needed}, found {found}')

  def unsupported(
    self, name: str, value: Any, supported: Sequence[Any]
  ) -> ValueError:
    text = lambda v: v if isinstance(v, str) else json.dumps(v)
    return ValueError(
      f'{self.where}: {name}={str(value)[:80]} is not supported; supported: '
      f'{" or ".join(map(text, supported))}'
    )
