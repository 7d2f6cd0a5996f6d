"""What a language model's predictions are measured by, token by token."""

import jax
import jax.numpy as jnp


def nll_per_token(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Negative log likelihood of each target, in nats.

  Args:
    logits: Of any float type; computed in float32. Shape [..., v].
    targets: Tokens; NaN is returned for those outside the vocabulary, which
      plain indexing would clamp in silence. Shape [...].

  Returns:
    f32[...].

  Examples:
    >>> nll_per_token(jnp.zeros((1, 4)), jnp.array([2])).round(3)
    Array([1.386], dtype=float32)
  """
  logits = logits.astype(jnp.float32)
  chosen = jnp.take_along_axis(
    logits, targets[..., None], axis=-1, mode='fill', fill_value=jnp.nan
  )[..., 0]
  return jax.nn.logsumexp(logits, axis=-1) - chosen


def divergence_per_token(log_probs: jax.Array, wanted: jax.Array) -> jax.Array:
  """Kullback-Leibler divergence from `wanted`, in nats.

  Args:
    log_probs: Log probabilities that are judged. Shape [..., v].
    wanted: Those they are judged by, the unquantized model's. Shape [..., v].

  Returns:
    sum_v p_v (log p_v - log q_v), p the wanted ones. f32[...].
  """
  wanted = wanted.astype(jnp.float32)
  return jnp.sum(jnp.exp(wanted) * (wanted - log_probs), axis=-1)
