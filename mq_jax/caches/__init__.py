"""Caches of keys and values: how attention reads what came before.

A policy is frozen data, a cache a pytree of static capacity; both are pure:

policy = caches.kivi(bits=2)
cache = policy.init(batch, heads, capacity, width, jnp.bfloat16)
y, cache = caches.attend(policy, cache, q, k, v, positions, window, scale)
policy.bits(cache).ebw

| policy | what is kept |
|---|---|
| `full` | everything, in the dtype of the cache |
| `kivi` | few bits, newest tokens in full; simulated or packed in bytes |
| `mikv` | heavy hitters and newest tokens in many bits, others in few |
| `h2o` | those only; `chance` is its control |
| `kvcrush` | those, and representatives of what is evicted |
| `zipvl` | as many in 4 bits as hold a share of the attention, others in 2 |

A system of one's own is either a class with `init`, `read`, `append` and
`bits` (see `Policy`) or a `Selection` for `Tiers`.
"""

import difflib
import inspect
from typing import Any

import jax

from mq_jax.caches import importance, quantizers, tiers
from mq_jax.caches._bits import Bits
from mq_jax.caches._policy import Policy, Seen, attend
from mq_jax.caches.full import Full, FullCache, full
from mq_jax.caches.kivi import kivi
from mq_jax.caches.kivi_packed import PackedCache, PackedKivi
from mq_jax.caches.kivi_simulated import Kivi
from mq_jax.caches.kvcrush import kvcrush
from mq_jax.caches.mikv import chance, h2o, mikv
from mq_jax.caches.tiers import TieredCache, Tiers
from mq_jax.caches.zipvl import zipvl

_FACTORIES = {
  'full': full,
  'kivi': kivi,
  'mikv': mikv,
  'h2o': h2o,
  'chance': chance,
  'kvcrush': kvcrush,
  'zipvl': zipvl,
}

NAMES = tuple(_FACTORIES)


def make(name: str, **options: Any) -> Policy:
  """A policy by name, with the options of its factory.

  Raises:
    ValueError: for an unknown name or option, with the nearest ones, or an
      option out of range.

  Examples:
    >>> make('kivi', bits=4, residual=64).key_bits
    4
  """
  if name not in _FACTORIES:
    near = difflib.get_close_matches(str(name), NAMES) or NAMES
    raise ValueError(f'no cache {name!r}; nearest: {", ".join(near)}')
  known = tuple(inspect.signature(_FACTORIES[name]).parameters)
  for option in options:
    if option not in known:
      raise ValueError(
        f'cache {name}: unknown option {option!r}; known are '
        f'{", ".join(known) or "none"}'
      )
  return _FACTORIES[name](**options)


def total_bits(policy: Policy, caches: Any) -> Bits:
  """Bits of several caches together, those of a model's layers."""
  return jax.tree.map(lambda *x: sum(x), *map(policy.bits, caches))


__all__ = [
  'Bits',
  'Full',
  'FullCache',
  'Kivi',
  'NAMES',
  'PackedCache',
  'PackedKivi',
  'Policy',
  'Seen',
  'TieredCache',
  'Tiers',
  'attend',
  'chance',
  'full',
  'h2o',
  'importance',
  'kivi',
  'kvcrush',
  'make',
  'mikv',
  'quantizers',
  'tiers',
  'total_bits',
  'zipvl',
]
