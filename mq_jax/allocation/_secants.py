"""Candidates and their stored bits as functions of numbers in recipes."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mq_jax import quantize
from mq_jax import sites as sites_lib
from mq_jax.allocation import candidates as candidates_lib
from mq_jax.allocation._blocks import Loss
from mq_jax.allocation._learnable import Leaves
from mq_jax.allocation.candidates import Candidates
from mq_jax.allocation.search import corrected


def secant(function: Callable[..., Any], width: float) -> Callable[..., Any]:
  """A function with the slope of its secants in place of its derivative.

  The value is exactly that of the function f. Its derivative by a number x is
  (f(x + width) - f(x - width)) / (2 width), which is that of the mean of f
  over [x - width, x + width].

  Args:
    function: (numbers, *rest) -> tree of float arrays; pure. The numbers are
      one array of floats of any shape, the rest is held constant.
    width: Half of the interval; of the order of the change that matters, as
      a narrower one meets too few jumps and is noisy.

  Returns:
    A function of the same arguments. A derivative of it takes two more calls
    for each number.

  Examples:
    >>> stairs = secant(jnp.round, 0.5)
    >>> stairs(jnp.float32(0.3)), jax.grad(stairs)(jnp.float32(0.3))
    (Array(0., dtype=float32), Array(1., dtype=float32))
  """

  @jax.custom_jvp
  def f(numbers, *rest):
    return function(numbers, *rest)

  @f.defjvp
  def f_jvp(primals, tangents):
    numbers, *rest = primals
    steps = width * jnp.eye(numbers.size, dtype=numbers.dtype)
    ends = jnp.concatenate([steps, -steps]).reshape(-1, *numbers.shape)
    # The value is one of the calls, so that one program makes all of them.
    ends = jnp.concatenate([jnp.zeros_like(ends[:1]), ends])
    found = jax.lax.map(lambda end: function(numbers + end, *rest), ends)
    value = jax.tree.map(lambda x: x[0], found)
    along = tangents[0].reshape(-1)

    def slope(ends):
      high, low = jnp.split(ends[1:].astype(jnp.float32), 2)
      change = (high - low) / (2.0 * width)
      slope = jnp.tensordot(along.astype(jnp.float32), change, axes=1)
      return slope.astype(ends.dtype)

    return value, jax.tree.map(slope, found)

  return f


class Now(NamedTuple):
  """Candidates at some numbers.

  Attributes:
    candidates: Their derivatives are secants.
    control: Zero, but with a derivative: that of the candidates' own errors
      tr(e^T A e) less what the secants of their weights make of it, see
      `expected`. f32[l, c].
  """

  candidates: Candidates
  control: jax.Array


def at(
  params: Any,
  base: Candidates,
  leaves: Leaves,
  raw: jax.Array,
  grams: Mapping[str, jax.Array] | None = None,
) -> Now:
  """What candidates make of sites with other numbers; differentiable.

  Args:
    params: The model's parameters.
    base: Candidates of the recipes as they are; those that learn nothing are
      taken from it.
    leaves: From `learnable`.
    raw: Coordinates of the numbers, see `Leaves`. f32[e, l] or f32[e, 1].
    grams: Gram matrices of the inputs by site, if there were statistics.

  Returns:
    Candidates of the same sites and labels, and the control.
  """
  raw = jnp.broadcast_to(raw, (raw.shape[0], len(base.sites)))
  jobs: dict[Any, list[tuple[int, int]]] = {}
  matrices, stacks = [], []
  for i, site in enumerate(base.sites):
    stack = base.values[site.name]
    leaf = sites_lib.get(params, site)
    matrices.append(site.matrix(leaf).astype(jnp.float32))
    stacks.append(list(stack))
    for c in sorted({leaf.candidate for leaf in leaves.entries}):
      key = (site.matrix_shape, stack.dtype, _program(leaves, c))
      jobs.setdefault(key, []).append((i, c))
  energies = {}
  for (_, dtype, _), members in jobs.items():
    found = _group(leaves, dtype, base.sites, members, raw, matrices, grams)
    for (i, c), value, energy in zip(members, *found, strict=True):
      stacks[i][c] = base.sites[i].unmatrix(value)
      energies[i, c] = energy
  values = {
    site.name: jnp.stack(stack)
    for site, stack in zip(base.sites, stacks, strict=True)
  }
  overlap = overlaps(values, base.sites, matrices, grams)
  control = jnp.zeros(overlap.shape[:2])
  for (i, c), energy in energies.items():
    tangent = lambda x: x - jax.lax.stop_gradient(x)
    change = tangent(energy) - tangent(overlap[i, c, c])
    control = control.at[i, c].set(change)
    overlap = overlap.at[i, c, c].set(energy)
  now = dataclasses.replace(base, values=values, overlap=overlap)
  return Now(now, control)


def _program(leaves: Leaves, candidate: int):
  """What decides the program of a recipe: all but its numbers."""
  recipe = dataclasses.replace(leaves.recipes[candidate], name='', options=())
  mine = [leaf for leaf in leaves.entries if leaf.candidate == candidate]
  ranges = tuple((leaf.index, leaf.low, leaf.high) for leaf in mine)
  return jax.tree.structure(recipe), ranges


def _group(leaves, dtype, sites, members, raw, matrices, grams):
  """Matrices and own errors of members (site, candidate), by one program."""
  at = sorted({i for i, _ in members})
  stacked = [jnp.stack([matrices[i] for i in at])]
  if grams is not None:
    stacked.append(jnp.stack([grams[sites[i].name] for i in at]))
  mine, parts = [], []
  for i, c in members:
    own = [e for e, leaf in enumerate(leaves.entries) if leaf.candidate == c]
    mine.append(raw[jnp.array(own), i])
    parts.append(jax.tree.leaves(leaves.recipes[c]))
  first = members[0][1]
  # Numbers in which the recipes differ are traced, the others are not.
  differing = [
    j for j, x in enumerate(zip(*parts, strict=True)) if len(set(x)) > 1
  ]
  other = {j: jnp.array([x[j] for x in parts]) for j in differing}

  def make(raw, other, weight, hessian=None):
    recipe = leaves.recipe(first, raw, other)
    flat = lambda x: x if x.ndim == 2 else x.reshape(-1, *x.shape[-2:])
    given = None if hessian is None else flat(hessian)
    codes, _ = quantize.quantize_batch(flat(weight), recipe, given)
    decode = lambda x: quantize.layout_of(recipe).decode(x, *weight.shape[-2:])
    decode = decode if weight.ndim == 2 else jax.vmap(decode)
    value = decode(codes).reshape(weight.shape).astype(dtype)
    error = value.astype(jnp.float32) - weight
    weighed = error if hessian is None else hessian @ error
    return value, jnp.sum(error * weighed)

  make = secant(make, leaves.width)
  # One after the other: side by side they take the memory of all.
  return jax.lax.map(
    lambda x: make(*x[:2], *(array[x[2]] for array in stacked)),
    (jnp.stack(mine), other, jnp.array([at.index(i) for i, _ in members])),
  )


def expected(
  loss: Loss,
  params: Any,
  base: Candidates,
  leaves: Leaves,
  gamma: jax.Array,
  grams: Mapping[str, jax.Array] | None = None,
) -> Callable[[jax.Array, jax.Array, Any], jax.Array]:
  """The loss of `search.corrected`, of choices and numbers.

  The secant of a weight meets the gradient G at the weight as it is, where
  each jump within the interval lies before it or behind, by chance; with few
  weights, or large jumps, that is noise. In the loss's quadratic model it is
  known: what e^T gamma A makes of the secant, in place of the secant of
  gamma/2 tr(e^T A e). The difference is taken off (a control variate); it
  changes no value, and has no mean where the secant has none.

  Returns:
    (probabilities f32[l, c], raw, batch) -> loss, as `gradient.relax` takes
    it.
  """

  def value(p, raw, batch):
    now = at(params, base, leaves, raw, grams)
    found = corrected(loss, params, now.candidates, gamma)(p, (), batch)
    control = jnp.sum(jnp.square(p) * now.control, -1)
    return found + 0.5 * jnp.sum(gamma * control)

  return value


def overlaps(values, sites, matrices, grams):
  found = []
  for i, site in enumerate(sites):
    stacked = jax.vmap(site.matrix)(values[site.name])
    gram = None if grams is None else grams[site.name]
    found.append(candidates_lib.overlap_of(stacked, matrices[i], gram))
  return jnp.stack(found)
