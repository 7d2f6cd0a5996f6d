"""Bit streams: round trips and a hand-packed example."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from mq_jax import layouts
from mq_jax.layouts import _bits


@hypothesis.given(
  width=st.integers(1, 17), count=st.integers(0, 40), seed=st.integers(0, 99)
)
def test_unpack_undoes_pack(width, count, seed):
  fields = np.random.default_rng(seed).integers(0, 2**width, count)
  stream = _bits.pack_bits(fields, width)
  assert stream.size == _bits.nbytes(count, width)
  np.testing.assert_array_equal(
    _bits.unpack_bits(stream, width, (count,)), fields
  )


def test_first_field_is_lowest():
  stream = _bits.pack_bits(np.array([0b01, 0b10, 0b11, 0b00, 0b01]), 2)
  np.testing.assert_array_equal(stream, [0b00_11_10_01, 0b01])


def test_a_stream_of_the_wrong_length_is_refused():
  with pytest.raises(ValueError, match='need 2'):
    _bits.unpack_bits(np.zeros(3, np.uint8), 4, (4,))


@pytest.mark.parametrize(
  'data',
  [
    {'layout': 'Integer', 'bits': 4},
    {'layout': 'Integr', 'bits': 4, 'group': 8, 'symmetric': True},
    {'layout': 'Integer', 'bits': '4', 'group': 8, 'symmetric': True},
    {'layout': 'Integer', 'bits': 4, 'group': 8, 'symmetric': True, 'x': 1},
    'Integer',
  ],
  ids=str,
)
def test_wrong_descriptions_are_refused(data):
  with pytest.raises(ValueError):
    layouts.from_json(data)
