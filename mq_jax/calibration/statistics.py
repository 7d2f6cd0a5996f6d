"""Gram matrices and ranges of the inputs of matmuls."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax import sites as sites_lib


class Statistics(NamedTuple):
  """What is known of the inputs [tokens, k] of one site.

  Stacked ([*batch, ...]) where the site's parameter holds several matrices.

  Attributes:
    gram: X^T X, accumulated in float32. f32[*batch, k, k].
    count: Rows of X that were seen, of those that are not all zero: an expert
      is given rows of zeros for tokens that are not its own. f32[*batch].
    total: Sum of each input. f32[*batch, k].
    largest: Largest magnitude of each input. f32[*batch, k].
  """

  gram: jax.Array
  count: jax.Array
  total: jax.Array
  largest: jax.Array


def of_rows(rows: jax.Array) -> Statistics:
  """Statistics of inputs [..., m, k], computed in float32."""
  x = rows.astype(jnp.float32)
  gram = jnp.matmul(
    jnp.swapaxes(x, -1, -2), x, precision=jax.lax.Precision.HIGHEST
  )
  return Statistics(
    gram=gram,
    count=jnp.sum(jnp.any(x != 0, axis=-1), axis=-1, dtype=jnp.float32),
    total=jnp.sum(x, axis=-2),
    largest=jnp.max(jnp.abs(x), axis=-2),
  )


def merge(a: Statistics, b: Statistics) -> Statistics:
  """Statistics of the rows of both; associative and commutative."""
  return Statistics(
    gram=a.gram + b.gram,
    count=a.count + b.count,
    total=a.total + b.total,
    largest=jnp.maximum(a.largest, b.largest),
  )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _tapped(f, wanted, params, batch, inputs):
  names = {site.name for site in wanted}

  def what(site, rows):
    if site.name not in names:
      return None
    if site.name in inputs:
      rows = inputs[site.name].on_rows(site, rows)
    found = of_rows(rows)
    # `tap` adds up the calls of a site, which a maximum does not survive.
    return found if site.calls == 1 else found._replace(largest=None)

  return sites_lib.tap(f, what)(params, *batch)[1]


def calibrate(
  f: Callable[..., Any],
  params: Any,
  batches: Iterable[Any],
  *,
  sites: Sequence[sites_lib.Site] | None = None,
  inputs: Mapping[str, Any] | None = None,
  least: int = 1,
  progress: Callable[[int, int | None], None] | None = None,
) -> dict[str, Statistics]:
  """One pass over data: statistics of the inputs of every site.

  Args:
    f: `f(params, *batch)`, any JAX function; give the same object again, and
      nothing is compiled again.
    params: Its parameters.
    batches: Batches for `f`; an entry that is no tuple is its only argument.
      Batches of one shape share one compiled program.
    sites: Sites to gather for; None for all with a parameter.
    inputs: Of sites by name, what `activations.choose` found: statistics are
      then of their quantized inputs (in the model's own basis), on which
      errors of weights are better made up for. Those of other sites, and what
      feeds all of them, are as ever.
    least: Rows that must have reached every matrix; 0 where `plans.compress`
      is to decide by its own `coverage`.
    progress: Called with the batches done and, if known, their number.

  Returns:
    Statistics by the site's name. `largest` is None for a site whose matrix
    is used more than once.

  Raises:
    ValueError: if there are no batches, or a site's inputs are not finite or
      too few.
  """
  batches = batches if hasattr(batches, '__len__') else list(batches)
  as_tuple = lambda batch: batch if isinstance(batch, tuple) else (batch,)
  if not len(batches):
    raise ValueError('calibrate: no batches; give at least one')
  if sites is None:
    sites = sites_lib.find(f, params, *as_tuple(batches[0]))
  wanted = tuple(site for site in sites if site.path is not None)
  found: dict[str, Statistics] = {}
  for done, batch in enumerate(batches):
    batch = jax.tree.map(jnp.asarray, as_tuple(batch))
    new = _tapped(f, wanted, params, batch, {} if inputs is None else inputs)
    for name, statistics in new.items():
      if statistics is not None:
        old = found.get(name)
        found[name] = statistics if old is None else _merge(old, statistics)
    if progress is not None:
      progress(done + 1, len(batches))
  for name in (site.name for site in wanted if site.name in found):
    statistics = found[name]
    if not bool(jnp.all(jnp.isfinite(statistics.gram))):
      raise ValueError(
        f'{name}: calibration data gives inputs that are not finite, or too '
        'large to square in float32'
      )
    check_coverage(name, statistics.count, least)
  return found


def check_coverage(name: str, count: jax.Array, least: int) -> None:
  """Refuse a site of which a matrix has seen too few rows.

  Args:
    name: Of the site.
    count: Rows that each of its matrices has seen. f32[*batch].
    least: Rows that each must have seen.

  Raises:
    ValueError: naming the site, and the matrices if it has several.
  """
  short = np.argwhere(np.asarray(count) < least)
  if not len(short):
    return
  seen = int(np.min(count))
  how_many = f'only {seen} rows' if seen else 'no row'
  which = ''
  if np.ndim(count):
    shown = ', '.join('/'.join(map(str, index)) for index in short[:5])
    which = f' {len(short)} of {np.size(count)} matrices ({shown}'
    which += ', ...)' if len(short) > 5 else ')'
  needed = f' where {least} are needed' if least > 1 else ''
  raise ValueError(
    f'{name}: {how_many} of calibration data that is not zero reached'
    f'{which or " it"}{needed}; calibrate on more, or round what is not '
    'covered (coverage)'
  )


@jax.jit
def _merge(a: Statistics, b: Statistics) -> Statistics:
  if a.largest is None:
    merged = merge(a._replace(largest=a.total), b._replace(largest=b.total))
    return merged._replace(largest=None)
  return merge(a, b)
