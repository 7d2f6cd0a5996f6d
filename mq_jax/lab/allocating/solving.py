"""Every solver by name, on one problem and under the same budgets."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax import allocation
from mq_jax.allocation import candidates as candidates_lib
from mq_jax.allocation import hessians, measured, search, sensitivities
from mq_jax.lab.allocating import checkpoints, setup

# HiGHS may prove for hours where loss is nearly proportional to cost.
_SECONDS = 120.0
_POPULATION = 8
_ROUNDS = 12
_SEARCH = 'search'

Choices = list[np.ndarray | None]


class Diverged(ValueError):
  """A loss became infinite or no number; what was good before is saved."""


class Losses:
  """Losses of whole choices on some text, each measured once."""

  def __init__(
    self,
    loss: Callable,
    params: Any,
    candidates: candidates_lib.Candidates,
    batches: Any,
  ):
    self._arguments = (loss, params, candidates)
    self._batches = jax.tree.map(jnp.asarray, batches)
    self._known: dict[bytes, float | list[float]] = {}

  def __call__(
    self,
    choices: Sequence[np.ndarray],
    progress: Callable[[int, int], None] | None = None,
  ) -> np.ndarray:
    """Mean losses f64[n, ...] of choices i64[n, l]; -1: the original weight."""
    rows = [np.asarray(c, np.int64) for c in choices]
    new = {x.tobytes(): x for x in rows if x.tobytes() not in self._known}
    loss, params, candidates = self._arguments
    for done, (name, row) in enumerate(new.items()):
      # One at a time: the program that the search compiles as well.
      hot = measured.one_hot(row[None], len(candidates.labels))
      found = measured.choice_losses(
        loss, params, candidates, hot, self._batches
      )
      self._known[name] = np.asarray(found[0], np.float64).tolist()
      if progress is not None:
        progress(done + 1, len(new))
    return np.array([self._known[x.tobytes()] for x in rows])

  def known(self) -> dict[str, Any]:
    """What was measured, for a file; by the bytes of the choice in hex."""
    good = lambda x: x if math.isfinite(x) else None  # JSON has no NaN
    return {k.hex(): jax.tree.map(good, v) for k, v in self._known.items()}

  def remember(self, known: Mapping[str, Any]) -> None:
    lost = lambda x: math.nan if x is None else x
    for key, value in known.items():
      self._known[bytes.fromhex(key)] = jax.tree.map(
        lost, value, is_leaf=lambda x: x is None
      )


@dataclasses.dataclass(frozen=True)
class Task:
  """What solvers are given.

  Attributes:
    bench: Model, sites and texts.
    made: The candidates.
    loss: Of parameters and a batch.
    batches: Of the search, a tree of arrays [b, ...].
    problem: With the one-site table as its sensitivities, no budgets.
    budgets: Those asked for first, then the others of the front.
    searched: Losses on the text of the search.
    folder: Where states are saved.
    progress: Of the solver at work: (done, total).
  """

  bench: setup.Bench
  made: candidates_lib.Made
  loss: Callable
  batches: Any
  problem: allocation.Problem
  budgets: Sequence[Mapping[str, float]]
  searched: Losses
  folder: checkpoints.Folder
  progress: Callable[..., None]

  @property
  def problems(self) -> list[allocation.Problem]:
    return [self.problem.with_budget(**b) for b in self.budgets]

  @property
  def seed(self) -> int:
    return self.bench.ask.seed

  @property
  def steps(self) -> int:
    return self.bench.ask.steps

  def each(
    self, solve: Callable[[allocation.Problem], np.ndarray | None]
  ) -> Choices:
    """A solver of one problem, under all budgets."""
    found = []
    for i, problem in enumerate(self.problems):
      found.append(solve(problem))
      self.progress(i + 1, len(self.budgets))
    return found


def _gradient(task: Task) -> Choices:
  bench, candidates = task.bench, task.made.candidates
  arguments = (task.loss, bench.model.params, candidates, task.problem)
  arguments += (list(task.budgets), task.batches)
  options = {'steps': task.steps, 'key': jax.random.key(task.seed)}
  # Only its structure counts: the curvature is not measured for it.
  unknown = jnp.zeros(len(candidates.names), jnp.float32)
  start = search.begin(*arguments, gamma=unknown, **options)
  saved = task.folder.load_arrays(_SEARCH)
  state = None if saved is None else unpacked(start, saved)

  def save(new):
    task.folder.save_arrays(_SEARCH, packed(new))

  try:
    found = search.front(
      *arguments,
      rounds=_ROUNDS,
      state=state,
      save=save,
      progress=task.progress,
      **options,
    )
  except FloatingPointError as error:
    raise Diverged(
      f'{error}; what was good before is in {task.folder.path}/state'
    ) from error
  return list(found.choices)


def packed(state: search.State) -> dict[str, np.ndarray]:
  """The leaves of a state as plain arrays, for a file."""
  plain = lambda x: np.asarray(jax.random.key_data(x) if _is_key(x) else x)
  leaves = jax.tree.leaves(state)
  return {f'leaf{i:03d}': plain(x) for i, x in enumerate(leaves)}


def unpacked(
  like: search.State, arrays: Mapping[str, np.ndarray]
) -> search.State:
  """Undo `packed`, for a state of the structure of another.

  Raises:
    ValueError: for other leaves.
  """
  leaves, tree = jax.tree.flatten(like)
  if len(leaves) != len(arrays):
    raise ValueError(
      f'saved search: {len(arrays)} arrays; this version has {len(leaves)}'
    )
  found = []
  for old, (name, new) in zip(leaves, sorted(arrays.items()), strict=True):
    if _is_key(old):
      found.append(jax.random.wrap_key_data(jnp.asarray(new)))
      continue
    if new.shape != np.shape(old) or new.dtype != old.dtype:
      raise ValueError(
        f'saved search: {name} is {new.dtype}{list(new.shape)}, not '
        f'{old.dtype}{list(np.shape(old))}'
      )
    host = isinstance(old, np.ndarray)
    found.append(np.array(new) if host else jnp.asarray(new))
  return jax.tree.unflatten(tree, found)


def _is_key(x: Any) -> bool:
  return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _uniform(task: Task) -> Choices:
  """The best uniform candidate that fits, by its loss on the search text."""
  shape = (len(task.problem.sites),)
  whole = [np.full(shape, j) for j in range(len(task.problem.candidates))]
  whole = [c for c in whole if allocation.feasible(task.problem, c)]
  losses = _finite(task.searched(whole)) if whole else []

  def best(problem):
    fits = [i for i, c in enumerate(whole) if allocation.feasible(problem, c)]
    return whole[min(fits, key=losses.__getitem__)] if fits else None

  return task.each(best)


def _hawq_v2(task: Task) -> Choices:
  bench, candidates = task.bench, task.made.candidates
  params, sites = bench.model.params, candidates.sites
  if candidates.blocks > 1:
    raise ValueError('traces are those of sites, not of blocks')
  mean = lambda params, data: jnp.mean(
    jax.lax.map(lambda b: task.loss(params, b), data)
  )
  traces = hessians.hutchinson_trace(
    mean,
    params,
    jax.tree.map(lambda x: jnp.asarray(x[:2]), task.batches),
    sites,
    key=jax.random.key(task.seed),
    draws=32,
  )
  omega = np.asarray(
    sensitivities.trace_table(params, sites, candidates.values, traces),
    np.float64,
  )
  omega = np.where(task.problem.allowed, omega, np.inf)
  sizes = np.array([np.prod(site.matrix_shape) for site in sites])
  importance = np.asarray(traces.mean, np.float64) / sizes
  return task.each(
    lambda p: allocation.monotone_pareto(
      dataclasses.replace(p, sensitivity=omega), importance
    )
  )


def _evaluations(task: Task) -> int:
  """Losses of whole choices that take the time of the gradient's budget."""
  batches = jax.tree.leaves(task.batches)[0].shape[0]
  # Forward and back takes three to four times as long as forward.
  relaxing = 4 * task.steps / batches
  # Of the steps of a descent about half are taken, and linearized at.
  descending = 3 * _ROUNDS
  curvature = len(task.made.candidates.names) / len(task.budgets)
  return math.ceil(relaxing + descending + curvature)


def _evolution(task: Task) -> Choices:
  """With the loss of the search, from what is greedy on the one-site table."""

  def one(problem):
    return allocation.evolve(
      problem,
      lambda choices: _finite(task.searched(list(choices))),
      seed=task.seed,
      population=_POPULATION,
      generations=max(1, _evaluations(task) // _POPULATION - 1),
      initial=allocation.greedy(problem)[None],
    )

  return task.each(one)


def _random(task: Task) -> Choices:
  """The best, by the loss of the search, of many that keep the budgets."""

  def one(problem):
    many = allocation.random_choices(
      problem, _evaluations(task), seed=task.seed
    )
    return many[int(np.argmin(_finite(task.searched(list(many)))))]

  return task.each(one)


def _finite(losses: np.ndarray) -> np.ndarray:
  return np.where(np.isnan(losses), np.inf, losses)


def _inverse_order(task: Task) -> Choices:
  table = np.where(task.problem.allowed, task.problem.sensitivity, -np.inf)
  importance = table.max(axis=1)  # what the site loses by its worst
  return task.each(lambda p: allocation.inverse_order(p, importance))


def _integer_program(task: Task) -> Choices:
  return task.each(lambda p: allocation.integer_program(p, time_limit=_SECONDS))


SOLVERS: dict[str, Callable[[Task], Choices]] = {
  'gradient': _gradient,
  'integer_program': _integer_program,
  'dynamic_program': lambda t: t.each(allocation.dynamic_program),
  'lagrangian': lambda t: t.each(allocation.lagrangian),
  'hawq_v2': _hawq_v2,
  'greedy': lambda t: t.each(allocation.greedy),
  'evolution': _evolution,
  'policy_gradient': lambda t: t.each(
    lambda p: allocation.policy_gradient(p, key=jax.random.key(t.seed))
  ),
  'uniform': _uniform,
  'random': _random,
  'inverse_order': _inverse_order,
}


def solve(name: str, task: Task, needed: bool) -> tuple[Choices, str]:
  """Choices of a solver under all budgets, and what went wrong, if anything.

  Args:
    name: One of `SOLVERS`.
    task: What it is given.
    needed: Whether to raise where it finds nothing under the first budgets;
      a solver that is only compared is left out instead.

  Raises:
    ValueError: if it is needed and fails.
  """
  try:
    choices = SOLVERS[name](task)
  except (ValueError, TimeoutError) as error:
    if needed or isinstance(error, Diverged):
      raise ValueError(f'{name}: {error}') from error
    return [None] * len(task.budgets), f'{name} is left out: {error}'
  if needed and choices[0] is None:
    raise ValueError(
      f'{name}: no such choice keeps the budgets; take another --solver'
    )
  return choices, ''


def one_site_table(task_parts: tuple, folder: checkpoints.Folder, progress):
  """The one-site table, candidate by candidate; what is there is kept.

  Args:
    task_parts: loss, params, candidates, batches.
    folder: Where columns are saved.
    progress: (done, total).

  Returns:
    f64[l, c].

  Raises:
    Diverged: if a loss is not finite, by site and candidate, or that of the
      model itself.
  """
  loss, params, candidates, batches = task_parts
  batches = jax.tree.map(jnp.asarray, batches)
  count = len(candidates.labels)
  saved = folder.load_arrays('table') or {}
  columns = [saved[key] for key in sorted(saved)]
  progress(len(columns), count)
  for j in range(len(columns), count):
    try:
      column = measured.one_site_table(
        loss, params, candidates, batches, only=[j]
      )
    except ValueError as error:
      own = Losses(loss, params, candidates, batches)
      (base,) = own([np.full(len(candidates.names), -1)])
      if not np.isfinite(base):
        raise Diverged(
          f'the loss of the unquantized model is {base} on the search text'
        ) from error
      raise Diverged(str(error)) from error
    columns.append(column[:, 0])
    arrays = {f'candidate{i:03d}': x for i, x in enumerate(columns)}
    folder.save_arrays('table', arrays)
    progress(j + 1, count)
  return np.stack(columns, axis=1)
