"""Steps that are broken in one way each, and what the suite says of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mq_jax import steps, testing
from mq_jax.steps import static, step

CHECKS = (
  *('runs', 'did_something', 'vmap', 'sharding', 'deterministic'),
  *('degenerate', 'gradient', 'padding', 'one_compile', 'size', 'finer'),
)


def _values(f):
  """A step that takes its values from the weights."""
  return lambda cluster: cluster._replace(value=f(cluster.weight))


def _branches(cluster):
  return cluster if cluster.weight[0] > 0 else cluster._replace(value=1.0)


def _takes_key(cluster):
  return cluster._replace(key=jax.random.split(cluster.key)[0])


def _looks_around(weight):
  # The callback sees all clusters of a batch, and does not keep them apart.
  most = lambda x: np.broadcast_to(np.abs(x).max(), x.shape).astype(x.dtype)
  shape = jax.ShapeDtypeStruct(weight.shape, weight.dtype)
  return jax.pure_callback(most, shape, weight, vmap_method='broadcast_all')


def _unrolled(weight):
  total = jnp.float32(0.0)
  for i in range(weight.shape[0]):
    total = jnp.maximum(total, weight[i])
  return jnp.minimum(weight, total)


@step
class Scale:
  """Its number is static, and nothing is rounded."""

  bits: int = static(2)

  def __call__(self, cluster):
    return cluster._replace(value=cluster.weight * self.bits / 8)


BROKEN = [
  ('runs', lambda cluster: cluster.value, {}, 'a step returns a Cluster'),
  ('runs', _values(lambda w: w.astype('bfloat16')), {}, 'value came as float'),
  ('runs', _branches, {}, 'raised TracerBoolConversionError'),
  ('runs', _takes_key, {'key': jax.random.key(0)}, 'the key is not the one'),
  ('did_something', lambda cluster: cluster, {}, 'as they were'),
  ('vmap', _values(_looks_around), {}, 'side by side equals'),
  ('sharding', _values(_looks_around), {}, 'spread over devices equals'),
  (
    'deterministic',
    _values(lambda w: w * np.random.rand()),  # drawn when it is traced
    {},
    'two traces',
  ),
  (
    'degenerate',
    _values(lambda w: w / jnp.max(jnp.abs(w))),
    {},
    'all zero cluster',
  ),
  (
    'gradient',
    _values(lambda w: jnp.sqrt(jnp.abs(w))),
    {},
    'at an all zero cluster',
  ),
  (
    'gradient',
    steps.RoundInliers(2, rounding='straight_through'),
    {'smooth': True},
    'finite differences say',
  ),
  ('padding', _values(lambda w: w + 1.0), {}, 'a value that is not 0'),
  (
    'padding',
    lambda cluster: cluster._replace(outlier=cluster.weight <= 0),
    {},
    'padding became an outlier',
  ),
  ('one_compile', Scale(), {'variants': [Scale(3)]}, 'a program of its own'),
  ('size', _values(_unrolled), {}, 'instead of Python loops'),
  (
    'finer',
    steps.RoundToNearest(3),
    {'finer': steps.RoundToNearest(2)},
    'not less than',
  ),
]


@pytest.mark.parametrize(
  'name, broken, options, told', BROKEN, ids=[x[0] for x in BROKEN]
)
def test_is_caught(name, broken, options, told):
  skip = {other: 'not asked here' for other in CHECKS[1:] if other != name}
  with pytest.raises(AssertionError, match=f': {name}: .*{told}'):
    testing.check_step(broken, skip=skip, **options)


def test_every_check_has_an_offender():
  assert {name for name, *_ in BROKEN} == set(CHECKS)


def test_report_and_all_failures_at_once():
  report = testing.check_step(
    steps.RoundToNearest(3), skip={'size': 'of no interest'}
  )
  assert report.skipped == {
    'size': 'of no interest',
    'finer': 'no finer step was given',
  }
  assert set(report.passed) | set(report.skipped) == set(CHECKS)
  assert 'size skipped: of no interest' in str(report)
  with pytest.raises(AssertionError) as caught:
    testing.check_step(_values(lambda w: w / jnp.max(jnp.abs(w))))
  lines = str(caught.value).splitlines()
  assert [line.split(': ')[2] for line in lines] == [
    *('degenerate', 'gradient', 'padding')
  ]
  with pytest.raises(ValueError, match="'sise' is no check; did you mean size"):
    testing.check_step(steps.RoundToNearest(3), skip={'sise': ''})
