"""`mq quantize`: a packed artifact of a model."""

import argparse

from mq_jax.lab.commands import shared


def add(commands) -> None:
  """Add the command to the parser of `mq`."""
  quantize = commands.add_parser(
    'quantize',
    help='write a packed artifact of a model',
    description='Quantize every matmul weight of a model by one recipe, or '
    'those of a plan: a language model, or a folder of a text encoder, ViT, '
    'ResNet or DiT.',
  )
  shared.add_model(quantize)
  asked = quantize.add_mutually_exclusive_group(required=True)
  asked.add_argument('--recipe', metavar='NAME')
  asked.add_argument(
    '--plan',
    metavar='FILE.json',
    help='recipes by site, as mq allocate writes them; the sites it leaves out '
    'stay as they are',
  )
  quantize.add_argument('--bits', type=int, metavar='B')
  quantize.add_argument(
    '--set',
    action='append',
    default=[],
    metavar='OPTION=VALUE',
    help='an option of the recipe, e.g. --set group=64; may be repeated',
  )
  quantize.add_argument(
    '--activations',
    metavar='FORMAT[:OPTION=VALUE,...]',
    help='quantize the inputs of the weights, too: mx_int, token, tensor or '
    'none, e.g. mx_int:bits=8,smooth=0.7',
  )
  quantize.add_argument(
    '--learn',
    nargs='?',
    const='block',
    metavar='SCOPE[:OPTION=VALUE,...]',
    help='learn the codes on the calibration data, by block (the default), '
    'model or site, e.g. block:steps=400,learning_rate=0.003',
  )
  quantize.add_argument(
    '--calibration',
    metavar='FILE',
    help='UTF-8 text to calibrate on (default: the docs corpus, for language '
    'models); for networks that see images, .npz with x and y, or MNIST files',
  )
  shared.add_windows(quantize, 'calibrate on', 64, 'windows or images')
  quantize.add_argument(
    '--generated',
    type=int,
    metavar='N',
    help='calibrate on N windows, too, that the language model itself writes',
  )
  quantize.add_argument(
    '--inputs',
    choices=('original', 'quantized'),
    help='calibrate each block on what the original blocks before it give '
    '(default), or the quantized ones (default with --stream)',
  )
  quantize.add_argument(
    '--uncovered',
    choices=('error', 'round'),
    default='error',
    help='experts that too few calibration tokens reach: refuse them '
    '(default), or round them without compensation',
  )
  quantize.add_argument(
    '--least-tokens',
    type=int,
    default=1,
    metavar='N',
    help='tokens that are enough for an expert (default 1)',
  )
  quantize.add_argument(
    '--stream',
    action='store_true',
    help='keep one block of the model in memory, and in DIR what is done, '
    'from which mq resume DIR goes on',
  )
  shared.add_mesh(quantize)
  quantize.add_argument('--seed', type=int, default=0)
  quantize.add_argument('--out', required=True, metavar='DIR')
  quantize.set_defaults(command=_quantize)


def _quantize(arguments: argparse.Namespace) -> int:
  from mq_jax import plans, recipes
  from mq_jax.lab import config, files

  shared.positive(arguments, 'windows', 'batch', 'least_tokens', 'generated')
  options = {} if arguments.bits is None else {'bits': arguments.bits}
  options |= config.options(arguments.set)
  if arguments.activations is not None:
    options['activations'] = config.named(
      arguments.activations, '--activations', 'format'
    )
  if arguments.learn is not None:
    options['learning'] = config.named(arguments.learn, '--learn', 'scope')
  if arguments.plan is None:
    recipe = recipes.make(arguments.recipe, **options)
    plan_of = lambda found: plans.uniform(found, recipe)
  else:
    plan_of = _planned(arguments.plan, options)
  files.check_writable(arguments.out)
  return (_streamed if arguments.stream else _whole)(arguments, plan_of)


def _planned(path: str, options: dict):
  """From sites a plan that a file has, learned if that is asked for."""
  from mq_jax import plans, recipes
  from mq_jax.lab import costing

  learning = options.pop('learning', None)
  if options:
    raise ValueError(
      f'--plan {path} says what the recipes are; leave out --bits, --set and '
      '--activations'
    )
  found = costing.read_plan(path)
  if learning is not None:
    learning = recipes.make('none', learning=learning).learning
    found = {name: r.with_learning(learning) for name, r in found.items()}
  return lambda sites: plans.named(found, sites)


def _whole(arguments: argparse.Namespace, plan_of) -> int:
  """Quantize a model that is in memory."""
  import time

  from rich import console

  from mq_jax import artifacts, calibration, learn, plans, sites, streaming
  from mq_jax.lab import (
    comparison,
    distributed,
    measure,
    networks,
    opening,
    progress,
  )

  artifacts.check_target(arguments.out)
  data = None
  if arguments.calibration is not None:  # a bad file is found before a model
    data = networks.read_data(arguments.calibration)
  model = opening.open_model(arguments.model, arguments.mesh)
  if comparison.has_packed(model.params):
    raise ValueError(f'{arguments.model}: is quantized already')
  drawn = arguments.windows, arguments.batch, arguments.seed
  if isinstance(model, opening.Network):
    if data is None or arguments.inputs == 'quantized' or arguments.generated:
      raise ValueError(
        f'{arguments.model}: a {model.architecture} needs --calibration FILE, '
        'its blocks are not calibrated one after the other (--inputs), and it '
        'writes no text (--generated)'
      )
    batches = networks.calibration_batches(model, data, *drawn)
  else:
    text = measure.calibration_text(arguments.calibration)
    batches = measure.calibration_batches(model, text, *drawn)
    batches += measure.generated_batches(
      model, arguments.generated, batches[0], arguments.seed
    )
  display = progress.Display(console.Console(stderr=True))
  first = batches[0] if isinstance(batches[0], tuple) else batches[:1]
  plan = plan_of(sites.find(model.apply, model.params, *first))
  learning, name = learn.options_of(plan), arguments.recipe or arguments.plan
  with display.rows(0, 1):
    if arguments.inputs == 'quantized' and learning is None:
      blocks = opening.blocks_of(model)
      start = time.perf_counter()
      plan = plan_of(streaming.find_sites(blocks, batches[0]))
      steps = streaming.quantize(
        blocks,
        plan,
        streaming.begin(blocks, batches),
        coverage=_coverage(arguments),
        progress=display.steps(name),
      )
      packed = streaming.assemble(blocks, list(steps))
      seconds = time.perf_counter() - start
    else:
      statistics = None  # learning calibrates as it goes
      if learning is None:
        statistics = calibration.calibrate(
          model.apply,
          model.params,
          batches,
          sites=[site for site, _ in plan.entries],
          least=0,  # `plans.compress` decides
          progress=display.steps('calibrating'),
        )
      packed, seconds = comparison.quantize(
        model,
        plan,
        statistics,
        display.steps(name),
        batches,
        _coverage(arguments),
        arguments.inputs or 'quantized',
      )
    with distributed.folder(arguments.out) as out:
      manifest = opening.save_artifact(out, model, packed)
  print(_said(arguments, model.name, manifest, plans.records(packed), seconds))
  return 0


def _coverage(arguments: argparse.Namespace):
  from mq_jax import plans

  return plans.Coverage(arguments.least_tokens, arguments.uncovered)


def _streamed(arguments: argparse.Namespace, plan_of) -> int:
  """Quantize a model block by block."""
  from rich import console

  from mq_jax import artifacts, learn, streaming
  from mq_jax.lab import (
    distributed,
    journal,
    listing,
    measure,
    opening,
    packing,
    progress,
    runs,
  )

  text = measure.calibration_text(arguments.calibration)
  if artifacts.is_artifact(arguments.model):
    raise ValueError(f'{arguments.model}: is quantized already')
  model, blocks = opening.open_blocks(arguments.model, arguments.mesh)
  inputs = arguments.inputs or 'quantized'
  batches = measure.calibration_batches(
    model, text, arguments.windows, arguments.batch, arguments.seed
  )
  if arguments.generated:
    raise ValueError(
      '--generated: a model that writes has all its blocks in memory; leave '
      '--stream out'
    )
  plan = plan_of(streaming.find_sites(blocks, batches[0]))
  learning = learn.options_of(plan)
  if learning is not None and (learning.scope != 'block' or learning.finish):
    raise ValueError(
      f'--learn {learning.label}: --stream has one block at a time; '
      'learn by block, or without --stream'
    )
  described, tokenizer = opening.described(model)
  versions = runs.versions()
  setup = {
    'model': arguments.model,
    'blocks': blocks.count,
    'config': described['config'],
    'plan': plan.to_json(),
    'inputs': inputs,
    'coverage': _coverage(arguments)._asdict(),
    'calibration': text.sha256,
    **{n: getattr(arguments, n) for n in ('windows', 'batch', 'seed', 'mesh')},
    'versions': {name: versions[name] for name in runs.LIBRARIES},
  }
  with (
    distributed.folder(arguments.out) as out,
    journal.Journal(out, listing.STREAM, arguments.argv) as log,
  ):
    done = packing.pack(
      out,
      blocks,
      plan,
      batches,
      setup=setup,
      inputs=inputs,
      coverage=_coverage(arguments),
      model=described,
      tokenizer=tokenizer,
      display=progress.Display(console.Console(stderr=True), log),
    )
  seconds = sum(done.seconds.values())
  print(_said(arguments, model.name, done.manifest, done.records, seconds))
  parts = ', '.join(f'{name} {s:.1f} s' for name, s in done.seconds.items())
  rate = done.manifest['totals']['elements'] / max(seconds, 1e-9)
  print(f'{parts}: {rate / 1e6:.2f} million weights a second')
  return 0


def _said(arguments, name: str, manifest, records, seconds: float) -> str:
  """What was done, in a line."""
  from mq_jax.lab import measure

  totals = manifest['totals']
  return (
    f'{arguments.out}: {name} by {arguments.recipe or arguments.plan}, '
    f'{len(manifest["packed"])} weights in {totals["nbytes"]} bytes, ebw '
    f'{totals["ebw"]:.4f}, quantized in {seconds:.1f} s, '
    f'{measure.status_of(records)}'
  )
