"""A store of tokens in tiers: evicted, few bits, more bits, full precision.

A policy is a selection (which tokens stay high), quantizers of the low and the
high tier, and a schedule. Demotion is one-way: what a token has lost is gone.
A new system is a selection in a file of its own and a factory.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mq_jax._pytrees import pytree_dataclass, static
from mq_jax.caches import _bits, _policy, _slots, quantizers

GONE, LOW, HIGH, FULL = range(4)
TIER_BITS = 2  # of each token and head


@pytree_dataclass
class TieredCache:
  """One layer's tokens, what they are worth and how they are kept.

  Attributes:
    k: Keys as attention reads them, [b, g, n, d].
    v: Values, like `k`.
    tier: 0 empty or evicted, 1 low, 2 high, 3 full precision. u8[b, g, n].
    score: Attention that a token got so far, f32[b, g, n].
    seen: Queries that could read it so far, f32[b, g, n].
    length: Tokens of each row, evicted ones included, i32[b].
    balancer: Of the channels of keys, f32[b, g, d].
    events: How often each row was compressed, i32[b].
  """

  k: jax.Array
  v: jax.Array
  tier: jax.Array
  score: jax.Array
  seen: jax.Array
  length: jax.Array
  balancer: jax.Array
  events: jax.Array


class Selection(Protocol):
  """Which tokens stay high; frozen data.

  Attributes:
    side_bits: Kept of a token that may be chosen again, per head; static.
  """

  side_bits: int

  def __call__(self, cache: TieredCache, high: jax.Array) -> jax.Array:
    """Those of the tokens `high` bool[b, g, n] that stay so; bool[b, g, n]."""


class Quantizer(Protocol):
  """Keys or values of a tier; frozen data."""

  def fake(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    """x [b, g, n, d] rounded; only where mask bool[b, g, n] does it matter."""

  def size(
    self, tokens: jax.Array, events: jax.Array, heads: int, width: int
  ) -> tuple[jax.Array, jax.Array]:
    """Bits of codes and of scales.

    Args:
      tokens: Of the tier, over all rows and heads, f32.
      events: Compressions, over all rows, f32.
      heads: g.
      width: d.
    """


@pytree_dataclass
class PerToken:
  """Groups of channels of one token share a scale.

  Attributes:
    bits: 1..8; may be traced.
    groups: In a head; MiKV has 2.
  """

  bits: ArrayLike
  groups: int = static(2)

  def fake(self, x, mask):
    del mask
    width = x.shape[-1]
    return quantizers.fake_quantize(x, self.bits, 3, width // self.groups)

  def size(self, tokens, events, heads, width):
    del events, heads
    scales = tokens * (quantizers.SIDE_BITS * self.groups)
    return tokens * width * jnp.asarray(self.bits, jnp.float32), scales


@pytree_dataclass
class Tiers:
  """A cache in tiers.

  Attributes:
    select: Which tokens stay high.
    low: Quantizers of keys and values of the others; None evicts them.
    high: Quantizers of those that stay; None leaves them as they are.
    every: Tokens between compressions. The first tokens of a row are always
      compressed, and after them whenever its length passes a multiple.
    balance: Divide channels of low keys by a balancer of queries and keys
      before rounding, and multiply after.
    groups: Divides the width of heads; static, for the check.
  """

  select: Any
  low: tuple[Any, Any] | None = None
  high: tuple[Any, Any] | None = None
  every: int = static(1)
  balance: bool = static(False)
  groups: int = static(1)

  def __post_init__(self):
    if not isinstance(self.every, int) or self.every < 1:
      raise ValueError(
        f'tiers: every={self.every!r} is not a whole number >= 1'
      )

  def init(self, batch, heads, capacity, width, dtype):
    _slots.check_shape('tiered', batch, heads, capacity, width)
    if width % self.groups:
      raise ValueError(
        f'tiered cache: heads of {width} channels are no multiple of '
        f'groups={self.groups}'
      )
    empty = jnp.zeros((batch, heads, capacity, width), dtype)
    each = jnp.zeros((batch, heads, capacity), jnp.float32)
    return TieredCache(
      k=empty,
      v=empty,
      tier=jnp.zeros(each.shape, jnp.uint8),
      score=each,
      seen=each,
      length=jnp.zeros(batch, jnp.int32),
      balancer=jnp.ones((batch, heads, width), jnp.float32),
      events=jnp.zeros(batch, jnp.int32),
    )

  def read(self, cache):
    return cache.k, cache.v, cache.tier > GONE

  def append(self, cache, q, k, v, positions, seen):
    cache = observe(cache, seen)
    if self.balance:
      cache = with_balancer(cache, q, k, positions)
    before = cache.length
    cache = append(cache, k, v, positions, seen)
    # Rows whose length passed a multiple, and rows that got their first.
    due = cache.length // self.every > before // self.every
    due |= (before == 0) & (cache.length > 0)
    return compress(self, cache, due)

  def bits(self, cache):
    b, heads, n, width = cache.k.shape
    tokens = _bits.count(_policy.fitting(cache.length, n))
    in_tier = lambda tier: _bits.count(cache.tier == tier)
    events = _bits.count(cache.events)
    codes = scales = jnp.float32(0.0)
    full = 2.0 * width * _bits.width(cache.k) * in_tier(FULL)
    for tier, pair in ((LOW, self.low), (HIGH, self.high)):
      for quantizer in pair or ():
        more = quantizer.size(in_tier(tier), events, heads, width)
        codes, scales = codes + more[0], scales + more[1]
    side = TIER_BITS * heads * tokens
    side += self.select.side_bits * (in_tier(HIGH) + in_tier(FULL))
    if self.balance:
      side += 16.0 * b * heads * width
    elements = 2.0 * heads * width * tokens
    return _bits.Bits(codes, scales, full, side, elements)


def observe(cache: TieredCache, seen: _policy.Seen) -> TieredCache:
  """Add what stored tokens got of attention, and who could read them."""
  return dataclasses.replace(
    cache, score=cache.score + seen.mass, seen=cache.seen + seen.rows
  )


def append(
  cache: TieredCache,
  k: jax.Array,
  v: jax.Array,
  positions: jax.Array,
  seen: _policy.Seen,
) -> TieredCache:
  """Put new tokens [b, g, t, d] behind the others, in full precision."""
  write = lambda store, x: _policy.write(store, cache.length, positions, x)
  return dataclasses.replace(
    cache,
    k=write(cache.k, k),
    v=write(cache.v, v),
    tier=write(cache.tier, jnp.full(k.shape[:3], FULL, jnp.uint8)),
    score=write(cache.score, seen.new_mass),
    seen=write(cache.seen, seen.new_rows),
    length=_slots.lengthened(cache.length, positions),
  )


def compress(
  policy: Tiers, cache: TieredCache, due: jax.Array | None = None
) -> TieredCache:
  """Demote tokens that the selection drops, round what comes to a tier.

  Args:
    policy: Selection and quantizers.
    cache: As it is.
    due: Rows to do it in, bool[b]; all by default.

  Returns:
    The cache, with no tier raised.
  """
  if due is None:
    due = jnp.ones(cache.length.shape, bool)
  high = (cache.tier >= HIGH) & due[:, None, None]
  keep = policy.select(cache, high) & high
  demoted = high & ~keep
  k, v, tier = cache.k, cache.v, cache.tier
  if policy.high is not None:
    entering = keep & (tier == FULL)
    k = _rounded(policy.high[0], k, entering)
    v = _rounded(policy.high[1], v, entering)
    tier = jnp.where(entering, jnp.uint8(HIGH), tier)
  if policy.low is None:
    gone = demoted[..., None]
    k, v = (jnp.where(gone, jnp.zeros((), x.dtype), x) for x in (k, v))
    tier = jnp.where(demoted, jnp.uint8(GONE), tier)
  else:
    factor = cache.balancer if policy.balance else None
    k = _rounded(policy.low[0], k, demoted, factor)
    v = _rounded(policy.low[1], v, demoted)
    tier = jnp.where(demoted, jnp.uint8(LOW), tier)
  events = cache.events + due.astype(jnp.int32)
  return dataclasses.replace(cache, k=k, v=v, tier=tier, events=events)


def with_balancer(
  cache: TieredCache, q: jax.Array, k: jax.Array, positions: jax.Array
) -> TieredCache:
  """Balancers of rows that get their first tokens; others keep theirs.

  sqrt(max|q| / max|k|) of a channel, over the row's first tokens and the
  query heads that share the keys, within 1e-4..1e4.

  Source:
    MiKV, arXiv 2402.18096, section 3.3.
  """
  b, t, h, d = q.shape
  g = k.shape[1]
  valid = (positions >= 0)[:, :, None, None]
  queries = jnp.where(valid, jnp.abs(q.astype(jnp.float32)), 0.0)
  queries = jnp.max(queries.reshape(b, t, g, h // g, d), axis=(1, 3))
  keys = jnp.max(jnp.abs(k.astype(jnp.float32)), axis=2)
  some = (queries > 0) & (keys > 0)
  ratio = queries / jnp.where(some, keys, 1.0)
  factor = jnp.where(some, jnp.clip(jnp.sqrt(ratio), 1e-4, 1e4), 1.0)
  # As it is stored.
  factor = factor.astype(jnp.float16).astype(jnp.float32)
  first = (cache.length == 0)[:, None, None]
  return dataclasses.replace(
    cache, balancer=jnp.where(first, factor, cache.balancer)
  )


def ends(
  cache: TieredCache, first: ArrayLike, newest: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The first tokens of rows, and the newest i32[b]; bool[b, 1, n] each."""
  slot = jnp.arange(cache.tier.shape[-1])[None, None]
  length = cache.length[:, None, None]
  newest = newest[:, None, None]
  return slot < first, (slot >= length - newest) & (slot < length)


def _rounded(
  quantizer: Any,
  x: jax.Array,
  mask: jax.Array,
  factor: jax.Array | None = None,
) -> jax.Array:
  """x [b, g, n, d], rounded where the mask is; a factor f32[b, g, d]."""

  def change(x):
    if factor is None:
      return quantizer.fake(x, mask)
    wide = x.astype(jnp.float32) * factor[:, :, None]
    return (quantizer.fake(wide, mask) / factor[:, :, None]).astype(x.dtype)

  return jnp.where(mask[..., None], change(x), x)
