"""Numbers of accelerators: learned freely, fitted to an area, rounded."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax.allocation._designs import AREA, Numbers, Space, Task
from mq_jax.allocation.problem import InfeasibleError
from mq_jax.hardware._rules import Rules

_HALVINGS = 20


def decode(space: Space, raw: Any, area: jax.typing.ArrayLike) -> Numbers:
  """Numbers of one accelerator that fit area and needs, from free ones.

  A value is between its least and its largest one, by a sigmoid of its
  logarithm; parts of a split are a softmax above one unit each. Where area
  or needs are exceeded, all values shrink towards their least, by equal
  shares of the way: those budgets hold at every step of a search instead of
  being weighed against the loss.

  Args:
    space: Accelerators.
    raw: {'values': f[n], 'split': f[parts]}, any numbers.
    area: In um2.

  Returns:
    Numbers by name; differentiable in `raw`, through the shrinking by the
    implicit function theorem.
  """
  low, high = _range(space)
  log = low + jax.nn.sigmoid(raw['values']) * (high - low)
  k = len(space.split)
  parts = 1.0 + (space.units - k) * jax.nn.softmax(raw['split'])
  # What is only looked at is kept out of the way of gradients.
  fixed_log, fixed_parts = jax.lax.stop_gradient((log, parts))
  at = lambda share: fixed_log + share * (low - fixed_log)
  excess = lambda share: _excess(space, at(share), fixed_parts, area)
  share = jnp.where(excess(0.0) <= 0, 0.0, _least_share(excess))
  slope = jnp.minimum(jax.grad(excess)(share), -1e-6)
  over = _excess(space, log + share * (low - log), parts, area)
  over = over - jax.lax.stop_gradient(over)  # 0, but for its gradient
  share = jnp.where(share > 0, share - over / slope, 0.0)
  return _numbers(space, log + share * (low - log), parts)


def _range(space):
  ends = np.array([(min(x), max(x)) for x in space.values.values()])
  return jnp.asarray(np.log(ends.T), jnp.float32)


def _numbers(space, log, parts):
  return dict(zip(space.names, (*jnp.exp(log), *parts), strict=True))


def _excess(space, log, parts, area):
  """Log of the most exceeded of area and needs; below 0 where all are kept."""
  numbers = _numbers(space, log, parts)
  used = [*space.needs(numbers).values(), _area(space, numbers) / area]
  return functools.reduce(jnp.maximum, map(jnp.log, used))


def _least_share(excess):
  """The least of a way to go, in [0, 1], at which a falling one is below 0."""

  def halve(_, ends):
    middle = 0.5 * (ends[0] + ends[1])
    fits = excess(middle) <= 0
    return jnp.where(fits, ends[0], middle), jnp.where(fits, middle, ends[1])

  ends = jnp.float32(0.0), jnp.float32(1.0)
  return jax.lax.fori_loop(0, _HALVINGS, halve, ends)[1]


@functools.partial(jax.jit, static_argnames='space')
def _refit(space, log, free, parts, area):
  """Move the free values alike, to fill area and needs; none exceeds them."""
  low, high = (jnp.where(free, end, log) for end in _range(space))
  over = _excess(space, log, parts, area) > 0
  # Down from here, or from the top down to here.
  begin, end = jnp.where(over, log, high), jnp.where(over, low, log)
  at = lambda share: begin + share * (end - begin)
  return at(_least_share(lambda x: _excess(space, at(x), parts, area)))


def _area(space, numbers):
  """um2 alone: `relaxed_cost` would make programs much larger."""
  return space.make(numbers).area(Rules(jnp, relaxed=True)).total


def start(space: Space, key: jax.Array) -> dict[str, jax.Array]:
  """Where a relaxation starts: values uniform in their logarithms."""
  values, split = jax.random.split(key)
  share = jax.random.uniform(
    values, (len(space.values),), minval=0.1, maxval=0.9
  )
  parts = 0.5 * jax.random.normal(split, (len(space.split),))
  return {'values': jax.scipy.special.logit(share), 'split': parts}


def check_area(task: Task) -> None:
  """Refuse an area that is below the smallest accelerator's."""
  low = {name: float(min(x)) for name, x in task.space.values.items()}
  low |= dict.fromkeys(
    task.space.split, task.space.units / max(1, len(task.space.split))
  )
  least = float(_area(task.space, low))
  if least > task.area:
    raise InfeasibleError(
      f'codesign: budget {AREA} = {task.area:.6g} cannot be met; the smallest '
      f'accelerator, {low}, takes {least:.6g}'
    )


def rounded(
  space: Space, numbers: Numbers, area: float = np.inf
) -> dict[str, np.ndarray]:
  """Accelerators that can be built around one that can't. [d] each.

  Values are rounded one after the other, each up and down; after each, the
  rest shrinks or grows to what it leaves of the area. The order matters, as
  the last ones take up what is left: each value is once the last. Parts of
  the split are rounded down, and what is left is dealt in all ways.

  Args:
    space: Accelerators.
    numbers: Of one.
    area: In um2.
  """
  parts = np.array([float(numbers[name]) for name in space.split], np.float32)
  start = np.log([float(numbers[name]) for name in space.values])
  found = {}  # in order, each once
  for turn in range(len(start)):
    ends = [start]
    order = np.roll(np.arange(len(start)), turn)
    for k, i in enumerate(order):
      free = np.isin(np.arange(len(start)), order[k + 1 :])
      ends = [
        _refitted(space, new, free, parts, area)
        for log in ends
        for new in _around(space, log, i)
      ]
    found |= dict.fromkeys(tuple(np.exp(log)) for log in ends)
  nearest = lambda values, x: min(values, key=lambda value: abs(value - x))
  columns = list(space.values.values())
  rows = dict.fromkeys(tuple(map(nearest, columns, x)) for x in found)
  floor = np.maximum(np.floor(parts + 1e-3), 1)
  spare = max(0, int(space.units - floor.sum()))
  deals = itertools.combinations(range(len(parts)), spare)
  deals = [floor + np.isin(range(len(parts)), deal) for deal in deals]
  rows = [(*row, *deal) for row in rows for deal in deals]
  return dict(zip(space.names, np.array(rows, np.float64).T, strict=True))


def _around(space, log, i) -> list[np.ndarray]:
  """With value i at its neighbours below and above. f64[n] each."""
  values = np.log(list(space.values.values())[i])
  at = np.searchsorted(values, log[i] + 1e-4) - 1
  ends = {max(at, 0), min(at + 1, len(values) - 1)}
  here = np.arange(len(log)) == i
  return [np.where(here, values[k], log) for k in sorted(ends)]


def _refitted(space, log, free, parts, area) -> np.ndarray:
  """As `_refit`, but those that are not free keep all their digits."""
  if not free.any() or not np.isfinite(area):
    return log
  new = _refit(space, np.float32(log), free, parts, np.float32(area))
  return np.where(free, np.asarray(new, np.float64), log)


def neighbours(space: Space, numbers: Numbers) -> dict[str, np.ndarray]:
  """Accelerators one move away. [d] each.

  A move takes one value a step, or two values a step each in opposite
  directions, or 1, 2, 4 or 8 units of a split from a part to another: buffers
  make no difference up to where something fits.
  """
  here = np.array([float(numbers[name]) for name in space.names])
  n, moves = len(space.values), []
  for step in itertools.product((-1, 0, 1), repeat=n):
    if sorted(map(abs, step)) != [0] * (n - 1) + [1] and (
      np.count_nonzero(step) != 2 or sum(step)
    ):
      continue
    new = here.copy()
    for i, values in enumerate(space.values.values()):
      at = values.index(here[i]) + step[i]
      new[i] = values[at] if 0 <= at < len(values) else np.nan
    if not np.isnan(new).any():
      moves.append(new)
  for i, j in itertools.permutations(range(n, len(here)), 2):
    for units in 2 ** np.arange(4):
      if here[i] > units:
        new = here.copy()
        new[[i, j]] += (-units, units)
        moves.append(new)
  return dict(zip(space.names, np.array(moves).reshape(-1, len(here)).T))
