"""find, tap and rewrite: what one can do with the sites of a function."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mq_jax.sites import _flow, _walk
from mq_jax.sites._calls import Call
from mq_jax.sites._site import Site, leaf_names

_CALL_FIELDS = {f.name for f in dataclasses.fields(Call)} & {
  f.name for f in dataclasses.fields(Site)
}


class _Traced(NamedTuple):
  """A function as a jaxpr, with its sites by position."""

  jaxpr: Any
  tree: Any  # structure of the result
  sites: tuple[Site, ...]
  by_key: dict[tuple[int, ...], Site]
  scans: dict[str, frozenset[tuple[int, ...]]]
  hidden: frozenset[tuple[int, ...]]


def _trace(f: Callable[..., Any], params: Any, batch: Sequence[Any]) -> _Traced:
  names = leaf_names(params)
  jaxpr, out = jax.make_jaxpr(f, return_shape=True)(params, *batch)
  variables = jaxpr.jaxpr.invars
  flows = [
    _flow.leaf(i, tuple(v.aval.shape))
    for i, v in enumerate(variables[: len(names)])
  ]
  flows += [_flow.ACTIVATION] * (len(variables) - len(names))
  analysis = _walk.Analysis(list(names))
  results = analysis.body(jaxpr, flows, (), 1)
  for flow in results:
    if flow.kind == 'leaf':
      analysis.other_uses |= flow.leaves
  shapes = [tuple(v.aval.shape) for v in variables[: len(names)]]
  by_key = _resolve(analysis, names, shapes)
  sites: dict[str, Site] = {}
  scans: dict[str, frozenset[tuple[int, ...]]] = {}
  for key, site in by_key.items():
    sites.setdefault(site.name, site)
    scans[site.name] = scans.get(site.name, frozenset()).union(
      analysis.calls[key].scans
    )
  return _Traced(
    jaxpr,
    jax.tree.structure(out),
    tuple(sites.values()),
    by_key,
    scans,
    frozenset(k for k, call in analysis.calls.items() if call.hidden),
  )


def _resolve(analysis, names, shapes):
  """Gathers the calls of each parameter into one site.

  Returns:
    The site of every call, by position; calls of one site differ only in what
    describes the call itself (`params`, `side` and the like).
  """
  paths, names = list(names.values()), list(names)
  by_leaf: dict[int, list[Any]] = {}
  for key, call in analysis.calls.items():
    if not (call.tag or call.label):
      by_leaf.setdefault(call.leaves[0], []).append((key, call))
  common = {leaf: _common(calls) for leaf, calls in by_leaf.items()}
  taken = set(names)
  sites: dict[tuple[int, ...], Site] = {}

  def free(name):
    number, first = 0, name
    while name in taken:
      number += 1
      name = f'{first}_{number}'
    taken.add(name)
    return name

  counts: dict[str, int] = {}
  shared: dict[int, str] = {}
  for key, call in analysis.calls.items():
    fields = {name: getattr(call, name) for name in _CALL_FIELDS}
    if call.label:
      number = counts.get(call.label, 0)
      counts[call.label] = number + 1
      fields['name'] = free(f'{call.label}_{number}')
      fields['path'] = None
    elif call.tag:
      owners = '+'.join(names[i] for i in call.leaves)
      fields['name'] = free(f'{owners}#{call.tag}')
      fields['path'] = None
    else:
      (leaf,) = call.leaves
      fields['name'], fields['path'] = names[leaf], paths[leaf]
      fields['shape'] = shapes[leaf]
      fields['tied'] = leaf in analysis.other_uses
      fields.update(common[leaf])
      if fields['reason']:
        if leaf not in shared:
          shared[leaf] = free(f'{names[leaf]}#{fields.pop("tag")}')
        fields.pop('tag', None)
        fields.update(name=shared[leaf], path=None, layout=(), shape=())
    sites[key] = Site(**fields)
  return sites


def _common(calls):
  """What the calls of one parameter have in common, or why they have not."""
  first = calls[0][1]
  # scans that do not slice the parameter use it again in every iteration
  uses = [call.trips // call.repeats for _, call in calls]
  result = {
    'calls': sum(uses),
    'm': sum(call.m * use for use, (_, call) in zip(uses, calls)),
    'reason': '',
  }
  if all(call.idle for _, call in calls):
    return result | {
      'tag': 'constant',
      'reason': 'no operand depends on the batch: it only multiplies '
      'constants; pass the data as a batch argument',
    }
  views = {(call.kind, call.layout) for _, call in calls}
  if len(views) > 1:
    forms = sorted({f'{c.kind} [{c.k}, {c.n}]' for _, c in calls})
    return result | {
      'tag': 'conflict',
      'm': first.m,
      'reason': f'{len(calls)} calls read it as different matrices '
      f'({", ".join(forms)}), for example as W and as its transpose',
    }
  return result


def find(f: Callable[..., Any], params: Any, *batch: Any) -> tuple[Site, ...]:
  """Finds every matmul and convolution of a function.

  The function is traced, nothing is computed. Each parameter that multiplies
  activations becomes one site, in the order of first use. Matmuls with no
  such parameter are listed too, with `path` None and a `reason`; none is left
  out silently.

  Args:
    f: Any JAX function `f(params, *batch)`.
    params: Its parameters: any pytree of arrays or ShapeDtypeStructs.
    *batch: Its data, likewise. What `f` closes over counts as constant.

  Returns:
    The sites. Those with a `path` can be quantized: see `Site.matrix`.

  Raises:
    TypeError: if `f` cannot be called or a leaf of `params` is no array.
    ValueError: if `params` has no leaf, or two of the same name.

  Examples:
    >>> f = lambda p, x: jnp.tanh(x @ p['up']) @ p['down']
    >>> params = {'up': jnp.ones((4, 8)), 'down': jnp.ones((8, 2))}
    >>> [(s.name, s.m, s.k, s.n) for s in find(f, params, jnp.ones((3, 4)))]
    [('up', 3, 4, 8), ('down', 3, 8, 2)]
  """
  _check_callable('find', f=f)
  return _trace(f, params, batch).sites


def tap(
  f: Callable[..., Any], what: Callable[[Site, jax.Array], Any]
) -> Callable[..., tuple[Any, dict[str, Any]]]:
  """Makes a function also return a statistic of the inputs of its matmuls.

  Args:
    f: Any JAX function `f(params, *batch)`.
    what: `what(site, rows) -> pytree of arrays`, called for the sites with a
      path. `rows` are the activations of one call as a matrix [m, k] whose
      columns match the rows of `site.matrix(leaf)`, or [groups, m, k] where
      `site.groups` > 1. Patches are cut out for convolutions.

  Returns:
    `g(params, *batch) -> (f(params, *batch), {site.name: statistic})`.
    Statistics of several calls of one parameter are added, also over the
    iterations of loops (start from zero: a maximum does not survive this). If
    a scan takes one slice of the parameter an iteration, they are stacked on a
    leading axis of length `site.repeats` instead, as the matrices are.

  Raises:
    TypeError: if an argument cannot be called.

  Examples:
    >>> gram = lambda site, rows: rows.T @ rows
    >>> g = tap(lambda w, x: x @ w, gram)
    >>> g(jnp.ones((2, 3)), jnp.ones((5, 2)))[1]['params'].tolist()
    [[5.0, 5.0], [5.0, 5.0]]
  """
  _check_callable('tap', f=f, what=what)

  def visit(site, eqn, operands):
    statistic = what(site, site.rows(*operands[:2]))
    (out,) = _walk.bind(eqn, operands)
    return out, {site.name: statistic}

  def tapped(params, *batch):
    traced = _trace(f, params, batch)
    sites = {
      key: site for key, site in traced.by_key.items() if site.path is not None
    }
    return _run(traced, sites, visit, (params, *batch), collects=True)

  return tapped


def rewrite(
  f: Callable[..., Any],
  handler: Callable[[Site, jax.Array, jax.Array, Callable[..., Any]], Any],
) -> Callable[..., Any]:
  """Replaces every matmul of a function.

  Args:
    f: Any JAX function `f(params, *batch)`.
    handler: `handler(site, lhs, rhs, dot) -> out`, called for every site that
      can be reached, with or without a path. `lhs` and `rhs` are the operands
      in the order of the primitive, `site.side` tells which is the weight, and
      `dot(lhs, rhs)` is the original operation with its dimension numbers,
      precision and result type. `site` carries the parameters of this call.

  Returns:
    `g(params, *batch)`, to be jitted, differentiated and vmapped like `f`.
    Inside custom_jvp and custom_vjp functions the custom rule still decides
    the gradient with respect to their inputs; what the handler closes over
    gets its own.

  Raises:
    TypeError: if an argument cannot be called. From `g`: if the handler
      returns no array or another dtype than the matmul.
    ValueError: from `g`: if the handler returns another shape.

  Examples:
    >>> double = lambda site, lhs, rhs, dot: 2.0 * dot(lhs, rhs)
    >>> g = rewrite(lambda w, x: x @ w, double)
    >>> g(jnp.ones((2, 1)), jnp.ones((1, 2))).tolist()
    [[4.0]]
  """
  _check_callable('rewrite', f=f, handler=handler)

  def visit(site, eqn, operands):
    lhs, rhs, *rest = operands
    dot = lambda lhs, rhs: _walk.bind(eqn, [lhs, rhs, *rest])[0]
    out = handler(site, lhs, rhs, dot)
    want = eqn.outvars[0].aval
    if not hasattr(out, 'shape') or not hasattr(out, 'dtype'):
      raise TypeError(
        f'{site.name}: the handler returned a {type(out).__name__}, needs an '
        f'array {want.dtype}{list(want.shape)}'
      )
    if out.shape != want.shape:
      raise ValueError(
        f'{site.name}: the handler returned shape {tuple(out.shape)}, the '
        f'matmul has {tuple(want.shape)}'
      )
    if out.dtype != want.dtype:
      raise TypeError(
        f'{site.name}: the handler returned {out.dtype}, the matmul has '
        f'{want.dtype}; cast the result with .astype'
      )
    return out, {}

  def rewritten(params, *batch):
    traced = _trace(f, params, batch)
    sites = {
      key: site
      for key, site in traced.by_key.items()
      if key not in traced.hidden
    }
    out, _ = _run(traced, sites, visit, (params, *batch), collects=False)
    return out

  return rewritten


def _run(traced, sites, visit, args, *, collects):
  run = _walk.Run(sites, traced.scans, visit, collects=collects)
  leaves = [
    x if hasattr(x, 'shape') else jnp.asarray(x) for x in jax.tree.leaves(args)
  ]
  outs, statistics = run.body(traced.jaxpr, leaves, ())
  return jax.tree.unflatten(traced.tree, outs), statistics


def _check_callable(function, **arguments):
  for name, value in arguments.items():
    if not callable(value):
      raise TypeError(
        f'{function}: {name} is a {type(value).__name__}, needs a function'
      )
