"""Allocation on the real loss of a model: candidates mixed in weight space.

A relaxed choice replaces the weight of a site by the mean of its candidates,
sum_c p_c W_c: one forward and backward pass whatever the number of
candidates, and no copy of an activation. But a mean of weights is better
than any of them, since rounding errors cancel in it; a search on it stops
between two candidates and loses when it has to choose. For independent
choices the expected loss is, to second order in the errors e_c = W_c - W,

    E L  =  L(mean)  +  1/2 sum over sites of tr(H Cov(e))

where the second term is zero at whole choices. With the Hessian of a site's
block approximated by gamma A, A the Gram matrix of its inputs and gamma one
number that a single measured loss gives, it costs nothing. The relaxed loss
then has the interactions between sites, and no reward for not choosing.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax import plans
from mq_jax import sites as sites_lib
from mq_jax._pytrees import pytree_dataclass, static
from mq_jax.allocation import gradient
from mq_jax.allocation.problem import Problem
from mq_jax.calibration import Statistics
from mq_jax.recipes import Recipe
from mq_jax.sites import Site

# (params, batch) -> mean loss
ModelLoss = Callable[[Any, Any], jax.Array]


@pytree_dataclass
class Candidates:
  """What every candidate makes of every site.

  Attributes:
    values: By site name, the parameter under each candidate.
      [c, *parameter's shape].
    overlap: Inner products of the candidates' errors under the Gram matrix
      of the site's inputs: tr(e_c^T A e_d). f32[l, c, c].
    sites: The sites, l of them.
    labels: Of the candidates, c of them.
  """

  values: dict[str, jax.Array]
  overlap: jax.Array
  sites: tuple[Site, ...] = static()
  labels: tuple[str, ...] = static()


class Made(NamedTuple):
  """Candidates, and the packed parameters that they stand for.

  Attributes:
    candidates: For the search.
    packed: By candidate, the parameters with packed matrices.
    bits: Stored bits, metadata included. f64[l, c].
  """

  candidates: Candidates
  packed: tuple[Any, ...]
  bits: np.ndarray


def make_candidates(
  params: Any,
  sites: Sequence[Site],
  recipes: Sequence[Recipe],
  *,
  statistics: Mapping[str, Statistics] | None = None,
  progress: Callable[[int, int], None] | None = None,
) -> Made:
  """Quantize every site by every recipe.

  Args:
    params: The model's parameters.
    sites: Sites to allocate for, each with a parameter of its own.
    recipes: The candidates; `recipes.none()` leaves a site in bfloat16.
    statistics: From `calibrate`. Without, errors are weighed alike.
    progress: Called with the candidates done and their number.

  Raises:
    ValueError: for no recipes, recipes with the same label, and whatever
      `plans.compress` refuses.
  """
  labels = tuple(recipe.label for recipe in recipes)
  if not labels or len(set(labels)) < len(labels):
    raise ValueError(
      f'allocation: candidates {list(labels)}; at least one is needed, and '
      'no label twice'
    )
  sites = tuple(entry[0] for entry in plans.uniform(sites, recipes[0]).entries)
  packed = []
  for i, recipe in enumerate(recipes):
    plan = plans.uniform(sites, recipe, exclude=())
    packed.append(plans.compress(params, plan, statistics=statistics))
    if progress is not None:
      progress(i + 1, len(labels))
  values, overlap, bits = {}, [], []
  for site in sites:
    matrices = [sites_lib.get(p, site) for p in packed]
    bits.append([8 * matrix.nbytes for matrix in matrices])
    stacked = jnp.stack([m.dequantize() for m in matrices])
    gram = None if statistics is None else statistics[site.name].gram
    original = site.matrix(sites_lib.get(params, site))
    overlap.append(_overlap(stacked, original, gram))
    values[site.name] = jax.vmap(site.unmatrix)(stacked)
  return Made(
    Candidates(values, jnp.stack(overlap), sites, labels),
    tuple(packed),
    np.array(bits, np.float64),
  )


@jax.jit
def _overlap(stacked, original, gram):
  """tr(e_c^T A e_d) over candidates; A the identity without statistics."""
  error = stacked.astype(jnp.float32) - original.astype(jnp.float32)[None]
  weighed = error if gram is None else gram @ error
  both = jnp.einsum('c...,d...->cd', error, weighed)
  return 0.5 * (both + both.T)


def mixed(params: Any, candidates: Candidates, probabilities: jax.Array) -> Any:
  """Parameters with the mean of its candidates at each site.

  Args:
    params: The model's parameters.
    candidates: Of each site.
    probabilities: f32[l, c].
  """
  new = {}
  for row, site in zip(probabilities, candidates.sites, strict=True):
    stack = candidates.values[site.name]
    mean = jnp.tensordot(row, stack.astype(jnp.float32), axes=1)
    new[site] = mean.astype(stack.dtype)
  return sites_lib.put(params, new)


def assemble(made: Made, params: Any, choice: Sequence[int]) -> Any:
  """Packed parameters of a whole choice i[l]: the plan carried out."""
  new = {
    site: sites_lib.get(made.packed[int(c)], site)
    for site, c in zip(made.candidates.sites, choice, strict=True)
  }
  return sites_lib.put(params, new)


def plan_of(
  made: Made, recipes: Sequence[Recipe], choice: Sequence[int]
) -> plans.Plan:
  """The plan of a whole choice i[l], to be saved."""
  return plans.Plan(
    tuple(
      (site, recipes[int(c)])
      for site, c in zip(made.candidates.sites, choice, strict=True)
    )
  )


@functools.partial(jax.jit, static_argnums=0)
def choice_losses(
  loss: ModelLoss,
  params: Any,
  candidates: Candidates,
  probabilities: jax.Array,
  batches: Any,
) -> jax.Array:
  """Loss of many relaxed or whole choices, by one compiled program.

  Args:
    loss: (params, batch) -> mean loss.
    params: The model's parameters.
    candidates: Of each site.
    probabilities: f32[many, l, c]; one-hot for whole choices.
    batches: Tree of arrays [b, ...]: the mean over b batches is taken.

  Returns:
    f32[many].
  """

  def one(p):
    changed = mixed(params, candidates, p)
    each = jax.lax.map(lambda batch: loss(changed, batch), batches)
    return jnp.mean(each)

  return jax.lax.map(one, probabilities)


def one_hot(choices: np.ndarray, count: int) -> jax.Array:
  """Whole choices i[..., l] as probabilities f32[..., l, c]."""
  return jax.nn.one_hot(jnp.asarray(choices), count, dtype=jnp.float32)


def one_site_table(
  loss: ModelLoss,
  params: Any,
  candidates: Candidates,
  batches: Any,
  *,
  base: Sequence[int] | None = None,
  only: Sequence[int] | None = None,
) -> np.ndarray:
  """Loss when one site alone takes one candidate, minus that when none does.

  Args:
    loss: (params, batch) -> mean loss.
    params: The model's parameters.
    candidates: Of each site.
    batches: Tree of arrays [b, ...].
    base: The choice i[l] from which one site deviates; None for the original
      parameters.
    only: Candidates to measure; None for all.

  Returns:
    f64[l, c], or [l, len(only)].

  Raises:
    ValueError: if a loss is not finite, by site and candidate.

  Source:
    The exact form of ZeroQ's and OHQ's sensitivities.
  """
  l, c = len(candidates.sites), len(candidates.labels)
  only = list(range(c)) if only is None else list(only)
  if base is None:
    # The original parameters as one more candidate.
    values = {
      site.name: jnp.concatenate(
        [
          candidates.values[site.name],
          sites_lib.get(params, site)[None].astype(
            candidates.values[site.name].dtype
          ),
        ]
      )
      for site in candidates.sites
    }
    candidates = Candidates(
      values, candidates.overlap, candidates.sites, (*candidates.labels, '')
    )
    base = [c] * l
  base = np.asarray(base)
  choices = np.tile(base, (l * len(only) + 1, 1))
  for i in range(l):
    for j, candidate in enumerate(only):
      choices[1 + i * len(only) + j, i] = candidate
  found = choice_losses(
    loss, params, candidates, one_hot(choices, len(candidates.labels)), batches
  )
  found = np.asarray(found, np.float64)
  table = (found[1:] - found[0]).reshape(l, len(only))
  if not np.isfinite(table).all():
    i, j = np.argwhere(~np.isfinite(table))[0]
    raise ValueError(
      f'allocation: loss with {candidates.labels[only[j]]} at '
      f'{candidates.sites[i].name} is not finite'
    )
  return table


def curvature(
  loss: ModelLoss,
  params: Any,
  candidates: Candidates,
  batches: Any,
) -> jax.Array:
  """gamma of each site: loss is 1/2 gamma tr(e^T A e) for its own error e.

  Measured at the candidate of the largest error, which alone rises above
  the noise of a small sample; negative rises count as none.

  Returns:
    f32[l].
  """
  sizes = np.asarray(jnp.diagonal(candidates.overlap, axis1=1, axis2=2))
  coarse = int(np.argmax(np.mean(sizes / sizes.max(1, keepdims=True), axis=0)))
  rise = one_site_table(loss, params, candidates, batches, only=[coarse])[:, 0]
  gamma = 2 * np.maximum(rise, 0) / np.maximum(sizes[:, coarse], 1e-30)
  return jnp.asarray(gamma, jnp.float32)


def corrected(
  loss: ModelLoss,
  params: Any,
  candidates: Candidates,
  gamma: jax.Array,
) -> Callable[[jax.Array, Any, Any], jax.Array]:
  """The expected loss of independent choices, to second order.

  Returns:
    (probabilities f32[l, c], extra, batch) -> loss, as `gradient.relax` takes
    it; `extra` is not looked at.
  """
  sizes = jnp.diagonal(candidates.overlap, axis1=1, axis2=2)

  def expected(p, extra, batch):
    del extra
    spread = jnp.sum(p * sizes, -1) - jnp.einsum(
      'lc,lcd,ld->l', p, candidates.overlap, p
    )
    value = loss(mixed(params, candidates, p), batch)
    return value + 0.5 * jnp.sum(gamma * spread)

  return expected


class Found(NamedTuple):
  """Choices found, one for each budget.

  Attributes:
    choices: i64[b, l].
    probabilities: Where the relaxations ended. f32[b, l, c].
    traces: Of the relaxations, `gradient.Trace` with an axis [b] in front.
    losses: On the batches of the search, of the choices. f64[b].
  """

  choices: np.ndarray
  probabilities: np.ndarray
  traces: gradient.Trace
  losses: np.ndarray


@functools.partial(jax.jit, static_argnames=('loss', 'steps'))
def _front(
  loss, params, candidates, gamma, cost, limits, allowed, groups, batches,
  key, schedule, *, steps,
):  # fmt: skip
  expected = corrected(loss, params, candidates, gamma)
  costs = lambda p, extra: jnp.einsum('qlc,lc->q', cost, p)

  def one(limit):
    state, trace = gradient.relax(
      expected,
      costs,
      allowed,
      groups,
      limit,
      gradient.begin(allowed, limit.shape[0], key=key),
      batches,
      steps=steps,
      schedule=schedule,
    )
    return state.probabilities, trace

  # One budget after the other: side by side their weights would be copies.
  return jax.lax.map(one, limits)


@functools.partial(jax.jit, static_argnums=0)
def _slopes(loss, params, candidates, gamma, probabilities, batches):
  expected = corrected(loss, params, candidates, gamma)

  def one(p):
    each = jax.lax.map(lambda batch: jax.grad(expected)(p, (), batch), batches)
    return jnp.mean(each, axis=0)

  return jax.lax.map(one, probabilities)


def search(
  loss: ModelLoss,
  params: Any,
  candidates: Candidates,
  problem: Problem,
  budgets: Sequence[Mapping[str, float]],
  batches: Any,
  *,
  gamma: jax.Array | None = None,
  steps: int = 40,
  polish: int = 2,
  key: jax.Array | None = None,
  schedule: gradient.Schedule | None = None,
) -> Found:
  """Plans of least loss for several budgets, by gradient.

  Relaxes with the expected loss (see above), rounds by an integer program on
  the loss linearized there, then linearizes again at the whole choice and
  keeps what lowers the loss on the batches.

  Args:
    loss: (params, batch) -> mean loss; the same function object again
      compiles nothing again.
    params: The model's parameters.
    candidates: Of each site.
    problem: Costs, ties and which candidates there are; its sensitivities are
      not looked at, but where they are infinite.
    budgets: By quantity, as `Problem.with_budget` takes them.
    batches: Tree of arrays [b, ...]; cycled through by the steps.
    gamma: From `curvature`; measured if not given.
    steps: Of each relaxation.
    polish: Rounds of linearizing at the whole choice.
    key: For Gumbel noise.
    schedule: See `gradient.Schedule`.

  Returns:
    The choices, feasible by the problem's exact costs.

  Raises:
    InfeasibleError: for a budget that nothing meets, before any work.
    FloatingPointError: if the loss is not finite.
  """
  problems = [problem.with_budget(**budget) for budget in budgets]
  key = jax.random.key(0) if key is None else key
  schedule = gradient.Schedule() if schedule is None else schedule
  if gamma is None:
    gamma = curvature(loss, params, candidates, batches)
  count = jax.tree.leaves(batches)[0].shape[0]
  order = np.arange(steps) % count
  p, traces = _front(
    loss,
    params,
    candidates,
    gamma,
    jnp.asarray(problem.cost, jnp.float32),
    jnp.asarray(np.stack([q.budget for q in problems]), jnp.float32),
    jnp.asarray(problem.allowed),
    jnp.asarray(problem.groups, jnp.int32),
    jax.tree.map(lambda x: jnp.asarray(x)[order], batches),
    key,
    schedule,
    steps=steps,
  )
  if not np.isfinite(np.asarray(traces.loss)).all():
    where = np.argwhere(~np.isfinite(np.asarray(traces.loss)))[0]
    raise FloatingPointError(
      f'allocation: the loss is not finite at step {where[1]} of budget '
      f'{dict(budgets[where[0]])}'
    )
  slopes = _slopes(loss, params, candidates, gamma, p, batches)
  choices = np.stack(
    [
      gradient.round_to_budget(q, p_, s)
      for q, p_, s in zip(problems, np.asarray(p), slopes, strict=True)
    ]
  )
  c = len(candidates.labels)
  losses = lambda x: np.asarray(
    choice_losses(loss, params, candidates, one_hot(x, c), batches), np.float64
  )
  best = losses(choices)
  for _ in range(polish):
    slopes = np.asarray(
      _slopes(loss, params, candidates, gamma, one_hot(choices, c), batches)
    )
    everywhere = np.ones_like(np.asarray(p[0]))
    again = np.stack(
      [
        gradient.round_to_budget(q, everywhere, s)
        for q, s in zip(problems, slopes, strict=True)
      ]
    )
    if (again == choices).all():
      break
    found = losses(again)
    better = found < best
    choices = np.where(better[:, None], again, choices)
    best = np.where(better, found, best)
    if not better.any():
      break
  return Found(choices, np.asarray(p), traces, best)
