"""Clusters: cutting an array into runs of weights, and lifting steps to it.

A step is written for one cluster of n weights; `lift` maps it over all
clusters of an array, `within` over the smaller clusters inside one.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mq_jax._pytrees import pytree_dataclass, static


class Cluster(NamedTuple):
  """One cluster of n weights on its way from floats to codes.

  Attributes:
    weight: What is still to be represented. f32[n].
    saliency: Cost of disturbing each weight: the squared error of the layer's
      output for a unit change, >= 0. Zero marks padding, which has no part in
      statistics. f32[n].
    outlier: Weights that get more bits than their neighbours. bool[n].
    kept: False where a weight is pruned to zero. bool[n].
    value: What the codes decode to so far. f32[n].
    code: What a layout stores: arrays of shape [n, ...] for elements, any
      other shape for the cluster as a whole.
    key: This cluster's own PRNG key; None when no step draws numbers.
  """

  weight: jax.Array
  saliency: jax.Array
  outlier: jax.Array
  kept: jax.Array
  value: jax.Array
  code: dict[str, Any]
  key: jax.Array | None = None

  @property
  def real(self) -> jax.Array:
    """False at padding. bool[n]."""
    return self.saliency > 0

  @property
  def inlier(self) -> jax.Array:
    """Weights that are neither outliers nor pruned nor padding. bool[n]."""
    return self.real & self.kept & ~self.outlier


Step = Callable[[Cluster], Cluster]


def new_cluster(
  weight: jax.Array,
  saliency: jax.Array | None = None,
  key: jax.Array | None = None,
) -> Cluster:
  """A cluster to which no step has been applied.

  Args:
    weight: Weights, computed in float32. Shape [n].
    saliency: See `Cluster`; None weighs all alike. Shape [n].
    key: Key for steps that draw random numbers.

  Raises:
    ValueError: if `weight` has more than one axis (use `lift` or `vmap`).
  """
  if weight.ndim != 1:
    raise ValueError(
      f'a cluster has one axis, weight has shape {weight.shape}; map the '
      'step over the other axes with mq_jax.lift'
    )
  weight = weight.astype(jnp.float32)
  none = jnp.zeros(weight.shape, bool)
  if saliency is None:
    saliency = jnp.ones(weight.shape, jnp.float32)
  return Cluster(
    weight=weight,
    saliency=saliency.astype(jnp.float32),
    outlier=none,
    kept=~none,
    value=jnp.zeros_like(weight),
    code={},
    key=key,
  )


def cut(
  array: jax.Array, size: int, axis: int = -1, fill: Any = 0
) -> jax.Array:
  """Cut an axis into clusters: [..., l, ...] -> [..., ceil(l / size), size].

  The axis moves to the end; `fill` pads the last cluster.
  """
  array = jnp.moveaxis(array, axis, -1)
  pad = -array.shape[-1] % size
  widths = [(0, 0)] * (array.ndim - 1) + [(0, pad)]
  array = jnp.pad(array, widths, constant_values=fill)
  return array.reshape(*array.shape[:-1], -1, size)


def join(clusters: jax.Array, length: int, axis: int = -1) -> jax.Array:
  """Undo `cut`: [..., c, size] -> the original axes, padding dropped."""
  array = clusters.reshape(*clusters.shape[:-2], -1)[..., :length]
  return jnp.moveaxis(array, -1, axis)


@pytree_dataclass
class Lifted:
  """A step mapped over the clusters of an array; made by `lift`."""

  step: Any
  size: int = static()
  axis: int = static(0)

  def clusters(
    self,
    weight: jax.Array,
    saliency: jax.Array | None = None,
    *,
    key: jax.Array | None = None,
  ) -> Cluster:
    """The step's result for every cluster; leading axes [..., c]."""
    if self.size < 1:
      raise ValueError(f'lift: size={self.size} must be at least 1')
    if not -weight.ndim <= self.axis < weight.ndim:
      raise ValueError(
        f'lift: axis={self.axis} is not an axis of shape {weight.shape}'
      )
    if saliency is None:
      saliency = jnp.ones(weight.shape, jnp.float32)
    saliency = jnp.broadcast_to(saliency, weight.shape)
    weights = cut(weight, self.size, self.axis)
    saliencies = cut(saliency, self.size, self.axis)
    leading = weights.shape[:-1]
    if key is not None:
      key = jax.random.split(key, leading)

    def run(w, s, k):
      return self.step(new_cluster(w, s, k))

    for _ in leading:
      run = jax.vmap(run)
    return run(weights, saliencies, key)

  def __call__(
    self,
    weight: jax.Array,
    saliency: jax.Array | None = None,
    *,
    key: jax.Array | None = None,
  ) -> tuple[jax.Array, dict[str, Any]]:
    result = self.clusters(weight, saliency, key=key)
    values = join(result.value, weight.shape[self.axis], self.axis)
    return values, result.code


def lift(step: Step, size: int, axis: int = 0) -> Lifted:
  """Map a step over the clusters of an array.

  Args:
    step: A step, `Cluster -> Cluster`.
    size: Weights in a cluster; the last cluster is padded with zeros of
      saliency 0, which change nothing in the others.
    axis: Axis along which neighbours share a cluster; for a weight [k, n],
      0 is the reduction axis ("in"), 1 the outputs ("out").

  Returns:
    A callable `(weight, saliency=None, *, key=None) -> (values, codes)`, and
    itself a pytree whose leaves are those of the step. `values` has the shape
    of `weight`; codes have the other axes and the cluster's index in front.

  Examples:
    >>> from mq_jax import steps
    >>> tx = steps.RoundToNearest(bits=4)
    >>> values, codes = lift(tx, size=2, axis=0)(jnp.eye(4))
    >>> values.shape, codes['scale'].shape
    ((4, 4), (4, 2))
  """
  return Lifted(step, size=size, axis=axis)


@pytree_dataclass
class Within:
  """A step applied to the smaller clusters inside a cluster.

  Element codes ([n, ...]) are cut along with the weights; codes of the whole
  cluster are shown to every part and stay as they are; new codes of a part
  are stacked.
  """

  step: Any
  size: int = static()

  def __call__(self, cluster: Cluster) -> Cluster:
    n = cluster.weight.shape[0]
    if n % self.size:
      raise ValueError(
        f'within: cluster of {n} weights is not a multiple of {self.size}'
      )
    parts = n // self.size
    element = {
      name: code
      for name, code in cluster.code.items()
      if code.ndim and code.shape[0] == n
    }
    whole = {k: v for k, v in cluster.code.items() if k not in element}
    split = lambda x: x.reshape(parts, self.size, *x.shape[1:])
    arrays = jax.tree.map(split, (cluster[:5], element))
    keys = None
    if cluster.key is not None:
      keys = jax.random.split(cluster.key, parts)

    def run(arrays, key):
      fields, codes = arrays
      part = self.step(Cluster(*fields, code={**whole, **codes}, key=key))
      changed = {k: v for k, v in part.code.items() if k not in whole}
      return part[:5], changed

    fields, codes = jax.vmap(run)(arrays, keys)
    merge = lambda x: x.reshape(n, *x.shape[2:])
    is_element = lambda x: x.ndim > 1 and x.shape[1] == self.size
    codes = {k: merge(v) if is_element(v) else v for k, v in codes.items()}
    return Cluster(
      *(merge(x) for x in fields), code={**whole, **codes}, key=cluster.key
    )


def within(step: Step, size: int) -> Within:
  """Apply a step to each run of `size` weights of a cluster."""
  return Within(step, size=size)


@pytree_dataclass
class Chain:
  """Steps applied in order; made by `chain`."""

  steps: tuple

  def __call__(self, cluster: Cluster) -> Cluster:
    for index, step in enumerate(self.steps):
      if cluster.key is not None:
        given = cluster._replace(key=jax.random.fold_in(cluster.key, index))
        cluster = step(given)._replace(key=cluster.key)
      else:
        cluster = step(cluster)
    return cluster


def chain(*steps: Step) -> Chain:
  """Apply steps in order; the chain is a step itself.

  Every step sees a key of its own when the cluster carries one. Plain
  functions are valid steps, but then the chain can't be a jit argument.
  """
  return Chain(tuple(steps))


def number_of_clusters(length: int, size: int) -> int:
  """Clusters of `size` that cover an axis of `length`."""
  return math.ceil(length / size)


def batch_of(length: int, most: int) -> int:
  """How many of `length` to do at a time, up to `most`, at least 1.

  A divisor of `length` where there is one of some size: `lax.map` compiles
  its body a second time for what is left over.

  Examples:
    >>> batch_of(96, 40)
    32
  """
  most = max(1, min(most, length))
  divisor = next(size for size in range(most, 0, -1) if length % size == 0)
  return divisor if 4 * divisor >= most else most
