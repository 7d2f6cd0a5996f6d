"""Matmuls to be priced: sizes, how often, and under which name."""

import difflib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mq_jax._pytrees import pytree_dataclass, static
from mq_jax.hardware import shapes
from mq_jax.sites import Site

PHASES = ('prefill', 'decode')


@pytree_dataclass
class Workload:
  """Matmuls Y[m, n] = X[m, k] W[k, n], scalars or arrays [l].

  Attributes:
    m: Rows of activations (tokens).
    k: Length of the reduction.
    n: Outputs.
    count: How often; costs are of all of them.
    names: Of the sites, for tables.
  """

  m: jax.typing.ArrayLike
  k: jax.typing.ArrayLike
  n: jax.typing.ArrayLike
  count: jax.typing.ArrayLike = 1
  names: tuple[str, ...] = static(())

  @property
  def macs(self):
    """Multiply-accumulates, all of them. [l]."""
    wide = lambda x: np.asarray(x, np.float64) if _plain(x) else x
    return wide(self.m) * self.k * self.n * self.count


def _plain(x: Any) -> bool:
  return not isinstance(x, jax.core.Tracer)


def gemm(
  m: jax.typing.ArrayLike,
  k: jax.typing.ArrayLike,
  n: jax.typing.ArrayLike,
  count: jax.typing.ArrayLike = 1,
  *,
  names: Sequence[str] = (),
) -> Workload:
  """One matmul, or several of arrays [l].

  Args:
    m: Rows of activations, >= 1.
    k: Length of the reduction, >= 1.
    n: Outputs, >= 1.
    count: How often, >= 1.
    names: Of the sites.

  Raises:
    ValueError: for sizes below 1 or not whole, by name.

  Examples:
    >>> gemm(16, 4096, 4096).macs
    np.float64(268435456.0)
  """
  sizes = {}
  for name, value in (('m', m), ('k', k), ('n', n), ('count', count)):
    if _plain(value):
      value = _whole(name, value)
    sizes[name] = value
  return Workload(**sizes, names=tuple(names))


def _whole(name: str, value: Any):
  array = np.asarray(value)
  if not np.issubdtype(array.dtype, np.number):
    raise ValueError(f'gemm: {name} = {value!r} is not a number')
  bad = ~((array >= 1) & (array == np.floor(array)) & np.isfinite(array))
  if bad.any():
    raise ValueError(
      f'gemm: {name} = {array[bad].flat[0]}; a whole number >= 1 is needed'
    )
  whole = array.astype(np.int64)
  return int(whole) if whole.ndim == 0 else whole


def from_sites(
  sites: Sequence[Site],
  phase: str = 'prefill',
  *,
  batch: int = 1,
  context: int = 2048,
  tokens: int | None = None,
) -> Workload:
  """The weight matmuls of a model, from its sites.

  Rows of activations scale with the tokens of a run, so they are replaced:
  `batch * context` tokens in prefill, `batch` in decode.

  Args:
    sites: From `mq_jax.sites.find`; products of two activations are left out.
    phase: 'prefill' or 'decode'.
    batch: Sequences.
    context: Tokens of each.
    tokens: Tokens of the batch that the sites were found with, for sites
      whose rows are not one a token (convolutions, experts). None replaces
      the rows of every site.

  Returns:
    One entry a site, in their order.

  Raises:
    ValueError: for an unknown phase, sizes below 1, or no sites.
  """
  rows = _rows(phase, batch, context)
  kept = [site for site in sites if site.kind != 'attention']
  if not kept:
    raise ValueError('from_sites: there is no site with a weight')
  m = [
    rows if tokens is None else max(1, round(site.m * rows / tokens))
    for site in kept
  ]
  return gemm(
    np.array(m),
    np.array([site.k for site in kept]),
    np.array([site.n for site in kept]),
    np.array([site.repeats * site.groups for site in kept]),
    names=[site.name for site in kept],
  )


def _rows(phase: str, batch: int, context: int) -> int:
  if phase not in PHASES:
    raise ValueError(f'phase {phase!r} is not one of {PHASES}')
  for name, value in (('batch', batch), ('context', context)):
    if value < 1 or value != int(value):
      raise ValueError(f'{name} = {value}; a whole number >= 1 is needed')
  return int(batch * context) if phase == 'prefill' else int(batch)


def model(
  name: str,
  phase: str = 'prefill',
  *,
  batch: int = 1,
  context: int = 2048,
  each_layer: bool = False,
) -> Workload:
  """The weight matmuls of a published model, without its weights.

  Args:
    name: One of `shapes.MODELS`.
    phase: 'prefill' or 'decode'; models of images have only 'prefill', and
      `context` does not concern them.
    batch: Sequences or images.
    context: Tokens of each.
    each_layer: One entry for every matrix instead of one for all that are
      equal, with their `count`.

  Raises:
    ValueError: for an unknown name, with the nearest ones.

  Examples:
    >>> work = model('llama-2-7b', 'decode')
    >>> work.names[:2], int(work.count[0]), int(model(
    ...   'llama-2-7b', each_layer=True).k.size)
    (('q_proj', 'k_proj'), 32, 224)
  """
  if name not in shapes.MODELS:
    near = difflib.get_close_matches(name, shapes.MODELS, n=3, cutoff=0.4)
    hint = near or sorted(shapes.MODELS)
    raise ValueError(f'no shapes of model {name!r}; nearest are {hint}')
  found = shapes.MODELS[name]
  if found.images:
    if phase != 'prefill':
      raise ValueError(f'{name}: a model of images has no phase {phase!r}')
    rows = batch
  else:
    rows = _rows(phase, batch, context)
  entries = []
  for matmul in found.matmuls:
    # An expert sees its share of the tokens.
    m = max(1, round(rows * matmul.rows * matmul.share))
    repeats = matmul.count if each_layer else 1
    count = 1 if each_layer else matmul.count
    for i in range(repeats):
      label = f'{i}/{matmul.name}' if each_layer else matmul.name
      entries.append((label, m, matmul.k, matmul.n, count))
  names, *sizes = zip(*entries, strict=True)
  return gemm(*map(np.array, sizes), names=names)
