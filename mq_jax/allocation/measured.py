"""Losses of a model under choices, measured."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax.allocation._blocks import Loss
from mq_jax.allocation.candidates import Candidates, mixed


@functools.partial(jax.jit, static_argnums=0)
def choice_losses(
  loss: Loss,
  params: Any,
  candidates: Candidates,
  probabilities: jax.Array,
  batches: Any,
) -> jax.Array:
  """Loss of many relaxed or whole choices, by one compiled program.

  Args:
    loss: (params, batch) -> mean loss, or several, f32[...].
    params: The model's parameters.
    candidates: Of each site.
    probabilities: f32[many, l, c]; one-hot for whole choices.
    batches: Tree of arrays [b, ...]: the mean over b batches is taken.

  Returns:
    f32[many, ...].
  """

  def one(p):
    changed = mixed(params, candidates, p)
    each = jax.lax.map(lambda batch: loss(changed, batch), batches)
    return jnp.mean(each, axis=0)

  return jax.lax.map(one, probabilities)


def one_hot(choices: np.ndarray, count: int) -> jax.Array:
  """Whole choices i[..., l] as probabilities f32[..., l, c]; -1 is none."""
  return jax.nn.one_hot(jnp.asarray(choices), count, dtype=jnp.float32)


def one_site_table(
  loss: Loss,
  params: Any,
  candidates: Candidates,
  batches: Any,
  *,
  base: Sequence[int] | None = None,
  only: Sequence[int] | None = None,
) -> np.ndarray:
  """Loss when one site alone takes one candidate, minus that when none does.

  Args:
    loss: (params, batch) -> mean loss.
    params: The model's parameters.
    candidates: Of each site.
    batches: Tree of arrays [b, ...].
    base: The choice i[l] from which one site deviates; None for the original
      parameters.
    only: Candidates to measure; None for all.

  Returns:
    f64[l, c], or [l, len(only)].

  Raises:
    ValueError: if a loss is not finite, by site and candidate.

  Source:
    The exact form of ZeroQ's and OHQ's sensitivities.
  """
  l, c = len(candidates.names), len(candidates.labels)
  only = list(range(c)) if only is None else list(only)
  # No candidate, -1, is one-hot nowhere: the original parameter.
  base = np.full(l, -1) if base is None else np.asarray(base)
  choices = np.tile(base, (l * len(only) + 1, 1))
  for i in range(l):
    for j, candidate in enumerate(only):
      choices[1 + i * len(only) + j, i] = candidate
  found = choice_losses(loss, params, candidates, one_hot(choices, c), batches)
  found = np.asarray(found, np.float64)
  table = (found[1:] - found[0]).reshape(l, len(only))
  if not np.isfinite(table).all():
    i, j = np.argwhere(~np.isfinite(table))[0]
    raise ValueError(
      f'allocation: loss with {candidates.labels[only[j]]} at '
      f'{candidates.names[i]} is not finite'
    )
  return table


def curvature(
  loss: Loss,
  params: Any,
  candidates: Candidates,
  batches: Any,
) -> jax.Array:
  """gamma of each site: loss is 1/2 gamma tr(e^T A e) for its own error e.

  Measured at the candidate of the largest error, which alone rises above
  the noise of a small sample; negative rises count as none.

  Returns:
    f32[l].
  """
  sizes = np.asarray(jnp.diagonal(candidates.overlap, axis1=1, axis2=2))
  coarse = int(np.argmax(np.mean(sizes / sizes.max(1, keepdims=True), axis=0)))
  rise = one_site_table(loss, params, candidates, batches, only=[coarse])[:, 0]
  gamma = 2 * np.maximum(rise, 0) / np.maximum(sizes[:, coarse], 1e-30)
  return jnp.asarray(gamma, jnp.float32)
