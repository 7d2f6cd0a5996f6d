"""The benchmark on a model that takes no time."""

import json

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import evaluation_rate
from mq_jax.models import huggingface


def test_products_of_a_program():
  def f(a, b):
    c = jax.jit(jnp.matmul)(a, b)  # [2, 3] [3, 5]
    step = lambda carry, x: (
      jnp.einsum('bk,bk->b', carry, x)[:, None] + carry,
      0,
    )
    return jax.lax.scan(step, c, jnp.ones((4, 2, 5)))

  jaxpr = jax.make_jaxpr(f)(jnp.ones((2, 3)), jnp.ones((3, 5))).jaxpr
  found = list(evaluation_rate.products(jaxpr))
  assert [(p.lhs, p.rhs, n) for p, n in found] == [
    ((2, 3), (3, 5), 1),
    ((2, 5), (2, 5), 4),
  ]
  assert [p.operations for p, _ in found] == [2 * 2 * 3 * 5, 2 * 2 * 5]


def test_operations_of_a_decoder(tiny):
  model = huggingface.load(tiny)
  _, jaxpr = evaluation_rate.program(model, 3)
  found = sum(p.operations * n for p, n in evaluation_rate.products(jaxpr))
  d, f, v, t = 32, 64, 257, 32
  weights = 2 * d * d + 2 * d * 16 + 3 * d * f + d * v
  attention = 2 * t * d  # scores and values, two heads of 16
  assert found == 3 * t * 2 * (weights + attention)


@pytest.mark.slow  # each product is compiled by itself
def test_rows_are_measured(tiny):
  model = huggingface.load(tiny)
  rows = evaluation_rate.measure(model, [1, 2], rounds=1)
  assert [row['batch'] for row in rows] == [1, 2]
  for row in rows:
    floor = row['floor_microseconds_per_token']
    assert floor > 0 and row['operations_per_token'] == 38976
    share = floor / row['microseconds_per_token']
    assert row['share_of_floor'] == pytest.approx(share)
  found = {'model': 'm', 'device': 'x', 'cores': 1, 'load': [0, 0]}
  json.dumps(found | {'rows': rows})
  assert '| 2 | 0.04 |' in evaluation_rate.markdown(found | {'rows': rows})
