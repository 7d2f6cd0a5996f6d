"""ZipVL: as many important tokens as hold a share of the attention.

Source: He et al., ZipVL, arXiv 2410.08584, from a digest. The cache only:
attention of the prompt stays dense. Scores are of all rows of the prompt where
the paper probes 128, and pooled over heads, which it does not say.
"""

import jax.numpy as jnp
from jax.typing import ArrayLike

from mq_jax._pytrees import pytree_dataclass, static
from mq_jax.caches import _checks, importance, quantizers, tiers


@pytree_dataclass
class MassShare:
  """Of the tokens that came since the last time, those with the attention.

  How many: as few as hold `share` of it. Which: those with the most per query
  that could read them. All heads keep the same; a token is judged once.

  Attributes:
    share: Of the attention, tau; may be traced.
  """

  share: ArrayLike = 0.975
  side_bits: int = static(0)  # tokens are judged once, scores then dropped

  def __call__(self, cache, high):
    new = high & (cache.tier == tiers.FULL)
    shared = jnp.any(new, axis=1, keepdims=True)
    total = lambda x: jnp.sum(jnp.where(new, x, 0.0), axis=1, keepdims=True)
    score, seen = total(cache.score), total(cache.seen)
    count = importance.mass_count(score, self.share)[..., None]
    mean = importance.mean_score(score, seen)
    chosen = importance.rank_mask(mean, count, shared)
    return high & ((cache.tier == tiers.HIGH) | chosen)


@pytree_dataclass
class PerChannel:
  """One scale for all tokens of a channel that come to the tier together."""

  bits: ArrayLike

  def fake(self, x, mask):
    inside = jnp.broadcast_to(mask[..., None], x.shape)
    # Tokens outside take a value of the range, so they do not widen it.
    wide = x.astype(jnp.float32)
    some = jnp.max(jnp.where(inside, wide, -jnp.inf), axis=2, keepdims=True)
    wide = jnp.where(inside, wide, jnp.where(jnp.isinf(some), 0.0, some))
    n = x.shape[2]
    return quantizers.fake_quantize(wide, self.bits, 2, n).astype(x.dtype)

  def size(self, tokens, events, heads, width):
    scales = events * float(heads * width * quantizers.SIDE_BITS)
    return tokens * width * jnp.asarray(self.bits, jnp.float32), scales


@pytree_dataclass
class ChannelSeparable:
  """Channels divided by the root of their largest value, then per token.

  The scale of a token is shared by its heads in the paper's code; here each
  head has its own.
  """

  bits: ArrayLike

  def fake(self, x, mask):
    wide = x.astype(jnp.float32)
    largest = jnp.max(
      jnp.where(mask[..., None], jnp.abs(wide), 0.0), axis=2, keepdims=True
    )
    factor = jnp.sqrt(largest).astype(jnp.float16).astype(jnp.float32)
    factor = jnp.where(factor > 0, factor, 1.0)
    width = x.shape[-1]
    even = quantizers.fake_quantize(wide / factor, self.bits, 3, width)
    return (even * factor).astype(x.dtype)

  def size(self, tokens, events, heads, width):
    scales = tokens * float(quantizers.SIDE_BITS)
    scales += events * float(heads * width * 16)
    return tokens * width * jnp.asarray(self.bits, jnp.float32), scales


def zipvl(
  share: float = 0.975, high_bits: int = 4, bits: int = 2, every: int = 100
) -> tiers.Tiers:
  """Important tokens in `high_bits`, others in `bits`, every so many tokens.

  Args:
    share: Of the attention that important tokens hold, the paper's tau.
    high_bits: Of important tokens, 1..8.
    bits: Of the others, 1..8; 0 evicts them, as the paper's second version.
    every: Tokens between compressions, in full precision until then.

  Raises:
    ValueError: for numbers out of range.
  """
  _checks.share('zipvl: share', share)
  _checks.whole('zipvl: high_bits', high_bits, 1, 8)
  _checks.whole('zipvl: bits', bits, 0, 8)
  pair = lambda b: (PerChannel(b), ChannelSeparable(b))
  return tiers.Tiers(
    MassShare(share),
    low=pair(bits) if bits else None,
    high=pair(high_bits),
    every=every,
  )
