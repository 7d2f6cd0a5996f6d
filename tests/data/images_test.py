import gzip

import numpy as np
import pytest

from mq_jax.data import images


def idx(array):
  """An array of bytes as an IDX file."""
  sizes = b''.join(n.to_bytes(4, 'big') for n in array.shape)
  return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


@pytest.fixture
def arrays():
  rng = np.random.default_rng(0)
  x = rng.integers(0, 256, (5, 4, 3, 2)).astype(np.uint8)
  return x, np.arange(5, dtype=np.uint8)


def test_npz(tmp_path, arrays):
  x, y = arrays
  np.savez(tmp_path / 'a.npz', x=x, y=y)
  found = images.read_images(tmp_path / 'a.npz')
  np.testing.assert_array_equal(found.pixels, x)
  np.testing.assert_array_equal(found.labels, y)
  assert found.labels.dtype == np.int32
  np.savez(tmp_path / 'b.npz', x=x[..., 0])
  found = images.read_images(tmp_path / 'b.npz')
  np.testing.assert_array_equal(found.pixels, x[..., :1])
  assert found.labels is None


@pytest.mark.parametrize('end', ['', '.gz'])
def test_idx(tmp_path, arrays, end):
  x, y = arrays
  pack = gzip.compress if end else bytes
  file = tmp_path / f'some-images-idx3-ubyte{end}'
  file.write_bytes(pack(idx(x[..., 0])))
  assert images.read_images(file).labels is None
  beside = tmp_path / f'some-labels-idx1-ubyte{end}'
  beside.write_bytes(pack(idx(y)))
  found = images.read_images(file)
  np.testing.assert_array_equal(found.pixels, x[..., :1])
  np.testing.assert_array_equal(found.labels, y)


def test_mnist(data_dir):
  path = data_dir / 'mnist-t10k/t10k-images-idx3-ubyte.gz'
  found = images.read_images(path)
  assert found.pixels.shape == (10000, 28, 28, 1)
  assert found.labels[:5].tolist() == [7, 2, 1, 0, 4]


def test_refused(tmp_path, arrays):
  x, y = arrays
  file = tmp_path / 'a.npz'

  def refused(match, **found):
    np.savez(file, **found)
    with pytest.raises(ValueError, match=match):
      images.read_images(file)

  refused(r"no array x, only \['images'\]", images=x)
  refused(r'float32\[5, 4, 3, 2\]', x=x.astype(np.float32))
  refused(r'uint8\[5\]', x=y)
  refused('5 whole numbers from 0', x=x, y=y[:-1])
  refused('5 whole numbers from 0', x=x, y=y - 1.0)
  refused('5 whole numbers from 0', x=x, y=y.astype(int) - 1)
  refused('not a whole .npz', x=np.array([{}], object))  # never unpickled
  file.write_bytes(b'PK no')
  with pytest.raises(ValueError, match='not a whole .npz'):
    images.read_images(file)
  with pytest.raises(FileNotFoundError, match='no such file'):
    images.read_images(tmp_path / 'absent.npz')
  other = tmp_path / 'x-images-idx3-ubyte'
  for content, match in (
    (b'', 'begins with nothing'),
    (idx(y), 'begins with 00 00 08 01'),
    (idx(x[..., 0])[:-1], '60 values .* 59 follow'),
  ):
    other.write_bytes(content)
    with pytest.raises(ValueError, match=match):
      images.read_images(other)
  (tmp_path / 'x.gz').write_bytes(b'no')
  with pytest.raises(ValueError, match='gzip'):
    images.read_images(tmp_path / 'x.gz')
