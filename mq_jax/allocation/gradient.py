"""Allocation by gradient: relaxed choices that meet budgets at every step.

Each site has probabilities p of its candidates. A step takes the gradient of
the loss with respect to p (not to logits: a softmax flattens where a choice
is nearly made, and never moves again), averages it over steps, and sets

    p ~ exp(-(gradient + sum of price x cost) / temperature)

with the prices at which expected costs meet the budgets, solved for exactly.
The temperature falls until nearly every site has chosen.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mq_jax._pytrees import pytree_dataclass, static
from mq_jax.allocation import exact
from mq_jax.allocation.problem import InfeasibleError, Problem, check

# (probabilities f32[l, c], extra, batch) -> loss
Loss = Callable[[jax.Array, Any, Any], jax.Array]
# (probabilities f32[l, c], extra) -> costs f32[q], in units of the budget
Costs = Callable[[jax.Array, Any], jax.Array]

_BISECTIONS = 40
_ROUNDS = 4  # over the budgets, where there are several
_SECONDS = 10.0


@pytree_dataclass
class Schedule:
  """How a relaxation is run; numbers are leaves.

  Attributes:
    hot: Temperature at the start, in units of the mean range of a site's
      scores; so it fits losses of any unit.
    cold: At the end; in between it falls geometrically.
    memory: Share of the averaged gradient that a step keeps.
    stride: Share of the way to the new probabilities that a step goes.
    learning_rate: Of the directions of `extra`, the other learned numbers.
    gumbel: Add Gumbel noise to the scores, scaled by the temperature (static).
  """

  hot: jax.typing.ArrayLike = 1.0
  cold: jax.typing.ArrayLike = 0.02
  memory: jax.typing.ArrayLike = 0.8
  stride: jax.typing.ArrayLike = 0.3
  learning_rate: jax.typing.ArrayLike = 0.03
  gumbel: bool = static(False)


class State(NamedTuple):
  """A relaxation between two steps; all there is to resume it.

  Attributes:
    probabilities: f32[l, c].
    score: Averaged gradient of the loss. f32[l, c].
    extra: Other learned numbers, any tree.
    multipliers: Prices: loss for the whole of a budget. f32[q].
    optimizer: Optax state of `extra`.
    step: Steps done, i32[].
    key: Randomness of the next steps.
  """

  probabilities: jax.Array
  score: jax.Array
  extra: Any
  multipliers: jax.Array
  optimizer: Any
  step: jax.Array
  key: jax.Array


class Trace(NamedTuple):
  """One entry a step.

  Attributes:
    loss: f32[t].
    usage: Expected cost over budget; f32[t, q].
    entropy: Mean over sites, in nats; f32[t].
  """

  loss: jax.Array
  usage: jax.Array
  entropy: jax.Array


def _together(x: jax.Array, groups: jax.Array) -> jax.Array:
  """Sums over tied sites, at each of them. f32[..., l, c]."""
  sites = x.shape[-2]
  rows = jnp.moveaxis(x, -2, 0)
  sums = jax.ops.segment_sum(rows, groups, num_segments=sites)
  return jnp.moveaxis(sums[groups], 0, -2)


def begin(
  allowed: jax.Array,
  quantities: int,
  *,
  key: jax.Array,
  extra: Any = (),
  optimizer: optax.GradientTransformation | None = None,
) -> State:
  """The state from which a relaxation starts: all candidates alike.

  Args:
    allowed: Candidates that a site has. bool[l, c].
    quantities: Number of budgets.
    key: Randomness of the run.
    extra: Start of the other learned numbers.
    optimizer: As of `relax`.
  """
  optimizer = optax.scale_by_adam() if optimizer is None else optimizer
  weights = jnp.where(jnp.asarray(allowed), 1.0, 0.0)
  uniform = weights / jnp.sum(weights, axis=-1, keepdims=True)
  return State(
    uniform,
    jnp.zeros_like(uniform),
    extra,
    jnp.zeros(quantities, jnp.float32),
    optimizer.init(extra),
    jnp.zeros((), jnp.int32),
    key,
  )


def priced(
  score: jax.Array,
  cost: jax.Array,
  room: jax.Array,
  allowed: jax.Array,
  groups: jax.Array,
  temperature: jax.typing.ArrayLike,
) -> tuple[jax.Array, jax.Array]:
  """Probabilities of least score plus entropy, within budgets.

  Minimizes sum(p score) - temperature entropy(p) subject to
  sum(p cost_q) <= room_q: p is a softmax, and the prices maximize a concave
  dual, one coordinate after the other by bisection.

  Args:
    score: f32[l, c].
    cost: f32[q, l, c].
    room: f32[q]; infinite where a quantity does not matter.
    allowed: bool[l, c].
    groups: Tied sites have one number below l. i32[l].
    temperature: In units of the score.

  Returns:
    Probabilities f32[l, c], and prices f32[q] in score for a unit of cost.
    A budget that no price meets gets the highest.
  """
  lacking = _together(jnp.where(allowed, 0.0, 1.0), groups) > 0
  score, tied_cost = _together(score, groups), _together(cost, groups)
  spread = lambda x: jnp.mean(
    jnp.max(jnp.where(lacking, -jnp.inf, x), -1)
    - jnp.min(jnp.where(lacking, jnp.inf, x), -1),
    axis=-1,
  )
  unit = (spread(score) + temperature) / (spread(tied_cost) + 1e-30)

  def choose(price):
    logits = -(score + jnp.einsum('q,qlc->lc', price, tied_cost)) / temperature
    return jax.nn.softmax(jnp.where(lacking, -jnp.inf, logits), axis=-1)

  def one(q, price):
    at = lambda value: price.at[q].set(value)
    fits = lambda value: jnp.sum(choose(at(value)) * cost[q]) <= room[q]

    def halve(_, ends):
      low, high = ends
      middle = 0.5 * (low + high)
      ok = fits(unit[q] * jnp.exp(middle))
      return jnp.where(ok, low, middle), jnp.where(ok, middle, high)

    ends = (jnp.float32(-12.0), jnp.float32(12.0))
    _, high = jax.lax.fori_loop(0, _BISECTIONS, halve, ends)
    return at(jnp.where(fits(0.0), 0.0, unit[q] * jnp.exp(high)))

  count = cost.shape[0]
  rounds = _ROUNDS if count > 1 else 1
  price = jax.lax.fori_loop(
    0,
    rounds * count,
    lambda i, price: one(i % count, price),
    jnp.zeros(count, jnp.float32),
  )
  return choose(price), price


def relax(
  loss: Loss,
  costs: Costs,
  allowed: jax.Array,
  groups: jax.Array,
  budget: jax.Array,
  state: State,
  batches: Any = (),
  *,
  steps: int,
  schedule: Schedule | None = None,
  optimizer: optax.GradientTransformation | None = None,
) -> tuple[State, Trace]:
  """Minimize a loss over probabilities, within budgets of expected costs.

  One `lax.scan`; map it over `budget` (and states) for a whole front from
  one program. Budgets hold in expectation at each step, up to the stride:
  they are not weighed against the loss.

  Args:
    loss: (probabilities, extra, batch) -> scalar, differentiable.
    costs: (probabilities, extra) -> f32[q].
    allowed: Candidates that a site has. bool[l, c].
    groups: Tied sites have one number, below l. i32[l].
    budget: f32[q]; infinite where a quantity does not matter.
    state: From `begin`, or of an interrupted run.
    batches: Tree of arrays whose first axis is the steps to be done now; ()
      for a loss without data, which then does all that remain of `steps`
      from a state that has done none.
    steps: Steps of the whole run; they decide the temperatures.
    schedule: Temperatures, memory and stride.
    optimizer: Makes directions of the gradients of `extra`; Adam by default.

  Returns:
    The state after the last step, and the trace.

  Source:
    Softmax relaxation as in differentiable architecture search; entropic
    mirror descent; Lagrange multipliers as in Shoham and Gersho (1988). The
    combination is ours.
  """
  schedule = Schedule() if schedule is None else schedule
  optimizer = optax.scale_by_adam() if optimizer is None else optimizer
  matters = jnp.isfinite(budget)
  limit = jnp.where(matters, budget, 1.0)

  def usage_of(p, extra):
    return jnp.where(matters, costs(p, extra) / limit, 0.0)

  def step(state, batch):
    p, extra = state.probabilities, state.extra
    key, noise = jax.random.split(state.key)
    share = state.step / max(steps - 1, 1)
    value, (slope, slope_extra) = jax.value_and_grad(loss, argnums=(0, 1))(
      p, extra, batch
    )
    # The first gradient is taken whole.
    keep = jnp.where(state.step == 0, 0.0, schedule.memory)
    score = keep * state.score + (1.0 - keep) * slope
    # Costs may be a whole hardware model: they are traced once.
    usage, pull = jax.vjp(usage_of, p, extra)
    usage_slope, _ = jax.vmap(pull)(jnp.eye(usage.shape[0], dtype=usage.dtype))
    room = 1.0 - usage + jnp.einsum('qlc,lc->q', usage_slope, p)
    room = jnp.where(matters, room, jnp.inf)

    span = jnp.max(jnp.where(allowed, score, -jnp.inf), -1) - jnp.min(
      jnp.where(allowed, score, jnp.inf), -1
    )
    temperature = schedule.hot * (schedule.cold / schedule.hot) ** share
    temperature = temperature * (jnp.mean(span) + 1e-20)
    aim = score
    if schedule.gumbel:
      aim = aim - temperature * jax.random.gumbel(noise, score.shape)
    new, price = priced(aim, usage_slope, room, allowed, groups, temperature)
    # The last step goes all the way.
    stride = jnp.where(state.step == steps - 1, 1.0, schedule.stride)
    moved = p + stride * (new - p)

    memory = state.optimizer
    if jax.tree.leaves(extra):
      _, drag = pull(price)
      total = jax.tree.map(jnp.add, slope_extra, drag)
      # Optax mixes dtypes, which users may have forbidden.
      with jax.numpy_dtype_promotion('standard'):
        direction, memory = optimizer.update(total, memory)
      extra = jax.tree.map(
        lambda x, d: x - schedule.learning_rate * d, extra, direction
      )
    surprise = jnp.where(p > 0, -p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0)
    entropy = jnp.mean(jnp.sum(surprise, axis=-1))
    state = State(moved, score, extra, price, memory, state.step + 1, key)
    return state, Trace(value, usage, entropy)

  length = None if jax.tree.leaves(batches) else steps
  return jax.lax.scan(step, state, batches, length=length)


def round_to_budget(
  problem: Problem,
  probabilities: jax.Array,
  slope: np.ndarray,
  *,
  keep: float = 1e-3,
) -> np.ndarray:
  """The best whole choice near a relaxed one that meets the budgets.

  An integer program on the loss linearized at the relaxed choice, over the
  candidates to which the relaxation gave at least `keep`; over all of them
  where these allow no feasible choice.

  Args:
    problem: The problem; its costs and budgets hold exactly.
    probabilities: f32[l, c].
    slope: Derivative of the loss with respect to the probabilities, or any
      other table of what a candidate costs in loss. f[l, c].
    keep: Least probability of a candidate.

  Returns:
    The choice, i64[l].
  """
  p = np.asarray(probabilities, np.float64)
  near = p >= np.minimum(keep, p.max(axis=1, keepdims=True))
  slope = np.where(problem.allowed, np.asarray(slope, np.float64), np.inf)
  narrow = dataclasses.replace(
    problem, sensitivity=np.where(near, slope, np.inf)
  )
  try:
    return _best(check(narrow))
  except InfeasibleError:
    return _best(dataclasses.replace(problem, sensitivity=slope))


def _best(problem: Problem) -> np.ndarray:
  # Where loss is nearly proportional to cost the proof may take for ever.
  try:
    return exact.integer_program(problem, time_limit=_SECONDS)
  except TimeoutError:
    return exact.lagrangian(problem)


def gradient(
  problem: Problem,
  *,
  key: jax.Array | None = None,
  steps: int = 60,
  schedule: Schedule | None = None,
) -> np.ndarray:
  """Solve a problem of tables by relaxation and rounding.

  Args:
    problem: The problem.
    key: For Gumbel noise.
    steps: Of the relaxation.
    schedule: See `Schedule`.

  Returns:
    A feasible choice, i64[l].
  """
  table = np.where(problem.allowed, problem.sensitivity, 0.0)
  # Constants of a site change no choice, but cost digits.
  table = table - np.where(problem.allowed, table, np.inf).min(1)[:, None]
  state = _relax_table(
    jnp.asarray(table, jnp.float32),
    jnp.asarray(problem.cost, jnp.float32),
    jnp.asarray(problem.budget, jnp.float32),
    jnp.asarray(problem.allowed),
    jnp.asarray(problem.groups, jnp.int32),
    jax.random.key(0) if key is None else key,
    Schedule() if schedule is None else schedule,
    steps,
  )
  return round_to_budget(problem, state.probabilities, problem.sensitivity)


@functools.partial(jax.jit, static_argnames='steps')
def _relax_table(table, cost, budget, allowed, groups, key, schedule, steps):
  state, _ = relax(
    lambda p, extra, batch: jnp.sum(p * table),
    lambda p, extra: jnp.einsum('qlc,lc->q', cost, p),
    allowed,
    groups,
    budget,
    begin(allowed, cost.shape[0], key=key),
    steps=steps,
    schedule=schedule,
  )
  return state
