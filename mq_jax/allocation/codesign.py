"""Bit widths and the accelerator that runs them, chosen together.

The loss is one of candidates' probabilities; what they cost depends on the
accelerator too: rows, columns, network units, the split of its memory. Both
move at once by gradient, on `hardware.relaxed_cost`. Then the accelerator is
rounded to values that can be built, and gets its best plan by `exact` on
`hardware.cost`:

  space = codesign.microscopiq({'rows': ..., 'cols': ..., 'recon_units': ...},
                               candidates, sram_bytes=2**20)
  task = codesign.make_task(space, sensitivity, work, candidates,
                            {'area_um2': 8e5, 'cycles': 9e7})
  found = codesign.search(task, key=jax.random.key(0))

An evaluation is the model priced on one accelerator, for all sites and
candidates: exactly, or relaxed with its gradient.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mq_jax import hardware
from mq_jax.allocation import gradient
from mq_jax.allocation._designs import (
  AREA,
  QUANTITIES,
  Space,
  Tables,
  Task,
  costs,
  make_task,
  microscopiq,
  tables,
)
from mq_jax.allocation._numbers import (
  check_area,
  decode,
  neighbours,
  rounded,
  start,
)
from mq_jax.allocation._plans import Found, best
from mq_jax.allocation.problem import InfeasibleError, evaluate

__all__ = [
  'AREA', 'QUANTITIES', 'Found', 'Relaxed', 'Space', 'Tables', 'Task', 'best',
  'decode', 'make_task', 'microscopiq', 'neighbours', 'relax', 'rounded',
  'search', 'start', 'tables',
]  # fmt: skip

# Rates of probabilities are the solver's; the accelerator takes larger steps
# than its default, in logits of the range.
SCHEDULE = gradient.Schedule(learning_rate=0.3)
SOFTNESS = (0.5, 0.02)


class Relaxed(NamedTuple):
  """Where relaxations from several starts ended.

  Attributes:
    numbers: Of the accelerators, not yet rounded, by name. f32[s] each.
    probabilities: f32[s, l, c].
    loss: Along the way. f32[s, t].
    usage: Expected cost over budget along the way. f32[s, t, q].
  """

  numbers: dict[str, np.ndarray]
  probabilities: np.ndarray
  loss: np.ndarray
  usage: np.ndarray


def relax(
  task: Task,
  *,
  key: jax.Array,
  starts: int = 5,
  steps: int = 30,
  schedule: gradient.Schedule = SCHEDULE,
  softness: tuple[float, float] = SOFTNESS,
) -> Relaxed:
  """Learn probabilities and accelerator from several starts, in one program.

  `gradient.relax`, with the accelerator as its other learned numbers. Of
  their gradient only the direction counts, and steps shrink to the end by a
  cosine: prices of budgets that are out of reach are very large.

  Args:
    task: The task. Tasks of equal shapes, space and loss share a program.
    key: Of the starts.
    starts: Number of them.
    steps: Of each; one evaluation each.
    schedule: See `gradient.Schedule`.
    softness: `temperature` of `relaxed_cost` at the first and last step:
      whether a buffer holds something is a threshold, which a gradient sees
      from afar only while it is soft.

  Raises:
    InfeasibleError: if the smallest accelerator exceeds the area.
  """
  check_area(task)
  table = np.where(np.isfinite(task.sensitivity), task.sensitivity, 0.0)
  limits = [task.budget[name] for name in task.quantities]
  numbers, state, trace = _relax(
    task.space,
    task.loss,
    task.quantities,
    jnp.asarray(table, jnp.float32),
    jnp.asarray(np.isfinite(task.sensitivity)),
    (task.work, task.candidates),
    jnp.asarray(task.index),
    jnp.asarray(limits, jnp.float32),
    jnp.float32(task.area),
    jax.random.split(key, starts),
    schedule,
    softness,
    steps,
  )
  return jax.tree.map(
    np.asarray, Relaxed(numbers, state.probabilities, trace.loss, trace.usage)
  )


@functools.partial(
  jax.jit, static_argnames=('space', 'loss', 'quantities', 'steps')
)
def _relax(
  space, loss, quantities, table, allowed, priced, index, budget, area, keys,
  schedule, softness, steps,
):  # fmt: skip
  work, candidates = priced
  task = Task(space, table, work, candidates, index, dict.fromkeys(quantities))
  count = work.k.shape[0]
  share = jnp.linspace(0.0, 1.0, steps)
  heat = softness[0] * (softness[1] / softness[0]) ** share
  optimizer = optax.chain(
    optax.normalize_by_update_norm(eps=1e-30),
    optax.scale_by_adam(),
    optax.scale_by_schedule(optax.cosine_decay_schedule(1.0, steps)),
  )

  def lost(p, raw, batch):
    return jnp.sum(p * table) if loss is None else loss(p)

  def expected(p, raw, heat):
    accelerator = space.make(decode(space, raw, area))
    cost = functools.partial(hardware.relaxed_cost, temperature=heat)
    found, _ = costs(task, accelerator, cost)
    # Of equal sites one is priced: their probabilities are added up.
    weight = jax.ops.segment_sum(p, index, num_segments=count)
    return jnp.stack([jnp.sum(x * weight) for x in found])

  def step(state, heat):
    return gradient.relax(
      lost, functools.partial(expected, heat=heat), allowed,
      jnp.arange(len(allowed)), budget, state, jnp.zeros(1),
      steps=steps, schedule=schedule, optimizer=optimizer,
    )  # fmt: skip

  def run(key):
    raw = start(space, key)
    state = gradient.begin(
      allowed, len(quantities), key=key, extra=raw, optimizer=optimizer
    )
    state, trace = jax.lax.scan(step, state, heat)
    trace = jax.tree.map(lambda x: x[:, 0], trace)  # of one step each
    return decode(space, state.extra, area), state._replace(key=()), trace

  return jax.vmap(run)(keys)


def search(
  task: Task,
  *,
  key: jax.Array,
  starts: int = 5,
  steps: int = 30,
  schedule: gradient.Schedule = SCHEDULE,
  softness: tuple[float, float] = SOFTNESS,
  kept: int = 3,
  rounds: int = 4,
  relaxed: Relaxed | None = None,
) -> Found:
  """Choose accelerator and plan: relax, round, and look around.

  Args:
    task: The task.
    key: Of the starts.
    starts: Relaxations.
    steps: Of each.
    schedule: See `gradient.Schedule`.
    softness: See `relax`.
    kept: Relaxations whose accelerators are rounded: the best ones, of such
      as differ in their rounded values.
    rounds: Most moves to a better neighbour of the best one found.
    relaxed: What `relax` returned, where it was called before.

  Returns:
    The best found. With a loss of its own, the integer programs are on its
    slope at the best relaxed probabilities, as in `gradient.round_to_budget`.

  Raises:
    InfeasibleError: if no accelerator that was looked at keeps the budgets;
      it names the nearest.
  """
  if relaxed is None:
    relaxed = relax(
      task, key=key, starts=starts, steps=steps, schedule=schedule,
      softness=softness,
    )  # fmt: skip
  # A budget missed by p % is worse than any loss.
  missed = np.maximum(np.round(relaxed.usage[:, -1].max(-1) - 1, 2), 0)
  order = np.lexsort((relaxed.loss[:, -1], missed))
  p = relaxed.probabilities[order[0]]
  if task.loss is not None:
    slope = np.asarray(jax.grad(task.loss)(p), np.float64)
    slope = np.where(np.isfinite(task.sensitivity), slope, np.inf)
    task = dataclasses.replace(task, sensitivity=slope)

  pieces, seen = [], set()
  for s in order:
    ends = {name: x[s] for name, x in relaxed.numbers.items()}
    some = rounded(task.space, ends, task.area)
    values = set(zip(*(some[name] for name in task.space.values)))
    # Starts that ended alike are rounded once.
    if len(pieces) < kept and not values <= seen:
      pieces.append(some)
      seen |= values
  designs = {
    name: np.concatenate([x[name] for x in pieces]) for name in task.space.names
  }
  found, seen = None, set()
  evaluations, plans = relaxed.loss.size, 0
  for _ in range(rounds + 1):
    designs = _unseen(task.space, designs, seen)
    if not len(designs[task.space.names[0]]):
      break
    new = best(task, designs, than=np.inf if found is None else found.loss)
    evaluations, plans = evaluations + new.evaluations, plans + new.plans
    if found is not None and (new.excess, new.loss) >= (
      found.excess,
      found.loss,
    ):
      break
    found = new
    designs = neighbours(task.space, found.numbers)
  if found.choice is None:
    raise InfeasibleError(
      f'codesign: no accelerator found keeps the budgets {task.budget}; the '
      f'nearest misses one by a factor {found.excess:.6g}: {found.numbers}'
    )
  if task.loss is not None:
    found = _by_slope(task, found, p)
    evaluations += 1
  return found._replace(evaluations=evaluations, plans=plans)


def _unseen(space, designs, seen) -> dict[str, np.ndarray]:
  """Those that were not asked for before, which are added to `seen`."""
  rows = np.stack([designs[name] for name in space.names], axis=1)
  new = [row for row in dict.fromkeys(map(tuple, rows)) if row not in seen]
  seen.update(new)
  return dict(zip(space.names, np.array(new).reshape(-1, rows.shape[1]).T))


def _by_slope(task, found, p) -> Found:
  """The plan by candidates near the relaxed choice, and its true loss."""
  priced = tables(task, {name: [x] for name, x in found.numbers.items()})
  problem = task.problem(priced.cost[:, 0], task.sensitivity)
  choice = gradient.round_to_budget(problem, p, task.sensitivity)
  whole = jax.nn.one_hot(choice, p.shape[1], dtype=jnp.float32)
  totals = found.totals | evaluate(problem, choice)
  totals.pop('sensitivity')
  return found._replace(
    choice=choice, loss=float(task.loss(whole)), totals=totals
  )
