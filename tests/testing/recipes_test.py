"""Recipes that are broken in one way each, and what the suite says of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mq_jax import layouts, recipes, testing
from mq_jax._pytrees import pytree_dataclass
from mq_jax.compensation import Compensation
from mq_jax.recipes._integer import IntegerRows

CHECKS = (
  *('quantizes', 'did_something', 'recorded', 'bits_are_bytes', 'unpack'),
  *('json', 'damaged', 'deterministic', 'vmap', 'sharding', 'degenerate'),
  *('scaling', 'calibration', 'one_compile', 'size', 'finer'),
)


@pytree_dataclass
class Stored(IntegerRows):
  """Sound rows, whose layout a test replaces; the program stays the same."""

  def layout(self):
    return self.of(self.bits, self.group, self.symmetric)


Stored.of = layouts.Integer


def _stored():
  return recipes.Recipe(rows=Stored(3, 16), name='stored')


class Promises(layouts.Integer):
  def nbytes(self, codes, k, n):
    return super().nbytes(codes, k, n) - 1


class Forgets(layouts.Integer):
  def unpack(self, buffers, k, n):
    codes = super().unpack(buffers, k, n)
    return {**codes, 'level': codes['level'] | 1}


class Integer(layouts.Integer):
  """Has the name of another: JSON tells them not apart."""


class Trusts(layouts.Integer):
  def unpack(self, buffers, k, n):
    short = buffers['scale'].size % 2
    scale = np.pad(buffers['scale'], (0, short))
    return super().unpack({**buffers, 'scale': scale}, k, n)


class Shifts(layouts.Integer):
  def decode(self, codes, k, n):
    return super().decode(codes, k, n) + 1e-3


class Breaks(layouts.Integer):
  def decode(self, codes, k, n):
    return super().decode(codes, k, n) / 0.0


LAYOUTS = [
  ('quantizes', Breaks, 'not finite'),
  ('bits_are_bytes', Promises, 'promises'),
  ('unpack', Forgets, 'differ after pack and unpack'),
  ('json', Integer, 'came back as'),
  ('damaged', Trusts, "'scale' is a byte short"),
  ('degenerate', Shifts, 'zeros are not zeros'),
]


class Forged(IntegerRows):
  def counts(self, weight, codes):
    return {'weight_mse': jnp.float32(0.0)}


class Draws(IntegerRows):
  def fit(self, rows, saliency, whole):
    # Drawn when it is traced: another program each time.
    return super().fit(rows * (1 + 0.1 * np.random.rand()), saliency, whole)


class LooksAround(IntegerRows):
  def prepare(self, weight, saliency):
    most = lambda x: np.broadcast_to(np.abs(x).max(), x.shape[:-2] + (1, 1))
    shape = jax.ShapeDtypeStruct((1, 1), 'float32')
    return jax.pure_callback(most, shape, weight, vmap_method='broadcast_all')

  def fit(self, rows, saliency, whole):
    return super().fit(jnp.clip(rows, -0.3 * whole, whole), saliency, ())


class HasUnits(IntegerRows):
  def fit(self, rows, saliency, whole):
    return super().fit(jnp.clip(rows, -0.05, 0.05), saliency, whole)


class Unrolled(IntegerRows):
  def prepare(self, weight, saliency):
    total = jnp.float32(0.0)
    for i in range(0, weight.shape[0], 16):
      total = total + weight[i, 0] * 0.0
    return total

  def fit(self, rows, saliency, whole):
    return super().fit(rows + whole, saliency, ())


def _rows(cls):
  made = pytree_dataclass(type(cls.__name__, (cls,), {}))
  return lambda: recipes.Recipe(rows=made(3, 16), name=cls.__name__)


def _deaf():
  # So much damping that the Hessian is lost in it.
  rows = IntegerRows(3, 16)
  return recipes.Recipe(rows=rows, compensation=Compensation(1e12), name='deaf')


rtn = functools.partial(recipes.rtn, group=16)

BROKEN = [
  ('did_something', lambda: rtn(bits=2), {'worst': 1e-3}, 'more than worst'),
  ('recorded', _rows(Forged), {}, 'weight_mse is'),
  ('deterministic', _rows(Draws), {}, 'two traces'),
  ('vmap', _rows(LooksAround), {}, 'side by side has'),
  ('sharding', _rows(LooksAround), {}, 'spread over devices has'),
  ('scaling', _rows(HasUnits), {}, 'have a unit'),
  ('calibration', _deaf, {}, 'that says nothing'),
  (
    'one_compile',
    lambda: rtn(bits=2),
    {'variants': [recipes.rtn(bits=2, group=8)]},
    'not a leaf',
  ),
  ('size', _rows(Unrolled), {}, 'instead of Python loops'),
  ('finer', lambda: rtn(bits=3), {'finer': rtn(bits=2)}, 'not less than'),
]


def _only(name):
  return {other: 'not asked' for other in CHECKS[1:] if other != name}


@pytest.mark.parametrize(
  'name, make, options, told', BROKEN, ids=[x[0] for x in BROKEN]
)
def test_is_caught(name, make, options, told):
  with pytest.raises(AssertionError, match=f': {name}: .*{told}'):
    testing.check_recipe(make(), skip=_only(name), **options)


@pytest.mark.parametrize('name, layout, told', LAYOUTS, ids=lambda x: str(x))
def test_broken_layout_is_caught(name, layout, told, monkeypatch):
  monkeypatch.setattr(Stored, 'of', layout)
  with pytest.raises(AssertionError, match=f': {name}: .*{told}'):
    testing.check_recipe(_stored(), skip=_only(name))


def test_every_check_has_an_offender():
  found = {name for name, *_ in [*BROKEN, *LAYOUTS]}
  assert found == set(CHECKS)


def test_a_sound_recipe_of_ones_own_passes():
  # Not `Stored`: programs were traced while its layout was another.
  report = testing.check_recipe(
    _rows(IntegerRows)(), skip={'scaling': 'to be quick'}
  )
  assert report.thing == 'IntegerRows'
  assert set(report.skipped) == {'scaling', 'calibration', 'finer'}


def test_factories_and_what_is_none():
  report = testing.check_recipe(rtn, skip=_only('finer'))
  assert report.thing == 'rtn(group=16)'
  assert 'finer' in report.passed  # by more bits, found in the signature
  with pytest.raises(TypeError, match="'rtn' is no Recipe"):
    testing.check_recipe('rtn')
