"""`mq quantize`: a packed artifact of a model."""

import argparse

from mq_jax.lab.commands import shared


def add(commands) -> None:
  """Add the command to the parser of `mq`."""
  quantize = commands.add_parser(
    'quantize',
    help='write a packed artifact of a model',
    description='Quantize every matmul weight of a model by one recipe.',
  )
  shared.add_model(quantize)
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
  shared.add_windows(quantize, 'calibrate on', 64)
  shared.add_mesh(quantize)
  quantize.add_argument('--seed', type=int, default=0)
  quantize.add_argument('--out', required=True, metavar='DIR')
  quantize.set_defaults(command=_quantize)


def _quantize(arguments: argparse.Namespace) -> int:
  from rich import console

  from mq_jax import artifacts, calibration, plans, recipes, sites
  from mq_jax.lab import (
    comparison,
    config,
    distributed,
    files,
    measure,
    opening,
    progress,
  )

  shared.positive(arguments, 'windows', 'batch')
  options = {} if arguments.bits is None else {'bits': arguments.bits}
  options |= config.options(arguments.set)
  recipe = recipes.make(arguments.recipe, **options)
  artifacts.check_target(arguments.out)
  files.check_writable(arguments.out)
  text = measure.calibration_text(arguments.calibration)
  model = opening.open_any(arguments.model, arguments.mesh)
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
    with distributed.folder(arguments.out) as out:
      manifest = opening.save_artifact(out, model, packed)
  totals = manifest['totals']
  status = measure.status_of(plans.records(packed))
  print(
    f'{arguments.out}: {model.name} by {arguments.recipe}, '
    f'{len(manifest["packed"])} weights in {totals["nbytes"]} bytes, ebw '
    f'{totals["ebw"]:.4f}, quantized in {seconds:.1f} s, {status}'
  )
  return 0
