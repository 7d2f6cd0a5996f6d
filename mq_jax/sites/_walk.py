"""The walk over a jaxpr, first for provenance, then with values.

Every higher-order primitive has one rule with two faces: `flow` says how the
operands reach its bodies and the results come out (no values, run once), and
`run` rebuilds the primitive around its interpreted bodies. What has no matmul
inside is bound unchanged, so most primitives never need a rule.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from mq_jax.sites import _calls, _flow
from mq_jax.sites._flow import Flow
from mq_jax.sites._site import Site

Key = tuple[int, ...]  # position of an equation: index, body, index, ...
Statistics = dict[str, Any]
# visit(site, equation, operands) -> output, statistics
Visit = Callable[[Site, Any, Sequence[Any]], tuple[Any, Statistics]]


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
  """A jaxpr and its constants; some primitives hold it closed, some open."""
  if hasattr(jaxpr, 'jaxpr'):
    return jaxpr.jaxpr, jaxpr.consts
  return jaxpr, ()


def _live(jaxpr: Any) -> list[tuple[int, Any]]:
  """Equations whose results are used, with their positions."""
  needed = {v for v in jaxpr.outvars if not isinstance(v, jex.Literal)}
  result = []
  for index, eqn in reversed(list(enumerate(jaxpr.eqns))):
    if eqn.effects or any(v in needed for v in eqn.outvars):
      needed.update(v for v in eqn.invars if not isinstance(v, jex.Literal))
      result.append((index, eqn))
  return result[::-1]


def _matmuls(eqn: Any) -> Iterator[Any]:
  """All matmuls inside the jaxprs among the parameters of an equation."""
  for jaxpr in jex.jaxprs_in_params(eqn.params):
    for inner in open_jaxpr(jaxpr)[0].eqns:
      if inner.primitive.name in _calls.MATMULS:
        yield inner
      yield from _matmuls(inner)


class Analysis:
  """The walk without values: finds the calls and what the weights are.

  Attributes:
    calls: Calls by position, in the order of the program.
    other_uses: Parameters that also feed something which is no matmul.
  """

  def __init__(self, names: list[str]):
    self.names = names
    self.calls: dict[Key, _calls.Call] = {}
    self.other_uses: set[int] = set()

  def body(
    self, jaxpr: Any, flows: Sequence[Flow], key: Key, trips: int
  ) -> list[Flow]:
    """Provenance of the results of a jaxpr; notes the calls in it."""
    jaxpr, _ = open_jaxpr(jaxpr)
    env = {v: _flow.CONSTANT for v in jaxpr.constvars}
    env.update(zip(jaxpr.invars, flows))
    read = lambda v: _flow.CONSTANT if isinstance(v, jex.Literal) else env[v]
    for index, eqn in _live(jaxpr):
      outs = self._equation(
        eqn, [read(v) for v in eqn.invars], (*key, index), trips
      )
      env.update(zip(eqn.outvars, outs))
    return [read(v) for v in jaxpr.outvars]

  def join(self, a: Flow, b: Flow) -> Flow:
    """`_flow.join`, noting the parameters which stop being addressable."""
    flow = _flow.join(a, b)
    if flow.kind != 'leaf':
      for old in (a, b):
        if old.kind == 'leaf':
          self.other_uses |= old.leaves
    return flow

  def refuse(self, key: Key, tag: str, reason: str) -> None:
    """Makes a call that has been noted one of no addressable parameter."""
    call = self.calls[key]
    if call.leaves and not call.tag:
      self.other_uses |= set(call.leaves)
      self.calls[key] = dataclasses.replace(
        call, tag=tag, reason=reason, layout=(), repeats=call.trips
      )

  def _equation(self, eqn, flows, key, trips):
    name = eqn.primitive.name
    if name in _calls.MATMULS:
      call = _calls.describe(eqn, flows[0], flows[1], trips, self.names)
      self.calls[key] = call
      outs, lost = _flow.transfer(eqn, flows)
      # being multiplied as a weight is the one use that does not count
      self.other_uses |= lost if call.tag else lost - set(call.leaves)
      return outs
    rule = rule_of(eqn)
    if rule is not None:
      return rule.flow(eqn, flows, self, key, trips)
    for i, inner in enumerate(_matmuls(eqn)):
      self.calls[(*key, i)] = _calls.hidden(eqn, inner, trips)
    if name.startswith(_calls.KERNELS):
      self.calls[key] = _calls.hidden(eqn, None, trips)
    outs, lost = _flow.transfer(eqn, flows)
    self.other_uses |= lost
    return outs


class Run:
  """The walk with values: `visit` stands in for some of the matmuls.

  Attributes:
    sites: Calls to be visited, by position.
    scans: For every site, keys of the scans which slice its parameter.
    collects: Whether `visit` returns statistics.
  """

  def __init__(
    self,
    sites: dict[Key, Site],
    scans: dict[str, frozenset[Key]],
    visit: Visit,
    *,
    collects: bool,
  ):
    self.sites, self.scans, self.collects = sites, scans, collects
    self._visit = visit
    self._above = {key[:i] for key in sites for i in range(len(key))}

  def body(
    self, jaxpr: Any, args: Sequence[Any], key: Key
  ) -> tuple[list[Any], Statistics]:
    """Evaluates a jaxpr, with the statistics of the sites in it."""
    jaxpr, consts = open_jaxpr(jaxpr)
    env = dict(zip(jaxpr.constvars, consts))
    env.update(zip(jaxpr.invars, args))
    read = lambda v: v.val if isinstance(v, jex.Literal) else env[v]
    statistics: Statistics = {}
    for index, eqn in _live(jaxpr):
      with eqn.ctx.manager:
        outs, found = self._equation(
          eqn, [read(v) for v in eqn.invars], (*key, index)
        )
      env.update(zip(eqn.outvars, outs))
      statistics = add(statistics, found)
    return [read(v) for v in jaxpr.outvars], statistics

  def _equation(self, eqn, values, key):
    if key in self.sites:
      out, found = self._visit(self.sites[key], eqn, values)
      return [out], found
    if key in self._above:
      return rule_of(eqn).run(eqn, values, self, key)
    return bind(eqn, values), {}

  def shapes(self, function: Callable[..., Any], *args: Any) -> Statistics:
    """Shapes of the statistics, the last result of `function(*args)`."""
    if not self.collects:
      return {}
    return jax.eval_shape(function, *args)[-1]


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
  """Applies an equation as it stands."""
  params = eqn.primitive.get_bind_params(eqn.params)
  subfuns = ()
  if isinstance(params, tuple):  # jax < 0.8 hands the functions out apart
    subfuns, params = params
  out = eqn.primitive.bind(*subfuns, *values, **params)
  return list(out) if eqn.primitive.multiple_results else [out]


def add(a: Statistics, b: Statistics) -> Statistics:
  """Sum of two sets of statistics; a site in one only is taken as it is."""
  both = {
    name: jax.tree.map(jnp.add, a[name], b[name]) for name in a if name in b
  }
  return {**a, **b, **both}


def _zeros(shapes: Any) -> Any:
  return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _split(values: Sequence[Any], *sizes: int) -> list[list[Any]]:
  parts, start = [], 0
  for size in sizes:
    parts.append(list(values[start : start + size]))
    start += size
  return [*parts, list(values[start:])]


class _Rule(Protocol):
  def flow(
    self, eqn: Any, flows: list[Flow], analysis: Analysis, key: Key, trips: int
  ) -> list[Flow]: ...

  def run(
    self, eqn: Any, values: list[Any], run: Run, key: Key
  ) -> tuple[list[Any], Statistics]: ...


class _Inline:
  """jit and calls: the body takes the place of the call."""

  @staticmethod
  def _body(eqn):
    for name in ('jaxpr', 'call_jaxpr', 'fun_jaxpr'):
      if name in eqn.params:
        return eqn.params[name]
    raise ValueError(
      f'sites: the body of {eqn.primitive} is not known; its parameters are '
      f'{sorted(eqn.params)}'
    )

  def flow(self, eqn, flows, analysis, key, trips):
    return analysis.body(self._body(eqn), flows, (*key, 0), trips)

  def run(self, eqn, values, run, key):
    return run.body(self._body(eqn), values, (*key, 0))


class _Remat(_Inline):
  """jax.checkpoint: wrapped again, with its policy."""

  def run(self, eqn, values, run, key):
    inner = functools.partial(super().run, eqn, run=run, key=key)
    again = jax.checkpoint(
      lambda *args: inner(list(args)),
      prevent_cse=eqn.params['prevent_cse'],
      policy=eqn.params['policy'],
    )
    return again(*values)


@jax.custom_jvp
def _graft(value, rule):
  """`value`, with the gradients of both."""
  del rule
  return value


@_graft.defjvp
def _graft_jvp(primals, tangents):
  return primals[0], tangents[0] + tangents[1]


class _Custom(_Inline):
  """custom_jvp and custom_vjp: values of the body, gradients of the rule.

  The rule was written for the block as it was, and its own matmuls lie in
  Python functions out of reach. So the gradient with respect to the block's
  inputs is that of the original block, while the interpreted body, cut off
  from these inputs, carries the gradients of what the handler brings along
  (learned scales, say). Without differentiation the original is dead code.
  """

  def run(self, eqn, values, run, key):
    cut = [jax.lax.stop_gradient(value) for value in values]
    outs, statistics = super().run(eqn, cut, run, key)
    smooth = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)
    outs = [
      _graft(out, rule) if smooth(rule) else out
      for out, rule in zip(outs, bind(eqn, values))
    ]
    return outs, statistics


class _Scan:
  """lax.scan: one interpreted body, whatever the length."""

  @staticmethod
  def _parts(eqn, values):
    return _split(values, eqn.params['num_consts'], eqn.params['num_carry'])

  def flow(self, eqn, flows, analysis, key, trips):
    length, n_carry = eqn.params['length'], eqn.params['num_carry']
    consts, carry, xs = self._parts(eqn, flows)
    xs = [_flow.sliced(x, key, length) for x in xs]
    step = lambda carry: analysis.body(
      eqn.params['jaxpr'], [*consts, *carry, *xs], (*key, 0), trips * length
    )
    carry, outs = _fixpoint(analysis, step, carry)
    ys = []
    for y in outs[n_carry:]:
      if y.kind == 'leaf':  # slices, stacked again: no longer the parameter
        analysis.other_uses |= y.leaves
        y = _flow.derived(y.leaves, 'scan')
      ys.append(y)
    return [*carry, *ys]

  def run(self, eqn, values, run, key):
    params = eqn.params
    n_carry = params['num_carry']
    consts, carry, xs = self._parts(eqn, values)

    def step(carry, x):
      args = [*consts, *carry, *x]
      outs, found = run.body(params['jaxpr'], args, (*key, 0))
      return outs[:n_carry], outs[n_carry:], found

    one = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in xs]
    shapes = run.shapes(step, carry, one)
    # What slices its parameter has a statistic an iteration. The others are
    # added up in the carry: stacking them would cost memory for every step.
    stacked = {name for name in shapes if key in run.scans[name]}
    totals = _zeros({n: s for n, s in shapes.items() if n not in stacked})

    def loop(state, x):
      carry, totals = state
      carry, ys, found = step(carry, x)
      stacks = {name: found.pop(name) for name in stacked}
      return (carry, add(totals, found)), (ys, stacks)

    extra = {'_split_transpose': True} if params.get('_split_transpose') else {}
    (carry, totals), (ys, stacks) = jax.lax.scan(
      loop,
      (carry, totals),
      xs,
      length=params['length'],
      reverse=params['reverse'],
      unroll=params['unroll'],
      **extra,
    )
    for name in stacked:
      inside = [s for s in run.scans[name] if s[: len(key)] == key != s]
      if inside:  # [outer, inner, ...] -> [repeats, ...], as in the matrix
        stacks[name] = jax.tree.map(
          lambda x: x.reshape(-1, *x.shape[2:]), stacks[name]
        )
    return [*carry, *ys], {**totals, **stacks}


class _While:
  """lax.while_loop and fori_loop of unknown length."""

  @staticmethod
  def _parts(eqn, values):
    return _split(
      values, eqn.params['cond_nconsts'], eqn.params['body_nconsts']
    )

  def flow(self, eqn, flows, analysis, key, trips):
    cond_consts, body_consts, carry = self._parts(eqn, flows)
    step = lambda carry: analysis.body(
      eqn.params['body_jaxpr'], [*body_consts, *carry], (*key, 1), trips
    )
    carry, _ = _fixpoint(analysis, step, carry)
    cond = (*key, 0)
    analysis.body(eqn.params['cond_jaxpr'], [*cond_consts, *carry], cond, trips)
    for at in [at for at in analysis.calls if at[: len(cond)] == cond]:
      analysis.refuse(at, 'condition', 'it decides whether a loop goes on')
    return carry

  def run(self, eqn, values, run, key):
    cond_consts, body_consts, carry = self._parts(eqn, values)

    def proceed(state):
      args = [*cond_consts, *state[0]]
      (go,), _ = run.body(eqn.params['cond_jaxpr'], args, (*key, 0))
      return go

    def step(carry):
      args = [*body_consts, *carry]
      return run.body(eqn.params['body_jaxpr'], args, (*key, 1))

    def loop(state):
      carry, found = step(state[0])
      return carry, add(state[1], found)

    totals = _zeros(run.shapes(step, carry))
    return jax.lax.while_loop(proceed, loop, (carry, totals))


class _Cond:
  """lax.cond and lax.switch; a branch not taken has statistics of zero."""

  def flow(self, eqn, flows, analysis, key, trips):
    results = [
      analysis.body(branch, flows[1:], (*key, i), trips)
      for i, branch in enumerate(eqn.params['branches'])
    ]
    return [functools.reduce(analysis.join, outs) for outs in zip(*results)]

  def run(self, eqn, values, run, key):
    index, *args = values
    branches = [
      functools.partial(self._branch, run, branch, (*key, i))
      for i, branch in enumerate(eqn.params['branches'])
    ]
    shapes: Statistics = {}
    for branch in branches:
      shapes.update(run.shapes(branch, *args))

    def complete(branch, *args):
      outs, found = branch(*args)
      rest = {name: s for name, s in shapes.items() if name not in found}
      return outs, {**found, **_zeros(rest)}

    return jax.lax.switch(
      index, [functools.partial(complete, b) for b in branches], *args
    )

  @staticmethod
  def _branch(run, jaxpr, key, *args):
    return run.body(jaxpr, args, key)


def _fixpoint(analysis, step, carry):
  """Provenance of a loop's carry: what holds before and after every step."""
  while True:
    outs = step(carry)
    new = [analysis.join(a, b) for a, b in zip(carry, outs)]
    if new == carry:
      return carry, outs
    carry = new


_RULES: dict[str, _Rule] = {
  **dict.fromkeys(
    ('call', 'closed_call', 'core_call', 'jit', 'pjit'), _Inline()
  ),
  **dict.fromkeys(('checkpoint', 'remat', 'remat2'), _Remat()),
  **dict.fromkeys(
    ('custom_jvp_call', 'custom_vjp_call', 'custom_vjp_call_jaxpr'), _Custom()
  ),
  'cond': _Cond(),
  'scan': _Scan(),
  'while': _While(),
}


def rule_of(eqn: Any) -> _Rule | None:
  """The rule of a higher-order primitive, None where there is none."""
  # A choice between platforms cannot be written as a switch again.
  if eqn.params.get('branches_platforms') is not None:
    return None
  return _RULES.get(eqn.primitive.name)
