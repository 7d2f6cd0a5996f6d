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

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax.allocation import exact, gradient
from mq_jax.allocation._blocks import Loss
from mq_jax.allocation.candidates import Candidates, mixed
from mq_jax.allocation.measured import choice_losses, curvature, one_hot
from mq_jax.allocation.problem import Problem, feasible

_BETWEEN_SAVES = 8  # steps, at most


def corrected(
  loss: Loss,
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


class State(NamedTuple):
  """A search for several budgets: what is saved to continue it.

  Attributes:
    gamma: Curvature of each site. f32[l].
    relaxations: Of each budget, stacked in front. `gradient.State`, [b, ...].
    losses: Of each step that is done, else zero. f32[b, t].
    choices: Found for each budget, -1 where that is still to do. i64[b, l].
    values: Their losses on the batches. f64[b].
  """

  gamma: jax.Array
  relaxations: gradient.State
  losses: np.ndarray
  choices: np.ndarray
  values: np.ndarray


class Found(NamedTuple):
  """Choices found, one for each budget.

  Attributes:
    choices: i64[b, l].
    losses: On the batches of the search, of the choices. f64[b].
    state: Where the search ended.
  """

  choices: np.ndarray
  losses: np.ndarray
  state: State


@functools.partial(jax.jit, static_argnames=('loss', 'steps'))
def _advance(
  loss, params, candidates, gamma, cost, limit, allowed, groups, batches,
  state, schedule, *, steps,
):  # fmt: skip
  return gradient.relax(
    corrected(loss, params, candidates, gamma),
    lambda p, extra: jnp.einsum('qlc,lc->q', cost, p),
    allowed,
    groups,
    limit,
    state,
    batches,
    steps=steps,
    schedule=schedule,
  )


@functools.partial(jax.jit, static_argnums=0)
def _slope(loss, params, candidates, gamma, probabilities, batches):
  expected = corrected(loss, params, candidates, gamma)
  each = jax.lax.map(
    lambda batch: jax.grad(expected)(probabilities, (), batch), batches
  )
  return jnp.mean(each, axis=0)


def begin(
  loss: Loss,
  params: Any,
  candidates: Candidates,
  problem: Problem,
  budgets: Sequence[Mapping[str, float]],
  batches: Any,
  *,
  gamma: jax.Array | None = None,
  steps: int = 40,
  key: jax.Array | None = None,
) -> State:
  """The state from which `front` starts, with the same arguments."""
  key = jax.random.key(0) if key is None else key
  if gamma is None:
    gamma = curvature(loss, params, candidates, batches)
  one = gradient.begin(problem.allowed, len(problem.quantities), key=key)
  count = len(budgets)
  return State(
    gamma,
    jax.tree.map(lambda x: jnp.stack([x] * count), one),
    np.zeros((count, steps), np.float32),
    np.full((count, len(problem.sites)), -1),
    np.zeros(count),
  )


def front(
  loss: Loss,
  params: Any,
  candidates: Candidates,
  problem: Problem,
  budgets: Sequence[Mapping[str, float]],
  batches: Any,
  *,
  gamma: jax.Array | None = None,
  steps: int = 40,
  rounds: int = 12,
  key: jax.Array | None = None,
  schedule: gradient.Schedule | None = None,
  state: State | None = None,
  save: Callable[[State], None] | None = None,
  progress: Callable[[int, int], None] | None = None,
) -> Found:
  """Plans of least loss for several budgets, by gradient.

  Relaxes with the expected loss (see above), rounds by an integer program on
  the loss linearized there, and descends from the best whole choice known by
  programs on the loss linearized at it, with few moves each (`descend`). One
  program serves all budgets, one after the other: side by side their weights
  would be copies. Batches whose second axis is sharded over a mesh are
  computed on where they are.

  Args:
    loss: (params, batch) -> mean loss; the same function object again
      compiles nothing again.
    params: The model's parameters.
    candidates: Of each site.
    problem: Costs, ties, and which candidates there are. The best choice by
      its sensitivities is one of those from which the descent may start: if
      they are the one-site table of these batches, the search is no worse than
      the integer program on it.
    budgets: By quantity, as `Problem.with_budget` takes them.
    batches: Tree of arrays [b, ...]; cycled through by the steps.
    gamma: From `curvature`; measured if not given.
    steps: Of each relaxation.
    rounds: Most steps of the descent from the whole choice.
    key: For Gumbel noise.
    schedule: See `gradient.Schedule`.
    state: Of an interrupted search with the same arguments, to continue.
    save: Called with the state every few steps.
    progress: Called with steps done and their number, of all budgets.

  Returns:
    The choices, feasible by the problem's exact costs.

  Raises:
    InfeasibleError: for a budget that nothing meets, before any work.
    FloatingPointError: if the loss is not finite; the state saved last is
      still good.
  """
  problems = [problem.with_budget(**budget) for budget in budgets]
  if state is None:
    state = begin(
      loss, params, candidates, problem, budgets, batches,
      gamma=gamma, steps=steps, key=key,
    )  # fmt: skip
  state = _relaxed(
    loss, params, candidates, problems, batches, state, schedule, rounds, save,
    progress,
  )  # fmt: skip
  return _chosen(
    loss, params, candidates, problems, batches, state, rounds, save, progress
  )


def _chosen(
  loss, params, candidates, problems, batches, state, rounds, save, progress
) -> Found:
  """Whole choices near the relaxed ones, each budget's saved when found."""
  count, steps = state.losses.shape
  hot = lambda choice: one_hot(choice, len(candidates.labels))
  measure = lambda choice: float(
    choice_losses(loss, params, candidates, hot(choice)[None], batches)[0]
  )
  slope = lambda p: np.asarray(
    _slope(loss, params, candidates, state.gamma, p, batches), np.float64
  )
  sizes = np.asarray(jnp.diagonal(candidates.overlap, axis1=1, axis2=2))
  alone = 0.5 * np.asarray(state.gamma, np.float64)[:, None] * sizes
  for b, problem in enumerate(problems):
    if state.choices[b, 0] < 0:
      p = state.relaxations.probabilities[b]
      starts = [
        gradient.round_to_budget(problem, p, slope(p)),
        gradient.round_to_budget(problem, np.ones(p.shape), alone),
        gradient.round_to_budget(
          problem, np.ones(p.shape), problem.sensitivity
        ),
      ]
      values = [measure(x) for x in starts]
      # What other budgets have found may do here as well.
      for other, value in zip(state.choices[:b], state.values[:b], strict=True):
        if feasible(problem, other):
          starts.append(other)
          values.append(value)
      first = int(np.argmin(values))
      choice, value = descend(
        problem,
        starts[first],
        values[first],
        lambda x: slope(hot(x)),
        measure,
        rounds=rounds,
      )
      choices, found = state.choices.copy(), state.values.copy()
      choices[b], found[b] = choice, value
      state = state._replace(choices=choices, values=found)
      if save is not None:
        save(state)
    if progress is not None:
      progress(count * steps + (b + 1) * rounds, count * (steps + rounds))
  return Found(state.choices, state.values, state)


def descend(
  problem: Problem,
  choice: np.ndarray,
  value: float,
  slope: Callable[[np.ndarray], np.ndarray],
  measure: Callable[[np.ndarray], float],
  *,
  rounds: int = 12,
  moves: int = 8,
) -> tuple[np.ndarray, float]:
  """Lower the loss of a whole choice by steps within a trust region.

  A step is the best choice, by the loss linearized at the present one, of
  those that differ at few sites; it is taken if it lowers the loss as
  measured. If not, what the linearization got wrong is charged to the moves
  made, half as many may be made next, and another step is tried. Slopes hold
  what all other sites' choices do to a site's, so that steps find what sums
  over sites cannot.

  Args:
    problem: Costs, budgets and ties.
    choice: Feasible, to begin with. i64[l].
    value: Its loss.
    slope: Of the loss with respect to candidates, at a choice: f64[l, c].
    measure: The loss of a choice.
    rounds: Most steps that are tried.
    moves: Sites that may change in the first step.

  Returns:
    A choice that is no worse, and its loss.
  """
  table = slope(choice) if rounds else None
  # An exchange between two sites is the least that keeps a budget.
  least = 2 * int(np.bincount(problem.groups).max())
  for i in range(rounds):
    moved = np.ones(problem.sensitivity.shape)
    moved[np.arange(len(choice)), choice] = 0.0
    near = dataclasses.replace(
      problem,
      sensitivity=np.where(problem.allowed, table, np.inf),
      cost=np.concatenate([problem.cost, moved[None]]),
      budget=np.append(problem.budget, max(moves, least)),
      quantities=(*problem.quantities, 'moves'),
    )
    new = exact.lagrangian(near)
    rows = np.flatnonzero(new != choice)
    if not len(rows):
      break
    found = measure(new)
    if found < value:
      choice, value = new, found
      moves = int(1.5 * max(moves, least))
      table = slope(choice) if i < rounds - 1 else table
    else:
      foreseen = np.sum(table[rows, new[rows]] - table[rows, choice[rows]])
      table = table.copy()
      table[rows, new[rows]] += (found - value - foreseen) / len(rows)
      moves = min(moves, len(rows)) // 2
  return choice, value


def _relaxed(
  loss, params, candidates, problems, batches, state, schedule, rounds, save,
  progress,
) -> State:  # fmt: skip
  """Do the steps that are left, a few at a time."""
  schedule = gradient.Schedule() if schedule is None else schedule
  steps = state.losses.shape[1]
  count = jax.tree.leaves(batches)[0].shape[0]
  few = max(n for n in range(1, _BETWEEN_SAVES + 1) if steps % n == 0)
  problem = problems[0]
  cost = jnp.asarray(problem.cost, jnp.float32)
  allowed = jnp.asarray(problem.allowed)
  groups = jnp.asarray(problem.groups, jnp.int32)
  relaxations, traces = state.relaxations, state.losses.copy()
  for b, limit in enumerate(p.budget for p in problems):
    for at in range(int(relaxations.step[b]), steps, few):
      part = np.arange(at, at + few) % count
      one, trace = _advance(
        loss,
        params,
        candidates,
        state.gamma,
        cost,
        jnp.asarray(limit, jnp.float32),
        allowed,
        groups,
        jax.tree.map(lambda x, part=part: jnp.asarray(x)[part], batches),
        jax.tree.map(lambda x, b=b: x[b], relaxations),
        schedule,
        steps=steps,
      )
      found = np.asarray(trace.loss)
      if not np.isfinite(found).all():
        step = at + int(np.argmin(np.isfinite(found)))
        names = dict(zip(problem.quantities, limit.tolist(), strict=True))
        raise FloatingPointError(
          f'allocation: the loss is not finite at step {step} of budget {names}'
        )
      traces[b, at : at + few] = found
      relaxations = jax.tree.map(
        lambda whole, x, b=b: whole.at[b].set(x), relaxations, one
      )
      state = state._replace(relaxations=relaxations, losses=traces.copy())
      if save is not None:
        save(state)
      if progress is not None:
        progress(b * steps + at + few, len(problems) * (steps + rounds))
  return state
