"""`mq cost`: what a model takes on accelerators."""

import argparse
import json

from mq_jax.lab.commands import shared

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


def add(commands) -> None:
  """Add the command to the parser of `mq`."""
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


def _cost(arguments: argparse.Namespace) -> int:
  from mq_jax.lab import config, costing

  shared.positive(arguments, 'batch', 'context', 'activation_bits')
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
