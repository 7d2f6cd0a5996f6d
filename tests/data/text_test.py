import gzip

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mq_jax.data import text


def test_plain_and_gzip(tmp_path):
  (tmp_path / 'a.txt').write_bytes('é\n'.encode())
  (tmp_path / 'a.txt.gz').write_bytes(gzip.compress('é\n'.encode()))
  assert text.read_text(tmp_path / 'a.txt') == 'é\n'
  assert text.read_text(str(tmp_path / 'a.txt.gz')) == 'é\n'


WHOLE = gzip.compress(b'hello world')
BAD = {
  'empty.txt': (b'', 'holds no text'),
  'blank.txt': (b' \n', 'holds no text'),
  'latin.txt': (b'caf\xe9 au lait', '0xe9 at offset 3'),
  'plain.gz': (b'hello', 'not a whole gzip'),
  'cut.gz': (WHOLE[:-6], 'not a whole gzip'),
  'crc.gz': (WHOLE[:-8] + bytes(4) + WHOLE[-4:], 'not a whole gzip'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_text_is_refused(tmp_path, name):
  raw, message = BAD[name]
  (tmp_path / name).write_bytes(raw)
  with pytest.raises(ValueError, match=message):
    text.read_text(tmp_path / name)


def test_damaged_gzip_is_refused(tmp_path):
  damaged = WHOLE[:10] + bytes([WHOLE[10] ^ 6]) + WHOLE[11:]
  (tmp_path / 'a.gz').write_bytes(damaged)
  with pytest.raises(ValueError, match='not a whole gzip'):
    text.read_text(tmp_path / 'a.gz')


def test_missing_text(tmp_path):
  with pytest.raises(FileNotFoundError, match='no such file'):
    text.read_text(tmp_path)


@given(st.integers(1, 40), st.integers(1, 9), st.sampled_from([None, 99]))
def test_windows_predict_each_token_once_in_order(size, length, bos):
  tokens = np.arange(size)
  context = 0 if bos is not None else 1
  if size - context < length:
    with pytest.raises(ValueError, match='shorter than one window'):
      text.windows(tokens, length, bos=bos)
    return
  found = text.windows(tokens, length, bos=bos)
  assert found.dtype == np.int32 and found.shape[1] == length + 1
  predicted = found[:, 1:].ravel()
  np.testing.assert_array_equal(
    predicted, tokens[context : context + predicted.size]
  )
  assert size - context - predicted.size < length
  before = found[:, 0] if bos is None else found[:, 1] - 1
  np.testing.assert_array_equal(before, found[:, 1] - 1)
  assert bos is None or (found[:, 0] == bos).all()
