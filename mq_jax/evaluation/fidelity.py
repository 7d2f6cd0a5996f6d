"""How far a quantized network's features are from those of the original."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax import sharding
from mq_jax import sites as sites_lib

OUTPUT = 'output'


class Fidelity(NamedTuple):
  """Agreement of features with a reference, over all rows.

  Attributes:
    cosine: Mean cosine of the angle between a row and its reference; 1 where
      both are zero, 0 where one is.
    relative_mse: Squared error over the squared reference, both summed.
    sqnr_db: -10 log10 of it; infinite where nothing differs.
    rows: Number of rows, vectors of features.
  """

  cosine: float
  relative_mse: float
  sqnr_db: float
  rows: int


def _sums(found: jax.Array, wanted: jax.Array) -> jax.Array:
  """Squared error, squared reference, cosines, rows: f32[4]."""
  a, b = (x.astype(jnp.float32) for x in (found, wanted))
  a, b = (x.reshape(-1, x.shape[-1]) for x in (a, b))
  dot, aa, bb = jnp.sum(a * b, -1), jnp.sum(a * a, -1), jnp.sum(b * b, -1)
  # Roots apart: the product of squares leaves float32 sooner.
  norm = jnp.sqrt(aa) * jnp.sqrt(bb)
  alike = ((aa == 0) & (bb == 0)).astype(jnp.float32)
  cosine = jnp.where(norm > 0, dot / jnp.where(norm > 0, norm, 1.0), alike)
  rows = jnp.asarray(a.shape[0], jnp.float32)
  return jnp.stack(
    [jnp.sum(jnp.square(a - b)), jnp.sum(bb), jnp.sum(cosine), rows]
  )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _batch_sums(apply, original, names, params, reference, batch):
  """`_sums` of the output, and of the inputs of the sites named."""

  def rows(site, x):
    return x if site.name in names else None

  out, seen = sites_lib.tap(apply, rows)(params, *batch)
  wanted, known = sites_lib.tap(original, rows)(reference, *batch)
  found = {OUTPUT: _sums(out, wanted)}
  return found | {name: _sums(seen[name], known[name]) for name in names}


def compare(
  apply: Callable[..., jax.Array],
  params: Any,
  original: Callable[..., jax.Array],
  reference: Any,
  batches: Iterable[Any],
  *,
  sites: Sequence[sites_lib.Site] = (),
) -> dict[str, Fidelity]:
  """Compare what two networks compute on the same batches.

  Args:
    apply: `(params, *batch) -> array [..., features]`; give the same object
      again, and nothing is compiled again.
    params: Its parameters, to be judged; plain arrays.
    original: The function of the original; `apply` if both are one.
    reference: Its parameters.
    batches: Batches for both; an entry that is no tuple is its only
      argument.
    sites: Sites whose inputs to compare too, each once in the function: how
      the error grows from layer to layer.

  Returns:
    The agreement of the output, under the name 'output', and of the inputs of
    each site, by its name. Sums of a batch are float32, over batches float64.

  Raises:
    ValueError: if there are no batches, or a site is called more than once or
      has no parameter.
  """
  for site in sites:
    if site.path is None or site.calls != 1:
      raise ValueError(
        f'{site.name}: is called {site.calls} times; inputs are compared of '
        'sites with a parameter that are called once'
      )
  names = tuple(site.name for site in sites)
  totals: dict[str, np.ndarray] = {}
  for batch in batches:
    batch = batch if isinstance(batch, tuple) else (batch,)
    sums = _batch_sums(apply, original, names, params, reference, batch)
    for name, value in sums.items():
      new = sharding.to_host(value).astype(np.float64)
      totals[name] = totals.get(name, 0.0) + new
  if not totals:
    raise ValueError('fidelity: no batches; give at least one')
  return {name: _fidelity(sums) for name, sums in totals.items()}


def _fidelity(sums: np.ndarray) -> Fidelity:
  error, energy, cosine, rows = map(float, sums)
  if energy > 0:
    relative = error / energy
  else:
    relative = 0.0 if error == 0 else math.inf
  decibel = math.inf
  if relative > 0:
    decibel = -10 * math.log10(relative) if relative < math.inf else -math.inf
  elif math.isnan(relative):
    decibel = math.nan
  return Fidelity(cosine / rows, relative, decibel, int(rows))
