"""What commands have in common: options and checks of them."""

import argparse
import os


def add_numbers(parser: argparse.ArgumentParser, *options) -> None:
  """Whole numbers: (name, default or None, what for)."""
  for name, default, what in options:
    said = '' if default is None else f' (default: {default})'
    parser.add_argument(
      f'--{name}', type=int, default=default, metavar='N', help=what + said
    )


def add_model(parser: argparse.ArgumentParser) -> None:
  """The option --model."""
  parser.add_argument(
    '--model',
    required=True,
    metavar='DIR|NAME',
    help='a bundled model, a Hugging Face folder or an artifact',
  )


def add_bindings(parser: argparse.ArgumentParser, example: str) -> None:
  """The config file and the option --set, which overrides it."""
  parser.add_argument('config', metavar='CONFIG.gin')
  parser.add_argument(
    '--set',
    action='append',
    default=[],
    metavar='BINDING',
    help=f'override a binding, e.g. --set {example!r}; may be repeated',
  )


def default_text() -> str | None:
  """The text to evaluate on that MQ_DATA names, if it is set."""
  folder = os.environ.get('MQ_DATA')
  return os.path.join(folder, 'wikitext-2', 'test.txt') if folder else None


def add_mesh(parser: argparse.ArgumentParser) -> None:
  """The option --mesh."""
  parser.add_argument(
    '--mesh',
    metavar='data=N,model=M',
    help='devices that share the work: batches are divided by N, weights by M '
    '(default: one device)',
  )


def add_windows(
  parser: argparse.ArgumentParser,
  what: str,
  default: int | None,
  unit: str = 'windows',
) -> None:
  """How many windows of a text, or images, and how many at once."""
  parser.add_argument(
    '--windows',
    type=int,
    default=default,
    metavar='N',
    help=f'{what} at most N {unit} (default: {default or "all"})',
  )
  parser.add_argument(
    '--batch', type=int, default=8, metavar='N', help=f'{unit} at a time'
  )


def positive(arguments: argparse.Namespace, *names: str) -> None:
  """Refuse numbers below 1 of the options named; None passes."""
  for name in names:
    value = getattr(arguments, name)
    if value is not None and value < 1:
      option = name.replace('_', '-')
      raise ValueError(f'--{option} {value}: needs at least 1')
