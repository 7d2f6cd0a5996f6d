"""Tests of the frozen pytree dataclasses."""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
import pytest

from mq_jax._pytrees import pytree_dataclass, static


@pytree_dataclass
class Inner:
  low: float
  high: float = 1.0


@pytree_dataclass
class Outer:
  bits: int
  mode: str = static()
  inner: Inner = dataclasses.field(default_factory=lambda: Inner(0.5))
  names: tuple = static(default_factory=lambda: ('a', 'b'))
  saturate: bool = static(True, kw_only=True)

  def scaled(self, x):
    return jnp.float32(x) * jnp.float32(self.bits) + self.inner.low


def test_leaves_are_the_fields_not_declared_static():
  option = Outer(3, 'fast')
  assert jax.tree.leaves(option) == [3, 0.5, 1.0]
  paths = [
    jax.tree_util.keystr(p)
    for p, _ in jax.tree_util.tree_leaves_with_path(option)
  ]
  assert paths == ['.bits', '.inner.low', '.inner.high']
  doubled = jax.tree.map(lambda leaf: 2 * leaf, option)
  assert doubled == Outer(6, 'fast', Inner(1.0, 2.0))


def test_static_without_default_is_required():
  with pytest.raises(TypeError, match='mode'):
    Outer(3)
  assert Outer(3, 'fast').names == ('a', 'b')


def test_equal_options_compare_and_hash_equal():
  a, b = Outer(3, 'fast'), Outer(3, 'fast', Inner(0.5, 1.0))
  assert a == b and hash(a) == hash(b)
  assert a != Outer(3, 'slow') and a != Outer(4, 'fast')
  assert pickle.loads(pickle.dumps(a)) == a
  assert dataclasses.replace(a, bits=4) == Outer(4, 'fast')
  assert 'bits=3' in repr(a)


def test_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    Outer(3, 'fast').bits = 4


def test_jit_traces_again_for_static_fields_only():
  traces = []

  @jax.jit
  def run(option, x):
    traces.append(option.mode)
    return option.scaled(x)

  for bits in (2, 3, 4):
    assert float(run(Outer(bits, 'fast'), 2.0)) == 2 * bits + 0.5
  run(Outer(2, 'fast', Inner(7.0)), 2.0)
  assert traces == ['fast']
  run(Outer(2, 'slow'), 2.0)
  run(Outer(2, 'slow', saturate=False), 2.0)
  assert traces == ['fast', 'slow', 'slow']


def test_stacked_leaves_are_swept_by_vmap_and_differentiated():
  options = [Outer(b, 'fast', Inner(float(b))) for b in (2, 3)]
  stacked = jax.tree.map(lambda *leaves: jnp.array(leaves), *options)
  swept = jax.vmap(lambda option: option.scaled(10.0))(stacked)
  assert swept.tolist() == [22.0, 33.0]
  # A tree of axes is an option as well.
  axes = jax.tree.map(lambda _: 0, options[0])
  swept = jax.vmap(lambda option: option.scaled(10.0), in_axes=(axes,))
  assert swept(stacked).tolist() == [22.0, 33.0]
  gradient = jax.grad(lambda inner: Outer(2, 'x', inner).scaled(1.0))
  assert gradient(Inner(0.5)).low == 1.0
