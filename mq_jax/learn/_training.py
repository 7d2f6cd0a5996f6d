"""One training loop for all that is learned: scan, held-out, best state."""

import difflib
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mq_jax import plans
from mq_jax.learn import _matrices, losses
from mq_jax.quantize import QuantizedMatrix
from mq_jax.recipes import Learning

_OPTIMIZERS = {
  'adam': optax.adam,
  'adamax': optax.adamax,
  'adamw': optax.adamw,
  'sgd': optax.sgd,
  'sign_sgd': optax.sign_sgd,
}


class Trace(NamedTuple):
  """What training saw.

  Attributes:
    train: Loss of each step. f32[s].
    held: Loss of the held-back examples at the start and at each look. f32[l].
    best: Number of the look with the least of them; 0 is the start.
    diverged: Whether a loss was not finite, where training stopped.
  """

  train: np.ndarray
  held: np.ndarray
  best: int
  diverged: bool


def train(
  loss: losses.Loss,
  params: Any,
  packed: Any,
  examples: Any,
  *,
  options: Learning = Learning(),  # noqa: B008
  inputs: Mapping[str, Any] | None = None,
  progress: Callable[[int, int], None] | None = None,
) -> tuple[Any, Trace]:
  """Move the codes of quantized matrices to where the loss is least.

  Args:
    loss: (params, examples) -> scalar; the same object compiles once for
      parameters of one structure.
    params: The model's own parameters.
    packed: From `plans.compress`; its matrices are learned.
    examples: Tree of arrays [e, ...].
    options: How to train; `scope` and `loss` of them are not looked at.
    inputs: What is done to the inputs of sites: `loss` is then of a function
      of `(params, inputs)`, see `plans.runnable`.
    progress: Called with the steps done and their number.

  Returns:
    `packed` with other codes, in as many bytes, and what training saw.

  Raises:
    ValueError: if nothing in `packed` can be learned, or there are too few
      examples to hold some back.
  """
  found = plans.matrices(packed)
  if not found:
    raise ValueError('learn: nothing is quantized; give a plan with sites')
  order, held = _drawn(count(examples), options)
  weights = _weights(params, packed)
  starts, leaves = {}, {}
  for name, matrix in found.items():
    starts[name], leaves[name] = _matrices.begin(matrix, weights[name], options)
  offered = {name for start in starts.values() for name in start.prior}
  if strange := [name for name in options.choices if name not in offered]:
    raise ValueError(
      f'learning: choices={options.choices}: no code has {", ".join(strange)} '
      'to choose; FineQ has pattern, MicroScopiQ role, osf and isf'
    )
  shell = jax.tree.map(
    lambda x: None if plans.is_matrix(x) else x, packed, is_leaf=plans.is_matrix
  )
  transform = _transform_of(options)
  program = _Program(loss, _places(packed), transform, options.steps)
  state = transform.init(leaves)
  fixed = _Fixed(
    *(shell, starts, inputs, jax.tree.map(jnp.asarray, examples)),
    anneal=jnp.float32(0.0),
  )
  look = lambda leaves: float(_held(program, fixed, leaves, held))
  best, held_losses = leaves, [look(leaves)]
  fixed = fixed._replace(anneal=jnp.float32(options.anneal * held_losses[0]))
  train_losses: list[float] = []
  for at in range(0, options.steps, options.every):
    part = order[at : at + options.every]
    leaves, state, each = _steps(program, fixed, leaves, state, part, at)
    train_losses += np.asarray(each).tolist()
    held_losses.append(look(leaves))
    if progress is not None and at + len(part) < options.steps:
      progress(at + len(part), options.steps)
    if not np.isfinite([*each, held_losses[-1]]).all():
      held_losses[-1] = np.inf
      break
    if held_losses[-1] == min(held_losses):
      best = leaves
    waited = len(held_losses) - 1 - int(np.argmin(held_losses))
    if options.patience is not None and waited >= options.patience:
      break
  if progress is not None:
    progress(options.steps, options.steps)  # also where it ended before
  learned = {
    name: _matrices.harden(matrix, weights[name], starts[name], best[name])
    for name, matrix in found.items()
  }
  trace = Trace(
    np.array(train_losses),
    np.array(held_losses),
    int(np.argmin(held_losses)),
    not np.isfinite(held_losses).all(),
  )
  return _replaced(packed, learned), trace


def count(examples: Any) -> int:
  counts = {x.shape[0] for x in jax.tree.leaves(examples)}
  if len(counts) != 1:
    raise ValueError(
      f'learn: examples of {sorted(counts) or "no"} in number; all arrays need '
      'one axis of examples in front, of one length'
    )
  return counts.pop()


def check(count: int, options: Learning) -> None:
  """Refuse options that `train` would refuse for so many examples.

  Raises:
    ValueError: for an unknown optimizer, or too few examples.
  """
  _drawn(count, options)
  _transform_of(options)


def _drawn(count: int, options: Learning) -> tuple[np.ndarray, np.ndarray]:
  """Examples of each step i32[steps, batch], and those held back i32[h]."""
  rng = np.random.default_rng(options.seed)
  shuffled = rng.permutation(count).astype(np.int32)
  held = max(1, round(options.held * count))
  if held >= count:
    raise ValueError(
      f'learn: {count} examples are too few to hold back {options.held:.0%} of '
      'them'
    )
  rest = shuffled[held:]
  batch = min(options.batch, len(rest))
  rounds = -(-options.steps * batch // len(rest))
  order = np.concatenate([rng.permutation(rest) for _ in range(rounds)])
  order = order[: options.steps * batch].reshape(options.steps, batch)
  return order, np.sort(shuffled[:held])


def _weights(params: Any, packed: Any) -> dict[str, jax.Array]:
  """Of each quantized matrix its weight [*batch, k, n]."""
  plain = jax.tree.leaves(params)
  leaves = jax.tree.leaves(packed, is_leaf=plans.is_matrix)
  if len(plain) != len(leaves):
    raise ValueError('learn: params and packed are not of one model')
  found = {}
  for weight, leaf, name in zip(plain, leaves, _places(packed), strict=True):
    if name is not None:
      weight = jnp.asarray(weight, jnp.float32)
      found[name] = weight if leaf.site is None else leaf.site.matrix(weight)
  return found


def _places(packed: Any) -> tuple[str | None, ...]:
  """Names of the matrices among the leaves; None for others."""
  byid = {id(matrix): name for name, matrix in plans.matrices(packed).items()}
  leaves = jax.tree.leaves(packed, is_leaf=plans.is_matrix)
  return tuple(byid.get(id(leaf)) for leaf in leaves)


def _replaced(packed: Any, learned: dict[str, QuantizedMatrix]) -> Any:
  leaves, tree = jax.tree.flatten(packed, is_leaf=plans.is_matrix)
  names = _places(packed)
  return jax.tree.unflatten(
    tree,
    [
      x if n is None else learned[n] for x, n in zip(leaves, names, strict=True)
    ],
  )


class _Program(NamedTuple):
  """What decides about compilation."""

  loss: losses.Loss
  places: tuple[str | None, ...]
  transform: optax.GradientTransformation
  steps: int


class _Fixed(NamedTuple):
  """What steps share."""

  shell: Any  # parameters, None for what is learned
  starts: dict[str, _matrices.Start]
  inputs: Mapping[str, Any] | None
  examples: Any
  anneal: jax.Array  # of the penalty of soft rounding


def _transform_of(options: Learning) -> optax.GradientTransformation:
  # With a rate that falls the penalty could not drive weights to the grid.
  last = options.learning_rate if options.soft else 0.0
  return _transform(
    options.optimizer, options.learning_rate, last, options.steps
  )


@functools.cache
def _transform(optimizer, first, last, steps):
  """The same object for the same options, so nothing compiles again."""
  if isinstance(optimizer, str):
    if optimizer not in _OPTIMIZERS:
      near = difflib.get_close_matches(optimizer, _OPTIMIZERS, n=3, cutoff=0.4)
      raise ValueError(
        f'learning: optimizer={optimizer!r}: did you mean '
        f'{" or ".join(near or _OPTIMIZERS)}?'
      )
    optimizer = _OPTIMIZERS[optimizer]
  return optimizer(optax.linear_schedule(first, last, steps))


def _loss(program, fixed, leaves, examples, hard=True):
  """Of relaxed matrices in their places among the other parameters."""
  is_none = lambda x: x is None
  others, tree = jax.tree.flatten(fixed.shell, is_leaf=is_none)
  whole = [
    x
    if name is None
    else _matrices.parameter(fixed.starts[name], leaves[name], hard)
    for x, name in zip(others, program.places, strict=True)
  ]
  params = jax.tree.unflatten(tree, whole)
  if fixed.inputs is not None:
    params = params, fixed.inputs
  return program.loss(params, examples)


@functools.partial(jax.jit, static_argnums=0)
def _steps(program, fixed, leaves, state, order, begun):
  """Some steps; leaves, state of the optimizer, losses f32[s]."""

  def penalized(leaves, batch, at):
    loss = _loss(program, fixed, leaves, batch, hard=False)
    each = [
      _matrices.penalty(fixed.starts[n], x, at) for n, x in leaves.items()
    ]
    return loss + fixed.anneal * sum(each) / len(each), loss

  def step(carry, given):
    leaves, state = carry
    chosen, number = given
    batch = jax.tree.map(lambda x: x[chosen], fixed.examples)
    (_, loss), slopes = jax.value_and_grad(penalized, has_aux=True)(
      leaves, batch, number / program.steps
    )
    # Optax counts on it: of a whole number and a float it takes powers.
    with jax.numpy_dtype_promotion('standard'):
      updates, state = program.transform.update(slopes, state, leaves)
    return (optax.apply_updates(leaves, updates), state), loss

  numbers = (begun + jnp.arange(len(order))).astype(jnp.float32)
  (leaves, state), each = jax.lax.scan(step, (leaves, state), (order, numbers))
  return leaves, state, each


@functools.partial(jax.jit, static_argnums=0)
def _held(program, fixed, leaves, chosen):
  """Mean loss over the examples held back, one at a time."""

  def one(index):
    example = jax.tree.map(lambda x: x[index][None], fixed.examples)
    return _loss(program, fixed, leaves, example)

  return jnp.mean(jax.lax.map(one, chosen))
