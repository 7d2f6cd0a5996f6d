"""Samplers cover their space; what can't be sampled is named."""

import itertools

import numpy as np
import pytest

from mq_jax.lab.sweeping import space as space_lib

MIXED = {
  'sigma': ('linear', 2.0, 4.0, 3),
  'damping': ('log', 0.001, 0.1, 3),
  'bits, group': [(2, 64), (3, 128)],
  'compare.seed': ('int', 0, 4, 2),
}


def without_points(given):
  return {
    k: v[:3] if isinstance(v, tuple) and v[0] != 'int' else v
    for k, v in given.items()
  }


def test_a_grid_has_every_combination_once():
  space = space_lib.make_space(MIXED, 'grid')
  found = space.design('grid', None, 0)
  expected = itertools.product(
    (2.0, 3.0, 4.0), (0.001, 0.01, 0.1), ((2, 64), (3, 128)), (0, 2, 4)
  )
  values = [tuple(s.values()) for s in found]
  flat = [(a, b, *c, d) for a, b, c, d in expected]
  np.testing.assert_allclose(values, flat, rtol=1e-12)
  assert list(found[0]) == ['sigma', 'damping', 'bits', 'group', 'compare.seed']
  # The ends are exact, so no recipe is asked for more than was written.
  assert {s['damping'] for s in found} >= {0.001, 0.1}
  assert space.design('grid', 5, 0) == found[:5]


@pytest.mark.parametrize('sampler', ['sobol', 'random'])
def test_drawn_settings_fill_the_space_and_grow_by_appending(sampler):
  space = space_lib.make_space(without_points(MIXED), sampler)
  found = space.design(sampler, 64, seed=1)
  assert space.design(sampler, 100, seed=1)[:64] == found
  assert space.design(sampler, 64, seed=2) != found
  sigma = np.array([s['sigma'] for s in found])
  assert np.all((sigma >= 2) & (sigma <= 4))
  log = np.log10([s['damping'] for s in found])
  for values, low, high in ((sigma, 2, 4), (log, -3, -1)):
    counts, _ = np.histogram(values, 4, (low, high))
    # A balanced sequence has 16 in each quarter; chance has some.
    assert np.all(counts == 16 if sampler == 'sobol' else counts > 4)
  assert {s['compare.seed'] for s in found} == {0, 2, 4}
  assert {(s['bits'], s['group']) for s in found} == {(2, 64), (3, 128)}


def test_settings_survive_the_way_through_optuna():
  given = without_points(MIXED) | {'rule': ['a', None, [1, 2]]}
  space = space_lib.make_space(given, 'random')
  dists = space.distributions()
  for setting in space.design('random', 20, 0):
    params = space.params(setting)
    for key, value in params.items():
      assert dists[key]._contains(dists[key].to_internal_repr(value))
    assert space.from_params(params) == setting


def test_corners_show_each_end_of_each_axis():
  corners = list(space_lib.make_space(MIXED, 'grid').corners())
  assert {c['sigma'] for c in corners} == {2.0, 4.0}
  assert {c['bits'] for c in corners} == {2, 3}
  assert {c['compare.seed'] for c in corners} == {0, 4}
  assert len(corners) == 1 + 4 + 1


@pytest.mark.parametrize(
  'given, sampler, words',
  [
    ({}, 'grid', ['at least one']),
    ({'a': []}, 'grid', ["'a'", 'empty']),
    ({'a': 3}, 'grid', ["'a'", 'list of values', '3']),
    ({'a': ('linear', 1.0, 2.0)}, 'grid', ["'a'", 'needs points']),
    ({'a': ('linear', 1.0, 2.0, 3)}, 'tpe', ["'a'", 'points', 'grid']),
    ({'a': ('log', 0.0, 2.0, 3)}, 'grid', ['above 0']),
    ({'a': ('linear', 2.0, 1.0, 3)}, 'grid', ['low < high']),
    ({'a': ('int', 0.5, 2)}, 'grid', ['low < high']),
    ({'a': ('linear', 1.0, 2.0, 1)}, 'grid', ['points', '>= 2']),
    ({'a': [1, 1]}, 'grid', ['twice']),
    ({'a, b': [(1, 2), (3,)]}, 'grid', ['2 names take 2 values']),
    ({'a, b': ('linear', 1, 2, 3)}, 'grid', ['list of tuples']),
    ({'a': [1], 'a, b': [(1, 2)]}, 'grid', ["'a'", 'twice']),
    ({'a': [lambda: 1]}, 'grid', ['plain data']),
  ],
)
def test_bad_spaces_are_named(given, sampler, words):
  with pytest.raises(space_lib.SpaceError) as caught:
    space_lib.make_space(given, sampler)
  for word in words:
    assert word in str(caught.value)


def test_a_grid_beyond_all_measure_is_refused():
  many = ('linear', 0.0, 1.0, 1000)
  space = space_lib.make_space({'a': many, 'b': many}, 'grid')
  with pytest.raises(space_lib.SpaceError, match='1000000 settings'):
    space.design('grid', None, 0)
  assert len(space.design('grid', 7, 0)) == 7
