"""What is known of one matmul, and how its weight becomes a matrix."""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax.sites import _axes


@dataclasses.dataclass(frozen=True)
class Site:
  """One matmul or convolution of a function, named by its parameter.

  Static, hashable data only. With `repeats`, `groups`, `m`, `k`, `n` the call
  costs `macs = repeats * groups * m * k * n` multiplications.

  Attributes:
    name: Path of the parameter joined by '/', see `leaf_names`. Sites without
      an addressable parameter are named '<parameters>#<why>', 'attention_<i>',
      'constant_<i>' or '<primitive>_<i>'.
    kind: 'matmul', 'conv', or 'attention' for a product of two activations.
    path: Key path of the parameter, or None where it cannot be addressed.
    m: Rows of activations of one group and one repeat, added up over the
      calls; for a convolution output positions times batch.
    k: Length of the reduction.
    n: Outputs of one group.
    repeats: Independent matrices stacked in the parameter of which a scan
      takes one an iteration (for sites without a parameter: its iterations).
    groups: Independent matrices used by one call, as experts or feature groups.
    calls: How often one matrix is used by one run of the function. Iterations
      of `scan` count, those of `while` do not; every branch of `cond` does.
    tied: Whether the parameter also feeds anything that is not this matmul.
    reason: Why the parameter cannot be addressed; '' where it can.
    shape: Shape of the parameter, () without one.
    layout: Atoms (stride, size) of the parameter that make up its repeats,
      groups, rows and columns, see `_axes`.
    side: Operand that holds the weight, 'lhs' or 'rhs' ('rhs' by convention
      where neither does).
    arrangement: Axes of the activation operand as (groups, rows, reduction);
      rows and reduction only describe matmuls.
    primitive: Name of the primitive of the call.
    params: Its parameters as (name, value) pairs: dimension numbers, strides,
      padding, precision. Of the first call; handlers get those of their own.
    lhs_shape: Shape of the first operand, of the same call.
    rhs_shape: Shape of the second.
  """

  name: str
  kind: str
  path: tuple[Any, ...] | None
  m: int
  k: int
  n: int
  repeats: int = 1
  groups: int = 1
  calls: int = 1
  tied: bool = False
  reason: str = ''
  shape: tuple[int, ...] = ()
  layout: _axes.Axes = ()
  side: str = 'rhs'
  arrangement: tuple[tuple[int, ...], ...] = ()
  primitive: str = 'dot_general'
  params: tuple[tuple[str, Any], ...] = ()
  lhs_shape: tuple[int, ...] = ()
  rhs_shape: tuple[int, ...] = ()

  @property
  def macs(self) -> int:
    """Multiply-accumulates of all calls together."""
    return self.repeats * self.groups * self.m * self.k * self.n

  @property
  def matrix_shape(self) -> tuple[int, ...]:
    """Shape of `matrix`: [repeats, groups, k, n], leading ones left out."""
    lead = tuple(x for x in (self.repeats, self.groups) if x > 1)
    return (*lead, self.k, self.n)

  def matrix(self, leaf: jax.Array) -> jax.Array:
    """Arranges the parameter as the matrix which multiplies activations.

    Args:
      leaf: The parameter, any dtype. Shape `self.shape`.

    Returns:
      Its elements in the order the call contracts them, kernels of
      convolutions flattened to rows (spatial axes, input feature). Shape
      [repeats, groups, k, n]; `repeats` and `groups` have an axis only where
      they are larger than 1.

    Raises:
      ValueError: if the site has no parameter or `leaf` has another shape.

    Examples:
      >>> from mq_jax.sites import find
      >>> site, = find(lambda w, x: x @ w.T, jnp.ones((3, 2)), jnp.ones((5, 2)))
      >>> site.matrix(jnp.ones((3, 2))).shape
      (2, 3)
    """
    self._check(np.shape(leaf), self.shape, 'matrix')
    return _axes.take(leaf, self.layout).reshape(self.matrix_shape)

  def unmatrix(self, matrix: jax.Array) -> jax.Array:
    """Exact inverse of `matrix`: back to the parameter's own shape.

    Raises:
      ValueError: if the site has no parameter or `matrix` is not of shape
        `self.matrix_shape`.
    """
    self._check(np.shape(matrix), self.matrix_shape, 'unmatrix')
    return _axes.untake(matrix, self.layout, self.shape)

  def rows(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """Arranges the activation operand so that `rows @ matrix` is the call.

    Args:
      lhs: First operand as a handler gets it.
      rhs: Second operand; its values are used only if it is the activation.

    Returns:
      Rows of input features, in the order of the rows of `matrix`; patches
      are cut out for a convolution. Shape [m, k], or [groups, m, k] for
      `groups` > 1, with the m of this call alone.

    Raises:
      ValueError: for calls with no such form (ragged or batch-grouped).
    """
    if self.primitive == 'conv_general_dilated':
      if dict(self.params)['batch_group_count'] > 1 or self.side == 'lhs':
        raise ValueError(f'{self.name}: {self.reason}, so it has no rows')
      patches = _patches(lhs, np.shape(rhs), dict(self.params))
      return patches[0] if self.groups == 1 else patches
    if self.primitive != 'dot_general':
      raise ValueError(f'{self.name}: a {self.primitive} has no rows')
    activation = rhs if self.side == 'lhs' else lhs
    sizes = [
      math.prod(activation.shape[i] for i in axes) for axes in self.arrangement
    ]
    order = [i for axes in self.arrangement for i in axes]
    return jnp.transpose(activation, order).reshape(
      sizes if self.groups > 1 else sizes[1:]
    )

  def _check(self, found, needed, method):
    if self.path is None:
      raise ValueError(
        f'{self.name}: has no addressable parameter ({self.reason}), so '
        f'there is nothing to {method}'
      )
    if tuple(found) != tuple(needed):
      raise ValueError(
        f'{self.name}: {method} got shape {tuple(found)}, needs {needed}'
      )


def _patches(x: jax.Array, kernel: tuple[int, ...], params: dict) -> jax.Array:
  """Input patches of a convolution, [groups, batch * outputs, taps * cin].

  Plain gathers, not `conv_general_dilated_patches`: that one convolves with
  an identity, so its result is rounded to the precision of the hardware, and
  it puts the feature before the taps.
  """
  numbers = params['dimension_numbers']
  x = jnp.transpose(x, numbers.lhs_spec)  # [b, c, *spatial]
  taps = [kernel[i] for i in numbers.rhs_spec[2:]]
  dilation = [d - 1 for d in params['lhs_dilation']]
  edges = [(lo, hi, d) for (lo, hi), d in zip(params['padding'], dilation)]
  zero = jnp.zeros((), x.dtype)
  x = jax.lax.pad(x, zero, [(0, 0, 0), (0, 0, 0), *edges])
  strides, spread = params['window_strides'], params['rhs_dilation']
  for i, (tap, stride, step) in enumerate(zip(taps, strides, spread)):
    axis = 2 + 2 * i  # every spatial axis so far became two: [output, tap]
    outputs = (x.shape[axis] - (tap - 1) * step - 1) // stride + 1
    index = np.arange(outputs)[:, None] * stride + np.arange(tap) * step
    x = jnp.take(x, index, axis=axis, mode='clip')
  groups, n = params['feature_group_count'], len(taps)
  x = x.reshape(x.shape[0], groups, -1, *x.shape[2:])
  order = [1, 0, *range(3, 3 + 2 * n, 2), *range(4, 4 + 2 * n, 2), 2]
  k = math.prod(taps) * x.shape[2]
  return jnp.transpose(x, order).reshape(groups, -1, k)


def _entry(key: Any) -> str:
  for attribute in ('key', 'idx', 'name'):
    if hasattr(key, attribute):
      return str(getattr(key, attribute))
  return str(key)


def _is_noise(key: Any) -> bool:
  return isinstance(key, jax.tree_util.GetAttrKey) and key.name == 'value'


def leaf_names(params: Any) -> dict[str, tuple[Any, ...]]:
  """Names of all leaves, in order, with their key paths.

  A name is the path joined by '/'. Two things are left out: a last '.value',
  which is the field of a Flax NNX variable that holds the array, and a first
  'params', the collection Flax Linen keeps parameters in. If two names
  became equal by that, nothing is left out.

  Raises:
    TypeError: if a leaf is no array.
    ValueError: if there is no leaf or two have the same name.
  """
  flat, _ = jax.tree_util.tree_flatten_with_path(params)
  if not flat:
    raise ValueError('params hold no arrays, so no matmul can be named by one')
  for path, leaf in flat:
    if not hasattr(leaf, 'shape') and not isinstance(leaf, (int, float)):
      raise TypeError(
        f'params{jax.tree_util.keystr(path)} is a {type(leaf).__name__}, '
        'needs an array'
      )
  paths = [path for path, _ in flat]

  def clean(path):
    entries = path[:-1] if len(path) > 1 and _is_noise(path[-1]) else path
    first = entries[0] if entries else None
    linen = isinstance(first, jax.tree_util.DictKey) and first.key == 'params'
    return entries[1:] if linen and len(entries) > 1 else entries

  for form in (clean, lambda path: path):
    # A bare array as params has an empty path
    names = ['/'.join(map(_entry, form(p))) or 'params' for p in paths]
    if len(set(names)) == len(names):
      return dict(zip(names, paths))
  twice = next(name for name in names if names.count(name) > 1)
  where = [p for name, p in zip(names, paths) if name == twice]
  raise ValueError(
    f'two leaves are both named {twice!r}: '
    + ' and '.join('params' + jax.tree_util.keystr(p) for p in where)
    + '; rename one key'
  )


def get(params: Any, site: Site) -> Any:
  """The parameter of a site, or whatever stands in its place.

  Raises:
    KeyError: if `params` has nothing at the site's path.
    ValueError: if the site has no path.
  """
  if site.path is None:
    raise ValueError(f'{site.name}: has no parameter ({site.reason})')
  at = lambda path, _: path == site.path
  flat, _ = jax.tree_util.tree_flatten_with_path(
    params, is_leaf=at, is_leaf_takes_path=True
  )
  for path, leaf in flat:
    if path == site.path:
      return leaf
  raise KeyError(f'{site.name}: params have nothing at this path')


def put(params: Any, leaves: Mapping[Site | str, Any]) -> Any:
  """A copy of `params` with some leaves replaced.

  Args:
    params: Any pytree.
    leaves: New leaves by site or name; anything may be put in, also a pytree.

  Raises:
    KeyError: for a name that `params` do not have, with the nearest ones.
    ValueError: for a site without a path.
  """
  new: dict[tuple[Any, ...], Any] = {}
  names = None
  for key, leaf in leaves.items():
    if isinstance(key, Site):
      if key.path is None:
        raise ValueError(f'{key.name}: has no parameter ({key.reason})')
      new[key.path] = leaf
      continue
    names = leaf_names(params) if names is None else names
    if key not in names:
      near = difflib.get_close_matches(key, names, n=3, cutoff=0.0)
      raise KeyError(f'{key}: no such parameter; nearest: {", ".join(near)}')
    new[names[key]] = leaf
  flat, tree = jax.tree_util.tree_flatten_with_path(
    params, is_leaf=lambda path, _: path in new, is_leaf_takes_path=True
  )
  missing = new.keys() - {path for path, _ in flat}
  if missing:
    where = ', '.join(jax.tree_util.keystr(path) for path in missing)
    raise KeyError(f'params have nothing at {where}')
  return tree.unflatten([new.get(path, leaf) for path, leaf in flat])
