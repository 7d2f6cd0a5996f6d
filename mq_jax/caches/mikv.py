"""MiKV and H2O: heavy hitters and the newest tokens stay, others lose bits.

Source: MiKV, arXiv 2402.18096, and H2O, arXiv 2306.14048, whose selection it
takes over. Known from a digest of the former and of its re-implementations:
no official code was found.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mq_jax._pytrees import pytree_dataclass, static
from mq_jax.caches import _checks, importance, tiers


@pytree_dataclass
class HeavyHitters:
  """The newest tokens of a row, and those that got the most attention.

  Of n tokens, floor(ratio n) stay, floor(recent floor(ratio n)) of them for
  being the newest. Chosen by each head of keys on its own, among tokens that
  are still high. Only attention so far counts, so nothing leaks from the
  future, as it does in H2O's code for perplexities.

  Attributes:
    ratio: Of a row's tokens; may be traced.
    recent: Of those; may be traced.
    sinks: First tokens that stay on top of them; may be traced.
  """

  ratio: ArrayLike = 0.2
  recent: ArrayLike = 0.5
  sinks: ArrayLike = 0
  side_bits: int = static(32)  # the score

  def __call__(self, cache, high):
    count = importance.share_of(self.ratio, cache.length)
    newest = importance.share_of(self.recent, count)
    sink, recent = tiers.ends(cache, self.sinks, newest)
    others = high & ~recent & ~sink
    heavy = importance.rank_mask(
      cache.score, (count - newest)[:, None, None], others
    )
    return high & (recent | sink | heavy)


@pytree_dataclass
class Chance:
  """As many tokens as `HeavyHitters` keeps, chosen by chance: a control.

  Attributes:
    ratio: Of a row's tokens; may be traced.
    recent: Of those, the newest; may be traced.
    seed: Of the choice; a token keeps its lot.
  """

  ratio: ArrayLike = 0.2
  recent: ArrayLike = 0.5
  seed: ArrayLike = 0
  side_bits: int = static(0)

  def __call__(self, cache, high):
    count = importance.share_of(self.ratio, cache.length)
    newest = importance.share_of(self.recent, count)
    _, recent = tiers.ends(cache, 0, newest)
    lots = jax.random.uniform(jax.random.key(self.seed), high.shape[1:])
    lots = jnp.broadcast_to(lots[None], high.shape)
    chosen = importance.rank_mask(
      lots, (count - newest)[:, None, None], high & ~recent
    )
    return high & (recent | chosen)


def mikv(
  bits: int = 2,
  high_bits: int = 16,
  ratio: float = 0.2,
  recent: float = 0.5,
  groups: int = 2,
  balance: bool = True,
) -> tiers.Tiers:
  """Important tokens in many bits, all others in few: nothing is evicted.

  Args:
    bits: Of the others, 1..8.
    high_bits: Of the important ones, 1..8, or 16 for as they are.
    ratio: Share of the tokens that are important.
    recent: Share of those that are simply the newest.
    groups: Of channels of a token, in a head, under one scale.
    balance: Whether channels of low keys are balanced against queries.

  Raises:
    ValueError: for numbers out of range.

  Source:
    MiKV, sections 3.1 to 3.3. The share of newest tokens and the two groups
    are those of re-implementations. The budget follows the current length.
    Balancers come from the first tokens of a row that come together.
  """
  _checks.whole('mikv: bits', bits, 1, 8)
  _checks.whole('mikv: groups', groups, 1)
  if high_bits != 16:
    _checks.whole('mikv: high_bits', high_bits, 1, 8)
  pair = lambda b: (tiers.PerToken(b, groups), tiers.PerToken(b, groups))
  return tiers.Tiers(
    HeavyHitters(
      _checks.share('mikv: ratio', ratio), _checks.share('mikv: recent', recent)
    ),
    low=pair(bits),
    high=None if high_bits == 16 else pair(high_bits),
    balance=balance,
    groups=groups,
  )


def h2o(ratio: float = 0.2, recent: float = 0.5, sinks: int = 0) -> tiers.Tiers:
  """Heavy hitters and the newest tokens stay, all others are evicted.

  Args:
    ratio: Share of the tokens that stay.
    recent: Share of those that are simply the newest.
    sinks: First tokens that stay on top of them.

  Raises:
    ValueError: for numbers out of range.
  """
  return tiers.Tiers(
    HeavyHitters(
      _checks.share('h2o: ratio', ratio),
      _checks.share('h2o: recent', recent),
      _checks.whole('h2o: sinks', sinks, 0),
    )
  )


def chance(ratio: float = 0.2, recent: float = 0.5, seed: int = 0):
  """The control of `h2o`: what stays is chosen by lot.

  Raises:
    ValueError: for numbers out of range.
  """
  return tiers.Tiers(
    Chance(
      _checks.share('chance: ratio', ratio),
      _checks.share('chance: recent', recent),
      _checks.whole('chance: seed', seed, 0),
    )
  )
