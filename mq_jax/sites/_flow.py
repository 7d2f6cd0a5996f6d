"""What every value of a jaxpr is made of: parameters, constants or data."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp

from mq_jax.sites import _axes


@dataclasses.dataclass(frozen=True)
class Flow:
  """Provenance of one value.

  Attributes:
    kind: 'constant' (no input), 'leaf' (a parameter, perhaps rearranged),
      'derived' (computed from parameters and constants), 'selected' (elements
      of parameters chosen by data) or 'activation' (depends on the batch).
    leaves: Indices of the parameters it is made of.
    axes: View of the parameter, for a leaf.
    repeats: Atoms of it that scans have sliced away, outermost first.
    scans: Keys of those scans.
    op: Primitive that made it 'derived', for the user.
  """

  kind: str
  leaves: frozenset[int] = frozenset()
  axes: _axes.Axes = ()
  repeats: _axes.Atoms = ()
  scans: tuple[tuple[int, ...], ...] = ()
  op: str = ''


CONSTANT = Flow('constant')
ACTIVATION = Flow('activation')
_BATCHED = ('activation', 'selected')

# Change neither the order of elements nor, but for rounding, their values.
# Each output belongs to the operand at the same position.
_IDENTITIES = frozenset({
  'convert_element_type', 'copy', 'copy_p', 'device_put', 'mesh_cast', 'name',
  'optimization_barrier', 'pcast', 'pvary', 'reduce_precision', 'reshard',
  'sharding_constraint', 'stop_gradient',
})  # fmt: skip
_REARRANGE = frozenset(
  {'broadcast_in_dim', 'expand_dims', 'reshape', 'squeeze', 'transpose'}
)
_SELECTIONS = frozenset({'dynamic_slice', 'gather'})


def leaf(index: int, shape: tuple[int, ...]) -> Flow:
  """Provenance of the parameter `index` itself."""
  if 0 in shape:  # nothing to multiply by, and no strides to speak of
    return derived((index,), 'being empty')
  return Flow('leaf', frozenset({index}), _axes.whole(shape))


def derived(leaves: Iterable[int], op: str) -> Flow:
  """Provenance of what `op` computed from parameters."""
  return Flow('derived', frozenset(leaves), op=op)


def sliced(flow: Flow, key: tuple[int, ...], length: int) -> Flow:
  """Provenance of what a scan of this key sees of its operand `flow`."""
  if flow.kind != 'leaf':
    return flow
  return dataclasses.replace(
    flow,
    axes=flow.axes[1:],
    repeats=flow.repeats + flow.axes[0],
    # a scan of one step slices nothing: the matrix has no axis for it
    scans=(*flow.scans, key) if length > 1 else flow.scans,
  )


def join(a: Flow, b: Flow) -> Flow:
  """Provenance of a value that is `a` in one branch or step, `b` in another."""
  if a == b:
    return a
  kinds = {a.kind, b.kind}
  if 'activation' in kinds or (kinds & {'selected'} and len(kinds) > 1):
    return ACTIVATION
  leaves = a.leaves | b.leaves
  if 'selected' in kinds:
    return Flow('selected', leaves)
  # a's op first, so that joining again changes nothing and loops terminate
  return derived(leaves, a.op or b.op or 'a branch or loop')


def _rearranged(eqn: Any, flow: Flow) -> Flow:
  name, params = eqn.primitive.name, eqn.params
  shape = eqn.outvars[0].aval.shape
  old = eqn.invars[0].aval.shape
  axes: _axes.Axes | None
  if name == 'transpose':
    axes = tuple(flow.axes[i] for i in params['permutation'])
  elif name == 'broadcast_in_dim':
    place = dict(zip(map(int, params['broadcast_dimensions']), range(len(old))))
    kept = lambda i, n: n == (old[place[i]] if i in place else 1)
    axes = None
    if all(kept(i, n) for i, n in enumerate(shape)):
      axes = tuple(
        flow.axes[place[i]] if i in place else () for i in range(len(shape))
      )
  elif name == 'reshape' and params.get('dimensions') is not None:
    axes = None
  else:
    axes = _axes.reshape(flow.axes, shape)
  if axes is None:
    return derived(flow.leaves, name)
  return dataclasses.replace(flow, axes=axes)


def _inexact(variable: Any) -> bool:
  dtype = getattr(variable.aval, 'dtype', None)  # tokens have none
  return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def transfer(
  eqn: Any, flows: Sequence[Flow]
) -> tuple[list[Flow], frozenset[int]]:
  """Provenance of the outputs of a first-order equation.

  Returns:
    One flow an output, and the parameters that enter the equation as such but
    leave it as something else.
  """
  name = eqn.primitive.name
  if name in _IDENTITIES:
    outs = list(flows[: len(eqn.outvars)])
    for i, (new, old) in enumerate(zip(eqn.outvars, eqn.invars)):
      # a float rounded to an integer is no view of the parameter any more
      rounded = _inexact(old) and not _inexact(new)
      if flows[i].kind == 'leaf' and rounded:
        outs[i] = derived(flows[i].leaves, name)
  elif name in _REARRANGE or (
    name == 'slice' and eqn.invars[0].aval.shape == eqn.outvars[0].aval.shape
  ):
    flow = flows[0]
    if flow.kind == 'leaf' and name != 'slice':
      flow = _rearranged(eqn, flow)
    outs = [flow]
  else:
    kinds = {flow.kind for flow in flows}
    leaves = frozenset().union(*(f.leaves for f in flows))
    made = frozenset().union(
      *(f.leaves for f in flows if f.kind not in _BATCHED)
    )
    if name in _SELECTIONS and flows[0].kind in ('leaf', 'derived'):
      chosen = any(f.kind in _BATCHED for f in flows[1:])
      out = Flow('selected', made) if chosen else derived(leaves, name)
    elif kinds & set(_BATCHED):
      out = ACTIVATION
    elif made:
      out = derived(made, name)
    else:
      out = CONSTANT
    outs = [out] * len(eqn.outvars)
  leaf_in = frozenset().union(*(f.leaves for f in flows if f.kind == 'leaf'))
  leaf_out = frozenset().union(*(f.leaves for f in outs if f.kind == 'leaf'))
  return outs, leaf_in - leaf_out
