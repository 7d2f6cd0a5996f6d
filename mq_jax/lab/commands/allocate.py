"""`mq allocate`: a plan of mixed precision under budgets."""

import argparse

from mq_jax.lab.commands import shared

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
    mq quantize --model reference --plan plan/plan.json --learn --out learned
"""


def add(commands) -> None:
  """Add the command to the parser of `mq`."""
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
  shared.add_numbers(
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
  shared.add_numbers(
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
  shared.add_mesh(allocate)
  allocate.add_argument('--axis', choices=('rows', 'columns'), help='of blocks')
  allocate.add_argument(
    '--artifact', action='store_true', help='write the packed model too'
  )
  allocate.set_defaults(command=_allocate)


def _allocate(arguments: argparse.Namespace) -> int:
  shared.positive(
    arguments,
    *('sequences', 'context', 'activation_bits', 'front', 'steps', 'batch'),
    *('calibration_windows', 'search_windows', 'test_windows', 'blocks'),
  )
  from rich import console

  from mq_jax.lab import (
    allocating,
    config,
    costing,
    distributed,
    files,
    journal,
    listing,
    progress,
  )

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
    mesh=arguments.mesh,
  )
  with distributed.folder(arguments.out) as folder:
    files.check_writable(folder)
    with journal.Journal(folder, listing.ALLOCATION, arguments.argv) as log:
      report = allocating.run(
        ask,
        folder,
        progress.Display(console.Console(stderr=True), log),
        artifact=arguments.artifact,
      )
  allocating.show(report, arguments.out)
  return 0
