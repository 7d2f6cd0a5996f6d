"""The same numbers on one device, on many, and on two processes."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sharded
from jax.sharding import PartitionSpec

from mq_jax import calibration, sharding
from mq_jax.evaluation import perplexity

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize(
  'text, sizes',
  [
    ('data=4,model=2', {'data': 4, 'model': 2}),
    (' model = 2 ', {'model': 2}),
  ],
)
def test_a_mesh_is_written_down(text, sizes):
  assert sharding.read_mesh(text) == sizes


@pytest.mark.parametrize('text', ['', '4', 'data=x', 'rows=2', 'data=1,data=2'])
def test_what_is_no_mesh_is_refused(text):
  with pytest.raises(ValueError, match='needs the form data=4,model=2'):
    sharding.read_mesh(text)


@pytest.mark.parametrize(
  'sizes, message',
  [
    ({'data': 0}, 'data needs a whole number >= 1, got 0'),
    ({'model': True}, 'model needs a whole number'),
    ({'data': 3, 'model': 2}, 'needs 6 devices; there are 2'),
  ],
)
def test_a_mesh_that_cannot_be(sizes, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(**sizes)


def test_where_weights_lie():
  mesh = sharding.make_mesh(1, 2)
  spec = lambda *shape: sharding.weight_sharding(shape, mesh).spec
  assert spec(6, 4) == PartitionSpec(None, 'model')
  assert spec(6, 5) == PartitionSpec('model', None)
  assert spec(7, 5) == spec(8) == spec() == PartitionSpec()


@pytest.mark.parametrize(
  'data, model', [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)]
)
def test_calibration_and_evaluation_on_a_mesh(tiny_llama, data, model):
  mesh = sharding.make_mesh(data, model)
  spread = sharding.on_mesh(tiny_llama, mesh)
  # Opened again, it compiles nothing again.
  assert sharding.on_mesh(tiny_llama, mesh).apply is spread.apply
  draw = np.random.default_rng(0)
  size = tiny_llama.config.vocab_size
  windows = draw.integers(0, size, (5, 17)).astype(np.int32)  # 2, 2 and 1

  def of(opened):
    score = perplexity.evaluate(opened.apply, opened.params, windows, batch=2)
    found = calibration.calibrate(
      opened.apply, opened.params, [windows[:4, :-1]]
    )
    return score.nll, found

  (nll, found), (want_nll, want) = of(spread), of(tiny_llama)
  np.testing.assert_allclose(nll, want_nll, rtol=1e-6)
  # Weights were divided for real, and so was what they gave.
  divided = {not x.is_fully_replicated for x in jax.tree.leaves(spread.params)}
  assert divided == ({True, False} if model > 1 else {False})
  for name, statistics in want.items():
    other = sharding.whole(found[name])
    assert other.gram.is_fully_replicated
    jax.tree.map(
      # Sums of 64 terms of float32 in another order.
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-3),
      other,
      statistics,
    )


def test_a_batch_is_divided():
  mesh = sharding.make_mesh(2, 1)
  seen = []
  apply = sharding.divided(lambda params, x: x + 1, mesh)
  for count in (4, 3):  # 3 can't be
    seen.append(jax.jit(apply)({}, jnp.zeros((count, 2))))
  assert [x.sharding.is_fully_replicated for x in seen] == [False, True]
  np.testing.assert_array_equal(sharding.to_host(seen[0]), np.ones((4, 2)))


def _run(golden_dir, *arguments, devices):
  environment = {
    **os.environ,
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
    'PYTHONPATH': str(ROOT),
  }
  return subprocess.Popen(
    [sys.executable, sharded.__file__, golden_dir / 'tiny-llama']
    + [str(x) for x in arguments],
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def _answer(process):
  out, err = process.communicate(timeout=900)
  assert process.returncode == 0, err[-2000:]
  return json.loads(out.splitlines()[-1])


def _check(found, want, devices):
  assert found['devices'] == devices
  assert found['choice'] == want['choice']
  np.testing.assert_allclose(found['nll'], want['nll'], rtol=1e-5)
  np.testing.assert_allclose(found['loss'], want['loss'], rtol=1e-3)
  for field, close in (('gram', 1e-3), ('table', 1e-5)):
    np.testing.assert_allclose(found[field], want[field], rtol=1e-4, atol=close)


@pytest.mark.slow
def test_eight_devices(golden_dir):
  want = sharded.outcome(golden_dir / 'tiny-llama')
  found = _answer(_run(golden_dir, 4, 2, devices=8))
  _check(found, want, 8)


@pytest.mark.slow
def test_two_processes(golden_dir):
  """Two devices each, over loopback: what both say is what one says."""
  want = sharded.outcome(golden_dir / 'tiny-llama')
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    where = f'127.0.0.1:{free.getsockname()[1]}'
  both = [_run(golden_dir, 2, 2, where, i, 2, devices=2) for i in range(2)]
  answers = [_answer(process) for process in both]
  assert answers[0] == answers[1]
  _check(answers[0], want, 4)
