import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation import rounded

from mq_jax.data import images as data
from mq_jax.evaluation import diffusion
from mq_jax.evaluation import images as images_lib
from mq_jax.models import networks

PIXELS = {'mean': (0.5,), 'std': (0.5,)}


@pytest.fixture(scope='module')
def batch():
  rng = np.random.default_rng(0)
  x = rng.integers(0, 256, (9, 4, 4, 1)).astype(np.uint8)
  return x, rng.integers(0, 9, 9).astype(np.int32)


def scaled(params, x, steps, labels):
  """A wrong guess that uses all it is given."""
  share = (steps + labels).astype(jnp.float32)[:, None, None, None] / 2000
  return params * x * share


def test_signal_shares():
  shares = diffusion.signal_shares()
  assert shares.shape == (1000,) and (np.diff(shares) < 0).all()
  assert shares[0] == 1 - 1e-4
  product = 1.0
  for i in range(500):
    product *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
  assert shares[499] == pytest.approx(product, rel=1e-12)


def test_noise_is_standard_and_of_the_image_alone():
  draw = jax.jit(diffusion.draw, static_argnums=(2, 3))
  index = jnp.arange(40)
  steps, noise = draw(3, index, (8, 8, 1), 1000)
  some, part = draw(3, index[::-1], (8, 8, 1), 1000)
  np.testing.assert_array_equal(some, steps[::-1])
  np.testing.assert_array_equal(part, noise[::-1])
  other, _ = draw(4, index, (8, 8, 1), 1000)
  assert (other != steps).mean() > 0.9
  assert steps.min() >= 0 and steps.max() < 1000
  assert len(set(steps.tolist())) > 35
  # 2560 values: five standard errors.
  assert abs(float(noise.mean())) < 0.1
  assert abs(float(noise.var()) - 1) < 0.14


def test_against_numpy(batch):
  x, y = batch
  shares = diffusion.signal_shares(50)
  found = diffusion.evaluate(
    scaled,
    jnp.float32(2.0),
    x,
    y,
    **PIXELS,
    reference=(scaled, jnp.float32(1.5)),
    shares=shares,
    seed=5,
    ranges=4,
    batch=4,
  )
  steps, noise = diffusion.draw(5, jnp.arange(9), (4, 4, 1), 50)
  steps, noise = np.asarray(steps), np.asarray(noise, np.float64)
  share = shares[steps][:, None, None, None]
  noisy = np.sqrt(share) * (x / 127.5 - 1) + np.sqrt(1 - share) * noise
  half = noisy * ((steps + y)[:, None, None, None] / 2000)
  error = 2 * half - noise
  each = (error**2).mean((1, 2, 3))
  assert found.mse == pytest.approx(each.mean(), rel=1e-5)
  assert found.mae == pytest.approx(np.abs(error).mean(), rel=1e-5)
  assert found.against == pytest.approx(((0.5 * half) ** 2).mean(), rel=1e-4)
  assert found.mse_error == pytest.approx(each.std(ddof=1) / 3, rel=1e-4)
  assert [row[:2] for row in found.by_step] == [
    (0, 12), (12, 25), (25, 38), (38, 50)
  ]  # fmt: skip
  assert sum(row[2] for row in found.by_step) == found.images == 9
  for low, high, count, mse, _ in found.by_step:
    inside = (steps >= low) & (steps < high)
    assert count == inside.sum()
    if count:
      assert mse == pytest.approx(each[inside].mean(), rel=1e-5)
    else:
      assert mse is None


def test_batch_does_not_matter(batch):
  x, y = batch
  of = lambda **more: diffusion.evaluate(
    scaled, jnp.float32(1.0), x, y, **PIXELS, **more
  )
  one, two = of(), of(batch=4)
  assert one.mse == pytest.approx(two.mse, rel=1e-6)
  assert one.against is None
  assert of() == one and of(seed=1) != one


def test_bad_input(batch):
  x, y = batch
  for match, images, labels, more in (
    ('float32', x.astype(np.float32), y, {}),
    ('labels of shape', x, y[:-1], {}),
    ('ranges=0', x, y, {'ranges': 0}),
    ('batch=0', x, y, {'batch': 0}),
  ):
    with pytest.raises(ValueError, match=match):
      diffusion.evaluate(scaled, {}, images, labels, **PIXELS, **more)


def torch_draws(count, size):
  """Steps below 1000 and noise as torch draws them after manual_seed(0).

  torch's CPU generator is the Mersenne twister seeded as NumPy's old one;
  normal values are Box and Muller's of 16 uniforms at a time, which have 24
  bits. Read in its sources (TransformationHelper, DistributionTemplates) and
  compared with torch 2.13.0: equal to 5e-7.
  """
  raw = np.random.RandomState(0)._bit_generator.random_raw
  steps = (raw(count) % 1000).astype(np.int32)
  uniform = (raw(count * size) & (2**24 - 1)).astype(np.float32) / 2**24
  first, second = np.split(uniform.reshape(-1, 16), 2, axis=1)
  radius = np.sqrt(-2 * np.log(1 - first))
  angle = np.float32(2 * np.pi) * second
  normal = [radius * np.cos(angle), radius * np.sin(angle)]
  return steps, np.concatenate(normal, 1).reshape(count, size)


@pytest.fixture(scope='module')
def asked(data_dir):
  """The network, and what its README asked it: images, steps, labels, noise."""
  net = networks.load(data_dir / 'dit-mnist')
  path = data_dir / 'mnist-t10k/t10k-images-idx3-ubyte.gz'
  pixels, labels = (x[:1000] for x in data.read_images(path))
  steps, noise = torch_draws(1000, 28 * 28)
  noise = noise.reshape(1000, 28, 28, 1)
  x = images_lib.normalized(jnp.asarray(pixels), *net.pixels)
  share = jnp.asarray(diffusion.signal_shares()[steps], jnp.float32)
  return (
    net,
    diffusion.noisy(x, jnp.asarray(noise), share),
    steps,
    labels,
    noise,
  )


@pytest.mark.parametrize(
  'bits, mse',
  [
    (None, 0.0402),
    (4, 0.0718),
    *[
      pytest.param(bits, mse, marks=pytest.mark.slow)
      for bits, mse in ((8, 0.0402), (6, 0.0422), (3, 0.1401), (2, 0.7245))
    ],
  ],
)
def test_published_errors_of_dit(asked, bits, mse):
  net, x, steps, labels, noise = asked
  params = net.params
  if bits is not None:
    params = rounded.kernels(params, bits, lambda n: n.startswith('dits/'))
  found = jax.jit(net.apply)(params, x, steps, labels)
  assert np.abs(noise).mean() == pytest.approx(0.80, abs=5e-3)
  # Four digits are published.
  assert float(jnp.square(found - noise).mean()) == pytest.approx(mse, abs=6e-5)


@pytest.mark.slow
def test_our_own_draws_say_the_same(asked, data_dir):
  net = asked[0]
  path = data_dir / 'mnist-t10k/t10k-images-idx3-ubyte.gz'
  pixels, labels = (x[:1000] for x in data.read_images(path))
  found = diffusion.evaluate(
    net.apply, net.params, pixels, labels, **net.pixels._asdict(), batch=250
  )
  # Other steps and noise: three standard errors.
  assert abs(found.mse - 0.0402) < 3 * found.mse_error < 0.006
