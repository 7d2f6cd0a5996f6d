"""Options of commands that work with a cache of keys and values."""

import argparse
import json
from typing import Any

DTYPES = ('float32', 'bfloat16', 'float16')


def add(parser: argparse.ArgumentParser, default: str | None) -> None:
  """The options --cache, --cache-bits, --cache-set and --cache-dtype."""
  group = parser.add_argument_group('cache of keys and values')
  shown = f' (default: {default})' if default else ''
  group.add_argument(
    '--cache',
    default=default,
    metavar='NAME',
    help=f'kind of cache: full, kivi, mikv, h2o, kvcrush, zipvl{shown}',
  )
  group.add_argument(
    '--cache-bits',
    type=int,
    metavar='N',
    help='bits of its codes; as --cache-set bits=N',
  )
  group.add_argument(
    '--cache-set',
    action='append',
    default=[],
    metavar='OPTION=VALUE',
    help='an option of the cache, e.g. residual=64; may be repeated',
  )
  group.add_argument(
    '--cache-dtype',
    choices=DTYPES,
    default='bfloat16',
    help='what it keeps unquantized numbers in (default: bfloat16)',
  )


def policy(arguments: argparse.Namespace) -> Any | None:
  """The kind of cache that was asked for; None if none was.

  Raises:
    ValueError: for an unknown cache or option, or one without a cache.
  """
  options: dict[str, Any] = {}
  for given in arguments.cache_set:
    name, _, value = given.partition('=')
    if not name or not value:
      raise ValueError(f'--cache-set {given!r}: needs the form option=value')
    try:
      options[name] = json.loads(value)
    except json.JSONDecodeError:
      options[name] = value  # a word
  if arguments.cache_bits is not None:
    options['bits'] = arguments.cache_bits
  if arguments.cache is None:
    if options:
      raise ValueError('--cache-bits and --cache-set need a --cache')
    return None
  from mq_jax import caches  # late: `mq --help` does not wait for jax

  return caches.make(arguments.cache, **options)


def add_chunk(parser: argparse.ArgumentParser) -> None:
  """The option --cache-chunk of commands that read a text."""
  parser.add_argument(
    '--cache-chunk',
    type=int,
    default=1,
    metavar='N',
    help='tokens that are read together, each other exactly and all before '
    'from the cache (default: 1, as in generation)',
  )


def read_through(model: Any, policy: Any, arguments: argparse.Namespace) -> Any:
  """The language model, reading texts through a cache.

  Raises:
    ValueError: if it is no language model.
  """
  import dataclasses

  from mq_jax.evaluation import cached
  from mq_jax.models import decoder

  if not isinstance(model.config, decoder.DecoderConfig):
    raise ValueError(f'{arguments.model}: no language model, has no cache')
  apply = cached.through_cache(
    model.config, policy, arguments.cache_chunk, arguments.cache_dtype
  )
  return dataclasses.replace(model, apply=apply)


def bits(
  model: Any, policy: Any, tokens: Any, arguments: argparse.Namespace
) -> dict[str, Any]:
  """What the cache takes after the first of windows i32[w, t + 1]."""
  import jax

  from mq_jax import plans
  from mq_jax.evaluation import cached

  read = cached.bits_reader(
    model.config, policy, arguments.cache_chunk, arguments.cache_dtype
  )
  run, params = plans.runnable(read, model.params)
  found = jax.jit(run)(params, tokens[:1, :-1])
  return {'cache': arguments.cache, 'cache_ebw': float(found.ebw)}
