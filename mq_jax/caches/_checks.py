"""Checks of the numbers that factories are given."""


def share(name: str, value: float) -> float:
  """Refuse what is not in 0..1; ValueError that names it."""
  number = isinstance(value, int | float) and not isinstance(value, bool)
  if not number or not 0 <= value <= 1:
    raise ValueError(f'{name}={value!r} is not a share in 0..1')
  return value


def whole(name: str, value: int, low: int, high: int | None = None) -> int:
  """Refuse what is not a whole number in low..high; ValueError."""
  fits = isinstance(value, int) and not isinstance(value, bool)
  if not fits or value < low or (high is not None and value > high):
    limit = f'>= {low}' if high is None else f'in {low}..{high}'
    raise ValueError(f'{name}={value!r} is not a whole number {limit}')
  return value
