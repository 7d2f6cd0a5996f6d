"""The inputs of one site: how they are seen, and a function that sees so.

Everything here is in the basis of the model: x goes to x' = (x / s) R, is
quantized, and comes back as Q(x') R^T s. The weight it meets is decoded to
that basis, too (`layouts.InputScaled`, `layouts.Rotated`), so that the product
is that of quantized inputs with quantized weights, and parameters remain what
they are for all other purposes.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax import rotations
from mq_jax import sites as sites_lib
from mq_jax._pytrees import pytree_dataclass
from mq_jax.sites import Site


@pytree_dataclass
class Inputs:
  """What is done to the inputs of one site.

  Attributes:
    quantizer: `Token`, `Tensor` or `MXInt`; None for none.
    scale: s, by which inputs are divided, f16[k] or [groups, k]; None for 1.
      Repeats that a scan takes one by one share it, as do the taps of a
      convolution.
    signs: Of a rotation, bool[features]; None for none.
  """

  quantizer: Any = None
  scale: jax.Array | None = None
  signs: jax.Array | None = None

  def _spread(self, x: jax.Array) -> jax.Array:
    """Scales f32, to multiply x [..., m, features]."""
    scale = self.scale[..., : x.shape[-1]].astype(jnp.float32)
    shape = (*scale.shape[:-1], *[1] * (x.ndim - scale.ndim), x.shape[-1])
    return jnp.broadcast_to(scale.reshape(shape), x.shape)

  def seen(self, x: jax.Array) -> jax.Array:
    """x' of rows x [..., m, features] (or [groups, m, features]), f32."""
    x = x.astype(jnp.float32)
    if self.scale is not None:
      x = x / self._spread(x)
    return x if self.signs is None else rotations.rotate(x, self.signs)

  def back(self, seen: jax.Array) -> jax.Array:
    """Undo `seen`."""
    if self.signs is not None:
      seen = rotations.unrotate(seen, self.signs)
    return seen if self.scale is None else seen * self._spread(seen)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Rows as their quantized values, in the basis they came in; f32."""
    if self.quantizer is None:
      return x.astype(jnp.float32)
    return self.back(self.quantizer(self.seen(x)))

  def on_rows(self, site: Site, rows: jax.Array) -> jax.Array:
    """The same of rows [..., m, k] as `sites.tap` hands them out."""
    runs = rows.reshape(*rows.shape[:-2], -1, features_of(site))
    return self(runs).reshape(rows.shape)

  def on_operand(self, site: Site, x: jax.Array) -> jax.Array:
    """The same of the operand of a call, in its shape and dtype."""
    if site.kind == 'conv':
      batch, channel, *_ = dict(site.params)['dimension_numbers'].lhs_spec
      free = [i for i in range(x.ndim) if i not in (batch, channel)]
      order = [batch, *free, channel]
      turned = jnp.transpose(x, order)
      # A position's channels are those of all feature groups, one by one.
      rows = turned.reshape(-1, site.groups, x.shape[channel] // site.groups)
      rows = jnp.swapaxes(rows, 0, 1)
    else:
      groups, free, contracted = site.arrangement
      order = [*groups, *free, *contracted]
      turned = jnp.transpose(x, order)
      size = lambda axes: math.prod(x.shape[i] for i in axes)
      rows = turned.reshape(size(groups), size(free), size(contracted))
    done = self(rows if site.groups > 1 else rows[0]).reshape(rows.shape)
    if site.kind == 'conv':
      done = jnp.swapaxes(done, 0, 1)
    back = np.argsort(order)
    return jnp.transpose(done.reshape(turned.shape), back).astype(x.dtype)


def features_of(site: Site) -> int:
  """Inputs that are scaled, rotated and grouped together.

  Of a matmul all k; of a convolution the channels of one position, as its
  operand is quantized before patches are cut.

  Raises:
    ValueError: for sites whose inputs can't be told: no parameter of its own,
      or a convolution's parameter that is not its kernel.
  """
  if site.path is None:
    raise ValueError(
      f'{site.name}: activations can not be quantized: {site.reason}'
    )
  if site.kind != 'conv':
    return site.k
  params = dict(site.params)
  return int(site.rhs_shape[params['dimension_numbers'].rhs_spec[1]])


@functools.cache
def quantize_inputs(f: Callable[..., Any]) -> Callable[..., Any]:
  """A function whose matmuls see quantized inputs.

  Args:
    f: Any JAX function `f(params, *batch)`.

  Returns:
    `g((params, inputs), *batch)`, to be jitted and differentiated like `f`,
    where `inputs` maps names of sites to `Inputs`. The same object for the
    same `f`, and `inputs` are arguments: numbers in them don't recompile. It
    raises ValueError if a name is that of no site it reaches, so that nothing
    is left out in silence.
  """

  def quantized(given: tuple[Any, Mapping[str, Inputs]], *batch: Any) -> Any:
    params, inputs = given
    met = set()

    def handler(site, lhs, rhs, dot):
      found = inputs.get(site.name)
      if found is None:
        return dot(lhs, rhs)
      met.add(site.name)
      if site.side == 'lhs':
        return dot(lhs, found.on_operand(site, rhs))
      return dot(found.on_operand(site, lhs), rhs)

    out = sites_lib.rewrite(f, handler)(params, *batch)
    missed = sorted(inputs.keys() - met)
    if missed:
      raise ValueError(
        f'activations: the function has no site {missed[0]!r} '
        f'({len(missed)} of {len(inputs)} are missing)'
      )
    return out

  return quantized


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _rows(f, wanted, count, params, batch):
  names = {site.name for site in wanted}

  def what(site, rows):
    if site.name not in names:
      return None
    m = rows.shape[-2]
    picked = np.linspace(0, m - 1, min(count, m)).round().astype(int)
    return jnp.take(rows, picked, axis=-2).astype(jnp.float32)

  return sites_lib.tap(f, what)(params, *batch)[1]


def sample_rows(
  f: Callable[..., Any],
  params: Any,
  batch: Any,
  sites: Sequence[Site],
  count: int = 256,
) -> dict[str, jax.Array]:
  """Some rows of the inputs of each site, evenly spread over a batch.

  Args:
    f: `f(params, *batch)`.
    params: Its parameters.
    batch: Data of `f`; if it is no tuple, its only argument.
    sites: Of it. Left out are those without a parameter, and those used more
      than once, whose rows `tap` would add up.
    count: Rows of each at most.

  Returns:
    By the site's name. f32[*batch, count, k].
  """
  batch = batch if isinstance(batch, tuple) else (batch,)
  wanted = tuple(s for s in sites if s.path is not None and s.calls == 1)
  found = _rows(f, wanted, count, params, jax.tree.map(jnp.asarray, batch))
  return {name: rows for name, rows in found.items() if rows is not None}
