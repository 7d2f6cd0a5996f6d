"""The `mq` command: run a study, quantize, evaluate, price, allocate bits.

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
  _add_allocate(commands)
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


_ALLOCATE = """\
A budget is NAME=VALUE in the unit of NAME, or NAME=0.6x: times what the
costliest uniform candidate takes, the one that, given to all sites, takes
most of NAME. Several hold at once; the first is drawn. NAME is ebw
(bit/weight, metadata included) or bytes; with --accelerator also cycles,
compute_cycles, time_s, energy_pj or dram_bytes, by the exact cost model on
the packed weights.

A candidate is [PATTERN@]RECIPE[:OPTION=VALUE,...], a tie PATTERN[,PATTERN...]:

    --candidate gptq:bits=4,group=64    --candidate none
    --candidate '*/mlp/*@fineq:compensate=True'   (only for sites that match)
    --tie '*/mlp/up_proj/*'             (all that match choose alike)
    --tie 'layers/{}/*/[qkv]_proj/*'    (those with the same {} choose alike)

Solvers: gradient, integer_program, dynamic_program, lagrangian, hawq_v2,
greedy, evolution, policy_gradient, uniform, random, inverse_order. The plan
written is that of --solver; those of --also are drawn beside it.

Texts to calibrate, search and test on are disjoint. The state is saved in
DIR as the search goes: the same command continues it, to the same result.

    mq allocate --model reference --budget ebw=2.5 --out plan
    mq allocate --model reference --accelerator microscopiq \\
        --budget cycles=0.8x --budget ebw=3 --out plan --artifact
    mq cost --model reference --plan plan/plan.json --accelerator systolic
"""


def _add_allocate(commands) -> None:
  allocate = commands.add_parser(
    'allocate',
    help='find a plan of mixed precision under budgets',
    description='Choose a recipe for every site, of least loss in budgets.',
    epilog=_ALLOCATE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  allocate.add_argument(
    '--model',
    required=True,
    metavar='DIR|NAME',
    help='a bundled model, or a Hugging Face folder',
  )
  allocate.add_argument(
    '--budget',
    action='append',
    default=[],
    metavar='NAME=VALUE',
    help='e.g. ebw=2.5 or cycles=0.6x, see below; may be repeated',
  )
  allocate.add_argument('--out', required=True, metavar='DIR')
  allocate.add_argument(
    '--accelerator', metavar='NAME[:OPTION,...]', help='as of mq cost'
  )
  allocate.add_argument(
    '--set',
    action='append',
    default=[],
    metavar='FIELD=VALUE',
    help='of the accelerator, as of mq cost; may be repeated',
  )
  allocate.add_argument(
    '--phase', choices=('prefill', 'decode'), default='prefill'
  )
  _add_numbers(
    allocate,
    ('sequences', 1, 'on the accelerator'),
    ('context', None, "tokens of a sequence there (default: the model's)"),
    ('activation-bits', None, 'default: as of mq cost'),
  )
  allocate.add_argument(
    '--candidate',
    action='append',
    default=[],
    metavar='RECIPE',
    help='see below; may be repeated (default: gptq of 2, 3, 4 and 6 bits in '
    'groups of 64 and fineq, or what the accelerator is made for)',
  )
  allocate.add_argument(
    '--tie', action='append', default=[], metavar='PATTERN', help='see below'
  )
  allocate.add_argument(
    '--exclude',
    action='append',
    default=[],
    metavar='PATTERN',
    help='sites to leave as they are; may be repeated',
  )
  allocate.add_argument('--solver', default='gradient', metavar='NAME')
  allocate.add_argument(
    '--also',
    default='uniform,integer_program,greedy',
    metavar='all|none|NAME,...',
    help='solvers drawn for comparison (default: %(default)s)',
  )
  allocate.add_argument(
    '--loss',
    choices=('divergence', 'next_token'),
    default='divergence',
    help='to search on: from the predictions of the unquantized model, or of '
    'the text itself, which has more noise (default: %(default)s)',
  )
  allocate.add_argument(
    '--text',
    metavar='FILE',
    help='UTF-8 text to test on (default: the docs corpus, test split)',
  )
  allocate.add_argument(
    '--calibration',
    metavar='FILE',
    help='UTF-8 text to calibrate and search on (default: the docs corpus)',
  )
  _add_numbers(
    allocate,
    ('front', 8, 'budgets drawn; 1 is only the one asked for'),
    ('steps', 16, 'of the gradient search, each on 2 windows'),
    ('calibration-windows', 64, 'windows to calibrate on'),
    ('search-windows', 8, 'windows that losses are measured on'),
    ('test-windows', 48, 'windows of the test text'),
    ('batch', 8, 'windows at a time'),
    ('seed', 0, 'of all random choices'),
    ('blocks', None, 'parts of a site that choose by themselves'),
  )
  allocate.add_argument('--axis', choices=('rows', 'columns'), help='of blocks')
  allocate.add_argument(
    '--artifact', action='store_true', help='write the packed model too'
  )
  allocate.set_defaults(command=_allocate)


def _add_numbers(parser: argparse.ArgumentParser, *options) -> None:
  for name, default, what in options:
    said = '' if default is None else f' (default: {default})'
    parser.add_argument(
      f'--{name}', type=int, default=default, metavar='N', help=what + said
    )


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


def _allocate(arguments: argparse.Namespace) -> int:
  _positive(
    arguments,
    *('sequences', 'context', 'activation_bits', 'front', 'steps', 'batch'),
    *('calibration_windows', 'search_windows', 'test_windows', 'blocks'),
  )
  from rich import console

  from mq_jax.lab import allocating, config, costing, progress

  if arguments.axis is not None and arguments.blocks is None:
    raise ValueError('--axis: is that of --blocks N, which is missing')
  design = None
  if arguments.accelerator is not None:
    (request,) = costing.requests(arguments.accelerator, None)
    if request.recipe is not None:
      raise ValueError(
        f'--accelerator {arguments.accelerator}: recipes are chosen here; '
        'leave out its own'
      )
    options = config.options(arguments.set)
    design = costing.design(request.accelerator, options)
  elif arguments.set:
    raise ValueError('--set: is of an accelerator; add --accelerator NAME')
  if design is not None and arguments.blocks is not None:
    raise ValueError(
      '--blocks: costs on an accelerator are those of whole sites; leave out '
      'one of --blocks and --accelerator'
    )
  solvers = allocating.names(
    arguments.also, arguments.solver, list(allocating.SOLVERS)
  )
  budgets = allocating.parse(arguments.budget, design is not None)
  candidates = allocating.candidates(arguments.candidate, design)
  for candidate in candidates if design else ():
    why = allocating.refusal(
      design, candidate.recipe, arguments.activation_bits
    )
    if why:
      raise ValueError(
        f'{arguments.accelerator}: candidate {candidate.recipe.label} does '
        f'not run: {why}'
      )
  ask = allocating.Ask(
    model=arguments.model,
    budgets=budgets,
    candidates=candidates,
    solvers=solvers,
    ties=tuple(arguments.tie),
    exclude=tuple(arguments.exclude),
    design=design,
    accelerator=design and ' '.join([arguments.accelerator, *arguments.set]),
    phase=arguments.phase,
    sequences=arguments.sequences,
    context=arguments.context,
    activation_bits=arguments.activation_bits,
    loss=arguments.loss,
    front=arguments.front,
    steps=arguments.steps,
    seed=arguments.seed,
    text=arguments.text,
    calibration_text=arguments.calibration,
    calibration_windows=arguments.calibration_windows,
    search_windows=arguments.search_windows,
    test_windows=arguments.test_windows,
    batch=arguments.batch,
    blocks=arguments.blocks,
    axis=arguments.axis,
  )
  report = allocating.run(
    ask,
    arguments.out,
    progress.Display(console.Console(stderr=True)),
    artifact=arguments.artifact,
  )
  allocating.show(report, arguments.out)
  return 0


def _positive(arguments: argparse.Namespace, *names: str) -> None:
  for name in names:
    value = getattr(arguments, name)
    if value is not None and value < 1:
      option = name.replace('_', '-')
      raise ValueError(f'--{option} {value}: needs at least 1')


if __name__ == '__main__':
  sys.exit(main())
