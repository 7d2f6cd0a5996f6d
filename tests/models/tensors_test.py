import json
import os
import struct

import hypothesis
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

from mq_jax.models import tensors


def entry(**changes):
  return {'dtype': 'F32', 'shape': [4], 'data_offsets': [0, 16], **changes}


def write(path, header, data=bytes(16), length=None):
  raw = header if isinstance(header, bytes) else json.dumps(header).encode()
  length = len(raw) if length is None else length
  path.write_bytes(struct.pack('<Q', length) + raw + data)
  return path


def some_tensors():
  return {
    'bf16': np.arange(4, dtype=ml_dtypes.bfloat16),
    'f8': np.ones(3, ml_dtypes.float8_e4m3fn),
    'f16': np.ones((2, 3), np.float16),
    'empty': np.zeros((0, 3), np.float32),
    'scalar': np.array(3.0, np.float32),
    'strided': np.arange(20.0).reshape(4, 5).T,
    'big_endian': np.arange(3).astype('>i4'),
    'bool': np.array([True, False]),
  }


def test_round_trip_keeps_names_values_dtypes_and_shapes(tmp_path):
  path = tmp_path / 'x.safetensors'
  tensors.write_safetensors(path, some_tensors(), {'format': 'np'})
  found = tensors.read_safetensors(path)
  assert found.keys() == some_tensors().keys()
  for name, expected in some_tensors().items():
    assert found[name].dtype == expected.dtype.newbyteorder('=')
    assert found[name].shape == expected.shape
    np.testing.assert_array_equal(found[name], expected)
    assert not found[name].flags.writeable
  assert tensors.read_metadata(path) == {'format': 'np'}
  assert os.listdir(tmp_path) == ['x.safetensors']  # no temporary left


def test_unaligned_header_gives_aligned_arrays(tmp_path):
  data = np.arange(4, dtype=np.float32).tobytes()
  path = write(tmp_path / 'x', json.dumps({'a': entry()}).encode() + b' ', data)
  assert (path.stat().st_size - 16) % 4  # the tensors begin askew
  found = tensors.read_safetensors(path)['a']
  assert found.flags.aligned
  np.testing.assert_array_equal(found, np.arange(4))


def test_no_tensors(tmp_path):
  assert tensors.read_safetensors(write(tmp_path / 'x', {}, b'')) == {}


def test_failed_write_leaves_the_old_file(tmp_path):
  path = tmp_path / 'x.safetensors'
  tensors.write_safetensors(path, {'a': np.ones(2, np.float32)})
  with pytest.raises(ValueError, match="'b' is of dtype complex128"):
    tensors.write_safetensors(path, {'b': np.ones(2, complex)})
  with pytest.raises(ZeroDivisionError), tensors.replacing(path) as temporary:
    temporary.write_bytes(b'half')
    1 / 0  # noqa: B018
  assert tensors.read_safetensors(path).keys() == {'a'}
  assert os.listdir(tmp_path) == ['x.safetensors']
  with pytest.raises(ValueError, match='cannot name'):
    tensors.write_safetensors(path, {'__metadata__': np.ones(2)})
  with pytest.raises(ValueError, match='metadata'):
    tensors.write_safetensors(path, {}, {'a': 1})


ONE = b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}'
BAD_FILES = {
  'header longer than file': ({'a': entry()}, {'length': 500}, 'truncated'),
  'header of 2**64': ({'a': entry()}, {'length': 2**64 - 1}, 'truncated'),
  'header cut short': ({'a': entry()}, {'length': 9}, 'not JSON'),
  'tensors cut off': ({'a': entry()}, {'data': bytes(8)}, "'a': data_offsets"),
  'bytes left over': ({'a': entry()}, {'data': bytes(20)}, 'end at byte 16'),
  'not JSON': (b'hello', {}, 'not JSON'),
  'not UTF-8': (b'{"\xff":1}', {}, 'not JSON'),
  'not an object': ([1], {}, 'found a list'),
  'too deep': (b'{"a":' + b'[' * 100_000, {}, 'not JSON'),
  'endless number': (b'{"a":' + b'9' * 5000 + b'}', {}, 'not JSON'),
  'name twice': (ONE + b',' + ONE[1:] + b'}', {}, "'a' is given 2 times"),
  'lone surrogate': (
    ONE.replace(b'a', b'\\ud800', 1) + b'}',
    {},
    'not a valid',
  ),
  'not a number': (ONE + b',"b":NaN}', {}, "'b': expected"),
  'zeros after header': (ONE + b'}\0\0', {}, 'not JSON'),
  'field missing': ({'a': {'dtype': 'F32'}}, {}, 'expected .* found'),
  'field too many': ({'a': entry(x=1)}, {}, 'expected .* found'),
  'unknown dtype': ({'a': entry(dtype='F31')}, {}, "'F31' is not supported"),
  'dtype no text': ({'a': entry(dtype=['F32'])}, {}, 'not supported'),
  'sub-byte dtype': (
    {'a': entry(dtype='F4', shape=[32])},
    {},
    "'F4' is not supported",
  ),
  'negative size': ({'a': entry(shape=[-4])}, {}, r"'a': shape .*\[-4\]"),
  'two negatives': ({'a': entry(shape=[-2, -2])}, {}, "'a': shape"),
  'fraction': ({'a': entry(shape=[4.0])}, {}, "'a': shape"),
  'boolean size': ({'a': entry(shape=[True, 4])}, {}, "'a': shape"),
  'size no list': ({'a': entry(shape=4)}, {}, "'a': shape"),
  'overflowing size': ({'a': entry(shape=[2**62, 2**62])}, {}, "'a': shape"),
  'overflow hidden by 0': (
    {'a': entry(shape=[2**62, 2**62, 0], data_offsets=[0, 0])},
    {'data': b''},
    "'a': shape",
  ),
  'beyond int64': (
    {'a': entry(shape=[2**64, 0], data_offsets=[0, 0])},
    {'data': b''},
    "'a': shape",
  ),
  'too many axes': ({'a': entry(shape=[1] * 65 + [4])}, {}, "'a': shape"),
  'shape and span differ': ({'a': entry(shape=[5])}, {}, '20 bytes, found 16'),
  'offsets reversed': ({'a': entry(data_offsets=[16, 0])}, {}, 'begin, end'),
  'three offsets': ({'a': entry(data_offsets=[0, 8, 16])}, {}, 'begin, end'),
  'offset beyond file': (
    {'a': entry(data_offsets=[16, 32])},
    {},
    'from 0 to 16',
  ),
  'overlap': ({'a': entry(), 'b': entry()}, {}, "'b' overlaps 'a'"),
  'hole': (
    {
      'a': entry(shape=[2], data_offsets=[0, 8]),
      'b': entry(shape=[1], data_offsets=[12, 16]),
    },
    {},
    "'b' leaves a hole after 'a': expected to begin at byte 8, found 12",
  ),
  'metadata no texts': (
    {'a': entry(), '__metadata__': {'n': 1}},
    {},
    '__metadata__',
  ),
  'metadata a list': ({'a': entry(), '__metadata__': []}, {}, '__metadata__'),
}


@pytest.mark.parametrize('case', BAD_FILES)
def test_bad_file_is_refused(tmp_path, case):
  header, changes, message = BAD_FILES[case]
  path = write(tmp_path / 'bad.safetensors', header, **changes)
  with pytest.raises(ValueError, match=message) as error:
    tensors.read_safetensors(path)
  assert str(path) in str(error.value)
  assert len(str(error.value)) < 1000


@pytest.mark.parametrize('size', [0, 3, 8])
def test_file_too_short_for_a_header(tmp_path, size):
  (tmp_path / 'x').write_bytes(bytes(size))
  with pytest.raises(ValueError, match='x: '):
    tensors.read_safetensors(tmp_path / 'x')


def test_missing_file(tmp_path):
  with pytest.raises(FileNotFoundError, match='no such file'):
    tensors.read_safetensors(tmp_path / 'x')


@pytest.fixture(scope='module')
def valid_bytes(tmp_path_factory):
  path = tmp_path_factory.mktemp('valid') / 'x'
  tensors.write_safetensors(path, some_tensors(), {'a': 'b'})
  return path


@hypothesis.settings(max_examples=150)
@hypothesis.given(data=st.data())
def test_damaged_files_are_read_or_refused(valid_bytes, data):
  raw = bytearray(valid_bytes.read_bytes())
  header = 8 + int.from_bytes(raw[:8], 'little')
  spots = st.integers(0, header - 1)
  for spot in data.draw(st.lists(spots, min_size=1, max_size=3)):
    raw[spot] = data.draw(st.integers(0, 255))
  raw = raw[: data.draw(st.sampled_from([len(raw), len(raw) - 1, header]))]
  path = valid_bytes.with_name('damaged')
  path.write_bytes(raw)
  try:
    found = tensors.read_safetensors(path)
  except ValueError:
    return
  assert sum(a.nbytes for a in found.values()) == len(raw) - header
  for array in found.values():
    array.copy()  # every byte can be read


@pytest.fixture
def sharded(tmp_path):
  one, two = (np.full(n, n, np.float32) for n in (1, 2))
  tensors.write_safetensors(tmp_path / 's1.safetensors', {'one': one})
  tensors.write_safetensors(tmp_path / 's2.safetensors', {'two': two})

  def index(weight_map):
    text = json.dumps({'metadata': {}, 'weight_map': weight_map})
    (tmp_path / tensors.INDEX).write_text(text)
    return tmp_path

  index({'one': 's1.safetensors', 'two': 's2.safetensors'})
  index.folder = tmp_path
  return index


def test_shards_are_joined(sharded):
  found = tensors.read_folder(sharded.folder)
  assert {k: v.size for k, v in found.items()} == {'one': 1, 'two': 2}


@pytest.mark.parametrize(
  'shard',
  [
    '../s1.safetensors',
    '/etc/s1.safetensors',
    'a\\s1.safetensors',
    'c:s1.safetensors',
    's1.safetensors\0',
    's1.bin',
    '..',
    '',
    3,
    None,
  ],
)
def test_shard_outside_the_folder_is_refused(sharded, shard):
  folder = sharded({'one': shard})
  with pytest.raises(ValueError, match="'one': shard"):
    tensors.read_folder(folder)


@pytest.mark.parametrize('weight_map', [None, [], {}, 'x'])
def test_index_without_a_map_is_refused(sharded, weight_map):
  with pytest.raises(ValueError, match='weight_map'):
    tensors.read_folder(sharded(weight_map))


def test_shards_that_disagree_with_the_index(sharded):
  folder = sharded.folder
  s1, s2 = 's1.safetensors', 's2.safetensors'
  with pytest.raises(FileNotFoundError, match='s3.safetensors is missing'):
    tensors.read_folder(sharded({'one': s1, 'two': 's3.safetensors'}))
  with pytest.raises(ValueError, match=r"missing \['three'\]"):
    tensors.read_folder(sharded({'one': s1, 'two': s2, 'three': s2}))
  both = {'one': np.ones(1, np.float32), 'two': np.ones(1, np.float32)}
  tensors.write_safetensors(folder / s2, both)
  with pytest.raises(ValueError, match="'one' is in another shard too"):
    tensors.read_folder(sharded({'one': s1, 'two': s2}))
  with pytest.raises(ValueError, match=r"not in the index \['one'\]"):
    tensors.read_folder(sharded({'two': s2}))


def test_folder_without_safetensors(tmp_path):
  with pytest.raises(FileNotFoundError, match='no such folder'):
    tensors.read_folder(tmp_path / 'x')
  with pytest.raises(ValueError, match='neither'):
    tensors.read_folder(tmp_path)
  (tmp_path / 'pytorch_model.bin').write_bytes(b'never opened')
  with pytest.raises(ValueError, match='pickles can run code'):
    tensors.read_folder(tmp_path)
