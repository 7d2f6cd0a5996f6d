import jax.numpy as jnp
import numpy as np
import pytest

from mq_jax import sites
from mq_jax.evaluation import fidelity


def f(params, x):
  return jnp.tanh(x @ params['up']) @ params['down']


@pytest.fixture(scope='module')
def nets():
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  a = {'up': draw(6, 8), 'down': draw(8, 5)}
  b = {'up': a['up'] + 0.1 * draw(6, 8), 'down': a['down']}
  return a, b, [draw(2, 3, 6) for _ in range(3)]


def oracle(found, wanted):
  found, wanted = (x.reshape(-1, x.shape[-1]) for x in (found, wanted))
  relative = ((found - wanted) ** 2).sum() / (wanted**2).sum()
  norms = np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1)
  cosine = ((found * wanted).sum(1) / norms).mean()
  return cosine, relative, -10 * np.log10(relative), len(found)


def test_against_numpy(nets):
  a, b, batches = nets
  found = sites.find(f, a, batches[0])
  result = fidelity.compare(f, b, f, a, batches, sites=found)
  assert set(result) == {'output', 'up', 'down'}
  x = np.concatenate(batches).astype(np.float64)
  hidden = [np.tanh(x @ p['up'].astype(np.float64)) for p in (b, a)]
  outs = [h @ p['down'].astype(np.float64) for h, p in zip(hidden, (b, a))]
  # Squares of a batch are summed in float32.
  assert result['down'] == pytest.approx(oracle(*hidden), rel=1e-4)
  assert result['output'] == pytest.approx(oracle(*outs), rel=1e-4)
  same = fidelity.Fidelity(1.0, 0.0, np.inf, 18)
  assert result['up'] == pytest.approx(same, rel=1e-6)


def test_ends():
  out = lambda p, x: p * x
  of = lambda p, q: fidelity.compare(
    out, jnp.float32(p), out, jnp.float32(q), [jnp.ones((2, 3))]
  )['output']
  assert of(1, 1) == pytest.approx((1.0, 0.0, np.inf, 2))
  assert of(0, 0) == (1.0, 0.0, np.inf, 2)
  assert of(0, 1) == (0.0, 1.0, 0.0, 2)
  assert of(1, 0) == (0.0, np.inf, -np.inf, 2)
  assert of(-2, 1) == pytest.approx((-1.0, 9.0, -10 * np.log10(9), 2))
  assert np.isnan(of(np.nan, 1).sqnr_db)


def test_batches_of_several_arguments(nets):
  a, b, batches = nets
  two = lambda p, x, y: f(p, x + y)
  once = fidelity.compare(f, b, f, a, [2 * x for x in batches])
  twice = fidelity.compare(two, b, two, a, [(x, x) for x in batches])
  assert once['output'] == pytest.approx(twice['output'], rel=1e-6)


def test_bad_input(nets):
  a, b, batches = nets
  with pytest.raises(ValueError, match='no batches'):
    fidelity.compare(f, b, f, a, [])
  double = lambda p, x: jnp.tanh(x @ p['w']) @ p['w']
  square = {'w': jnp.ones((6, 6))}
  found = sites.find(double, square, batches[0])
  with pytest.raises(ValueError, match='w: is called 2 times'):
    fidelity.compare(double, square, double, square, batches, sites=found)
