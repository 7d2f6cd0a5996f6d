"""Solvers that learn from many evaluated choices: evolution and policy."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mq_jax.allocation import _program, _tables
from mq_jax.allocation.heuristics import random_choices
from mq_jax.allocation.problem import Problem

Fitness = Callable[[np.ndarray], np.ndarray]


class _Evaluator:
  """Calls a fitness once per choice, in batches of one size.

  One size, so that a jitted fitness compiles once: a short batch is filled
  up with its last choice.
  """

  def __init__(self, t, fitness: Fitness | None, batch: int):
    self._t, self._fitness, self._batch = t, fitness, batch
    self._known: dict[bytes, float] = {}

  def __call__(self, rows: np.ndarray) -> np.ndarray:
    """Values of choices i64[p, l] of the rows of the tables. f64[p]."""
    if self._fitness is None:
      return _tables.totals(self._t, rows)[0]
    new = {x.tobytes(): x for x in rows if x.tobytes() not in self._known}
    names, choices = list(new), np.array(list(new.values()))
    for at in range(0, len(names), self._batch):
      chunk = choices[at : at + self._batch]
      count = len(chunk)
      short = self._batch - count
      chunk = np.concatenate([chunk, np.repeat(chunk[-1:], short, axis=0)])
      values = np.asarray(self._fitness(chunk[:, self._t.index]), np.float64)
      values = _check_values(values, self._batch)[:count]
      self._known.update(zip(names[at : at + count], values))
    return np.array([self._known[x.tobytes()] for x in rows])


def _check_values(values, count) -> np.ndarray:
  if values.shape != (count,) or np.isnan(values).any():
    what = (
      f'shape {values.shape}'
      if values.shape != (count,)
      else f'NaN for {np.isnan(values).sum()}'
    )
    raise ValueError(
      f'allocation: fitness returned {what}, for {count} choices; needed is a '
      'number for each'
    )
  return values


def evolve(
  problem: Problem,
  fitness: Fitness | None = None,
  *,
  seed: int | np.random.Generator,
  population: int = 64,
  generations: int = 100,
  mutation: float | None = None,
  crossover: float = 0.9,
  newcomers: float = 0.1,
  batch: int | None = None,
  initial: np.ndarray | None = None,
  on_generation: Callable[[int, np.ndarray, float], bool | None] | None = None,
) -> np.ndarray:
  """Evolve choices; each is moved into the budgets before it is looked at.

  Parents come from the better half. A child takes each site from either,
  has sites changed at random, is repaired by random steps down, and spends
  what is left by random steps up; the site of a step is random, the step is
  the best there by the problem's sensitivity, whatever the fitness is. The
  best of old and new survive, each choice once. On many sites it takes long
  from random choices: begin with those of cheap solvers.

  Args:
    problem: The problem.
    fitness: Function of choices i64[p, l] to values f[p], less is better,
      infinite for failures: a measured loss, say. It is called once for each
      different choice. The problem's sensitivity if left out.
    seed: Number or generator.
    population: How many live.
    generations: How many rounds of as many children.
    mutation: Share of sites changed in a child; one site if left out.
    crossover: Share of children with two parents.
    newcomers: Share of children drawn at random, against narrowing.
    batch: Choices in a call of `fitness`; `population` if left out.
    initial: Choices to begin with, beside random ones. i[n, l].
    on_generation: Called with the number of the generation, the best choice
      i64[l] and its value; stops the search by returning True.

  Returns:
    The best choice seen. i64[l].

  Raises:
    ValueError: if the fitness returns NaN or another shape, a population is
      too small, or an initial choice doesn't keep ties or exist.
    InfeasibleError: if no choice meets all budgets.

  Source:
    EMQ, arXiv 2307.10554, and its siblings' code: halves, coin crossover,
    newcomers. Budgets by repair are ours.

  Examples:
    >>> from mq_jax.allocation import make_problem
    >>> problem = make_problem([[4.0, 1.0], [2.0, 1.5]],
    ...                        {'bits': [[2, 4], [2, 4]]}, {'bits': 6})
    >>> evolve(problem, seed=0, population=4, generations=4)
    array([1, 0])
  """
  if population < 2:
    raise ValueError(f'allocation: a population of {population} is too small')
  t = _tables.tables(problem)
  rng = np.random.default_rng(seed)
  anchor = _program.anchor(problem, t)
  evaluate = _Evaluator(t, fitness, batch or population)
  l = len(t.loss)
  options = np.argsort(~t.allowed, axis=1, kind='stable')
  sizes = t.allowed.sum(axis=1)
  _, first = np.unique(t.index, return_index=True)

  def fresh(count):
    return random_choices(problem, count, seed=rng, sweeps=2)[:, first]

  def settle(rows):
    return np.unique(_tables.settle(t, rows, anchor, rng), axis=0)

  rows = fresh(population)
  if initial is not None:
    rows = np.concatenate([_initial(t, initial, first), rows])
  rows = settle(rows)
  values = evaluate(rows)
  rate = 1 / l if mutation is None else mutation
  for generation in range(generations + 1):
    order = np.argsort(values, kind='stable')[:population]
    rows, values = rows[order], values[order]
    if on_generation is not None and on_generation(
      generation, rows[0][t.index], float(values[0])
    ):
      break
    if generation == generations:
      break
    parents = rows[: max(len(rows) // 2, 1)]
    mother, father = (
      parents[rng.integers(len(parents), size=population)] for _ in range(2)
    )
    mixed = rng.random(population) < crossover
    coin = (rng.random((population, l)) < 0.5) & mixed[:, None]
    children = np.where(coin, father, mother)
    change = rng.random((population, l)) < rate
    # A copy of its parent would be a wasted child.
    change[np.arange(population), rng.integers(l, size=population)] = True
    draw = (rng.random((population, l)) * sizes).astype(int)
    children = np.where(change, options[np.arange(l), draw], children)
    drawn = int(round(newcomers * population))
    if drawn:
      children[:drawn] = fresh(drawn)
    children = settle(children)
    old = {x.tobytes() for x in rows}
    children = children[[x.tobytes() not in old for x in children]]
    if len(children):
      rows = np.concatenate([rows, children])
      values = np.concatenate([values, evaluate(children)])
  return _tables.expand(problem, t, rows[0])


def _initial(t, initial, first) -> np.ndarray:
  initial = np.asarray(initial)
  if initial.ndim != 2 or initial.shape[1] != len(t.index):
    raise ValueError(
      f'allocation: initial choices of shape {initial.shape}; needed is '
      f'[n, {len(t.index)}]'
    )
  rows = initial[:, first].astype(np.int64)
  known = (rows >= 0) & (rows < t.loss.shape[1])
  if (
    not known.all()
    or not t.allowed[np.arange(len(first)), rows].all()
    or (rows[:, t.index] != initial).any()
  ):
    raise ValueError(
      'allocation: an initial choice breaks a tie or has a candidate that its '
      'site lacks'
    )
  return rows


def policy_gradient(
  problem: Problem,
  fitness: Callable | None = None,
  *,
  key: jax.Array,
  steps: int = 2000,
  samples: int = 16,
  learning_rate: float = 0.02,
  entropy: float = 0.05,
  decay: float = 0.95,
  penalty: float = 10.0,
  one_sided: bool = True,
  warmup: int = 64,
  traced: bool = False,
) -> np.ndarray:
  """Learn a distribution over candidates for each site by REINFORCE.

  Choices are drawn from a softmax by site. Their reward is the fitness, in
  its standard deviations over uniformly drawn choices, and a penalty on
  costs; a moving average is the baseline, and a penalty on entropy that
  grows along a cosine makes the policy decide. Of all choices drawn, and the
  most likely one moved into the budgets, the best that keeps the budgets is
  returned.

  Args:
    problem: The problem.
    fitness: Function of choices i64[p, l] to values f[p], less is better.
      The problem's sensitivity if left out.
    key: Of jax.random.
    steps: How often the policy is updated.
    samples: Choices drawn for a step; FLIQS draws one.
    learning_rate: Of Adam on the logits.
    entropy: Last weight of the entropy.
    decay: Of the moving average.
    penalty: Weight of the relative excess over a budget, summed over budgets,
      in standard deviations of the fitness.
    one_sided: Whether only excess is penalized, or all distance from the
      budget, as FLIQS does.
    warmup: Choices drawn uniformly for mean and deviation of the fitness,
      rounded up to a multiple of `samples`: the size of all its calls.
    traced: Whether `fitness` can be called under jit, on i32[p, l]: all steps
      then are one compiled scan, as they are without a fitness.

  Returns:
    The best choice seen that keeps the budgets. i64[l].

  Raises:
    ValueError: if the fitness returns NaN or another shape.
    InfeasibleError: if no choice meets all budgets.

  Source:
    FLIQS, arXiv 2308.03290 (policy, baseline, entropy schedule, absolute
    reward of TuNAS); rates as measured in our notes. Several samples a step,
    the units of the reward and the final repair are ours.
  """
  t = _tables.tables(problem)
  anchor = _program.anchor(problem, t)
  l = len(t.loss)
  # An excess of the whole budget counts one, as in C / C0.
  budget = problem.budget[t.quantities]
  unit = np.where(budget > 0, budget, t.scale)
  game = _Game(
    table=jnp.asarray(np.where(t.allowed, t.loss, 0.0), jnp.float32),
    cost=jnp.asarray(t.cost / unit[:, None, None], jnp.float32),
    room=jnp.asarray(t.budget / unit, jnp.float32),
    mask=jnp.asarray(np.where(t.allowed, 0.0, -np.inf), jnp.float32),
    index=jnp.asarray(t.index),
    mean=jnp.float32(0.0),
    spread=jnp.float32(1.0),
    penalty=jnp.float32(penalty),
    entropy=jnp.float32(entropy),
    decay=jnp.float32(decay),
    learning_rate=jnp.float32(learning_rate),
  )
  compiled = fitness is None or traced
  inside = fitness if compiled else None

  def value_of(choices):
    """Of i[p, l], p a multiple of samples: f64[p]."""
    values = []
    for chunk in np.split(np.asarray(choices), len(choices) // samples):
      if compiled:
        value = _value(game, jnp.asarray(chunk, jnp.int32), inside)
      else:
        value = fitness(chunk[:, t.index].astype(np.int64))
      values.append(_check_values(np.asarray(value, np.float64), samples))
    return np.concatenate(values)

  logits = jnp.zeros(t.loss.shape, jnp.float32)
  rounds = max(-(-warmup // samples), 1)
  # All numbers at once: the generator takes long to compile.
  noise = jax.random.uniform(key, (rounds + steps, samples, l))
  noise, first = noise[rounds:], noise[:rounds].reshape(-1, l)
  trials = np.asarray(_draw(game, logits, first), np.int64)
  values = value_of(trials)
  finite = np.isfinite(values)
  if not finite.any():
    raise ValueError('allocation: fitness is finite for no random choice')
  game = game._replace(
    mean=jnp.float32(values[finite].mean()),
    spread=jnp.float32(values[finite].std() or 1.0),
  )
  state = _State(logits, _ADAM.init(logits), jnp.float32(0.0))
  progress = jnp.arange(steps, dtype=jnp.float32) / steps
  if compiled:
    state, seen, found = _learn(game, state, noise, progress, one_sided, inside)
    seen = np.asarray(seen, np.int64).reshape(-1, l)
    found = _check_values(np.asarray(found, np.float64).ravel(), len(seen))
  else:
    chosen, valued = [np.zeros((0, l), np.int64)], [np.zeros(0)]
    for one, at in zip(noise, progress):
      choice = _draw(game, state.logits, one)
      value = value_of(choice)
      chosen.append(np.asarray(choice, np.int64))
      valued.append(value)
      value = jnp.asarray(value, jnp.float32)
      state = _update(game, state, choice, value, at, one_sided)
    seen, found = np.concatenate(chosen), np.concatenate(valued)

  likely = (np.asarray(state.logits) + np.asarray(game.mask)).argmax(axis=1)
  likely = _tables.fill(t, _tables.repair(t, likely[None], anchor))
  likely = np.repeat(likely, samples, axis=0)
  seen = np.concatenate([trials, seen, likely])
  found = np.concatenate([values, found, value_of(likely)])
  # The program works in single precision; budgets, and sums of the table,
  # are looked at again in double.
  if fitness is None:
    found, _ = _tables.totals(t, seen)
  found = np.where(_tables.fits(t, seen), found, np.inf)
  at = found.argmin()
  if not np.isfinite(found[at]):
    at = -1  # nothing finite fits
  return _tables.expand(problem, t, seen[at])


_ADAM = optax.scale_by_adam()


class _Game(NamedTuple):
  """What the policy plays for; arrays, so that one program serves all."""

  table: jax.Array  # f32[l, c]
  cost: jax.Array  # in units of the budget, f32[q, l, c]
  room: jax.Array  # f32[q]
  mask: jax.Array  # 0, or -inf where a site lacks the candidate, f32[l, c]
  index: jax.Array  # row of each site, i32[sites]
  mean: jax.Array  # of the fitness over uniform choices
  spread: jax.Array  # its standard deviation
  penalty: jax.Array
  entropy: jax.Array
  decay: jax.Array
  learning_rate: jax.Array


class _State(NamedTuple):
  logits: jax.Array  # f32[l, c]
  moments: optax.OptState
  baseline: jax.Array


@jax.jit
def _draw(game, logits, noise):
  """Choices i32[p, l] from the policy by uniform numbers f32[p, l]."""
  below = jnp.cumsum(jax.nn.softmax(logits + game.mask), axis=-1)
  # Below the sum for all numbers, so that it is passed where p > 0.
  at = noise * (1 - 1e-6) * below[None, :, -1]
  return (below[None] <= at[..., None]).sum(axis=-1, dtype=jnp.int32)


@functools.partial(jax.jit, static_argnums=2)
def _value(game, choice, fitness):
  """Fitness, or the sum of the table, of choices i32[p, l]. f32[p]."""
  if fitness is not None:
    value = fitness(choice[:, game.index])
    return value.astype(jnp.float32)
  return game.table[jnp.arange(len(game.table)), choice].sum(axis=-1)


@functools.partial(jax.jit, static_argnums=5)
def _update(game, state, choice, value, progress, one_sided):
  """One step of REINFORCE with choices i32[p, l] of values f32[p]."""
  drawn = jax.nn.one_hot(choice, game.table.shape[1])  # [p, l, c]
  spent = jnp.einsum('qlc,plc->pq', game.cost, drawn) - game.room[None, :]
  spent = jax.nn.relu(spent) if one_sided else jnp.abs(spent)
  # A failure, infinite, counts as very bad; its gradient must be finite.
  worse = jnp.minimum((value - game.mean) / game.spread, 100.0)
  reward = -worse - game.penalty * spent.sum(axis=1)
  baseline = game.decay * state.baseline + (1 - game.decay) * reward.mean()
  weight = game.entropy * (1 - jnp.cos(jnp.pi * progress)) / 2

  def loss(logits):
    log_p = jax.nn.log_softmax(logits + game.mask)
    p = jnp.exp(log_p)
    log_p = jnp.where(jnp.isfinite(log_p), log_p, 0.0)
    chosen = jnp.einsum('plc,lc->p', drawn, log_p) / len(log_p)
    uncertain = -(p * log_p).sum(axis=-1).mean()
    return -((reward - baseline) * chosen).mean() + weight * uncertain

  gradient = jax.grad(loss)(state.logits)
  # Adam takes a float to the power of its whole count.
  with jax.numpy_dtype_promotion('standard'):
    direction, moments = _ADAM.update(gradient, state.moments)
  logits = state.logits - game.learning_rate * direction
  return _State(logits, moments, baseline)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _learn(game, state, noise, progress, one_sided, fitness):
  """All steps: the state, choices i32[steps, p, l] and values f32[steps, p]."""

  def step(state, x):
    one, at = x
    choice = _draw(game, state.logits, one)
    value = _value(game, choice, fitness)
    return _update(game, state, choice, value, at, one_sided), (choice, value)

  state, (seen, found) = jax.lax.scan(step, state, (noise, progress))
  return state, seen, found
