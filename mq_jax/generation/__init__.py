"""Text from a decoder: greedy or sampled, with any cache of keys and values.

found = generation.generate(
  model.config, model.params, [prompt], 100, policy=caches.kivi(bits=2)
)
"""

from mq_jax.generation.decoding import (
  NO_TOKEN,
  Generated,
  State,
  advance,
  begin,
  check_room,
  finish,
  generate,
  new_caches,
  pad,
  prefill,
  stream,
)
from mq_jax.generation.sampling import Sampling, draw, filtered, sampling

__all__ = [
  'NO_TOKEN',
  'Generated',
  'Sampling',
  'State',
  'advance',
  'begin',
  'check_room',
  'draw',
  'filtered',
  'finish',
  'generate',
  'new_caches',
  'pad',
  'prefill',
  'sampling',
  'stream',
]
