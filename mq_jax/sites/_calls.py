"""One equation that multiplies: its operands, sizes and weight."""

import dataclasses
import math
from typing import Any

from mq_jax.sites import _axes, _flow
from mq_jax.sites._flow import Flow

MATMULS = ('dot_general', 'conv_general_dilated', 'ragged_dot_general')
# Primitives that hide matmuls and have no jaxpr to look into.
KERNELS = ('dot_product_attention', 'scaled_dot', 'scaled_matmul')


@dataclasses.dataclass(frozen=True)
class Call:
  """One matmul equation; the fields of `Site` it decides, see there.

  Attributes:
    leaves: Parameters the weight is made of, one where it is addressable.
    tag: '' where the weight is addressable, else what its name ends in.
    label: Name without a number, for calls that no parameter names.
    idle: Whether the other operand is a constant, as the zero state that an
      unrolled recurrence starts from.
    trips: Iterations of all scans around the equation.
    scans: Keys of those which take slices of the parameter.
    hidden: Whether it lies inside an equation that cannot be rebuilt.
  """

  kind: str
  m: int
  k: int
  n: int
  groups: int
  repeats: int
  side: str
  arrangement: tuple[tuple[int, ...], ...]
  layout: _axes.Axes
  leaves: tuple[int, ...]
  tag: str
  label: str
  reason: str
  idle: bool
  trips: int
  scans: tuple[tuple[int, ...], ...]
  primitive: str
  params: tuple[tuple[str, Any], ...]
  lhs_shape: tuple[int, ...]
  rhs_shape: tuple[int, ...]
  hidden: bool = False


@dataclasses.dataclass
class _Weight:
  """Which operand is the weight, and why it is none one can address."""

  side: str = 'rhs'
  kind: str = 'matmul'
  tag: str = ''
  label: str = ''
  reason: str = ''
  leaves: frozenset[int] = frozenset()
  flow: Flow | None = None
  idle: bool = False


def _weight(lhs: Flow, rhs: Flow, kind: str, names: list[str]) -> _Weight:
  """Decides which operand is the weight from what both are made of."""
  batched = [f.kind in ('activation', 'selected') for f in (lhs, rhs)]
  called = lambda leaves: ', '.join(names[i] for i in sorted(leaves))
  if all(batched):
    chosen = [f for f in (rhs, lhs) if f.kind == 'selected']
    if len(chosen) == 1:
      flow = chosen[0]
      return _Weight(
        side='rhs' if flow is rhs else 'lhs',
        kind=kind,
        tag='selected',
        leaves=flow.leaves,
        reason=f'data select which elements of {called(flow.leaves)} multiply',
      )
    return _Weight(
      kind='attention', label='attention', reason='product of two activations'
    )
  leaves = lhs.leaves | rhs.leaves if not any(batched) else frozenset()
  by_side = {'rhs': rhs, 'lhs': lhs}
  others = {'rhs': lhs, 'lhs': rhs}
  whole = [side for side, flow in by_side.items() if flow.kind == 'leaf']
  if len(whole) == 1 and others[whole[0]].kind in (
    'activation',
    'selected',
    'constant',
  ):
    flow = by_side[whole[0]]
    idle = others[whole[0]].kind == 'constant'
    return _Weight(whole[0], kind, leaves=flow.leaves, flow=flow, idle=idle)
  if leaves:
    return _Weight(
      kind=kind,
      tag='derived',
      leaves=leaves,
      reason=f'no operand depends on the batch: product of {called(leaves)}',
      side='lhs' if rhs.kind == 'constant' else 'rhs',
    )
  # At most one operand is batched from here on, so the other is the weight.
  side = 'lhs' if batched[1] else 'rhs'
  flow = by_side[side]
  if flow.kind == 'derived':
    return _Weight(
      side,
      kind,
      'derived',
      leaves=flow.leaves,
      reason=f'the weight is computed from {called(flow.leaves)} by {flow.op}',
    )
  return _Weight(side, kind, label='constant', reason='constant')


def _free(rank: int, *used: tuple[int, ...]) -> tuple[int, ...]:
  return tuple(i for i in range(rank) if not any(i in u for u in used))


def _sizes(shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
  return math.prod(shape[i] for i in axes)


def _dot(numbers: Any, shapes: dict, weight: _Weight) -> dict[str, Any]:
  """Sizes, arrangement of the activation and layout of a dot_general."""
  (lc, rc), (lb, rb) = numbers
  contract = {'lhs': tuple(lc), 'rhs': tuple(rc)}
  batch = {'lhs': tuple(lb), 'rhs': tuple(rb)}
  w, a = weight.side, 'lhs' if weight.side == 'rhs' else 'rhs'
  pairs = list(zip(contract[w], contract[a]))
  if weight.flow is not None:
    # The order of a sum is free: take the parameter's own, so that calls which
    # list the same axes differently still agree on the rows of the matrix.
    axes = weight.flow.axes
    pairs.sort(key=lambda p: -max((s for s, _ in axes[p[0]]), default=-1))
  w_contract, a_contract = (tuple(p[i] for p in pairs) for i in (0, 1))
  w_free = _free(len(shapes[w]), w_contract, batch[w])
  a_free = _free(len(shapes[a]), a_contract, batch[a])
  layout: _axes.Axes = ()
  if weight.flow is not None:
    roles = (batch[w], w_contract, w_free)
    layout = tuple(
      tuple(x for i in role for x in weight.flow.axes[i]) for role in roles
    )
  return {
    'm': _sizes(shapes[a], a_free),
    'k': _sizes(shapes[w], w_contract),
    'n': _sizes(shapes[w], w_free),
    'groups': _sizes(shapes[w], batch[w]),
    'arrangement': (batch[a], a_free, a_contract),
    'layout': layout,
  }


def _conv(params: dict, shapes: dict, out: tuple, weight: _Weight) -> dict:
  """Sizes and layout of a convolution, whose kernel is its second operand."""
  numbers, groups = params['dimension_numbers'], params['feature_group_count']
  kernel = shapes['rhs']
  n_axis, c_axis, *taps = numbers.rhs_spec
  layout: _axes.Axes = ()
  if weight.flow is not None:
    axes = weight.flow.axes
    cut = _axes.reshape((axes[n_axis],), (groups, kernel[n_axis] // groups))
    name = None
    if params['batch_group_count'] > 1:
      name = 'it is a convolution with batch groups'
    elif weight.side == 'lhs':
      name = 'the parameter is the input of the convolution, not its kernel'
    elif cut is None:
      name = 'its feature groups interleave in the parameter'
    if name:
      weight.tag, weight.reason, weight.flow = 'conv', name, None
    else:
      rows = tuple(x for i in (*taps, c_axis) for x in axes[i])
      layout = (cut[0], rows, cut[1])
  b_axis, _, *spatial = numbers.out_spec
  return {
    'm': _sizes(out, (b_axis, *spatial)),
    'k': _sizes(kernel, (c_axis, *taps)),
    'n': kernel[n_axis] // groups,
    'groups': groups,
    'arrangement': (),
    'layout': layout,
  }


def _ragged(params: dict, shapes: dict, weight: _Weight) -> dict[str, Any]:
  """Sizes of a ragged_dot, whose rows choose their group by data."""
  numbers = params['ragged_dot_dimension_numbers']
  (lc, rc), (lb, rb) = numbers.dot_dimension_numbers
  group = tuple(numbers.rhs_group_dimensions)
  weight.flow = None
  if not weight.tag and weight.leaves:
    weight.tag = 'ragged'
    weight.reason = 'the rows of a ragged_dot choose their matrix by data'
  return {
    'm': _sizes(shapes['lhs'], _free(len(shapes['lhs']), lc, lb)),
    'k': _sizes(shapes['lhs'], lc),
    'n': _sizes(shapes['rhs'], _free(len(shapes['rhs']), rc, rb, group)),
    # every row meets one matrix only, so the matrices do not multiply the work
    'groups': _sizes(shapes['rhs'], rb),
    'arrangement': (),
    'layout': (),
  }


def _hashable(value: Any) -> Any:
  try:
    hash(value)
  except TypeError:
    return repr(value)
  return value


def describe(
  eqn: Any, lhs: Flow, rhs: Flow, trips: int, names: list[str]
) -> Call:
  """The call that an equation of one of the `MATMULS` makes.

  Args:
    eqn: The equation.
    lhs: Provenance of its first operand.
    rhs: Provenance of its second.
    trips: Iterations of all scans around it.
    names: Names of the parameters, for reasons.
  """
  primitive, params = eqn.primitive.name, eqn.params
  shapes = {
    'lhs': tuple(eqn.invars[0].aval.shape),
    'rhs': tuple(eqn.invars[1].aval.shape),
  }
  kind = 'conv' if primitive == 'conv_general_dilated' else 'matmul'
  weight = _weight(lhs, rhs, kind, names)
  if primitive == 'dot_general':
    sizes = _dot(params['dimension_numbers'], shapes, weight)
  elif primitive == 'conv_general_dilated':
    sizes = _conv(params, shapes, eqn.outvars[0].aval.shape, weight)
  else:
    sizes = _ragged(params, shapes, weight)
  flow, layout = weight.flow, sizes.pop('layout')
  if flow is not None:
    layout = tuple(_axes.merge(x) for x in (flow.repeats, *layout))
  repeats = trips if flow is None else _axes.size(flow.repeats)
  return Call(
    **sizes,
    kind=weight.kind,
    repeats=repeats,
    layout=layout,
    side=weight.side,
    leaves=tuple(sorted(weight.leaves)),
    tag=weight.tag,
    label=weight.label,
    reason=weight.reason,
    idle=weight.idle,
    trips=trips,
    scans=() if flow is None else flow.scans,
    primitive=primitive,
    params=tuple((k, _hashable(v)) for k, v in sorted(params.items())),
    lhs_shape=shapes['lhs'],
    rhs_shape=shapes['rhs'],
  )


def hidden(eqn: Any, inner: Any | None, trips: int) -> Call:
  """A matmul that cannot be reached because `eqn` cannot be rebuilt.

  Args:
    eqn: The equation which hides it.
    inner: The matmul inside, or None for a kernel without a jaxpr.
    trips: Iterations of all scans around it.
  """
  name = eqn.primitive.name
  label, reason = name, f'hidden inside the primitive {name!r}'
  if inner is not None:
    call = describe(inner, _flow.ACTIVATION, _flow.ACTIVATION, trips, [])
    return dataclasses.replace(
      call, kind='matmul', label=label, reason=reason, hidden=True
    )
  return Call(
    kind='matmul', m=0, k=0, n=0, groups=1, repeats=trips, side='rhs',
    arrangement=(), layout=(), leaves=(), tag='', label=label, reason=reason,
    idle=False, trips=trips, scans=(), primitive=name, params=(),
    lhs_shape=(), rhs_shape=(), hidden=True,
  )  # fmt: skip
