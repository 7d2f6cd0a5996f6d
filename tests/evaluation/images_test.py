import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation import rounded

from mq_jax.data import images as data
from mq_jax.evaluation import images
from mq_jax.models import networks

MEAN, STD = (0.5, 0.25), (0.5, 2.0)


@pytest.fixture(scope='module')
def batch():
  rng = np.random.default_rng(0)
  x = rng.integers(0, 256, (7, 3, 3, 2)).astype(np.uint8)
  return x, rng.integers(0, 9, 7).astype(np.int32)


def linear(params, x):
  return x.reshape(x.shape[0], -1) @ params


@pytest.fixture(scope='module')
def params():
  return np.random.default_rng(1).standard_normal((18, 9)).astype(np.float32)


def test_against_numpy(batch, params):
  x, y = batch
  pixels = (x / 255 - np.array(MEAN)) / np.array(STD)
  scores = pixels.reshape(7, -1) @ params.astype(np.float64)
  log_z = np.log(np.exp(scores).sum(-1))
  nll = log_z - scores[np.arange(7), y]
  order = np.argsort(-scores, axis=-1)
  found = images.evaluate(linear, params, x, y, mean=MEAN, std=STD, batch=3)
  hit = order[:, 0] == y
  assert 0 < hit.mean() < 1 or (order[:, :5] == y[:, None]).any(1).mean() < 1
  assert found.top1 == pytest.approx(hit.mean())
  assert found.top5 == pytest.approx((order[:, :5] == y[:, None]).any(1).mean())
  assert found.nll == pytest.approx(nll.mean(), rel=1e-5)
  error = nll.std(ddof=1) / np.sqrt(7)
  assert found.nll_error == pytest.approx(error, rel=1e-5)
  assert found.top1_error == pytest.approx(hit.std(ddof=1) / np.sqrt(7))
  assert found.images == 7


def test_batch_does_not_matter_and_compiles_once(batch, params):
  x, y = batch
  apply = chex.assert_max_traces(lambda p, b: linear(p, b), n=2)
  more = dict(mean=MEAN, std=STD)
  seen = []
  one = images.evaluate(apply, params, x, y, **more)
  two = images.evaluate(
    apply, params, x, y, **more, batch=2, progress=lambda *n: seen.append(n)
  )
  again = images.evaluate(apply, params, x, y, **more, batch=2)
  assert two == again
  assert one == pytest.approx(two, rel=1e-6)
  assert seen == [(2, 7), (4, 7), (6, 7), (7, 7)]


def test_ties_and_labels_outside():
  x, flat = np.zeros((2, 1, 1, 1), np.uint8), lambda p, b: jnp.zeros((2, 4))
  of = lambda labels: images.evaluate(
    flat, {}, x, np.array(labels), mean=(0.0,), std=(1.0,), batch=2
  )
  assert of([0, 1]).top1 == 0.5  # the lowest of equal classes
  assert of([3, 3]).top5 == 1.0
  assert of([1, 2]).nll == pytest.approx(np.log(4))
  assert np.isnan(of([0, 4]).nll)


def test_bad_input(batch, params):
  x, y = batch
  of = lambda x=x, y=y, mean=MEAN, std=STD, **more: images.evaluate(
    linear, params, x, y, mean=mean, std=std, **more
  )
  for match, change in (
    ('float32', {'x': x.astype(np.float32)}),
    (r'uint8\[7, 3, 3\]', {'x': x[..., 0]}),
    (r'uint8\[0', {'x': x[:0]}),
    ('labels of shape', {'y': y[:-1]}),
    ('from -1', {'y': y * 0 - 1}),
    ('1 means', {'mean': (0.5,)}),
    ('batch=0', {'batch': 0}),
  ):
    with pytest.raises(ValueError, match=match):
      of(**change)


@pytest.fixture(scope='module')
def resnet20(data_dir):
  return networks.load(data_dir / 'resnet20-cifar10')


@pytest.mark.parametrize(
  'bits, top1',
  [
    (None, 0.910),
    (4, 0.900),
    *[
      pytest.param(bits, top1, marks=pytest.mark.slow)
      for bits, top1 in ((8, 0.912), (6, 0.914), (3, 0.804), (2, 0.106))
    ],
  ],
)
def test_published_accuracy_of_resnet20(resnet20, data_dir, bits, top1):
  """The README of the data; an image is 0.002."""
  found = data.read_images(data_dir / 'cifar10-subset/test500.npz')
  params = resnet20.params
  if bits is not None:
    params = rounded.kernels(params, bits, lambda name: True)
  scores = images.evaluate(
    resnet20.apply,
    jax.tree.map(jnp.asarray, params),
    *found,
    mean=resnet20.pixels.mean,
    std=resnet20.pixels.std,
    batch=250,
  )
  # Another order of sums may turn one image.
  assert scores.top1 == pytest.approx(top1, abs=0.0021)
