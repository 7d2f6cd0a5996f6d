"""Text from a decoder: greedy or sampled, with any cache of keys and values.

found = generation.generate(
  model.config, model.params, [prompt], 100, policy=caches.kivi(bits=2)
)
"""

from mq_jax.generation.decoding import generate, stream
from mq_jax.generation.drawing import Sampling, draw, filtered, sampling
from mq_jax.generation.prompts import NO_TOKEN, check_room, pad
from mq_jax.generation.steps import (
  Generated,
  State,
  advance,
  begin,
  finish,
  new_caches,
  prefill,
  step,
)

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
  'step',
  'stream',
]
