"""`mq generate`: text from a model, token by token, with any cache."""

import argparse
import json
import sys
import time
from typing import Any, TextIO

from mq_jax.lab.commands import cache_options, shared


def add(commands) -> None:
  """Add the command to the parser of `mq`."""
  generate = commands.add_parser(
    'generate',
    help='continue a text, with a compressed cache of keys and values',
    description='Continue a prompt. The text goes to standard output as it '
    'comes, rate and size of the cache to standard error at the end.',
  )
  generate.add_argument(
    'model',
    metavar='MODEL',
    help='a bundled model, a Hugging Face folder or an artifact',
  )
  generate.add_argument('prompt', metavar='PROMPT', help='text to continue')
  shared.add_numbers(generate, ('tokens', 64, 'at most N new tokens'))
  generate.add_argument(
    '--temperature',
    type=float,
    default=0.0,
    metavar='T',
    help='0 takes the most likely token (default), 1 draws as the model says',
  )
  shared.add_numbers(
    generate,
    ('top-k', None, 'draw among the N likeliest tokens'),
    ('seed', 0, 'of the draws'),
  )
  generate.add_argument(
    '--top-p',
    type=float,
    metavar='P',
    help='draw among the likeliest tokens that together have probability P',
  )
  generate.add_argument(
    '--no-stop', action='store_true', help="go on behind the model's end token"
  )
  cache_options.add(generate, 'full')
  generate.add_argument(
    '--json', action='store_true', help='print one JSON object and nothing else'
  )
  generate.set_defaults(command=_generate)


def _generate(arguments: argparse.Namespace) -> int:
  from mq_jax import generation

  shared.positive(arguments, 'tokens', 'top_k')
  sampling = generation.sampling(
    arguments.temperature, arguments.top_k, arguments.top_p
  )
  cut = arguments.top_k is not None or arguments.top_p is not None
  if sampling is None and cut:
    raise ValueError(
      '--top-k and --top-p choose among tokens to draw; give a --temperature '
      'above 0, e.g. 1'
    )
  policy = cache_options.policy(arguments)

  import jax

  from mq_jax import plans
  from mq_jax.lab import opening
  from mq_jax.models import decoder

  model = opening.open_any(arguments.model)
  if not isinstance(model.config, decoder.DecoderConfig):
    raise ValueError(f'{arguments.model}: no language model, writes no text')
  if model.tokenizer is None:
    raise ValueError(
      f'{model.name}: has no tokenizer.json, so it reads no text'
    )
  prompt = model.tokenizer.encode(
    arguments.prompt, add_special_tokens=False
  ).ids
  if model.bos is not None:
    prompt = [model.bos, *prompt]
  if not prompt:
    raise ValueError('the prompt is empty, and the model has no bos to begin')
  stop = () if arguments.no_stop or model.eos is None else (model.eos,)
  _, params = plans.runnable(model.apply, model.params)
  states = generation.stream(
    model.config,
    params,
    prompt,
    arguments.tokens,
    policy=policy,
    sampling=sampling,
    key=jax.random.key(arguments.seed),
    stop=stop,
    dtype=arguments.cache_dtype,
  )
  out = None if arguments.json else sys.stdout
  result = _run(states, model.tokenizer, prompt, stop, policy, out)
  result = {'model': arguments.model, 'prompt': arguments.prompt} | result
  result['cache'] = arguments.cache
  if arguments.json:
    print(json.dumps(result, allow_nan=False))
  else:
    print(_said(result), file=sys.stderr)
  return 0


def _run(
  states, tokenizer, prompt, stop, policy, out: TextIO | None
) -> dict[str, Any]:
  """Take all steps, write text as it comes; what came of it."""
  from mq_jax import caches

  text = _Text(tokenizer, prompt, out)
  times, new = [time.perf_counter()], []
  for state in states:
    new.append(int(state.token[0]))
    times.append(time.perf_counter())
    if new[-1] not in stop:
      text.add(new[-1])
  text.finish()
  bits = caches.total_bits(policy, state.caches)
  # The first step reads the prompt and compiles, the second compiles.
  steady = times[-1] - times[2] if len(times) > 3 else None
  return {
    'text': text.shown,
    'prompt_tokens': len(prompt),
    'tokens': len(new),
    'first_seconds': round(times[1] - times[0], 3),
    'tokens_per_second': steady and round((len(times) - 3) / steady, 2),
    'cache_ebw': float(bits.ebw),
    'cache_bytes': int(float(bits.total) / 8),
  }


def _said(result: dict[str, Any]) -> str:
  rate = result['tokens_per_second']
  return (
    f'{result["prompt_tokens"]} tokens of prompt, {result["tokens"]} new; '
    f'{"-" if rate is None else f"{rate:.4g}"} tokens/s after the first two '
    f'({result["first_seconds"]:.3g} s to the first, compiling included); '
    f'{result["cache"]} cache: {result["cache_ebw"]:.4g} bits per element, '
    f'{result["cache_bytes"]} bytes'
  )


class _Text:
  """New text as its tokens come: a character is written once it is whole."""

  def __init__(self, tokenizer, prompt: list[int], out: TextIO | None):
    self._tokenizer, self._ids, self._out = tokenizer, list(prompt), out
    self._before = len(self._decoded())
    self.shown = ''

  def _decoded(self) -> str:
    # With the prompt: decoders treat the beginning of a text specially.
    return self._tokenizer.decode(self._ids, skip_special_tokens=True)

  def _show(self, text: str) -> None:
    new = text[self._before + len(self.shown) :]
    self.shown += new
    if self._out is not None:
      self._out.write(new)
      self._out.flush()

  def add(self, token: int) -> None:
    self._ids.append(token)
    text = self._decoded()
    if not text.endswith('\ufffd'):  # bytes of a character are still to come
      self._show(text)

  def finish(self) -> None:
    self._show(self._decoded())
    if self._out is not None:
      print(file=self._out, flush=True)
