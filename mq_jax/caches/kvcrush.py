"""KVCrush: a part of the budget goes to tokens that stand for evicted ones.

Source: Jha et al., KVCrush, arXiv 2503.00022, from a digest of the paper and
of two implementations of its authors' firm (per-head codes as in vLLM's).
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mq_jax._pytrees import pytree_dataclass, static
from mq_jax.caches import _checks, importance, tiers

ANCHORS = ('mean', 'zeros', 'ones', 'alternating')


def codes(score: jax.Array, among: jax.Array) -> jax.Array:
  """One bit a token and head: whether it is in the head's upper half.

  Args:
    score: f32[b, g, n].
    among: The tokens in question, bool[b, 1 or g, n].

  Returns:
    bool[b, g, n]; exactly floor(m / 2) of m tokens of a head are True.
  """
  among = jnp.broadcast_to(among, score.shape)
  half = jnp.sum(among, axis=-1, keepdims=True) // 2
  return importance.rank_mask(score, half, among)


def distances(bits: jax.Array, among: jax.Array, anchor: str) -> jax.Array:
  """Hamming distances of tokens' codes to an anchor.

  Args:
    bits: bool[b, g, n], a code is [g] long.
    among: Tokens of which 'mean' takes the majority, bool[b, 1, n].
    anchor: One of ANCHORS.

  Returns:
    f32[b, 1, n].
  """
  b, g, _ = bits.shape
  if anchor == 'mean':
    count = jnp.sum(bits & among, axis=-1, keepdims=True)
    reference = 2 * count > jnp.sum(among, axis=-1, keepdims=True)
  else:
    pattern = {
      'zeros': jnp.zeros(g, bool),
      'ones': jnp.ones(g, bool),
      'alternating': jnp.arange(g) % 2 == 1,
    }[anchor]
    reference = jnp.broadcast_to(pattern[None, :, None], (b, g, 1))
  return jnp.sum(bits != reference, axis=1, keepdims=True, dtype=jnp.float32)


@pytree_dataclass
class Crush:
  """First, newest and important tokens, and representatives of the rest.

  All heads keep the same tokens. First and newest ones are within the budget.

  Attributes:
    ratio: Of a row's tokens that stay; may be traced.
    recent: Of those, the newest; may be traced.
    representatives: Of what is left of the budget; may be traced.
    sinks: First tokens that stay; may be traced.
    anchor: What codes are compared with, one of ANCHORS.
  """

  ratio: ArrayLike = 0.2
  recent: ArrayLike = 0.25
  representatives: ArrayLike = 0.25
  sinks: ArrayLike = 0
  anchor: str = static('mean')
  side_bits: int = static(32)

  def __call__(self, cache, high):
    shared = jnp.any(high, axis=1, keepdims=True)
    count = importance.share_of(self.ratio, cache.length)
    newest = importance.share_of(self.recent, count)
    sink, recent = tiers.ends(cache, self.sinks, newest)
    protected = shared & (sink | recent)
    others = shared & ~protected
    left = jnp.maximum(
      count[:, None, None] - jnp.sum(protected, axis=-1, keepdims=True), 0
    )
    standing = importance.share_of(self.representatives, left)
    heavy = importance.rank_mask(
      jnp.sum(cache.score, axis=1, keepdims=True), left - standing, others
    )
    rest = others & ~heavy
    apart = distances(codes(cache.score, others), others, self.anchor)
    picked = importance.spread_mask(apart, standing, rest)
    return high & (protected | heavy | picked)


def kvcrush(
  ratio: float = 0.2,
  recent: float = 0.25,
  representatives: float = 0.25,
  sinks: int = 0,
  anchor: str = 'mean',
) -> tiers.Tiers:
  """Eviction that keeps representatives of what it evicts.

  Args:
    ratio: Share of the tokens that stay.
    recent: Share of those that are simply the newest.
    representatives: Share of the others that stand for evicted tokens.
    sinks: First tokens that stay, within the budget.
    anchor: 'mean', 'zeros', 'ones' or 'alternating'.

  Raises:
    ValueError: for numbers out of range or an unknown anchor.
  """
  if anchor not in ANCHORS:
    raise ValueError(
      f'kvcrush: anchor={anchor!r} is not one of {", ".join(ANCHORS)}'
    )
  return tiers.Tiers(
    Crush(
      _checks.share('kvcrush: ratio', ratio),
      _checks.share('kvcrush: recent', recent),
      _checks.share('kvcrush: representatives', representatives),
      _checks.whole('kvcrush: sinks', sinks, 0),
      anchor,
    )
  )
