"""Fronts of two objectives, both better when less."""

import math
from collections.abc import Sequence

from mq_jax.report import tables

Point = tuple[float, float]


def hypervolume(points: Sequence[Point], reference: Point) -> float:
  """Area that points dominate, up to a reference; exact.

  Larger is better. The area is that of all (x, y) with a point at or below
  them in both, and below the reference in both.

  Args:
    points: Objectives, less is better.
    reference: The corner; what is not better than it in both counts nothing.

  Returns:
    The area in the product of the units.

  Raises:
    ValueError: if a number is not finite.

  Examples:
    >>> hypervolume([(1, 2), (2, 1)], (3, 3))
    3.0
    >>> hypervolume([(4, 0)], (3, 3))
    0.0
  """
  numbers = [x for point in (*points, reference) for x in point]
  if not all(map(math.isfinite, numbers)):
    raise ValueError(f'hypervolume: not finite: {[*points, reference]}')
  right, top = reference
  front = tables.pareto([(x, y) for x, y in points if x < right and y < top])
  ends = [x for x, _ in front[1:]] + [right]
  # Strips from each point to the next; of none higher than the one before.
  return float(sum((end - x) * (top - y) for (x, y), end in zip(front, ends)))
