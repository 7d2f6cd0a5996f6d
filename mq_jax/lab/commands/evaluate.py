"""`mq eval`: how well a model predicts a text, and answers questions."""

import argparse
import json
import time
from typing import Any

from mq_jax.lab.commands import cache_options, shared

_CUTS = """\
How a text is cut decides the figure; compare within one cut only.

  --cut bos    (default) windows of the context length, each begun by the
               model's first token; every token is predicted once
  --cut field  as published perplexities: the lines joined by '\\n\\n',
               tokenized once with what special tokens the tokenizer adds,
               consecutive windows of the model's context, the first token of
               each not predicted; what is left at the end is dropped
  --stride N   of the field's: overlapping windows, N tokens apart; of each
               the tokens count that the one before did not hold

WikiText-2 as the field has it:

    mq eval --model DIR --text FOLDER/wiki.test.raw --cut field

where a folder with wiki.test.raw (or test.raw.txt and test.txt) does, too.
--choices takes a file of one JSON object a line: query (or context), choices,
gold (or answer; a number from 0, or the choice). acc takes the likeliest
choice, acc_norm the likeliest by character, acc_bytes by byte; with --cut bos
each begins with the model's first token, with --cut field none does.

Networks that are no language models are evaluated on --data: classifiers of
images and predictors of noise on .npz (x, y) or MNIST files, masked language
models on a text; other encoders are compared with --against.
"""


def add(commands) -> None:
  """Add the command to the parser of `mq`."""
  evaluate = commands.add_parser(
    'eval',
    help='perplexity, agreement and accuracy of a model',
    description='Evaluate a model on windows of a text, and on questions.',
    epilog=_CUTS,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  shared.add_model(evaluate)
  evaluate.add_argument(
    '--text', metavar='FILE', help='a text file, or a folder of WikiText-2'
  )
  evaluate.add_argument(
    '--data',
    metavar='FILE',
    help='images, or a text for an encoder, to evaluate a network on that is '
    'no language model',
  )
  shared.add_windows(evaluate, 'evaluate', None, 'windows or images')
  evaluate.add_argument(
    '--cut',
    choices=('bos', 'field'),
    default='bos',
    help='how the text is cut into windows (default: %(default)s)',
  )
  shared.add_numbers(
    evaluate,
    ('stride', None, 'tokens from window to window, with --cut field'),
    ('context', None, "tokens of a window (default: the model's, up to 2048)"),
  )
  evaluate.add_argument(
    '--against',
    metavar='DIR|NAME',
    help='also the divergence from this model, and how often both would '
    'choose the same token',
  )
  evaluate.add_argument(
    '--choices', metavar='FILE', help='multiple-choice questions, JSON lines'
  )
  evaluate.add_argument(
    '--stream',
    action='store_true',
    help='keep the weights of one block in memory',
  )
  shared.add_mesh(evaluate)
  cache_options.add(evaluate, None)
  cache_options.add_chunk(evaluate)
  evaluate.add_argument(
    '--json', action='store_true', help='print one JSON object and nothing else'
  )
  evaluate.set_defaults(command=_eval)


def _eval(arguments: argparse.Namespace) -> int:
  from mq_jax.evaluation import choices
  from mq_jax.lab import measure, opening

  shared.positive(arguments, 'windows', 'batch', 'stride', 'context')
  _check(arguments)
  policy = cache_options.policy(arguments)
  if arguments.data is not None:
    return _network(arguments)
  questions = text = None
  if arguments.choices is not None:
    questions = choices.read_questions(arguments.choices)
  if arguments.text is not None:
    text = measure.evaluation_text(arguments.text)
  blocks = None
  if arguments.stream:
    model, blocks = opening.open_blocks(arguments.model, arguments.mesh)
  else:
    model = opening.open_any(arguments.model, arguments.mesh)
  if policy is not None:
    model = cache_options.read_through(model, policy, arguments)
  cut = measure.Cut(
    arguments.cut == 'field', arguments.stride, arguments.context
  )
  windows = other = None
  if text is not None:
    windows = measure.windows(model, text, arguments.windows, cut)
  if arguments.against is not None:
    other = opening.open_any(arguments.against, arguments.mesh)
  start = time.perf_counter()
  found: dict[str, Any] = {}
  if blocks is not None:
    found = measure.streamed_scores(model, blocks, windows, arguments.batch)
  elif windows is not None and other is None:
    found = measure.scores(model, model.params, windows, arguments.batch)
  elif windows is not None:
    found = measure.compared(model, other, windows, arguments.batch)
    found['against'] = arguments.against
  if policy is not None and windows is not None:
    found |= cache_options.bits(model, policy, windows.tokens, arguments)
  if questions is not None:
    found['choices'] = measure.answered(
      model, questions, cut, arguments.batch
    )._asdict()
  return _show(arguments, model, found, time.perf_counter() - start)


def _network(arguments: argparse.Namespace) -> int:
  """A network that is no language model, on its data."""
  from mq_jax.lab import networks, opening

  data = networks.read_data(arguments.data)
  model = opening.open_model(arguments.model, arguments.mesh)
  if not isinstance(model, opening.Network):
    raise ValueError(
      f'{arguments.model}: is a language model; give --text instead of --data'
    )
  reference = None
  if arguments.against is not None:
    other = opening.open_model(arguments.against, arguments.mesh)
    same = getattr(other, 'config', None) == model.config
    if not isinstance(other, opening.Network) or not same:
      raise ValueError(
        f'{arguments.against}: is no network of the architecture and sizes of '
        f'{arguments.model}'
      )
    reference = other.params
  start = time.perf_counter()
  found = networks.scores(
    model,
    model.params,
    data,
    batch=arguments.batch,
    limit=arguments.windows,
    reference=reference,
  )
  if reference is not None:
    # A noise predictor's scores have a field of this name.
    found |= {'reference': arguments.against}
  return _show(arguments, model, found, time.perf_counter() - start)


def _show(
  arguments: argparse.Namespace, model, found: dict[str, Any], seconds: float
) -> int:
  """Print what was found; returns the exit code."""
  from mq_jax import plans
  from mq_jax.lab import comparison

  params = getattr(model, 'params', None)  # a checkpoint's are not read
  packed = isinstance(params, dict) and comparison.has_packed(params)
  result = {
    'model': arguments.model,
    **found,
    # Of a plain model no weight is packed, so there is no width to report.
    'ebw': float(plans.size(params).ebw) if packed else None,
    'seconds': round(seconds, 3),
  }
  if arguments.json:
    print(json.dumps(result, allow_nan=False))
    return 0
  result |= result.pop('choices', {})
  for low, high, _, mse, _ in result.pop('by_step', ()):
    result[f'mse {low}-{high - 1}'] = mse
  width = max(map(len, result))
  for name, value in result.items():
    shown = f'{value:.6g}' if isinstance(value, float) else value
    print(f'{name:{width}}  {"-" if shown is None else shown}')
  return 0


def _check(arguments: argparse.Namespace) -> None:
  """Refuse options that would do nothing."""
  if arguments.cache is not None:
    for option in ('data', 'mesh', 'stream'):
      if getattr(arguments, option):
        raise ValueError(f'--cache does not go together with --{option}')
  if arguments.data is not None:
    others = ('text', 'choices', 'stride', 'context', 'stream')
    for option in others:
      if getattr(arguments, option):
        raise ValueError(f'--{option} is for language models, without --data')
    if arguments.cut != 'bos':
      raise ValueError('--cut is for language models, without --data')
    return
  if arguments.text is None and arguments.choices is None:
    raise ValueError('nothing to evaluate on: give --text, --choices or both')
  if arguments.stride is not None and arguments.cut != 'field':
    raise ValueError('--stride needs --cut field')
  if arguments.stream:
    for option in ('against', 'choices'):
      if getattr(arguments, option) is not None:
        raise ValueError(f'--stream scores a text only, without --{option}')
  if arguments.text is None and arguments.against is not None:
    raise ValueError('--against compares predictions of a text: give --text')
