"""`mq eval`: perplexity and bits per byte of a model."""

import argparse
import json
import time

from mq_jax.lab.commands import shared


def add(commands) -> None:
  """Add the command to the parser of `mq`."""
  evaluate = commands.add_parser(
    'eval',
    help='perplexity and bits per byte of a model on a text',
    description='Evaluate a model on windows of a text.',
  )
  shared.add_model(evaluate)
  evaluate.add_argument('--text', required=True, metavar='FILE')
  shared.add_windows(evaluate, 'evaluate', None)
  shared.add_mesh(evaluate)
  evaluate.add_argument(
    '--json', action='store_true', help='print one JSON object and nothing else'
  )
  evaluate.set_defaults(command=_eval)


def _eval(arguments: argparse.Namespace) -> int:
  from mq_jax import plans
  from mq_jax.lab import comparison, measure, opening

  shared.positive(arguments, 'windows', 'batch')
  text = measure.evaluation_text(arguments.text)
  model = opening.open_any(arguments.model, arguments.mesh)
  windows = measure.windows(model, text, arguments.windows)
  start = time.perf_counter()
  scores = measure.scores(model, model.params, windows, arguments.batch)
  seconds = time.perf_counter() - start
  packed = comparison.has_packed(model.params)
  result = {
    'model': arguments.model,
    **{k: scores[k] for k in ('nll', 'perplexity', 'bits_per_byte')},
    **{k: scores[k] for k in ('tokens', 'bytes')},
    # Of a plain model no weight is packed, so there is no width to report.
    'ebw': float(plans.size(model.params).ebw) if packed else None,
    'seconds': round(seconds, 3),
  }
  if arguments.json:
    print(json.dumps(result, allow_nan=False))
    return 0
  width = max(map(len, result))
  for name, value in result.items():
    shown = f'{value:.6g}' if isinstance(value, float) else value
    print(f'{name:{width}}  {"-" if shown is None else shown}')
  return 0
