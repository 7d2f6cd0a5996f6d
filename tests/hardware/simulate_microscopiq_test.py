"""The datapath against integer products of independently decoded weights."""

import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mq_jax import layouts, quantize, recipes
from mq_jax.hardware.simulate import microscopiq
from mq_jax.models import bundled


def decoded(codes, layout, k, n):
  """Weights as Python integers w, in units of 2^unit. object[k, n], int.

  Written from the format: {sign, magnitude} elements, halves of outliers in
  the slots of the permutation list, 1.m times 2^osf.
  """
  codes = {name: np.asarray(code) for name, code in codes.items()}
  bits, b = layout.bits, layout.micro_block
  unit = int(min(codes['isf'].min(), codes['osf'].min() - bits, 0))
  element = codes['element'].astype(int)
  sign = 1 - 2 * (element >> (bits - 1))
  magnitude = element & ((1 << (bits - 1)) - 1)
  weight = np.zeros(element.shape, object)
  for i, j in np.argwhere(magnitude > 0):
    isf = int(codes['isf'][i, j // layout.block])
    weight[i, j] = int(sign[i, j] * magnitude[i, j]) << (isf - unit)
  for i, u, p in np.argwhere(codes['upper'] != codes['lower']):
    high = u * b + codes['upper'][i, u, p]
    low = u * b + codes['lower'][i, u, p]
    half = bits // 2
    mantissa = int((magnitude[i, high] << half) + magnitude[i, low])
    value = int(sign[i, high]) * ((1 << bits) + mantissa)
    weight[i, high] = value << (int(codes['osf'][i, u]) - bits - unit)
    weight[i, low] = 0
  return weight[:, :n], unit


def check(product, codes, layout, x, k, n):
  """Equal, bit for bit, to the product of integers without bound."""
  weight, unit = decoded(codes, layout, k, n)
  want = x.astype(object) @ weight
  assert product.accumulator.dtype == np.int64
  assert product.accumulator.shape == want.shape
  # Both in the lower unit.
  low = min(unit, int(product.exponent.min()))
  scale = lambda by: np.array([1 << int(e) for e in by], object)
  got = product.accumulator.astype(object) * scale(product.exponent - low)
  assert (got == want * (1 << (unit - low))).all()


def random_codes(rng, layout, k, n, *, share=0.5, spread=3):
  """Codes as any quantizer may leave them: 0..4 outliers, all pairings."""
  bits, b = layout.bits, layout.micro_block
  blocks = -(-n // layout.block)
  micros = blocks * layout.block // b
  stored = -(-n // b)
  shape = (k, micros, b)
  slots = np.argsort(rng.random(shape), axis=-1).astype(np.uint8)
  count = rng.integers(1, b // 2 + 1, (k, micros, 1))
  count *= rng.random((k, micros, 1)) < share
  count[:, stored:] = 0
  used = np.arange(b // 2) < count
  upper = np.where(used, slots[..., : b // 2], 0)
  lower = np.where(used, slots[..., b // 2 :], 0)
  element = rng.integers(0, 1 << bits, shape).astype(np.uint8)
  top = 1 << (bits - 1)
  for i, u, p in np.argwhere(used):
    at, to = upper[i, u, p], lower[i, u, p]
    half = (1 << (bits // 2)) - 1  # the other bits of a half are spare
    element[i, u, at] &= top | half
    element[i, u, to] = (element[i, u, at] & top) | (element[i, u, to] & half)
  element = element.reshape(k, -1)
  element[:, stored * b :] = 0
  small = lambda *s: rng.integers(-spread, spread + 1, s).astype(np.int8)
  return {
    'element': element,
    'isf': small(k, blocks),
    'osf': np.where(used.any(axis=-1), small(k, micros), 0).astype(np.int8),
    'upper': upper,
    'lower': lower,
  }


def activations(rng, m, k, bits=8):
  return rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), (m, k))


@pytest.mark.parametrize('bits', [2, 4])
def test_multiplier_is_exact(bits):
  """All words times all activations."""
  word, x = np.meshgrid(np.arange(16), np.arange(-128, 128))
  products = microscopiq.multiply(
    jnp.asarray(word, jnp.int32), jnp.asarray(x, jnp.int32), bits
  )
  assert len(products) == 4 // bits
  for lane, product in enumerate(products):
    element = word >> (lane * bits) & ((1 << bits) - 1)
    top = 1 << (bits - 1)
    value = np.where(element & top, -1, 1) * (element & (top - 1))
    np.testing.assert_array_equal(product, value * x)


def walkthrough():
  """Weight 1 for input 0, outlier 1.5 = 1.10b for input 1; 8 outputs."""
  layout = layouts.MicroScopiQ(bits=2, block=8)
  element = np.zeros((2, 8), np.uint8)
  element[:, 0] = 1
  pairs = np.zeros((2, 1, 4), np.uint8)
  lower = pairs.copy()
  lower[1, 0, 0] = 3
  codes = {
    'element': element,
    'isf': np.zeros((2, 1), np.int8),
    'osf': np.zeros((2, 1), np.int8),
    'upper': pairs,
    'lower': lower,
  }
  return codes, layout


def test_walkthrough_gives_56():
  """iAcc 8, iAct 32, weight 1.5: MicroScopiQ's example."""
  codes, layout = walkthrough()
  x = np.array([[8, 32]])
  product = microscopiq.matmul(codes, layout, x, 2, 8, columns=8)
  np.testing.assert_array_equal(product.values(), [[56] + 7 * [0]])
  assert product.exponent.tolist() == 8 * [-2]
  assert product.accumulator[0, 0] == 4 * 56
  assert (product.inlier_shift, product.outlier_shift) == (2, 0)
  np.testing.assert_array_equal(product.passes, [[0, 0], [1, 0]])


def test_sign_of_a_hidden_bit_without_mantissa():
  """-1.0: both halves are zero, only their sign bits are left."""
  codes, layout = walkthrough()
  codes['element'][1, [0, 3]] = 2
  product = microscopiq.matmul(
    codes, layout, np.array([[8, 32]]), 2, 8, columns=8
  )
  assert product.values()[0].tolist() == [8 - 32] + 7 * [0]


@hypothesis.given(
  seed=st.integers(0, 2**32 - 1),
  bits=st.sampled_from([2, 4]),
  n=st.integers(1, 32),
  links=st.sampled_from([1, 2]),
)
@hypothesis.settings(max_examples=30)
def test_equals_integer_product(seed, bits, n, links):
  k = 6
  rng = np.random.default_rng(seed)
  layout = layouts.MicroScopiQ(bits=bits, block=24)
  codes = random_codes(rng, layout, k, n)
  x = activations(rng, 3, k)
  product = microscopiq.matmul(
    codes, layout, x, k, n, link_values=links, columns=16
  )
  check(product, codes, layout, x, k, n)


@pytest.mark.parametrize(
  'options',
  [
    {'micro_block': 4},
    pytest.param({'micro_block': 16}, marks=pytest.mark.slow),
    pytest.param({'columns': 128}, marks=pytest.mark.slow),
  ],
)
def test_other_blocks_and_arrays(options):
  rng = np.random.default_rng(1)
  columns = options.pop('columns', 32)
  layout = layouts.MicroScopiQ(bits=2, block=64, **options)
  k, n = 1, 150
  codes = random_codes(rng, layout, k, n)
  x = activations(rng, 2, k)
  product = microscopiq.matmul(
    codes, layout, x, k, n, link_values=1, columns=columns
  )
  check(product, codes, layout, x, k, n)


@functools.cache
def every_list():
  """All lists of 0..4 pairs in a micro-block of 8. u8[list, 2, 4]."""
  lists = []
  for count in range(5):
    for upper in itertools.combinations(range(8), count):
      rest = [slot for slot in range(8) if slot not in upper]
      for lower in itertools.permutations(rest, count):
        empty = (0,) * (4 - count)
        lists.append((upper + empty, lower + empty))
  return np.array(lists, np.uint8)


@pytest.mark.parametrize('links', [1, 2])
@pytest.mark.parametrize('bits', [2, 4])
def test_every_route(bits, links):
  """All 5937 lists of a micro-block of 8, each once in one matrix."""
  lists = every_list()
  k, n = 62, 768
  rng = np.random.default_rng(bits)
  lists = np.pad(lists, ((0, k * n // 8 - len(lists)), (0, 0), (0, 0)))
  layout = layouts.MicroScopiQ(bits=bits)
  codes = random_codes(rng, layout, k, n, share=0)
  pairs = lists[rng.permutation(len(lists))].reshape(k, n // 8, 2, 4)
  codes['upper'], codes['lower'] = pairs[:, :, 0], pairs[:, :, 1]
  half = (1 << (bits // 2)) - 1
  top = 1 << (bits - 1)
  element = codes['element'].reshape(k, n // 8, 8)
  for i, u, p in np.argwhere(codes['upper'] != codes['lower']):
    at, to = codes['upper'][i, u, p], codes['lower'][i, u, p]
    element[i, u, at] &= top | half
    element[i, u, to] = (element[i, u, at] & top) | (element[i, u, to] & half)
  codes['osf'] = rng.integers(-4, 5, codes['osf'].shape).astype(np.int8)
  x = activations(rng, 2, k)
  product = microscopiq.matmul(codes, layout, x, k, n, link_values=links)
  check(product, codes, layout, x, k, n)
  assert set(np.unique(product.passes)) == ({1, 2} if links == 1 else {1})


@functools.cache
def real_layer(kind, bits):
  """A packed projection of the model with outliers; and what it stands for."""
  params = bundled.load('reference-planted').params
  leaf = next(
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    if kind in jax.tree_util.keystr(path)
  )
  weight = leaf.reshape(-1, *leaf.shape[-2:])[0]
  q = quantize.quantize_matrix(weight, recipes.microscopiq(bits=bits))
  return layouts.unpack(q.pack()), np.asarray(q.dequantize(), np.float64)


@pytest.mark.parametrize(
  'kind, bits',
  [
    ('q_proj', 2),
    pytest.param('q_proj', 4, marks=pytest.mark.slow),
    pytest.param('o_proj', 2, marks=pytest.mark.slow),
  ],
)
def test_real_layers_from_packed_bytes(kind, bits):
  back, values = real_layer(kind, bits)
  k, n = values.shape
  x = activations(np.random.default_rng(0), 4, k)
  for links in (1, 2):
    product = microscopiq.matmul(
      back.codes, back.layout, x, k, n, link_values=links
    )
    # Integers below 2^53: sums in float64 are exact.
    np.testing.assert_array_equal(product.values(), x @ values)
    assert product.passes.max() >= 1
  weights = values / np.ldexp(1.0, product.exponent)
  np.testing.assert_array_equal(weights, np.round(weights))
  np.testing.assert_array_equal(
    product.accumulator, x @ weights.astype(np.int64)
  )


def test_part_of_a_real_layer():
  back, values = real_layer('q_proj', 2)
  (k, full), n = values.shape, 203  # the last micro-block is 3 wide
  assert full == 256  # as many macro-blocks
  x = activations(np.random.default_rng(1), 4, k)
  product = microscopiq.matmul(back.codes, back.layout, x, k, n)
  np.testing.assert_array_equal(product.values(), x @ values[:, :n])


def test_scales_that_no_value_uses_do_not_decide():
  rng = np.random.default_rng(0)
  layout = layouts.MicroScopiQ(bits=2, block=16)
  codes = random_codes(rng, layout, 6, 16, share=0)
  codes['element'][2] = 0
  codes['isf'][2] = -127
  x = activations(rng, 2, 6)
  product = microscopiq.matmul(codes, layout, x, 6, 16, columns=8)
  check(product, codes, layout, x, 6, 16)
  assert product.inlier_shift <= 6
  # All zero: any unit is right, none is -127.
  codes['element'][:] = 0
  product = microscopiq.matmul(codes, layout, x, 6, 16, columns=8)
  assert not product.accumulator.any() and not product.exponent.any()


def test_outliers_among_zeros_and_far_scales():
  rng = np.random.default_rng(4)
  layout = layouts.MicroScopiQ(bits=4, block=16)
  codes = random_codes(rng, layout, 6, 32, share=0.7, spread=12)
  roles = np.zeros((6, 4, 8), bool)
  for name in ('upper', 'lower'):
    i, u, p = np.nonzero(codes['upper'] != codes['lower'])
    roles[i, u, codes[name][i, u, p]] = True
  codes['element'][::2] *= roles.reshape(6, 32)[::2]  # only outliers there
  x = activations(rng, 2, 6, bits=16)
  product = microscopiq.matmul(codes, layout, x, 6, 32, columns=8)
  check(product, codes, layout, x, 6, 32)
  assert product.inlier_shift + product.outlier_shift > 24


def test_sums_of_63_bits_fit_and_more_do_not():
  layout = layouts.MicroScopiQ(bits=2, block=8)
  codes = {
    'element': np.ones((2, 8), np.uint8),
    'isf': np.array([[0], [31]], np.int8),
    'osf': np.zeros((2, 1), np.int8),
    'upper': np.zeros((2, 1, 4), np.uint8),
    'lower': np.zeros((2, 1, 4), np.uint8),
  }
  x = np.array([[2**31 - 1, 2**31 - 1], [-(2**31), 2**31 - 1]])
  product = microscopiq.matmul(codes, layout, x, 2, 8, columns=8)
  check(product, codes, layout, x, 2, 8)
  codes['isf'][1] = 33
  with pytest.raises(ValueError, match=r'left shifts of 0\.\.33 \(inliers\)'):
    microscopiq.matmul(codes, layout, x, 2, 8, columns=8)


def trace(k):
  rng = np.random.default_rng(0)
  pairs = np.zeros((2, k, 4, 4), np.uint8)
  table, lists, _ = microscopiq._tabulate(*pairs, 2)
  element = rng.integers(0, 4, (k, 32), np.uint8)
  i64 = lambda width: np.zeros((k, width), np.int64)
  rows = microscopiq._Rows(element, lists, i64(2), i64(4), i64(4))
  with jax.enable_x64(True):
    run = functools.partial(microscopiq._run, bits=2, columns=16)
    return jax.make_jaxpr(run)(*jax.tree.map(jnp.asarray, (rows, table)))


def test_program_does_not_grow_with_k():
  count = lambda k: str(trace(k)).count(' = ')
  assert count(4) == count(400)


def test_one_program_for_other_numbers_and_lists():
  rng = np.random.default_rng(0)
  layout = layouts.MicroScopiQ(bits=2, block=16)
  run = lambda share: microscopiq.matmul(
    random_codes(rng, layout, 9, 16, share=share),
    layout,
    activations(rng, 2, 9),
    9,
    16,
    columns=8,
  )
  run(0.0)
  size = microscopiq._run._cache_size()
  run(0.9)
  run(0.3)
  assert microscopiq._run._cache_size() == size


def spoil(**changes):
  codes, layout = walkthrough()
  given = {
    'codes': codes,
    'layout': layout,
    'activations': np.array([[8, 32]]),
    'k': 2,
    'n': 8,
    'columns': 8,
  }
  return microscopiq.matmul(**{**given, **changes})


@pytest.mark.parametrize(
  'changes, error, message',
  [
    ({'layout': layouts.Dense()}, TypeError, 'layout is Dense'),
    (
      {'layout': layouts.MicroScopiQ(bits=2, axis='in')},
      ValueError,
      "axis='in'; the datapath needs axis='out'",
    ),
    (
      {'layout': layouts.MicroScopiQ(bits=2, pruned=False)},
      ValueError,
      'pruned=False',
    ),
    ({'layout': layouts.MicroScopiQ(bits=3)}, ValueError, 'bits=3'),
    ({'columns': 4}, ValueError, 'columns=4 with micro-blocks of 8'),
    ({'columns': 24}, ValueError, 'columns=24'),
    ({'columns': 0}, ValueError, 'columns=0'),
    ({'n': 9}, ValueError, r"'element' has shape \(2, 8\); k=2, n=9"),
    ({'activations': np.ones((1, 2))}, TypeError, 'float64; integers'),
    ({'activations': np.ones((1, 3), int)}, ValueError, r'\[m, 2\] is needed'),
    ({'activations': np.ones((0, 2), int)}, ValueError, 'no activations'),
    ({'activations': np.array([[1, 2**31]])}, ValueError, 'not within i32'),
    ({'link_values': 0}, ValueError, 'link_values=0'),
  ],
)
def test_refuses(changes, error, message):
  with pytest.raises(error, match=message):
    spoil(**changes)


def test_refuses_a_slot_used_twice():
  codes, layout = walkthrough()
  codes['upper'][1, 0, 1], codes['lower'][1, 0, 1] = 5, 3
  with pytest.raises(ValueError, match='uses slot 3 twice'):
    spoil(codes=codes)
