"""The hypervolume, against areas counted cell by cell and by chance."""

import doctest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mq_jax.report import documents, fronts, html, maps, plain, style

_SIDE = 12
points = st.lists(
  st.tuples(st.integers(0, _SIDE + 2), st.integers(0, _SIDE + 2)), max_size=9
)


def counted(found, corner):
  """Unit cells with a point at or below their lower left."""
  return sum(
    any(x <= i and y <= j for x, y in found)
    for i in range(corner[0])
    for j in range(corner[1])
  )


@given(points, st.tuples(st.integers(1, _SIDE), st.integers(1, _SIDE)))
def test_area_is_that_of_the_cells_dominated(found, corner):
  assert fronts.hypervolume(found, corner) == counted(found, corner)


@given(points)
def test_order_and_what_is_dominated_do_not_matter(found):
  corner = (_SIDE, _SIDE)
  more = [*reversed(found), *((x + 1, y + 1) for x, y in found)]
  assert fronts.hypervolume(more, corner) == fronts.hypervolume(found, corner)


def test_area_by_chance():
  random = np.random.default_rng(0)
  found = random.uniform(0, 1, (20, 2)) ** 2
  darts = random.uniform(0, 1, (200_000, 2))
  hit = (found[:, None] <= darts).all(-1).any(0).mean()
  assert fronts.hypervolume(found.tolist(), (1, 1)) == pytest.approx(
    hit, abs=4 * 0.5 / 200_000**0.5
  )


def test_what_is_not_finite_is_refused():
  with pytest.raises(ValueError, match='not finite'):
    fronts.hypervolume([(1.0, float('nan'))], (2.0, 2.0))


@pytest.mark.parametrize(
  'module',
  [documents, fronts, html, maps, plain, style],
  ids=lambda m: m.__name__,
)
def test_examples(module):
  found = doctest.testmod(module)
  assert found.attempted and not found.failed
