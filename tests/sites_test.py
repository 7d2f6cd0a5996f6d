"""Sites: names and sizes, taps and rewrites, against hand-written truths."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

from mq_jax import sites
from mq_jax.models import decoder


def normal(seed, *shape):
  """Small whole numbers: sums of their products are exact in float32."""
  values = np.random.default_rng(seed).integers(-4, 5, shape)
  return jnp.asarray(values, jnp.float32)


def filled(shapes):
  """Parameters of these shapes; an initialiser would take long to compile."""
  leaves, tree = jax.tree.flatten(shapes)
  values = [normal(i, *x.shape) / 8 for i, x in enumerate(leaves)]
  return tree.unflatten(values)


@dataclasses.dataclass
class Case:
  """A function and what is to be found in it.

  `sites` maps a name to (m, k, n) and whatever else is not the default.
  """

  f: Callable[..., Any]
  params: Any
  batch: tuple[Any, ...]
  sites: dict[str, tuple[tuple[int, int, int], dict[str, Any]]]
  vmap: bool = True


CASES: dict[str, Callable[[], Case]] = {}


def case(build):
  CASES[build.__name__] = build
  return build


X = normal(0, 2, 5, 4)  # [b, t, features]


# Plain functions


@case
def plain_mlp():
  f = lambda p, x: jax.nn.relu(x @ p['up']) @ p['down']
  params = {'up': normal(1, 4, 6), 'down': normal(2, 6, 3)}
  return Case(
    f, params, (X,), {'up': ((10, 4, 6), {}), 'down': ((10, 6, 3), {})}
  )


@case
def weight_on_the_left():
  f = lambda p, x: p['w'] @ x
  return Case(
    f,
    {'w': normal(1, 3, 4)},
    (normal(2, 4, 7),),
    {'w': ((7, 4, 3), {'side': 'lhs'})},
  )


@case
def transposed():
  return Case(
    lambda w, x: x @ w.T, normal(1, 3, 4), (X,), {'params': ((10, 4, 3), {})}
  )


@case
def einsum_heads():
  """Reduction over two axes which the call lists in another order."""
  f = lambda p, x: jnp.einsum('bthd,dho->bto', x, p['o'])
  return Case(
    f,
    {'o': normal(1, 3, 2, 5)},
    (normal(2, 2, 4, 2, 3),),
    {'o': ((8, 6, 5), {})},
  )


@case
def reshaped_weight():
  """[k, h*d] cut into heads, and [h, d, n] put together."""

  def f(p, x):
    y = jnp.einsum('btk,khd->bthd', x, p['a'].reshape(4, 2, 3))
    return y.reshape(2, 5, 6) @ p['b'].astype(jnp.float32).reshape(6, 3)

  params = {'a': normal(1, 4, 6), 'b': normal(2, 2, 3, 3)}
  return Case(f, params, (X,), {'a': ((10, 4, 6), {}), 'b': ((10, 6, 3), {})})


@case
def identities():
  """What a weight may pass through on its way and stay itself."""

  def f(w, x):
    w = lax.stop_gradient(w).astype(jnp.bfloat16).astype(jnp.float32)
    w = lax.optimization_barrier(jnp.copy(w)[None])
    w = lax.squeeze(lax.expand_dims(w, (0,)), (0, 1))
    return x @ w

  return Case(f, normal(1, 4, 3), (X,), {'params': ((10, 4, 3), {})})


@case
def experts():
  f = lambda p, x: jnp.einsum('etk,ekn->etn', x, p['experts'])
  return Case(
    f,
    {'experts': normal(1, 3, 4, 2)},
    (normal(2, 3, 6, 4),),
    {'experts': ((6, 4, 2), {'groups': 3})},
  )


@case
def vmapped():
  """Weights and data mapped together: a batched matmul."""
  return Case(
    lambda w, x: jax.vmap(lambda w, x: jnp.tanh(x @ w))(w, x),
    normal(1, 2, 4, 3),
    (X,),
    {'params': ((5, 4, 3), {'groups': 2})},
  )


@case
def vmapped_weight():
  """Weights mapped alone: more outputs of one matmul."""
  return Case(
    lambda w, x: jax.vmap(lambda w: x @ w)(w),
    normal(1, 2, 4, 3),
    (X,),
    {'params': ((10, 4, 6), {})},
  )


@case
def used_twice():
  f = lambda p, x: (x @ p['w']) @ p['w']
  return Case(
    f, {'w': normal(1, 4, 4)}, (X,), {'w': ((20, 4, 4), {'calls': 2})}
  )


@case
def tied_embedding():
  f = lambda p, t: jnp.tanh(p['e'][t]) @ p['e'].T
  return Case(
    f,
    {'e': normal(1, 7, 4)},
    (jnp.array([[1, 2, 3], [4, 5, 6]]),),
    {'e': ((6, 4, 7), {'tied': True})},
  )


@case
def unrolled_recurrence():
  """The first step multiplies a constant state, which is a call as well."""

  def f(w, x):
    h = jnp.zeros((2, 4))
    for t in range(3):
      h = jnp.tanh(h @ w + x[:, t])
    return h

  return Case(f, normal(1, 4, 4), (X,), {'params': ((6, 4, 4), {'calls': 3})})


@case
def attention():
  f = lambda p, x: jax.nn.dot_product_attention(
    *[(x @ p[i]).reshape(2, 5, 2, 2) for i in 'qkv']
  )
  return Case(
    f,
    {i: normal(ord(i), 4, 4) for i in 'qkv'},
    (X,),
    {
      'q': ((10, 4, 4), {}),
      'k': ((10, 4, 4), {}),
      'v': ((10, 4, 4), {}),
      'attention_0': ((5, 2, 5), {'kind': 'attention', 'groups': 4}),
      'attention_1': ((2, 5, 5), {'kind': 'attention', 'groups': 4}),
    },
  )


@case
def random_keys():
  def f(p, key, x):
    key, sub = jax.random.split(key)
    mask = jax.random.bernoulli(sub, 0.5, x.shape)
    return jnp.where(mask, x, 0) @ p['w'] + jax.random.normal(key, (5, 3))[None]

  return Case(
    f,
    {'w': normal(1, 4, 3)},
    (jax.random.key(0, impl='unsafe_rbg'), X),
    {'w': ((10, 4, 3), {})},
  )


# Control flow

DEPTH = {'k': normal(1, 3, 4, 4), 'b': normal(2, 3, 4)}


def layer(x, p):
  return jnp.tanh(x @ p['k'] + p['b'][None, None]), None


@case
def scan_layers():
  return Case(
    lambda p, x: lax.scan(layer, x, p)[0],
    DEPTH,
    (X,),
    {'k': ((10, 4, 4), {'repeats': 3})},
  )


@case
def scan_layers_reversed():
  return Case(
    lambda p, x: lax.scan(layer, x, p, reverse=True, unroll=3)[0],
    DEPTH,
    (X,),
    {'k': ((10, 4, 4), {'repeats': 3})},
  )


@case
def scan_one_layer():
  return Case(
    lambda p, x: lax.scan(layer, x, p)[0],
    jax.tree.map(lambda a: a[:1], DEPTH),
    (X,),
    {'k': ((10, 4, 4), {})},
  )


@case
def scan_of_scans():
  inner = lambda x, p: lax.scan(layer, x, p)
  return Case(
    lambda p, x: lax.scan(inner, x, p)[0],
    {'k': normal(1, 2, 3, 4, 4), 'b': normal(2, 2, 3, 4)},
    (X,),
    {'k': ((10, 4, 4), {'repeats': 6})},
  )


@case
def scan_layers_in_scan_over_time():
  """Layers are stacked, steps of time are added."""

  def f(p, x):
    step = lambda h, x: (lax.scan(layer, h + x[:, None], p)[0], None)
    return lax.scan(step, x, x.transpose(1, 0, 2))[0]

  return Case(f, DEPTH, (X,), {'k': ((50, 4, 4), {'repeats': 3, 'calls': 5})})


@case
def scan_weight_as_constant():
  def f(w, x):
    step = lambda h, x: (jnp.tanh(h @ w + x), h @ w)
    return lax.scan(step, jnp.zeros((2, 4)), x.transpose(1, 0, 2))

  return Case(f, normal(1, 4, 4), (X,), {'params': ((20, 4, 4), {'calls': 10})})


@case
def scan_weight_carried():
  def f(w, x):
    step = lambda c, _: ((c[0], jnp.tanh(c[1] @ c[0])), None)
    (w, y), _ = lax.scan(step, (w, x), length=3)
    return y @ w

  return Case(f, normal(1, 4, 4), (X,), {'params': ((40, 4, 4), {'calls': 4})})


@case
def remat_in_scan():
  body = jax.checkpoint(
    layer, policy=jax.checkpoint_policies.dots_saveable, prevent_cse=False
  )
  return Case(
    lambda p, x: lax.scan(body, x, p)[0],
    DEPTH,
    (X,),
    {'k': ((10, 4, 4), {'repeats': 3})},
  )


@case
def lax_map():
  return Case(
    lambda w, x: lax.map(lambda x: x @ w, x),
    normal(1, 4, 3),
    (X,),
    {'params': ((10, 4, 3), {'calls': 2})},
  )


@case
def conditional():
  def f(p, x):
    left = lambda x: (x @ p['l'], p['both'])
    right = lambda x: (x @ p['r'] @ p['r'], p['both'])
    y, both = lax.cond(x.sum() > 0, left, right, x)
    return y @ both

  square = normal(1, 4, 4)
  return Case(
    f,
    {'l': square, 'r': square + 1, 'both': square - 1},
    (X,),
    {
      'r': ((20, 4, 4), {'calls': 2}),
      'l': ((10, 4, 4), {}),
      'both': ((10, 4, 4), {}),
    },
    vmap=False,  # becomes a select, which computes both branches
  )


@case
def jitted():
  inner = jax.jit(lambda w, x: jnp.tanh(x @ w))
  return Case(
    lambda p, x: inner(p['a'], inner(p['b'], x)),
    {'a': normal(1, 4, 3), 'b': normal(2, 4, 4)},
    (X,),
    {'b': ((10, 4, 4), {}), 'a': ((10, 4, 3), {})},
  )


@jax.custom_vjp
def doubling(w, x):
  """A product whose gradient is on purpose not that of a product."""
  return jnp.tanh(x @ w)


doubling.defvjp(
  lambda w, x: (jnp.tanh(x @ w), (w, x)),
  lambda res, g: (2 * res[0], g.sum() * res[1]),
)


@case
def custom_vjp():
  return Case(
    lambda p, x: doubling(p['a'], x) @ p['b'],
    {'a': normal(1, 4, 3), 'b': normal(2, 3, 2)},
    (X,),
    {'a': ((10, 4, 3), {}), 'b': ((10, 3, 2), {})},
  )


@jax.custom_jvp
def tripling(w, x):
  return x @ w


@tripling.defjvp
def _(primals, tangents):
  w, x = primals
  return x @ w, 3 * (tangents[1] @ w) + x @ tangents[0]


@case
def custom_jvp():
  return Case(
    lambda p, x: jax.nn.silu(tripling(p['a'], x)) @ p['b'],
    {'a': normal(1, 4, 3), 'b': normal(2, 3, 2)},
    (X,),
    {'a': ((10, 4, 3), {}), 'b': ((10, 3, 2), {})},
  )


@case
def custom_vjp_in_scan():
  body = lambda x, w: (doubling(w, x), None)
  return Case(
    lambda w, x: lax.scan(body, x, w)[0],
    normal(1, 3, 4, 4),
    (X,),
    {'params': ((10, 4, 4), {'repeats': 3})},
  )


@case
def closed_call():
  """No public function makes this primitive, so a jit is turned into one."""
  traced = jax.make_jaxpr(jax.jit(lambda w, x: x @ w))(jnp.ones((4, 3)), X)
  (eqn,) = traced.jaxpr.eqns
  eqn = eqn.replace(
    primitive=jex.primitives.closed_call_p,
    params={'call_jaxpr': eqn.params['jaxpr']},
  )
  body = jex.ClosedJaxpr(traced.jaxpr.replace(eqns=[eqn]), traced.consts)
  return Case(
    lambda w, x: jex.jaxpr_as_fun(body)(w, x)[0],
    normal(1, 4, 3),
    (X,),
    {'params': ((10, 4, 3), {})},
  )


# Convolutions


def conv(w, x, layout, strides=(1, 1), padding='SAME', groups=1, **options):
  return lax.conv_general_dilated(
    x,
    w,
    strides,
    padding,
    dimension_numbers=layout,
    feature_group_count=groups,
    **options,
  )


def conv_case(name, kernel, image, mkn, layout, more=None, **options):
  f = lambda p, x: conv(p['kernel'], x, layout, **options)
  CASES['conv_' + name] = lambda: Case(
    f,
    {'kernel': normal(1, *kernel)},
    (normal(2, *image),),
    {'kernel': (mkn, {'kind': 'conv', **(more or {})})},
  )


NHWC, NCHW = ('NHWC', 'HWIO', 'NHWC'), ('NCHW', 'OIHW', 'NCHW')
conv_case('nhwc', (3, 3, 2, 5), (2, 6, 7, 2), (84, 18, 5), NHWC)
conv_case('nchw', (5, 2, 3, 3), (2, 2, 6, 7), (84, 18, 5), NCHW)
conv_case(
  'strided',
  (3, 2, 2, 5),
  (2, 8, 7, 2),
  (2 * 4 * 3, 12, 5),
  NHWC,
  strides=(2, 3),
  padding=((1, 1), (2, 0)),
)
conv_case(
  'dilated',
  (5, 2, 3, 2),
  (2, 2, 9, 8),
  (2 * 5 * 5, 12, 5),
  NCHW,
  padding='VALID',
  rhs_dilation=(2, 3),
)
conv_case(
  'transposed',
  (3, 3, 2, 5),
  (1, 4, 4, 2),
  (81, 18, 5),
  NHWC,
  padding=((2, 2), (2, 2)),
  lhs_dilation=(2, 2),
)
conv_case(
  'grouped', (3, 3, 2, 9), (2, 4, 4, 6), (32, 18, 3), NHWC,
  {'groups': 3}, groups=3,
)  # fmt: skip
conv_case(
  'depthwise', (4, 1, 3, 3), (2, 4, 5, 5), (50, 9, 1), NCHW,
  {'groups': 4}, groups=4,
)  # fmt: skip
conv_case(
  'one_dimension', (3, 2, 5), (2, 6, 2), (12, 6, 5), ('NWC', 'WIO', 'NWC'),
  strides=(1,),
)  # fmt: skip


# Flax


def linen_case(name, module, expected, x=X):
  def build():
    variables = filled(jax.eval_shape(module.init, jax.random.key(0), x))
    return Case(module.apply, variables, (x,), expected)

  CASES['linen_' + name] = build


linen_case('dense', nn.Dense(3), {'kernel': ((10, 4, 3), {})})
linen_case(
  'dense_general',
  nn.Sequential([nn.DenseGeneral((2, 3)), nn.DenseGeneral(5, axis=(-2, -1))]),
  {'layers_0/kernel': ((10, 4, 6), {}), 'layers_1/kernel': ((10, 6, 5), {})},
)
linen_case(
  'conv', nn.Conv(3, (3,)), {'kernel': ((10, 12, 3), {'kind': 'conv'})}
)
ATTENTION = {
  'query/kernel': ((10, 4, 4), {}),
  'key/kernel': ((10, 4, 4), {}),
  'value/kernel': ((10, 4, 4), {}),
  'attention_0': ((5, 2, 5), {'kind': 'attention', 'groups': 4}),
  'attention_1': ((2, 5, 5), {'kind': 'attention', 'groups': 4}),
  'out/kernel': ((10, 4, 4), {}),
}
linen_case('attention', nn.MultiHeadDotProductAttention(num_heads=2), ATTENTION)


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, _=None):
    return nn.tanh(nn.Dense(4, name='dense')(x)), None


class Stack(nn.Module):
  axis: int = 0
  remat: bool = False

  @nn.compact
  def __call__(self, x):
    block = nn.remat(Block) if self.remat else Block
    scanned = nn.scan(
      block,
      variable_axes={'params': self.axis},
      split_rngs={'params': True},
      length=3,
    )
    return scanned(name='layers')(x, None)[0]


STACK = {'layers/dense/kernel': ((10, 4, 4), {'repeats': 3})}
linen_case('scan', Stack(), STACK)
linen_case('scan_axis_1', Stack(axis=1), STACK)
linen_case('scan_remat', Stack(remat=True), STACK)


def nnx_case(name, make, expected, x=X, call=lambda m, x: m(x)):
  def build():
    graph, shapes = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    f = lambda params, x: call(nnx.merge(graph, params), x)
    return Case(f, filled(shapes), (x,), expected)

  CASES['nnx_' + name] = build


nnx_case(
  'linear', lambda r: nnx.Linear(4, 3, rngs=r), {'kernel': ((10, 4, 3), {})}
)
nnx_case(
  'conv',
  lambda r: nnx.Conv(2, 6, (3, 3), strides=2, feature_group_count=2, rngs=r),
  {'kernel': ((18, 9, 3), {'kind': 'conv', 'groups': 2})},
  x=normal(3, 2, 6, 6, 2),
)
nnx_case(
  'attend',
  lambda r: nnx.Embed(7, 4, rngs=r),
  {'embedding': ((10, 4, 7), {})},
  call=lambda m, x: m.attend(x),
)
nnx_case(
  'einsum',
  lambda r: nnx.Einsum('btk,kn->btn', (4, 3), (3,), rngs=r),
  {'kernel': ((10, 4, 3), {})},
)
nnx_case(
  'attention',
  lambda r: nnx.MultiHeadAttention(2, 4, rngs=r, decode=False),
  ATTENTION,
)


@case
def nnx_module_as_params():
  make = lambda: nnx.MultiHeadAttention(2, 4, rngs=nnx.Rngs(0), decode=False)
  module = filled(nnx.eval_shape(make))
  return Case(lambda m, x: m(x), module, (X,), ATTENTION)


@functools.cache
def built(name):
  m = CASES[name]()
  m.jitted = jax.jit(m.f)
  m.want = everything(m)(m.f)
  return m


def everything(m):
  """Values, values under vmap and gradients of a function, in one program."""
  many = jax.tree.map(lambda x: jnp.stack([x, x]), m.batch)

  def run(f):
    def loss(params):
      return sum(
        jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(f(params, *m.batch))
      )

    def all_of(params):
      values = f(params, *m.batch)
      gradient = jax.grad(loss)(params)
      if not m.vmap:
        return values, gradient
      axes = (None, *(0 for _ in many))
      return values, gradient, jax.vmap(f, axes)(params, *many)

    return jax.jit(all_of)(m.params)

  return run


# What differs most; the others: by -m slow.
QUICK = {
  *('plain_mlp', 'weight_on_the_left', 'transposed', 'einsum_heads'),
  *('reshaped_weight', 'experts', 'vmapped', 'tied_embedding', 'attention'),
  *('random_keys', 'scan_layers_in_scan_over_time', 'scan_weight_carried'),
  *('remat_in_scan', 'conditional', 'custom_vjp_in_scan'),
  *('conv_strided', 'conv_dilated', 'linen_dense', 'linen_scan_axis_1'),
  *('nnx_conv', 'nnx_module_as_params'),
}


@pytest.fixture(
  params=[
    pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
    for name in CASES
  ]
)
def model(request):
  return built(request.param)


def addressable(site):
  return site.path is not None


DOT = lambda site, lhs, rhs, dot: dot(lhs, rhs)
GRAM = lambda site, rows: jnp.swapaxes(rows, -1, -2) @ rows


def equal(a, b, **tolerance):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    if tolerance:
      np.testing.assert_allclose(x, y, **tolerance)
    else:
      np.testing.assert_array_equal(x, y)


# Every case


def test_find_names_and_sizes(model):
  found = sites.find(model.f, model.params, *model.batch)
  assert [s.name for s in found] == list(model.sites)
  for site in found:
    mkn, more = model.sites[site.name]
    assert (site.m, site.k, site.n) == mkn, site.name
    default = dict(
      kind='matmul', repeats=1, groups=1, calls=1, tied=False, side='rhs'
    )
    for field, value in (default | more).items():
      assert getattr(site, field) == value, (site.name, field)
    assert (site.path is None) == (site.kind == 'attention')
    assert (site.reason == '') == (site.path is not None)
  assert len(set(found)) == len(found)  # hashable and equal by value
  assert found == sites.find(model.f, model.params, *model.batch)


def test_find_computes_nothing(model):
  shapes = lambda tree: jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree
  )
  found = sites.find(model.f, shapes(model.params), *shapes(model.batch))
  assert [s.name for s in found] == list(model.sites)


def test_rewrite_with_dot_is_the_function(model):
  values, gradient, *vmapped = everything(model)(sites.rewrite(model.f, DOT))
  equal((values, *vmapped), (model.want[0], *model.want[2:]))
  equal(gradient, model.want[1], rtol=1e-5, atol=1e-5)


def test_rewrite_reaches_every_site(model):
  """A handler that zeroes one site is the function with that leaf zeroed."""
  for site in sites.find(model.f, model.params, *model.batch):
    if not addressable(site) or site.tied:
      continue

    def handler(at, lhs, rhs, dot, name=site.name):
      out = dot(lhs, rhs)
      return jnp.zeros_like(out) if at.name == name else out

    leaf = sites.get(model.params, site)
    zeroed = sites.put(model.params, {site: jnp.zeros_like(leaf)})
    got = jax.jit(sites.rewrite(model.f, handler))(model.params, *model.batch)
    equal(got, model.jitted(zeroed, *model.batch), rtol=1e-6, atol=1e-6)
    assert np.any(np.asarray(leaf))


def test_matrix_round_trip(model):
  for site in sites.find(model.f, model.params, *model.batch):
    if not addressable(site):
      continue
    leaf = sites.get(model.params, site)
    matrix = jax.jit(site.matrix)(leaf)
    lead = [x for x in (site.repeats, site.groups) if x > 1]
    assert matrix.shape == (*lead, site.k, site.n) == site.matrix_shape
    equal(site.unmatrix(matrix), leaf)
    index = jnp.arange(leaf.size).reshape(leaf.shape)
    equal(jax.jit(site.unmatrix)(site.matrix(index)), index)


def test_rows_times_matrix_is_the_operation(model):
  """For sites outside of scans, where the operand is the whole parameter."""
  seen = set()

  def handler(site, lhs, rhs, dot, params):
    out = dot(lhs, rhs)
    if not addressable(site) or site.repeats > 1:
      return out
    y = site.rows(lhs, rhs) @ site.matrix(sites.get(params, site))
    y = y.reshape(site.groups, -1, site.n)  # [g, m, n]
    if site.kind == 'conv':
      # [g, b * spatial, n] -> [b, spatial, g * n] -> the layout of the call
      numbers = dict(site.params)['dimension_numbers'].out_spec
      sizes = [out.shape[i] for i in (numbers[0], *numbers[2:])]
      y = jnp.moveaxis(y, 0, 1).reshape(*sizes, -1)
      y = jnp.moveaxis(y, -1, 1).transpose(np.argsort(numbers))
    elif site.side == 'lhs':
      y = jnp.swapaxes(y, -1, -2)
    seen.add(site.name)
    return y.reshape(out.shape)

  @jax.jit
  def by_matrices(params, *batch):
    bound = functools.partial(handler, params=params)
    return sites.rewrite(model.f, bound)(params, *batch)

  got = by_matrices(model.params, *model.batch)
  equal(got, model.want[0], rtol=1e-5, atol=1e-5)
  found = sites.find(model.f, model.params, *model.batch)
  assert seen == {s.name for s in found if addressable(s) and s.repeats == 1}


def test_tap_sees_every_row(model):
  _, statistics = jax.eval_shape(
    sites.tap(model.f, GRAM), model.params, *model.batch
  )
  found = [
    s for s in sites.find(model.f, model.params, *model.batch) if addressable(s)
  ]
  assert set(statistics) == {s.name for s in found}
  for site in found:
    lead = [x for x in (site.repeats, site.groups) if x > 1]
    assert statistics[site.name].shape == (*lead, site.k, site.k)
  what = lambda site, rows: jnp.full((), rows.shape[-2])
  values, counts = jax.jit(sites.tap(model.f, what))(model.params, *model.batch)
  equal(values, model.want[0])
  if 'cond[' in str(jax.make_jaxpr(model.f)(model.params, *model.batch)):
    return  # one branch only is taken
  for site in found:
    np.testing.assert_array_equal(counts[site.name], site.m)


# Statistics against activations captured by hand


def numpy_gram(*activations):
  return sum(np.asarray(a, np.float64).T @ np.asarray(a) for a in activations)


def test_tap_gram_of_an_mlp():
  m = plain_mlp()
  _, statistics = jax.jit(sites.tap(m.f, GRAM))(m.params, X)
  x = np.asarray(X).reshape(10, 4)
  hidden = np.maximum(x @ np.asarray(m.params['up']), 0)
  np.testing.assert_allclose(statistics['up'], numpy_gram(x))
  np.testing.assert_allclose(statistics['down'], numpy_gram(hidden))


def test_tap_of_two_calls_adds():
  m = used_twice()
  _, statistics = sites.tap(m.f, GRAM)(m.params, X)
  x = np.asarray(X).reshape(10, 4)
  want = numpy_gram(x, x @ np.asarray(m.params['w']))
  np.testing.assert_allclose(statistics['w'], want)


@pytest.mark.parametrize(
  'build', [scan_layers, scan_layers_reversed, remat_in_scan]
)
def test_scanned_statistics_are_the_unrolled_ones(build):
  m = build()
  _, statistics = jax.jit(sites.tap(m.f, GRAM))(m.params, X)
  h = np.asarray(X, np.float64).reshape(10, 4)
  order = [2, 1, 0] if build is scan_layers_reversed else [0, 1, 2]
  for i in order:
    np.testing.assert_allclose(
      statistics['k'][i], numpy_gram(h), rtol=1e-5, atol=1e-5
    )
    h = np.tanh(h @ np.asarray(DEPTH['k'][i]) + np.asarray(DEPTH['b'][i]))


def test_nested_scans_stack_in_the_order_of_the_matrix():
  m = scan_of_scans()
  _, statistics = sites.tap(m.f, GRAM)(m.params, X)
  (site,) = sites.find(m.f, m.params, X)
  h = np.asarray(X, np.float64).reshape(10, 4)
  k, b = (np.asarray(m.params[i]) for i in 'kb')
  for i, matrix in enumerate(site.matrix(m.params['k'])):
    np.testing.assert_allclose(
      statistics['k'][i], numpy_gram(h), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_array_equal(matrix, k[i // 3, i % 3])
    h = np.tanh(h @ np.asarray(matrix) + b[i // 3, i % 3])


def test_scan_over_layers_and_time():
  m = scan_layers_in_scan_over_time()
  _, statistics = sites.tap(m.f, GRAM)(m.params, X)
  x = np.asarray(X, np.float64)
  h, want = x, np.zeros((3, 4, 4))
  for t in range(5):
    h = h + x[:, t, None]
    for i in range(3):
      want[i] += numpy_gram(h.reshape(-1, 4))
      h = np.tanh(h @ np.asarray(DEPTH['k'][i]) + np.asarray(DEPTH['b'][i]))
  np.testing.assert_allclose(statistics['k'], want, rtol=1e-5, atol=1e-5)


def test_loop_without_slices_adds():
  m = lax_map()
  _, statistics = sites.tap(m.f, GRAM)(m.params, X)
  want = numpy_gram(np.asarray(X).reshape(10, 4))
  np.testing.assert_allclose(statistics['params'], want)


@pytest.mark.parametrize('sign, left', [(1.0, True), (-1.0, False)])
def test_branch_not_taken_has_no_statistics(sign, left):
  m = conditional()
  x = sign * jnp.abs(X)
  _, statistics = jax.jit(sites.tap(m.f, GRAM))(m.params, x)
  gram = numpy_gram(np.asarray(x).reshape(10, 4))
  second = numpy_gram(np.asarray(x @ m.params['r']).reshape(10, 4))
  np.testing.assert_allclose(statistics['l'], gram if left else 0 * gram)
  np.testing.assert_allclose(
    statistics['r'], 0 * gram if left else gram + second
  )


def test_experts_have_a_statistic_each():
  m = experts()
  _, statistics = sites.tap(m.f, GRAM)(m.params, *m.batch)
  for x, gram in zip(m.batch[0], statistics['experts']):
    np.testing.assert_allclose(gram, numpy_gram(x))


def test_while_counts_what_it_did():
  def f(w, x, steps):
    body = lambda c: (c[0] + 1, jnp.tanh(c[1] @ w))
    return lax.while_loop(lambda c: c[0] < steps, body, (0, x))[1]

  w = normal(1, 4, 4)
  (site,) = sites.find(f, w, X, 3)
  assert (site.name, site.m, site.calls) == ('params', 10, 1)
  g = jax.jit(sites.tap(f, lambda site, rows: jnp.full((), len(rows))))
  for steps in (0, 3):
    out, statistics = g(w, X, steps)
    equal(out, jax.jit(f)(w, X, steps))
    assert int(statistics['params']) == 10 * steps
  equal(sites.rewrite(f, DOT)(w, X, 3), f(w, X, 3))


def test_patches_of_negative_padding():
  """Against NumPy: XLA's CPU convolution itself gets this one wrong."""
  x = normal(2, 1, 3, 4, 1)
  f = lambda w, x: conv(w, x, NHWC, padding=((0, 0), (-1, 1)))
  _, rows = sites.tap(f, lambda site, rows: rows)(jnp.ones((2, 2, 1, 1)), x)
  image = np.pad(np.asarray(x)[0, :, 1:, 0], ((0, 0), (0, 1)))
  want = [
    image[i : i + 2, j : j + 2].reshape(-1) for i in range(2) for j in range(3)
  ]
  np.testing.assert_array_equal(rows['params'], np.stack(want))


def test_patches_are_exact_in_low_precision():
  x = jnp.linspace(-1, 1, 32).reshape(1, 4, 4, 2).astype(jnp.bfloat16)
  f = lambda w, x: conv(w, x, NHWC, padding='VALID')
  w = jnp.ones((2, 2, 2, 3), jnp.bfloat16)
  _, rows = sites.tap(f, lambda site, rows: rows)(w, x)
  want = [
    np.asarray(x)[0, i : i + 2, j : j + 2].reshape(-1)
    for i in range(3)
    for j in range(3)
  ]
  assert rows['params'].dtype == jnp.bfloat16
  np.testing.assert_array_equal(rows['params'], np.stack(want))


@pytest.mark.parametrize(
  'name', ['plain_mlp', 'remat_in_scan', 'conditional', 'custom_vjp_in_scan']
)
def test_tap_has_the_gradients_of_the_function(name):
  m = built(name)
  tapped = sites.tap(m.f, GRAM)
  got = everything(m)(lambda *args: tapped(*args)[0])
  equal(got, m.want, rtol=1e-5, atol=1e-5)


# Programs


def lowered(f, n, *batch):
  params = {'k': jnp.ones((n, 4, 4)), 'b': jnp.ones((n, 4))}
  return len(jax.jit(f).lower(params, *batch).as_text().splitlines())


def test_rewritten_scan_does_not_grow():
  f = scan_layers().f
  for g in (sites.rewrite(f, DOT), sites.tap(f, GRAM)):
    assert lowered(g, 2, X) == lowered(g, 20, X)


def test_remat_is_kept_with_its_policy():
  m = remat_in_scan()
  count = lambda g: str(
    jax.make_jaxpr(jax.grad(lambda p, x: g(p, x).sum()))(m.params, X)
  ).count('remat2[')
  assert count(sites.rewrite(m.f, DOT)) == count(m.f) > 0
  text = str(jax.make_jaxpr(sites.rewrite(m.f, DOT))(m.params, X))
  assert 'DotsSaveable' in text and 'prevent_cse=False' in text


def test_blocks_without_sites_are_left_alone():
  inner = jax.jit(lambda x: jax.nn.silu(jnp.sin(x)))
  f = lambda w, x: inner(x @ w)
  text = str(jax.make_jaxpr(sites.rewrite(f, DOT))(jnp.ones((4, 3)), X))
  assert 'jit[' in text and 'silu' in text


def test_dead_matmuls_are_no_sites():
  def f(p, x):
    _ = x @ p['unused']
    return x @ p['used']

  params = {'used': jnp.ones((4, 3)), 'unused': jnp.ones((4, 3))}
  assert [s.name for s in sites.find(f, params, X)] == ['used']


def test_effects_survive(capfd):
  def f(w, x):
    y = x @ w
    jax.debug.print('sum {}', y.sum())
    return y

  sites.rewrite(f, DOT)(normal(1, 4, 3), X).block_until_ready()
  jax.effects_barrier()
  assert 'sum' in capfd.readouterr().out


def test_handler_may_learn():
  """A scale the handler closes over has a gradient, custom rules or not."""
  for build in (plain_mlp, custom_vjp, scan_layers, remat_in_scan):
    m = build()

    def loss(scale, f=m.f, params=m.params):
      handler = lambda site, lhs, rhs, dot: dot(lhs, rhs) * scale
      return sites.rewrite(f, handler)(params, X).sum()

    slope = jax.jit(jax.grad(loss))(0.01)
    step = 1e-4
    want = (loss(0.01 + step) - loss(0.01 - step)) / (2 * step)
    np.testing.assert_allclose(slope, want, rtol=1e-2, atol=1e-2)


def test_handler_gets_the_parameters_of_its_call():
  f = lambda w, x: jnp.tanh(x @ w)[0] @ w
  ranks = []

  def handler(site, lhs, rhs, dot):
    ranks.append(len(site.lhs_shape))
    assert lhs.shape == site.lhs_shape and rhs.shape == site.rhs_shape
    ((contract, _), _) = dict(site.params)['dimension_numbers']
    assert contract == (lhs.ndim - 1,)
    return dot(lhs, rhs)

  sites.rewrite(f, handler)(normal(1, 4, 4), X)
  assert ranks == [3, 2]


def test_rewrite_works_on_rewritten_functions():
  m = scan_layers()
  triple = lambda site, lhs, rhs, dot: 3 * dot(lhs, rhs)
  once = lambda site, lhs, rhs, dot: 9 * dot(lhs, rhs)
  equal(
    sites.rewrite(sites.rewrite(m.f, triple), triple)(m.params, X),
    sites.rewrite(m.f, once)(m.params, X),
    rtol=1e-6,
  )


# What is found but cannot be addressed


def only(f, params, *batch):
  (site,) = sites.find(f, params, *batch)
  return site


W = normal(1, 4, 4)


@pytest.mark.parametrize(
  'f, name, reason',
  [
    (lambda p, x: x @ (p['w'] * 2), 'w#derived', 'by mul'),
    (lambda p, x: x @ p['w'][:, :3], 'w#derived', 'by slice'),
    (lambda p, x: x @ (p['w'] + p['v']), 'v+w#derived', 'v, w by add'),
    (
      lambda p, x: x @ jnp.concatenate([p['w'], p['v']], 1),
      'v+w#derived',
      'by concatenate',
    ),
    (lambda p, x: x @ jnp.broadcast_to(p['w'], (2, 4, 4)), 'w#derived', 'by'),
    (lambda p, x: x @ p['w'].astype(int).astype(float), 'w#derived', 'by conv'),
    (lambda p, x: x @ jnp.eye(4), 'constant_0', 'constant'),
    (lambda p, x: x[0, :1] + p['w'] @ p['v'], 'v+w#derived', 'no operand'),
    (lambda p, x: x[0, :1] + p['w'] @ jnp.eye(4), 'w#constant', 'no operand'),
    (lambda p, x: x @ p['w'] @ p['w'].T, 'w#conflict', 'different matrices'),
    (
      lambda p, x: x @ lax.cond(x.sum() > 0, lambda: p['w'], lambda: p['v']),
      'v+w#derived',
      'by a branch',
    ),
  ],
)
def test_refused_by_name(f, name, reason):
  params = {'v': W + 1, 'w': W}
  site = only(f, params, X)
  assert (site.name, site.path) == (name, None)
  assert reason in site.reason
  equal(sites.rewrite(f, DOT)(params, X), f(params, X))
  assert sites.tap(f, GRAM)(params, X)[1] == {}
  with pytest.raises(ValueError, match='no addressable parameter'):
    site.matrix(W)


def test_both_layouts_count_as_calls_of_the_refused_site():
  site = only(lambda w, x: x @ w @ w.T, W, X)
  assert site.calls == 2 and 'transpose' in site.reason


def test_slices_of_a_fused_weight_are_told_apart():
  f = lambda p, x: [x @ w for w in jnp.split(p['qkv'], 3, axis=1)]
  found = sites.find(f, {'qkv': normal(1, 4, 6)}, X)
  assert [s.name for s in found] == [
    'qkv#derived',
    'qkv#derived_1',
    'qkv#derived_2',
  ]
  assert all((s.m, s.k, s.n) == (10, 4, 2) for s in found)


def test_weight_used_plainly_and_scaled_is_tied():
  found = sites.find(lambda p, x: x @ p['w'] @ (2 * p['w']), {'w': W}, X)
  assert [(s.name, s.tied) for s in found] == [
    ('w', True),
    ('w#derived', False),
  ]


def test_carried_weight_that_changes_is_derived():
  def f(w, x):
    step = lambda c, _: ((c[0] * 2, c[1] @ c[0]), None)
    return lax.scan(step, (w, x), length=3)[0][1]

  site = only(f, W, X)
  assert (site.name, site.repeats) == ('params#derived', 3)


def test_weight_selected_by_data():
  f = lambda p, x, i: x @ p['experts'][i]
  site = only(f, {'experts': normal(1, 3, 4, 2)}, X, jnp.array(1))
  f = lambda p, x, i: jnp.einsum('btk,bkn->btn', x, p['experts'][i])
  site = only(f, {'experts': normal(1, 3, 4, 2)}, X, jnp.array([1, 2]))
  assert site.name == 'experts#selected' and site.path is None


def test_ragged_dot():
  f = lambda p, x, n: lax.ragged_dot(x, p['experts'], n)
  args = {'experts': normal(1, 2, 4, 3)}, normal(2, 6, 4), jnp.array([2, 4])
  site = only(f, *args)
  assert (site.name, site.m, site.k, site.n) == ('experts#ragged', 6, 4, 3)
  equal(sites.rewrite(f, DOT)(*args), f(*args))


def test_batch_grouped_and_swapped_convolutions():
  x = normal(2, 4, 6, 2)
  numbers = ('NWC', 'WIO', 'NWC')
  f = lambda w, x: lax.conv_general_dilated(
    x, w, (1,), 'SAME', dimension_numbers=numbers, batch_group_count=2
  )
  assert only(f, normal(1, 3, 2, 4), x).name == 'params#conv'
  f = lambda w, x: lax.conv_general_dilated(
    w, x, (1,), 'SAME', dimension_numbers=numbers
  )
  site = only(f, normal(1, 3, 8, 6), x)
  assert site.name == 'params#conv' and 'input' in site.reason


def test_condition_of_a_loop():
  go = lambda w, x: jnp.sum(x @ w) < 5
  f = lambda w, x: lax.while_loop(lambda x: go(w, x), lambda x: x + 1, x)
  site = only(f, W, X)
  assert site.name == 'params#condition'
  equal(sites.rewrite(f, DOT)(W, X), f(W, X))


def test_hidden_matmuls_are_reported_and_left_alone():
  """custom_vmap has a rule of its own, which is not ours to drop."""

  @jax.custom_batching.custom_vmap
  def product(w, x):
    return x @ w

  product.def_vmap(lambda size, mapped, w, x: (x @ w, True))
  f = lambda p, x: product(p['w'], x) @ p['w']
  hidden, plain = sites.find(f, {'w': W}, X)
  assert (hidden.name, hidden.path) == ('custom_vmap_call_0', None)
  assert 'custom_vmap_call' in hidden.reason
  assert (plain.name, plain.tied) == ('w', True)
  zero = lambda site, lhs, rhs, dot: 0 * dot(lhs, rhs)
  assert not np.any(sites.rewrite(f, zero)({'w': W}, X))
  equal(sites.rewrite(f, DOT)({'w': W}, X), f({'w': W}, X))


# Names, get and put


def test_names_drop_the_noise_of_flax():
  variables = {'params': {'a': W}, 'batch_stats': {'mean': W}}
  assert list(sites.leaf_names(variables)) == ['batch_stats/mean', 'a']
  # 'params/a' and 'a' would become one, so both keep their whole path
  assert list(sites.leaf_names({'params': {'a': W}, 'a': W})) == [
    'a',
    'params/a',
  ]
  state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
  assert list(sites.leaf_names(state)) == ['bias', 'kernel']
  # a dictionary's own 'value' is no noise
  assert list(sites.leaf_names({'v': {'value': W}})) == ['v/value']
  assert list(sites.leaf_names([W, (W,)])) == ['0', '1/0']


def test_names_at_the_door():
  with pytest.raises(ValueError, match='hold no arrays'):
    sites.find(lambda p, x: x, {}, X)
  with pytest.raises(ValueError, match="both named 'a/b'.*rename"):
    sites.find(lambda p, x: x, {'a/b': W, 'a': {'b': W}}, X)
  with pytest.raises(TypeError, match=r"params\['a'\] is a str"):
    sites.find(lambda p, x: x, {'a': 'kernel'}, X)
  for make in (sites.tap, sites.rewrite):
    with pytest.raises(TypeError, match='needs a function'):
      make(lambda p, x: x, 3)


def test_get_and_put():
  m = CASES['nnx_linear']()
  site = only(m.f, m.params, X)
  kernel = sites.get(m.params, site)
  assert kernel.shape == (4, 3)
  by_site = sites.put(m.params, {site: 2 * kernel})
  by_name = sites.put(m.params, {'kernel': 2 * kernel})
  equal(by_site, by_name)
  equal(sites.get(by_site, site), 2 * kernel)
  equal(sites.get(m.params, site), kernel)  # the old ones are untouched
  packed = sites.put(m.params, {site: (1, 2)})  # any pytree may stand there
  assert sites.get(packed, site) == (1, 2)
  equal(sites.put(packed, {site: kernel}), m.params)
  with pytest.raises(KeyError, match='nearest: kernel'):
    sites.put(m.params, {'kernl': kernel})
  with pytest.raises(KeyError, match='nothing at'):
    sites.put({'other': W}, {site: W})
  with pytest.raises(KeyError, match='nothing at'):
    sites.get({'other': W}, site)


def test_matrix_at_the_door():
  site = only(lambda p, x: x @ p['w'], {'w': W}, X)
  with pytest.raises(ValueError, match=r'w: matrix got shape \(3,\)'):
    site.matrix(jnp.ones(3))
  with pytest.raises(ValueError, match=r'w: unmatrix got shape \(3,\)'):
    site.unmatrix(jnp.ones(3))


@pytest.mark.parametrize(
  'error, match, handler',
  [
    (ValueError, r'w: the handler returned shape \(4,\)', lambda y: y[0, 0]),
    (
      TypeError,
      'w: the handler returned bfloat16',
      lambda y: y.astype('bfloat16'),
    ),
    (TypeError, 'w: the handler returned a NoneType', lambda y: None),
  ],
)
def test_handler_results_at_the_door(error, match, handler):
  g = sites.rewrite(
    lambda p, x: x @ p['w'], lambda site, lhs, rhs, dot: handler(dot(lhs, rhs))
  )
  with pytest.raises(error, match=match):
    jax.jit(g)({'w': W}, X)


# The reference model


def test_llama():
  config = decoder.DecoderConfig(
    vocab_size=11,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=2,
    max_position_embeddings=16,
  )
  f, params = (
    decoder.functional(config),
    filled(jax.eval_shape(lambda: decoder.init_params(config, 0))),
  )
  tokens = jnp.arange(10).reshape(2, 5)
  found = {s.name: s for s in sites.find(f, params, tokens)}
  sizes = {
    'self_attn/q_proj': (8, 8),
    'self_attn/k_proj': (8, 4),
    'self_attn/v_proj': (8, 4),
    'self_attn/o_proj': (8, 8),
    'mlp/gate_proj': (8, 12),
    'mlp/up_proj': (8, 12),
    'mlp/down_proj': (12, 8),
  }
  for layer in range(2):
    for name, (k, n) in sizes.items():
      site = found.pop(f'layers/{layer}/{name}/kernel')
      assert (site.m, site.k, site.n) == (10, k, n)
    for product in range(2):
      site = found.pop(f'attention_{2 * layer + product}')
      assert site.kind == 'attention'
      assert site.macs == 2 * 4 * 5 * 5 * 2  # b h t t d
  head = found.pop('embed_tokens/embedding')
  assert (head.m, head.k, head.n, head.tied) == (10, 8, 11, True)
  assert not found
  equal(
    jax.jit(sites.rewrite(f, DOT))(params, tokens), jax.jit(f)(params, tokens)
  )
  table = sites.get(params, head)
  equal(head.matrix(table), table.T)
