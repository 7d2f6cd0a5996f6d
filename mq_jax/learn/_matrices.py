"""What is learned of a quantized matrix: where on its grid, and the grid.

Codes keep their layout and so their bytes; weights move from the value they
were given to another of the grid, and what codes say of the grid moves too.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax import layouts, plans
from mq_jax._pytrees import pytree_dataclass, static
from mq_jax.quantize import QuantizedMatrix
from mq_jax.recipes import Learning

# A factor that travels as far as an offset changes so much less: offsets are
# in steps of the grid, of which 2**bits make a range.
_FACTOR = 0.1
# A logit travels farther: a choice is between options, not neighbours.
_LOGIT = 10.0
# Mean squared steps by which an option must be better to be e times as likely.
_TEMPERATURE = 0.1
# By how much, in logits, the options that codes have are ahead at the start.
_AHEAD = 0.5
# Ends of AdaRound's sigmoid, which is cut to 0..1.
_SIGMOID = -0.1, 1.1
# Share of the steps in which the penalty of soft rounding waits, and the
# exponent with which it begins and ends.
_WARM_UP, _STEEP, _FLAT = 0.2, 20.0, 2.0


@pytree_dataclass
class Start:
  """A matrix as it was quantized, ready to be moved.

  Attributes:
    codes: Of the layout.
    target: Where weights are before they are rounded, which gives the codes'
      values; for the rounding 'sigmoid' the lower neighbour on the grid, for
      'nearest' the weight itself. f32[*batch, k, n].
    spacing: Distance of neighbours on the grid. f32[*batch, k, n].
    prior: Logits of the choices that are learned. f32[*batch, a, *cells].
    layout: Of the codes.
    options: How it is learned.
    site: Of the model that is trained; None for a matrix on its own.
  """

  codes: dict[str, jax.Array]
  target: jax.Array
  spacing: jax.Array
  prior: dict[str, jax.Array]
  layout: layouts.Layout = static()
  options: 'Moves' = static()
  site: Any = static(None)


class Moves(NamedTuple):
  """The options of learning that decide about a matrix; see `Learning`."""

  rounding: str = 'straight'
  reach: float = 0.5
  numbers: bool = True
  choices: tuple[str, ...] = ()

  @classmethod
  def of(cls, options: Learning) -> 'Moves':
    return cls(*(getattr(options, name) for name in cls._fields))


class Leaves(NamedTuple):
  """What is learned of one matrix; all zero at the start, but 'sigmoid's.

  Attributes:
    offsets: How far weights go, in units of the spacing, or what a sigmoid or
      tanh makes so. f32[*batch, k, n]; None for the rounding 'nearest'.
    factors: Of codes that are real numbers, their logarithms by tenths; of
      whole ones, what is added to them.
    logits: What is added to those of choices, by tens.
  """

  offsets: jax.Array | None
  factors: dict[str, jax.Array]
  logits: dict[str, jax.Array]


def begin(
  matrix: QuantizedMatrix,
  weight: jax.Array,
  options: Learning = Learning(),  # noqa: B008
) -> tuple[Start, Leaves]:
  """Start from a quantized matrix, each weight as near to its own as can be.

  Args:
    matrix: What was made of the weight.
    weight: As it was. f32[*batch, k, n].
    options: How to learn.

  Raises:
    ValueError: if its layout can't be learned, or not so.
  """
  layout, moves = matrix.layout, Moves.of(options)
  if not hasattr(layout, 'relax'):
    raise ValueError(
      f'{matrix.recipe}: layout {type(layout).__name__} has no `relax`; what '
      'it stores cannot be learned'
    )
  codes, shape = matrix.codes, matrix.shape
  weight = weight.astype(jnp.float32)
  target, spacing, prior = _placed(
    layout, moves, shape, codes, weight, options.near
  )
  zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
  names = layout.learned(codes) if moves.numbers else ()
  if moves.rounding == 'nearest' and not (names or prior):
    raise ValueError(
      f"{matrix.recipe}: learning with rounding='nearest' finds nothing to "
      'learn in its codes'
    )
  offsets = None if moves.rounding == 'nearest' else zeros(target)
  if moves.rounding == 'sigmoid':
    target, offsets = _between(
      *(layout, shape, codes, target, spacing),
    )
  leaves = Leaves(
    offsets,
    {name: zeros(codes[name]) for name in names},
    jax.tree.map(zeros, prior),
  )
  return Start(
    codes, target, spacing, prior, layout, moves, matrix.site
  ), leaves


def _batched(f, shape, *arguments):
  """A function of one matrix, of a batch of them."""
  for _ in shape[:-2]:
    f = jax.vmap(f)
  return f(*arguments)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _placed(layout, moves, shape, codes, weight, near):
  """Targets, spacings and priors; compiled once for matrices alike."""
  k, n = shape[-2:]

  def one(codes, weight):
    value = layout.place(codes, layout.decode(codes, k, n), k, n)
    spacing = layout.spacing(codes, k, n)
    own = layout.place(codes, weight, k, n)
    far = near * spacing
    target = value + jnp.clip(own - value, -far, far)
    relax = lambda target: layout.relax(codes, target, k, n)
    # What is clipped or pruned would not hear of it.
    heard = jax.grad(lambda t: jnp.sum(layout.place(codes, relax(t), k, n)))
    target = jnp.where(heard(target) != 0, target, value)
    same = jnp.all(relax(target) == layout.decode(codes, k, n))
    target = jnp.where(same, target, value)
    prior = {}
    if moves.choices:
      found = layouts.choices(layout, codes, target, k, n)
      prior = {n: _prior(*found[n]) for n in moves.choices if n in found}
    return weight if moves.rounding == 'nearest' else target, spacing, prior

  return _batched(one, shape, codes, weight)


def _prior(now: jax.Array, error: jax.Array) -> jax.Array:
  """Logits by errors, those of the options that codes have in front."""
  logits = -error / _TEMPERATURE
  others = jnp.where(now > 0, -jnp.inf, logits).max(axis=0, keepdims=True)
  first = jnp.maximum(logits, others + _AHEAD)
  return jnp.where(now > 0, first, logits)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _between(layout, shape, codes, target, spacing):
  """The neighbours below targets, and what a sigmoid puts them there by."""
  k, n = shape[-2:]
  value = _batched(
    lambda c: layout.place(c, layout.decode(c, k, n), k, n), shape, codes
  )
  low = jnp.where(target >= value, value, value - spacing)
  share = (target - low) / jnp.where(spacing > 0, spacing, 1.0)
  least, most = _SIGMOID
  inner = (jnp.clip(share, 1e-4, 1 - 1e-4) - least) / (most - least)
  return low, jnp.log(inner) - jnp.log1p(-inner)


def _numbers(start: Start, leaves: Leaves) -> dict[str, jax.Array]:
  """Codes with numbers as they are stored, differentiable."""
  moved = {}
  for name, factor in leaves.factors.items():
    code = start.codes[name]
    if not jnp.issubdtype(code.dtype, jnp.floating):
      moved[name] = code.astype(jnp.float32) + factor  # the layout rounds it
      continue
    soft = code.astype(jnp.float32) * jnp.exp(_FACTOR * factor)
    stored = soft.astype(code.dtype).astype(jnp.float32)
    moved[name] = layouts.through(stored, soft)
  return start.codes | moved


def _up(leaves: Leaves) -> jax.Array:
  """AdaRound's h(V), from 0 (down) to 1 (up)."""
  least, most = _SIGMOID
  return jnp.clip(jax.nn.sigmoid(leaves.offsets) * (most - least) + least, 0, 1)


def _target(start, codes, leaves, hard):
  k, n = start.target.shape[-2:]
  match start.options.rounding:
    case 'nearest':
      place = lambda codes, weight: start.layout.place(codes, weight, k, n)
      return _batched(place, start.target.shape, codes, start.target)
    case 'sigmoid':
      up = _up(leaves)
      up = (up >= 0.5).astype(jnp.float32) if hard else up
      return start.target + start.spacing * up
    case 'tanh':
      far = start.options.reach * jnp.tanh(leaves.offsets)
      return start.target + start.spacing * far
  return start.target + start.spacing * leaves.offsets


def _settled(start: Start, leaves: Leaves, hard: bool = True):
  """Codes that say which grid, targets on it, and logits of choices."""
  codes = _numbers(start, leaves)
  target = _target(start, codes, leaves, hard)
  logits = {n: start.prior[n] + _LOGIT * x for n, x in leaves.logits.items()}
  k, n = start.target.shape[-2:]
  settle = lambda codes, logits, target: layouts.settle(
    start.layout, codes, logits, target, k, n
  )
  return (
    _batched(settle, start.target.shape, codes, logits, target),
    target,
    logits,
  )


def values(start: Start, leaves: Leaves, hard: bool = True) -> jax.Array:
  """What the matrix decodes to, differentiable in the leaves.

  Args:
    start: From `begin`.
    leaves: What is learned.
    hard: Whether also for soft rounding weights are on the grid, as `harden`
      puts them.
  """
  soft = start.options.rounding in ('sigmoid', 'tanh')
  k, n = start.target.shape[-2:]
  codes, target, logits = _settled(start, leaves, hard)
  # The options are in front of cells, behind the matrices of a batch.
  axis = start.target.ndim - 2
  shares = {n: jax.nn.softmax(x, axis=axis) for n, x in logits.items()}
  relax = lambda codes, target, shares: start.layout.relax(
    codes, target, k, n, hard or not soft, shares
  )
  return _batched(relax, start.target.shape, codes, target, shares)


def penalty(start: Start, leaves: Leaves, at: jax.Array) -> jax.Array:
  """How far from the grid soft weights are, on average; 0 for others.

  Args:
    start: From `begin`.
    leaves: What is learned.
    at: Share of the steps done, f32.

  Source:
    'sigmoid': AdaRound, arXiv 2004.10568, equation 24 (recalled), from the
    exponent 20 to 2 after a fifth of the steps. 'tanh': our choice, the squared
    sine, which grows along a line.
  """
  done = jnp.maximum(at - _WARM_UP, 0.0) / (1.0 - _WARM_UP)
  match start.options.rounding:
    case 'sigmoid':
      power = _STEEP + (_FLAT - _STEEP) * done
      far = 1.0 - jnp.abs(2.0 * _up(leaves) - 1.0) ** power
      return jnp.where(done > 0, jnp.mean(far), 0.0)
    case 'tanh':
      target = _target(start, start.codes, leaves, False)
      k, n = start.target.shape[-2:]
      value = _batched(
        lambda c: start.layout.place(c, start.layout.decode(c, k, n), k, n),
        start.target.shape,
        start.codes,
      )
      safe = jnp.where(start.spacing > 0, start.spacing, 1.0)
      return done * jnp.mean(jnp.sin(jnp.pi * (target - value) / safe) ** 2)
  return jnp.float32(0.0)


def parameter(start: Start, leaves: Leaves, hard: bool = True) -> jax.Array:
  """`values` as the model has them."""
  found = values(start, leaves, hard)
  return found if start.site is None else start.site.unmatrix(found)


@jax.jit
def _recoded(start: Start, leaves: Leaves) -> dict[str, jax.Array]:
  k, n = start.target.shape[-2:]
  codes, target, _ = _settled(start, leaves)
  recode = lambda codes, target: start.layout.recode(codes, target, k, n)
  moved = _batched(recode, start.target.shape, codes, target)
  return {name: x.astype(start.codes[name].dtype) for name, x in moved.items()}


def harden(
  matrix: QuantizedMatrix, weight: jax.Array, start: Start, leaves: Leaves
) -> QuantizedMatrix:
  """The matrix with the codes that `values` decodes from, as many bytes.

  Args:
    matrix: As it was begun from.
    weight: What it stands for. f32[*batch, k, n].
    start: From `begin`.
    leaves: What was learned.

  Returns:
    The matrix; its record has `weight_mse` anew, `moved`, the share of weights
    whose value is another, and no `output_error`, of which Hessians know.
  """
  # The site only names it, and would make each a program of its own.
  codes = _recoded(dataclasses.replace(start, site=None), leaves)
  learned = dataclasses.replace(matrix, codes=codes)
  before, after = (np.asarray(plans.decode(m)) for m in (matrix, learned))
  if matrix.site is not None:
    before, after = (np.asarray(matrix.site.matrix(x)) for x in (before, after))
  weight = np.asarray(weight, np.float32)
  mean = lambda x: np.mean(x, axis=(-2, -1), dtype=np.float32)
  power = mean(weight**2)
  record = {n: x for n, x in matrix.record.items() if n != 'output_error'}
  record['weight_mse'] = jnp.asarray(
    mean((weight - after) ** 2) / np.where(power > 0, power, 1.0)
  )
  record['moved'] = jnp.asarray(mean(before != after))
  return dataclasses.replace(learned, record=record)
