"""What sensitivities share: the loss as a function of its sites alone."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax import sites as sites_lib
from mq_jax.sites import Site

# (params, batch) -> scalar
Loss = Callable[[Any, Any], jax.Array]
# Arrays of the shape of each site's parameter, by the site's name
Leaves = dict[str, jax.Array]


class Estimate(NamedTuple):
  """Means of independent samples, one a site.

  Attributes:
    mean: Of all samples. f32[l].
    error: Its standard error; infinite for one sample. f32[l].
    means: After each sample. f32[s, l].
    errors: After each sample. f32[s, l].
  """

  mean: jax.Array
  error: jax.Array
  means: jax.Array
  errors: jax.Array


def compiled(*static: str):
  """Jits a function of sites; named arguments, sites and loss are static."""

  def wrap(f):
    signature = inspect.signature(f)
    fixed = {'loss', 'sites', *static} & set(signature.parameters)
    program = jax.jit(f, static_argnames=sorted(fixed))

    @functools.wraps(f)
    def call(*args, **kwargs):
      bound = signature.bind(*args, **kwargs)
      bound.arguments['sites'] = tuple(bound.arguments['sites'])
      return program(*bound.args, **bound.kwargs)

    return call

  return wrap


def site_leaves(params: Any, sites: Sequence[Site]) -> Leaves:
  """The parameters of sites in float32, by name.

  Raises:
    KeyError: if `params` lacks one of them.
    ValueError: without sites, if one has no parameter or an integer one, or
      if two have the same.
  """
  if not sites:
    raise ValueError('sensitivity: no sites given')
  leaves, owners = {}, {}
  for site in sites:
    leaf = jnp.asarray(sites_lib.get(params, site))
    other = owners.setdefault(site.path, site)
    if site.name in leaves or other is not site:
      raise ValueError(
        f'{site.name}: has the parameter or name of another site given, '
        f'{other.name}; leave one of them out'
      )
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      raise ValueError(
        f'{site.name}: parameter has dtype {leaf.dtype}; a real float is needed'
      )
    leaves[site.name] = leaf.astype(jnp.float32)
  return leaves


def check_leaves(
  what: str, leaves: Leaves, given: Mapping[str, jax.Array], axes: int = 0
) -> None:
  """Refuse what does not have an array of each site's shape.

  Args:
    what: Name for messages.
    leaves: Parameters of the sites.
    given: Arrays of their shapes, with `axes` more in front that all sites
      have alike.
    axes: Axes in front.

  Raises:
    ValueError: for sites that are missing or shapes that don't fit.
  """
  front = None
  for name, leaf in leaves.items():
    if name not in given:
      raise ValueError(f'{name}: {what} has nothing for this site')
    shape = np.shape(given[name])
    front = shape[:axes] if front is None else front
    if shape != (*front, *leaf.shape):
      raise ValueError(
        f'{name}: {what} has shape {shape}, needed is {(*front, *leaf.shape)}'
      )


def at_sites(loss: Loss, params: Any, sites: Sequence[Site]):
  """The loss as a function of (leaves, batch), and the leaves."""
  leaves = site_leaves(params, sites)

  def f(leaves, batch):
    new = {}
    for site in sites:
      dtype = jnp.asarray(sites_lib.get(params, site)).dtype
      new[site] = leaves[site.name].astype(dtype)
    return loss(sites_lib.put(params, new), batch).astype(jnp.float32)

  return f, leaves


# Names are given in the order of sites: jax sorts the keys of dicts.
def dots(a: Leaves, b: Leaves, names: Iterable[str]) -> jax.Array:
  """Products site by site, f32[l]; not as matmuls, which may be rounded."""
  return jnp.stack([jnp.sum(a[name] * b[name]) for name in names])


def only(index: jax.Array, a: Leaves, names: Iterable[str]) -> Leaves:
  """Zeros but for the site of an index, which may be traced."""
  return {n: jnp.where(index == i, a[n], 0.0) for i, n in enumerate(names)}


def drawn(
  distribution: Callable[..., jax.Array], key: jax.Array, leaves: Leaves
) -> Leaves:
  """Random numbers of the shapes of leaves, by one draw.

  A generator takes longer to compile than a layer, so all sites share one.
  """
  ends = np.cumsum([leaf.size for leaf in leaves.values()])
  flat = distribution(key, (int(ends[-1]),), jnp.float32)
  parts = jnp.split(flat, ends[:-1])
  return {
    name: part.reshape(leaf.shape)
    for part, (name, leaf) in zip(parts, leaves.items(), strict=True)
  }


def estimate(samples: jax.Array) -> Estimate:
  """Running means and standard errors of f32[s, l], by Welford's rule."""

  def add(carry, sample):
    count, mean, scatter = carry
    count = count + 1.0
    off = sample - mean
    mean = mean + off / count
    scatter = scatter + off * (sample - mean)
    variance = scatter / jnp.maximum(count - 1.0, 1.0)
    error = jnp.where(count > 1.0, jnp.sqrt(variance / count), jnp.inf)
    return (count, mean, scatter), (mean, error)

  zero = jnp.zeros_like(samples[0])
  _, (means, errors) = jax.lax.scan(add, (0.0, zero, zero), samples)
  return Estimate(means[-1], errors[-1], means, errors)


def at_least_one(**counts: int | None) -> None:
  for name, count in counts.items():
    if count is not None and count < 1:
      raise ValueError(f'sensitivity: {name}={count} must be at least 1')
