"""From options and statistics to what is done to each site's inputs."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mq_jax import compensation, equalization, formats, rotations
from mq_jax import sites as sites_lib
from mq_jax.activations._inputs import Inputs, features_of, sample_rows
from mq_jax.activations._quantizers import Tensor
from mq_jax.calibration import Statistics, calibrate
from mq_jax.sites import Site

GRID = tuple(i / 10 for i in range(11))  # exponents that a search tries


def choose(
  params: Any,
  entries: Sequence[tuple[Site, Any]],
  statistics: Mapping[str, Statistics] | None = None,
  rows: Mapping[str, jax.Array] | None = None,
) -> dict[str, Inputs]:
  """What is done to the inputs of each site whose recipe says so.

  Args:
    params: The model's parameters, not quantized yet.
    entries: Sites and their recipes, as of a `Plan`.
    statistics: From `calibrate`, of inputs as they come; smoothing and static
      scales need them.
    rows: From `sample_rows`, for smooth='search'.

  Returns:
    By the site's name; none for sites whose recipe leaves inputs alone.

  Raises:
    ValueError: by site, for statistics or rows that are missing, and for
      what can't be done there.
  """
  found = {}
  for site, recipe in entries:
    if recipe.activations is not None:
      try:
        found[site.name] = _choose(
          site,
          recipe,
          jnp.asarray(sites_lib.get(params, site)),
          None if statistics is None else statistics.get(site.name),
          None if rows is None else rows.get(site.name),
        )
      except ValueError as error:
        raise ValueError(f'{site.name}: {recipe.label}: {error}') from error
  return found


def _choose(site: Site, recipe, leaf, statistics, rows) -> Inputs:
  options, features = recipe.activations, features_of(site)
  if options.fold:
    raise ValueError(
      'smoothing is to be folded into what writes the channels; call '
      'mq_jax.activations.fold first'
    )
  if recipe.scales_inputs:
    if options.transforms:
      raise ValueError('the recipe scales inputs itself; leave out transforms')
    if site.repeats > 1:
      raise ValueError(
        'the recipe scales the inputs of each matrix of the scan apart, which '
        'its quantizer can not follow'
      )
  matrix = site.matrix(leaf).astype(jnp.float32)
  largest = _largest(site, statistics, options)
  signs = rotations.draw_signs(options.seed, features)
  signs = signs if options.rotate else None
  scale = None
  if options.smooth == 'search':
    scale = _searched(site, recipe, matrix, largest, rows, signs, features)
  elif options.smooth is not None:
    scale = _scale(site, matrix, largest, features, options.smooth)
  quantizer = options.quantizer
  if isinstance(quantizer, Tensor) and not quantizer.dynamic:
    seen = largest
    if scale is not None:
      seen = seen / _repeated(site, scale.astype(jnp.float32))
    quantizer = dataclasses.replace(
      quantizer, largest=jnp.max(_most(site, seen), axis=-1)
    )
  return Inputs(quantizer, scale, signs)


def _largest(site, statistics, options):
  """Largest magnitude of each input [*batch, k], where it is needed."""
  quantizer = options.quantizer
  static = isinstance(quantizer, Tensor) and not quantizer.dynamic
  if not static and options.smooth is None:
    return None
  found = getattr(statistics, 'largest', None)
  if found is None:
    why = (
      'there are no calibration statistics of this site'
      if statistics is None
      else 'its matrix is used more than once, so that they are not gathered'
    )
    what = 'a static scale' if options.smooth is None else 'smoothing'
    raise ValueError(f'{what} needs the largest inputs, but {why}')
  return found


def _most(site: Site, x: jax.Array) -> jax.Array:
  """The largest over the axis of repeats, which share what is chosen."""
  return jnp.max(x, axis=0) if site.repeats > 1 else x


def _repeated(site: Site, x: jax.Array) -> jax.Array:
  return x[None] if site.repeats > 1 else x


def _scale(site, matrix, largest, features, alpha) -> jax.Array:
  """Scales as stored, f16[k] or [groups, k]."""
  # Taps of a convolution share what is chosen: [.., k] -> [.., features].
  runs = lambda x: x.reshape(*x.shape[:-1], -1, features)
  shared = lambda x: _most(site, jnp.max(runs(x), axis=-2))
  inputs = shared(largest)
  weights = shared(jnp.max(jnp.abs(matrix), axis=-1))
  scale = equalization.smoothing_scale(inputs, weights, alpha)
  stored = formats.stored_scale(scale)
  taps = matrix.shape[-2] // features
  return jnp.tile(stored, (*[1] * (stored.ndim - 1), taps))


def _searched(site, recipe, matrix, largest, rows, signs, features):
  """The scale of least output error on a sample of rows; None for none."""
  if rows is None:
    raise ValueError(
      "smooth='search' needs rows of the inputs; give those of "
      'mq_jax.activations.sample_rows (a matrix used more than once has none)'
    )
  quantizer = recipe.activations.quantizer
  if isinstance(quantizer, Tensor) and not quantizer.dynamic:
    raise ValueError("smooth='search' and a static scale: choose one of them")
  if not hasattr(recipe.rows, 'group'):
    raise ValueError("smooth='search' is not for recipes of blocks")
  scales = [_scale(site, matrix, largest, features, a) for a in GRID]
  scales = jnp.stack([jnp.ones_like(scales[0]), *scales])
  each = _repeated(site, jnp.moveaxis(scales, 0, -2))  # [*batch, grid, k]
  batch = matrix.shape[:-2]
  each = jnp.broadcast_to(each, (*batch, *each.shape[-2:]))
  flat = lambda x: x.reshape(-1, *x.shape[len(batch) :])
  errors = _output_errors(
    *map(flat, (matrix, rows, each)), recipe.rows, quantizer, signs, features
  )
  best = int(jnp.argmin(errors))  # the first: none, where nothing is better
  return None if best == 0 else scales[best]


@functools.partial(jax.jit, static_argnames='features')
def _output_errors(
  weights, rows, scales, recipe_rows, quantizer, signs, features
):
  """Squared errors f32[grid] of outputs of quantized rows and weights.

  Args:
    weights: f32[b, k, n].
    rows: f32[b, m, k].
    scales: Of each weight those that are tried, f16[b, grid, k].
    recipe_rows: How weights are rounded.
    quantizer: Of inputs, or None.
    signs: Of a rotation, or None.
    features: See `features_of`.
  """
  inputs = Inputs(quantizer, None, signs)

  def one(w, x, scale):
    s = scale.astype(jnp.float32)
    seen = x / s[None]
    quantized = inputs(seen.reshape(-1, features)).reshape(x.shape)
    scaled = w * s[:, None]
    if signs is not None:
      scaled = rotations.rotate(scaled, signs, 0)
    cost = jnp.mean(jnp.square(seen), axis=0) + 1e-12
    value = compensation.rounded(scaled, cost, recipe_rows)
    if signs is not None:
      value = rotations.unrotate(value, signs, 0)
    return jnp.sum(jnp.square(x @ w - quantized @ value))

  rows = rows.astype(jnp.float32)
  every = lambda s: jnp.sum(jax.vmap(one)(weights, rows, s))
  return jax.lax.map(every, jnp.swapaxes(scales, 0, 1))


class Prepared(NamedTuple):
  """What `prepare` returns, for `mq_jax.compress`."""

  inputs: dict[str, Inputs]
  statistics: dict[str, Statistics]


def prepare(
  f: Any,
  params: Any,
  entries: Sequence[tuple[Site, Any]],
  batches: Sequence[Any],
  statistics: Mapping[str, Statistics],
  progress: Any = None,
) -> Prepared:
  """`choose`, with what else it needs of the calibration data.

  Args:
    f: `f(params, *batch)`.
    params: Its parameters.
    entries: Sites and their recipes, as of a `Plan`.
    batches: Calibration data; the first gives rows for smooth='search', all
      of them statistics for sees='quantized'.
    statistics: From `calibrate`, of inputs as they come.
    progress: As for `calibrate`.

  Returns:
    What is done to inputs, and the statistics that recipes ask for: those of
    quantized inputs where they say so.

  Raises:
    ValueError: as `choose`.
  """
  asked = [(s, r) for s, r in entries if r.activations is not None]
  if not asked:
    return Prepared({}, dict(statistics))
  rows = None
  if any(r.activations.smooth == 'search' for _, r in asked):
    rows = sample_rows(f, params, batches[0], [s for s, _ in asked])
  inputs = choose(params, asked, statistics, rows)
  found = dict(statistics)
  seeing = [s for s, r in asked if r.activations.sees == 'quantized']
  if seeing:
    found |= calibrate(
      f,
      params,
      batches,
      sites=seeing,
      inputs=inputs,
      least=0,  # they were given rows already, and refused if too few
      progress=progress,
    )
  return Prepared(inputs, found)


class Folded(NamedTuple):
  """What `fold` returns: each in the place of what it was given."""

  params: Any
  entries: tuple[tuple[Site, Any], ...]
  statistics: dict[str, Statistics]


def fold(
  params: Any,
  pairs: Sequence[equalization.ChannelPair],
  entries: Sequence[tuple[Site, Any]],
  statistics: Mapping[str, Statistics],
) -> Folded:
  """Smooth the inputs of sites by what writes them, where that is exact.

  Sites of a pair are smoothed together, if all of them ask for it
  (`fold=True`) with one exponent. Sites that ask for it and are in no such
  pair keep their exponent, but are scaled where they are (`fold=False`).

  Args:
    params: The model's parameters, nested dicts.
    pairs: Of the model, whose consumers are read by sites.
    entries: Sites and their recipes, as of a `Plan`.
    statistics: From `calibrate`, of the sites.

  Returns:
    Parameters of the same function, entries that ask for no more folding, and
    the statistics of the new inputs.

  Raises:
    ValueError: for smooth='search', which is chosen site by site, or for
      statistics that are missing.
  """
  asked = {}
  for site, recipe in entries:
    options = recipe.activations
    if options is not None and options.fold:
      if options.smooth == 'search':
        raise ValueError(
          f"{site.name}: {recipe.label}: smooth='search' finds an exponent for "
          'each site; with fold=True give one'
        )
      asked[site.name] = options.smooth
  found = dict(statistics)
  done = set()
  for pair in pairs:
    names = ['/'.join(map(str, path)) for path, _ in pair.consumers]
    alphas = {asked.get(name) for name in names}
    if len(alphas) > 1 or None in alphas:
      continue
    largest = {n: found[n].largest for n in names if n in found}
    if any(x is not None and x.ndim > 1 for x in largest.values()):
      continue  # matrices of one parameter, each with inputs of its own
    alpha = alphas.pop()
    factors = equalization.smoothing_factors(params, [pair], largest, alpha)
    params = equalization.rescale_channels(params, [pair], factors)
    for name in names:
      old = found[name]
      f = equalization.spread(factors[0], pair, old.total.shape[-1])
      found[name] = old._replace(
        gram=old.gram * (f[:, None] * f[None, :]),
        total=old.total * f,
        largest=old.largest * f,
      )
      done.add(name)
  new = []
  for site, recipe in entries:
    options = recipe.activations
    if site.name in done:
      options = dataclasses.replace(options, smooth=None, fold=False)
    elif site.name in asked:
      options = dataclasses.replace(options, fold=False)
    new.append((site, dataclasses.replace(recipe, activations=options)))
  return Folded(params, tuple(new), found)
