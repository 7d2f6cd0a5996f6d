"""The `mq` command: run a study, quantize, evaluate, price on hardware.

Exit codes: 0 done, 1 a row of a run failed, 2 the input cannot be used (one
line on standard error says why), 130 interrupted.
"""

import argparse
import json
import os
import pathlib
import sys
import time
from collections.abc import Sequence

# Heavy modules are imported by the commands that need them: `mq --help` and
# a mistyped option answer at once.


def main(argv: Sequence[str] | None = None) -> int:
  """Run the command line; returns the exit code."""
  arguments = _parser().parse_args(argv)
  try:
    return arguments.command(arguments)
  except KeyboardInterrupt:
    print('\nmq: interrupted', file=sys.stderr)
    return 130
  except (ValueError, OSError) as error:
    # What the user gave is at fault, and the message says how; anything else
    # is a bug of ours and keeps its traceback.
    print(f'mq: {error}', file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='mq', description='Quantization research in JAX.'
  )
  commands = parser.add_subparsers(required=True, metavar='COMMAND')

  run = commands.add_parser(
    'run',
    help='run a study: recipes compared on models',
    description='Run a study, or continue it: finished rows are kept.',
  )
  run.add_argument('config', metavar='CONFIG.gin')
  run.add_argument(
    '--set',
    action='append',
    default=[],
    metavar='BINDING',
    help="override a binding, e.g. --set 'compare.seed = 1'; may be repeated",
  )
  run.add_argument(
    '--text',
    metavar='FILE',
    help='evaluate on this UTF-8 text (default: wikitext-2/test.txt in the '
    'folder MQ_DATA if that is set, else the docs corpus)',
  )
  run.add_argument(
    '--out', metavar='DIR', help='default: runs/CONFIG-<digest of the study>'
  )
  run.set_defaults(command=_run)

  quantize = commands.add_parser(
    'quantize',
    help='write a packed artifact of a model',
    description='Quantize every matmul weight of a model by one recipe.',
  )
  _add_model(quantize)
  quantize.add_argument('--recipe', required=True, metavar='NAME')
  quantize.add_argument('--bits', type=int, metavar='B')
  quantize.add_argument(
    '--set',
    action='append',
    default=[],
    metavar='OPTION=VALUE',
    help='an option of the recipe, e.g. --set group=64; may be repeated',
  )
  quantize.add_argument(
    '--calibration',
    metavar='FILE',
    help='UTF-8 text to calibrate on (default: the docs corpus)',
  )
  _add_windows(quantize, 'calibrate on', 64)
  quantize.add_argument('--seed', type=int, default=0)
  quantize.add_argument('--out', required=True, metavar='DIR')
  quantize.set_defaults(command=_quantize)

  evaluate = commands.add_parser(
    'eval',
    help='perplexity and bits per byte of a model on a text',
    description='Evaluate a model on windows of a text.',
  )
  _add_model(evaluate)
  evaluate.add_argument('--text', required=True, metavar='FILE')
  _add_windows(evaluate, 'evaluate', None)
  evaluate.add_argument(
    '--json', action='store_true', help='print one JSON object and nothing else'
  )
  evaluate.set_defaults(command=_eval)
  _add_cost(commands)
  return parser


_ENTRIES = """\
An ENTRY is an accelerator, optionally with options and a recipe:

    NAME[:OPTION,...][/RECIPE[:OPTION=VALUE,...]]

    microscopiq
    microscopiq:rows=32,recon_units=4/microscopiq:bits=4
    gpu_roofline:h100/none    (a bare word is the accelerator's first option)
    /gptq:bits=4              (with --compare: the one of --accelerator)

Accelerators: microscopiq, olive, gobo, fineq, systolic, mixpe, bitfusion,
gpu_roofline, tpu_roofline. Options of an accelerator are those of its
function in mq_jax.hardware.accelerators, memory.FIELD, and clock_ghz.

The recipe of an entry counts first, then --recipe or --plan, then what the
accelerator is made for. Weights of a model are quantized, without calibration
and compensation, and their bits measured; of published shapes, those of a
Gaussian matrix. A quantized artifact is priced as it is.

    mq cost --model llama-2-7b --accelerator microscopiq --phase decode
    mq cost --model reference --recipe gptq --bits 4 --accelerator systolic:os
    mq cost --model opt-6.7b --compare microscopiq olive gobo gpu_roofline:h100
    mq cost --model llama-3-8b --accelerator microscopiq \\
        --compare /microscopiq:bits=2 /microscopiq:bits=4 --out costs
"""


def _add_cost(commands) -> None:
  cost = commands.add_parser(
    'cost',
    help='cycles, energy and area of a model on accelerators',
    description='Price the weight matmuls of a model on accelerators.',
    epilog=_ENTRIES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  cost.add_argument(
    '--model',
    required=True,
    metavar='DIR|NAME|SHAPES',
    help='published shapes such as llama-2-7b, a bundled model, a Hugging '
    'Face folder or an artifact',
  )
  cost.add_argument('--accelerator', metavar='ENTRY', help='see below')
  cost.add_argument(
    '--compare', nargs='+', metavar='ENTRY', help='several, side by side'
  )
  recipe = cost.add_mutually_exclusive_group()
  recipe.add_argument(
    '--plan', metavar='FILE.json', help='recipes by site, as of Plan.to_json'
  )
  recipe.add_argument('--recipe', metavar='NAME', help='one for all sites')
  cost.add_argument('--bits', type=int, metavar='B', help='of the recipe')
  cost.add_argument(
    '--option',
    action='append',
    default=[],
    metavar='OPTION=VALUE',
    help='of the recipe, e.g. --option group=64; may be repeated',
  )
  cost.add_argument(
    '--set',
    action='append',
    default=[],
    metavar='FIELD=VALUE',
    help='of every accelerator, e.g. --set memory.l2_bytes=4194304; may be '
    'repeated',
  )
  cost.add_argument('--phase', choices=('prefill', 'decode'), default='prefill')
  cost.add_argument(
    '--batch', type=int, default=1, metavar='N', help='sequences, or images'
  )
  cost.add_argument(
    '--context',
    type=int,
    metavar='N',
    help='tokens of a sequence in prefill (default: 2048, or what the model '
    'reads); weight matmuls of a decoding step do not depend on it',
  )
  cost.add_argument(
    '--activation-bits',
    type=int,
    metavar='A',
    help='default: 8; 16 for rooflines, gobo and 16-bit designs of mixpe',
  )
  cost.add_argument(
    '--json', action='store_true', help='print one JSON object and nothing else'
  )
  cost.add_argument(
    '--out', metavar='DIR', help='write cost.json, cost.csv and cost.png there'
  )
  cost.set_defaults(command=_cost)


def _add_model(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    '--model',
    required=True,
    metavar='DIR|NAME',
    help='a bundled model, a Hugging Face folder or an artifact',
  )


def _add_windows(
  parser: argparse.ArgumentParser, what: str, default: int | None
) -> None:
  parser.add_argument(
    '--windows',
    type=int,
    default=default,
    metavar='N',
    help=f'{what} at most N windows (default: {default or "all"})',
  )
  parser.add_argument(
    '--batch', type=int, default=8, metavar='N', help='windows at a time'
  )


def _run(arguments: argparse.Namespace) -> int:
  from rich import console

  from mq_jax.lab import config

  bindings, default = list(arguments.set), None
  if arguments.text is not None:
    bindings.append(f'compare.text = {arguments.text!r}')
  elif os.environ.get('MQ_DATA'):
    default = os.path.join(os.environ['MQ_DATA'], 'wikitext-2', 'test.txt')
  study, operative = config.load(
    arguments.config, bindings, default_text=default
  )

  from mq_jax.lab import comparison, progress, runs
  from mq_jax.report import tables

  path = pathlib.Path(
    arguments.out or runs.default_folder(arguments.config, study)
  )
  records = comparison.run(
    study,
    path,
    operative=operative,
    name=os.path.basename(arguments.config),
    display=progress.Display(console.Console(stderr=True)),
  )
  out = console.Console()
  out.print(tables.rich_table(comparison.shown(records)))
  out.print(f'written to {path}', markup=False, highlight=False, soft_wrap=True)
  failures = sum(map(runs.failed, records))
  if failures:
    print(f'mq: {failures} of {len(records)} rows failed', file=sys.stderr)
  return 1 if failures else 0


def _quantize(arguments: argparse.Namespace) -> int:
  from rich import console

  from mq_jax import artifacts, calibration, plans, recipes, sites
  from mq_jax.lab import comparison, config, measure, opening, progress

  _positive(arguments, 'windows', 'batch')
  options = {} if arguments.bits is None else {'bits': arguments.bits}
  options |= config.options(arguments.set)
  recipe = recipes.make(arguments.recipe, **options)
  artifacts.check_target(arguments.out)
  text = measure.calibration_text(arguments.calibration)
  model = opening.open_any(arguments.model)
  if comparison.has_packed(model.params):
    raise ValueError(f'{arguments.model}: is quantized already')
  batches = measure.calibration_batches(
    model, text, arguments.windows, arguments.batch, arguments.seed
  )
  display = progress.Display(console.Console(stderr=True))
  with display.rows(0, 1):
    found = sites.find(model.apply, model.params, batches[0])
    statistics = calibration.calibrate(
      model.apply,
      model.params,
      batches,
      sites=found,
      progress=display.steps('calibrating'),
    )
    packed, seconds = comparison.quantize(
      model, recipe, found, statistics, display.steps(arguments.recipe)
    )
    manifest = opening.save_artifact(arguments.out, model, packed)
  totals = manifest['totals']
  status = measure.status_of(plans.records(packed))
  print(
    f'{arguments.out}: {model.name} by {arguments.recipe}, '
    f'{len(manifest["packed"])} weights in {totals["nbytes"]} bytes, ebw '
    f'{totals["ebw"]:.4f}, quantized in {seconds:.1f} s, {status}'
  )
  return 0


def _eval(arguments: argparse.Namespace) -> int:
  from mq_jax import plans
  from mq_jax.lab import comparison, measure, opening

  _positive(arguments, 'windows', 'batch')
  text = measure.evaluation_text(arguments.text)
  model = opening.open_any(arguments.model)
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


def _cost(arguments: argparse.Namespace) -> int:
  from mq_jax.lab import config, costing

  _positive(arguments, 'batch', 'context', 'activation_bits')
  asked = costing.requests(
    arguments.accelerator,
    arguments.compare,
    costing.recipe_of(arguments.recipe, arguments.bits, arguments.option),
  )
  if arguments.out is not None:
    costing.check_target(arguments.out)
  model, results = costing.run(
    asked,
    arguments.model,
    options=config.options(arguments.set),
    plan=None if arguments.plan is None else costing.read_plan(arguments.plan),
    phase=arguments.phase,
    batch=arguments.batch,
    context=arguments.context,
    activation_bits=arguments.activation_bits,
  )
  report = costing.as_json(model, results, arguments.phase, arguments.batch)
  if arguments.out is not None:
    costing.write(arguments.out, report)
  if arguments.json:
    print(json.dumps(report, allow_nan=False))
  else:
    costing.show(report, arguments.out)
  return 0


def _positive(arguments: argparse.Namespace, *names: str) -> None:
  for name in names:
    value = getattr(arguments, name)
    if value is not None and value < 1:
      option = name.replace('_', '-')
      raise ValueError(f'--{option} {value}: needs at least 1')


if __name__ == '__main__':
  sys.exit(main())
