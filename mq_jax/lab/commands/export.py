"""`mq export`: a model as a folder for other programs."""

import argparse

_FORMATS = """\
  --to hf                  a Hugging Face folder of plain weights, those that
                           packed ones decode to; float32 keeps them exactly
  --to compressed-tensors  integers stay packed ('pack-quantized'): 4 or 8
                           bits by rtn or gptq, in groups that divide the
                           inputs, symmetric or not; with scales in float16
                           (the default) or float32

The folder is read back and compared bit by bit before it gets its name.

    mq quantize --model DIR --recipe gptq --bits 4 --out w4
    mq export w4 --to compressed-tensors w4-packed
    mq eval --model w4-packed --text some.txt
"""


def add(commands) -> None:
  """Add the command to the parser of `mq`."""
  export = commands.add_parser(
    'export',
    help='write a model for other programs',
    description="Write a model as a folder in Hugging Face's layout.",
    epilog=_FORMATS,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  export.add_argument(
    'model',
    metavar='ARTIFACT',
    help='an artifact; with --to hf any other model, too',
  )
  export.add_argument(
    '--to', required=True, choices=('hf', 'compressed-tensors')
  )
  export.add_argument('out', metavar='OUT', help='a new folder')
  export.add_argument(
    '--dtype',
    choices=('float32', 'bfloat16', 'float16'),
    help='of the weights (default: float32), or of scales and what is not '
    'packed (default: float16)',
  )
  export.add_argument(
    '--shard-bytes',
    type=int,
    default=5_000_000_000,
    metavar='N',
    help='most bytes of tensors in one file (default: %(default)s)',
  )
  export.set_defaults(command=_export)


def _export(arguments: argparse.Namespace) -> int:
  from rich import console

  from mq_jax import exporting, plans
  from mq_jax.lab import files, opening, progress
  from mq_jax.lab.commands import shared

  shared.positive(arguments, 'shard_bytes')
  exporting.check_target(arguments.out)
  files.check_writable(arguments.out)
  packed = arguments.to == 'compressed-tensors'
  dtype = arguments.dtype or ('float16' if packed else 'float32')
  model = opening.open_any(arguments.model)
  write = (
    exporting.to_compressed_tensors if packed else exporting.to_huggingface
  )
  display = progress.Display(console.Console(stderr=True))
  with display.rows(0, 1):
    write(
      arguments.out,
      model,
      dtype=dtype,
      max_shard_bytes=arguments.shard_bytes,
      progress=display.steps('comparing'),
    )
  matrices = plans.matrices(model.params).values()
  said = f'{arguments.out}: {model.name} as {arguments.to}, {dtype}; read back'
  print(f'{said} and equal to {arguments.model} bit for bit')
  inputs = sum(matrix.inputs is not None for matrix in matrices)
  if inputs:
    print(
      f'{inputs} of {len(matrices)} matrices quantize their inputs in '
      f'{arguments.model}; what reads {arguments.out} does not'
    )
  return 0
