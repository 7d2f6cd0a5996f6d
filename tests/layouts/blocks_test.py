"""Layouts side by side in one matrix: cut, joined, stored, read back."""

import json

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

from mq_jax import artifacts, layouts, quantize, recipes
from mq_jax.artifacts import _format
from mq_jax.layouts import blocks


def random_codes(layout, k, n, rng):
  """Any codes that a layout can hold; plain numpy, which compiles nothing."""
  if isinstance(layout, layouts.Dense):
    return {'value': rng.normal(size=(k, n)).astype(ml_dtypes.bfloat16)}
  if isinstance(layout, layouts.InputScaled):
    codes = random_codes(layout.inner, k, n, rng)
    return {**codes, 'input_scale': np.float16(rng.uniform(0.5, 2.0, k))}
  if isinstance(layout, layouts.Blocks):
    shapes = layout.shapes(k, n)
    return blocks.join(
      [random_codes(p, *s, rng) for p, s in zip(layout.parts, shapes)]
    )
  groups = (-(-k // layout.group), n)
  top = 2**layout.bits
  return {
    'level': rng.integers(0, top, (k, n)).astype(np.int16),
    'zero': rng.integers(0, top, groups).astype(np.uint8),
    'scale': np.float16(rng.uniform(0.1, 1.0, groups)),
  }


INNER = (
  layouts.Dense(),
  layouts.Integer(2, 8, False),
  layouts.Integer(3, 5, False),
  layouts.InputScaled(layouts.Integer(4, 16, False)),
  layouts.Blocks(
    (layouts.Integer(5, 4, False), layouts.Dense()), axis='columns'
  ),
)


@hypothesis.given(st.integers(1, 50), st.integers(1, 50))
def test_equal_blocks_cover_the_axis(length, count):
  if count > length:
    with pytest.raises(ValueError, match='can not be cut'):
      blocks.spans(length, count)
    return
  found = blocks.spans(length, count)
  np.testing.assert_array_equal(
    np.concatenate([np.arange(length)[span] for span in found]),
    np.arange(length),
  )
  sizes = [span.stop - span.start for span in found]
  assert len(sizes) == count and max(sizes) - min(sizes) <= 1
  assert blocks.spans(length, count, sizes) == found


@hypothesis.settings(max_examples=20)
@hypothesis.given(
  parts=st.lists(st.sampled_from(INNER), min_size=1, max_size=4),
  axis=st.sampled_from(blocks.AXES),
  k=st.integers(8, 37),
  n=st.integers(8, 23),
  explicit=st.booleans(),
  seed=st.integers(0, 99),
)
def test_round_trip_is_exact(parts, axis, k, n, explicit, seed):
  rng = np.random.default_rng(seed)
  sizes = ()
  if explicit:  # at least two columns for the blocks of a block
    length = (k if axis == 'rows' else n) - 2 * len(parts)
    cuts = np.sort(rng.integers(0, length + 1, len(parts) - 1))
    sizes = np.diff([0, *cuts, length]) + 2
    sizes = tuple(int(x) for x in sizes)
  layout = layouts.Blocks(tuple(parts), axis, sizes)
  codes = random_codes(layout, k, n, rng)
  buffers = layout.pack(codes, k, n)
  assert layout.nbytes(codes, k, n) == sum(b.nbytes for b in buffers.values())
  assert layout.paper_bits(codes, k, n) <= 8 * layout.nbytes(codes, k, n)
  back = layout.unpack(buffers, k, n)
  assert back.keys() == codes.keys()
  for name, code in codes.items():
    assert back[name].dtype == code.dtype
    np.testing.assert_array_equal(back[name], code)
  text = json.dumps(layouts.to_json(layout))
  assert layouts.from_json(json.loads(text)) == layout


@pytest.mark.parametrize('axis', blocks.AXES)
def test_decode_is_concatenation_under_jit_and_vmap(axis):
  layout = layouts.Blocks(INNER, axis)
  k, n = 31, 29
  rng = np.random.default_rng(0)
  codes = random_codes(layout, k, n, rng)
  codes = jax.tree.map(jnp.asarray, codes)
  parts = lambda c: [p.decode(*rest) for p, *rest in layout.split(c, k, n)]
  want = np.concatenate(jax.jit(parts)(codes), axis=blocks.AXES.index(axis))
  assert want.shape == (k, n)
  decode = jax.jit(lambda c: layout.decode(c, k, n))
  np.testing.assert_array_equal(decode(codes), want)
  both = jax.tree.map(lambda x: jnp.stack([x, x]), codes)
  np.testing.assert_array_equal(jax.jit(jax.vmap(decode))(both)[1], want)


INTEGER = {'layout': 'Integer', 'bits': 4, 'group': 8, 'symmetric': True}


@pytest.mark.parametrize(
  'fields, words',
  [
    ({'parts': []}, 'no tuple of layouts'),
    ({'parts': [3]}, 'no tuple of layouts'),
    ({'parts': 'Dense'}, 'no tuple of layouts'),
    ({'parts': INTEGER}, 'no tuple of layouts'),
    ({'parts': [{'layout': 'os.system'}]}, 'os.system'),
    ({'parts': [INTEGER], 'axis': 'k'}, "axis='k'"),
    ({'parts': [INTEGER], 'axis': 1}, 'axis=1'),
    ({'parts': [INTEGER], 'sizes': [2, 3]}, '2 sizes for 1'),
    ({'parts': [INTEGER], 'sizes': [2.0]}, 'no whole'),
    ({'parts': [INTEGER], 'sizes': [True]}, 'no whole'),
    ({'parts': [INTEGER], 'more': 1}, 'unknown fields'),
    ({'parts': [INTEGER | {'bits': [4]}]}, r'bits=\[4\]'),
    ({}, 'parts'),
  ],
)
def test_wrong_descriptions_are_refused(fields, words):
  with pytest.raises(ValueError, match=words):
    layouts.from_json({'layout': 'Blocks', **fields})


def test_buffers_that_do_not_fit_are_refused():
  layout = layouts.Blocks((layouts.Dense(), INNER[1]))
  buffers = layout.pack(
    random_codes(layout, 9, 4, np.random.default_rng(0)), 9, 4
  )
  for strange in ('2/value', 'value', '00x/value', '0'):
    with pytest.raises(ValueError, match='none of 2 blocks'):
      layout.unpack(buffers | {strange: np.zeros(1, np.uint8)}, 9, 4)
  gone = {name: b for name, b in buffers.items() if name != '1/scale'}
  with pytest.raises(KeyError, match='1/scale'):
    layout.unpack(gone, 9, 4)
  for sizes in ((4, 4), (9, 0), (10, -1), (10**30, 1)):
    wrong = layouts.Blocks(layout.parts, sizes=sizes)
    with pytest.raises(ValueError, match='add up'):
      wrong.unpack(buffers, 9, 4)
  with pytest.raises(ValueError):
    layout.unpack(buffers, 1, 4)


@pytest.fixture(scope='module')
def matrix():
  weight = np.random.default_rng(0).normal(size=(21, 10)).astype(np.float32)
  tile = {
    'recipe': 'blocks',
    'axis': 'columns',
    'parts': [{'recipe': 'none'}] * 2,
  }
  recipe = recipes.blocks([recipes.rtn(bits=3), tile], sizes=[8, 13])
  return quantize.quantize_matrix(weight, recipe)


def test_split_and_join_undo_each_other(matrix):
  parts = quantize.split(matrix)
  assert [part.shape for part in parts] == [(8, 10), (13, 10)]
  assert sum(part.nbytes for part in parts) == matrix.nbytes
  again = quantize.join(parts, 'rows')
  assert again.layout == matrix.layout
  np.testing.assert_array_equal(np.asarray(again), np.asarray(matrix))
  assert quantize.split(parts[0]) == (parts[0],)
  for blocks_, axis in ((parts, 'columns'), (parts, 'k'), ((), 'rows')):
    with pytest.raises(ValueError, match='join'):
      quantize.join(blocks_, axis)


def test_an_artifact_holds_exactly_the_bytes_claimed(matrix, tmp_path):
  artifacts.save(tmp_path / 'a', {'w': matrix}, model={})
  size = (tmp_path / 'a' / 'packed.bin').stat().st_size
  assert 8 * size == matrix.ebw * matrix.size
  back = artifacts.load(tmp_path / 'a').params['w']
  assert back.layout == matrix.layout and back.recipe == matrix.recipe
  np.testing.assert_array_equal(np.asarray(back), np.asarray(matrix))
  for name, buffer in matrix.pack().buffers.items():
    np.testing.assert_array_equal(back.pack().buffers[name], buffer)


def test_a_lying_artifact_is_refused_by_name(matrix, tmp_path):
  artifacts.save(tmp_path / 'a', {'w': matrix}, model={})
  path = tmp_path / 'a' / 'manifest.json'
  good = path.read_text()

  def lie(change):
    manifest = json.loads(good)
    change(manifest['packed'][0])
    manifest['sha256'] = _format.manifest_sha256(manifest)
    path.write_text(json.dumps(manifest))

  def nest(entry):
    for _ in range(150):
      entry['layout'] = {'layout': 'Blocks', 'parts': [entry['layout']]}

  for change in (
    lambda entry: entry['layout'].update(sizes=[8, 14]),
    lambda entry: entry['layout'].update(sizes=[]),
    lambda entry: entry['layout'].update(axis='columns'),
    lambda entry: entry['layout']['parts'].reverse(),
    lambda entry: entry['layout']['parts'].pop(),
    lambda entry: entry['layout'].update(parts=[[INTEGER]]),
    lambda entry: entry['buffers'][0].update(name='7/level'),
    nest,
  ):
    lie(change)
    with pytest.raises(ValueError, match=r'packed\[0\]'):
      artifacts.load(tmp_path / 'a')
