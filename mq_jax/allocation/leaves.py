"""Numbers inside candidates, learned by gradient along with the choice.

A candidate's weight W(x) depends on numbers x of its recipe: the threshold
of outliers, the share of the range that is clipped. It is constant in pieces
(linear for a clip) with jumps, so its derivative says nothing, or half. The
secant over an interval is the derivative of the mean of W over that interval:
it takes the jumps with it, works for every recipe, with error compensation
too, and needs no surrogate that must be derived for each rounding.

What it costs: every step quantizes each learned candidate once, and twice
more for each of its numbers. That is little beside a forward pass for
recipes without a Hessian; those with one solve a layer each time.

Only options of a recipe's factory are learned, since these are what a plan
stores: `remake` carries out what was learned as any plan is carried out, and
choices are rounded on the bits that it packs.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax import plans
from mq_jax.allocation import gradient, measured
from mq_jax.allocation import search as search_lib
from mq_jax.allocation._blocks import Loss
from mq_jax.allocation._learnable import Leaf, Leaves, learnable
from mq_jax.allocation._remade import (
  Bits,
  Remade,
  grams_of,
  measure_bits,
  remake,
)
from mq_jax.allocation._secants import Now, at, expected, secant
from mq_jax.allocation.candidates import Made
from mq_jax.allocation.problem import Problem, make_problem
from mq_jax.calibration import Statistics

# bits [l, c] -> costs [l, c] by quantity; of numpy's and of jax's arrays
Costs = Callable[[Any], Mapping[str, Any]]

_AT_ONCE = 8  # steps of one program

# Half a secant's width: 40 steps reach far, over small bumps of the loss.
_LEARNING_RATE = 0.1


class Found(NamedTuple):
  """What a search found, for each budget.

  Attributes:
    choices: Of the recipes given. i64[b, l].
    plans: With the numbers that were learned; `plans.compress` packs them.
    losses: On the batches of the search. f64[b].
    raw: Coordinates where the relaxations ended. f32[b, e, l or 1].
    traces: Loss of each step, of relaxed choices. f32[b, t].
  """

  choices: np.ndarray
  plans: tuple[plans.Plan, ...]
  losses: np.ndarray
  raw: np.ndarray
  traces: np.ndarray


def search(
  loss: Loss,
  params: Any,
  made: Made,
  leaves: Leaves,
  budgets: Sequence[Mapping[str, float]],
  batches: Any,
  *,
  statistics: Mapping[str, Statistics] | None = None,
  costs: Costs = lambda bits: {'bits': bits},
  ties: Sequence[Sequence[str | int]] = (),
  gamma: jax.Array | None = None,
  steps: int = 40,
  rounds: int = 8,
  key: jax.Array | None = None,
  schedule: gradient.Schedule | None = None,
  progress: Callable[[int, int], None] | None = None,
) -> Found:
  """Plans of least loss for several budgets: choices and numbers by gradient.

  Relaxes both together with the loss of `search.front`, makes candidates of
  the numbers found, and then rounds and descends as `search.front` does, on
  their exact costs. A candidate with the numbers of its start is left as an
  alternative at every site.

  Args:
    loss: (params, batch) -> mean loss.
    params: The model's parameters.
    made: Candidates of the recipes of `leaves`, from `candidates.make`.
    leaves: From `learnable`.
    budgets: By quantity.
    batches: Tree of arrays [b, ...]; cycled through by the steps.
    statistics: As `made` was made with.
    costs: Costs of stored bits [l, c]; the default budgets their sum. It is
      called with numpy's arrays and with jax's.
    ties: Groups of sites that choose the same candidate, see `make_problem`;
      their numbers are their own.
    gamma: From `measured.curvature`; measured if not given.
    steps: Of each relaxation.
    rounds: Most steps of the descent from a whole choice.
    key: For Gumbel noise.
    schedule: See `gradient.Schedule`; its learning rate is that of the
      coordinates, 0.1 by default: a positive number moves by a tenth a step.
    progress: Called with steps done and their number, of all budgets.

  Raises:
    ValueError: if `made` is of other recipes.
    InfeasibleError: for a budget that the recipes as they are don't meet,
      before any work.
    FloatingPointError: if the loss is not finite.
  """
  old = made.candidates
  labels = tuple(recipe.label for recipe in leaves.recipes)
  if labels != old.labels:
    raise ValueError(
      f'allocation: candidates {list(old.labels)} were made, but numbers are '
      f'learned of {list(labels)}'
    )
  if old.blocks > 1:
    raise ValueError(
      f'allocation: candidates of {old.blocks} blocks a site; numbers are '
      'learned of whole sites, blocks=1'
    )
  problem = _problem(made, costs, ties)
  limits = [problem.with_budget(**budget).budget for budget in budgets]
  key = jax.random.key(0) if key is None else key
  if schedule is None:
    schedule = gradient.Schedule(learning_rate=_LEARNING_RATE)
  if gamma is None:
    gamma = measured.curvature(loss, params, old, batches)
  bits = measure_bits(params, made, leaves, statistics=statistics)
  count = jax.tree.leaves(batches)[0].shape[0]
  few = max(n for n in range(1, _AT_ONCE + 1) if steps % n == 0)
  results, traces = [], np.zeros((len(budgets), steps), np.float32)
  for b, (budget, limit) in enumerate(zip(budgets, limits, strict=True)):
    state = gradient.begin(
      jnp.asarray(problem.allowed), len(limit), key=key,
      extra=jnp.asarray(leaves.begin(len(old.sites)), jnp.float32),
    )  # fmt: skip
    for done in range(0, steps, few):
      part = np.arange(done, done + few) % count
      state, trace = _advance(
        loss, costs, leaves, params, old, grams_of(statistics, old.sites), bits,
        gamma, jnp.asarray(limit, jnp.float32), jnp.asarray(problem.allowed),
        jnp.asarray(problem.groups, jnp.int32),
        jax.tree.map(lambda x, part=part: jnp.asarray(x)[part], batches),
        state, schedule, steps=steps,
      )  # fmt: skip
      traces[b, done : done + few] = trace.loss
      if not np.isfinite(traces[b]).all():
        step = int(np.argmin(np.isfinite(traces[b])))
        raise FloatingPointError(
          f'allocation: the loss is not finite at step {step} of budget '
          f'{dict(budget)}'
        )
      if progress is not None:
        progress(b * steps + done + few, len(budgets) * steps)
    remade = remake(params, made, leaves, state.extra, statistics=statistics)
    again = _problem(remade.made, costs, ties)
    found = _rounded(
      loss, params, remade, again, budget, batches, gamma, steps, rounds, key,
      state,
    )  # fmt: skip
    results.append(found)
  choices, plans_found, losses, raw = zip(*results, strict=True)
  return Found(
    np.stack(choices), plans_found, np.array(losses), np.stack(raw), traces
  )


def _problem(made: Made, costs: Costs, ties) -> Problem:
  return make_problem(
    np.zeros(made.bits.shape),
    costs(made.bits),
    {},
    sites=[site.name for site in made.candidates.sites],
    candidates=made.candidates.labels,
    ties=ties,
  )


@functools.partial(
  jax.jit, static_argnames=('loss', 'costs', 'leaves', 'steps')
)
def _advance(
  loss, costs, leaves, params, base, grams, bits, gamma, limit, allowed,
  groups, batches, state, schedule, *, steps,
):  # fmt: skip
  def spent(p, raw):
    tables = costs(bits.at(raw)).values()
    tables = jnp.stack([jnp.asarray(x, jnp.float32) for x in tables])
    return jnp.einsum('qlc,lc->q', tables, p)

  return gradient.relax(
    expected(loss, params, base, leaves, gamma, grams), spent, allowed,
    groups, limit, state, batches,
    steps=steps, schedule=schedule,
  )  # fmt: skip


def _rounded(
  loss, params, remade, problem, budget, batches, gamma, steps, rounds, key,
  relaxed,
):  # fmt: skip
  """Choice, plan and loss near a relaxed choice, on remade candidates."""
  made = remade.made
  start = search_lib.begin(
    loss, params, made.candidates, problem, [budget], batches,
    gamma=gamma, steps=steps, key=key,
  )  # fmt: skip
  # A search whose steps are done: only the rounding is left. The candidates
  # of the start come in where they are better, by descending, or needed.
  more = len(remade.origin) - relaxed.probabilities.shape[1]
  p = jnp.pad(relaxed.probabilities, ((0, 0), (0, more)))
  relaxations = start.relaxations._replace(
    probabilities=p[None], step=relaxed.step[None]
  )
  found = search_lib.front(
    loss, params, made.candidates, problem, [budget], batches,
    gamma=gamma, steps=steps, rounds=rounds,
    state=start._replace(relaxations=relaxations),
  )  # fmt: skip
  choice = found.choices[0]
  entries = zip(made.candidates.sites, remade.recipes, choice, strict=True)
  plan = plans.Plan(tuple((site, row[int(c)]) for site, row, c in entries))
  raw = np.asarray(relaxed.extra)
  return remade.origin[choice], plan, found.losses[0], raw


__all__ = [
  'Bits',
  'Found',
  'Leaf',
  'Leaves',
  'Now',
  'Remade',
  'at',
  'expected',
  'learnable',
  'measure_bits',
  'remake',
  'search',
  'secant',
]
