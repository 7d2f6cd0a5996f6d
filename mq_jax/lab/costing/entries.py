"""What a model costs on accelerators: names and options in, records out.

An entry says which accelerator, and optionally which recipe:

    NAME[:OPTION,...][/RECIPE[:OPTION=VALUE,...]]

    microscopiq
    microscopiq:rows=32,recon_units=4/microscopiq:bits=4
    gpu_roofline:h100/none        (a bare word is the first option: the GPU)
    /gptq:bits=4                  (the accelerator of `--accelerator`)

Everything that can be refused is refused before weights are quantized.
"""

import dataclasses
import inspect
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mq_jax import hardware, quantize, recipes
from mq_jax.lab import config
from mq_jax.recipes import Recipe


class Default(NamedTuple):
  """What an accelerator is priced with where nothing is said.

  Attributes:
    clock_ghz: Cycles a ns; None where the accelerator has a clock itself.
    recipe: Name.
    options: Of the recipe.
    activation_bits: Width of activations.
  """

  clock_ghz: float | None
  recipe: str
  options: tuple[tuple[str, Any], ...] = ()
  activation_bits: int = 8


_W4 = (('bits', 4),)
DEFAULTS = {
  # Clock of the evaluation of MicroScopiQ and what it is compared with.
  'microscopiq': Default(1.0, 'microscopiq', (('bits', 2),)),
  'olive': Default(1.0, 'olive', _W4),
  # Its PEs take activations in floating point.
  'gobo': Default(1.0, 'gobo', activation_bits=16),
  # Not published: chosen equal to MicroScopiQ's.
  'fineq': Default(1.0, 'fineq'),
  'systolic': Default(1.0, 'rtn', (('bits', 8),)),
  # Clock of their released simulators.
  'mixpe': Default(0.5, 'rtn', _W4),
  'bitfusion': Default(0.5, 'rtn', _W4),
  'gpu_roofline': Default(None, 'none', activation_bits=16),
  'tpu_roofline': Default(None, 'none', activation_bits=16),
}
# MixPE's designs are built for other widths than the accelerator's default.
_MIXPE = {
  'w4a16': Default(0.5, 'rtn', _W4, 16),
  'int8': Default(0.5, 'rtn', (('bits', 8),)),
  'fp16': Default(0.5, 'none', activation_bits=16),
}


class Named(NamedTuple):
  """A name with options, as written; a bare word is the option ''."""

  name: str
  options: tuple[tuple[str, Any], ...] = ()

  @property
  def label(self) -> str:
    """As `parse` reads it."""
    words = [f'{k}={v}' if k else str(v) for k, v in self.options]
    return ':'.join([self.name, ','.join(words)] if words else [self.name])


class Request(NamedTuple):
  """One column of a comparison, as asked for.

  Attributes:
    accelerator: Name and options.
    recipe: Name and options; None takes the plan, the model's own precision,
      or what the accelerator is made for.
    label: As the user wrote it, or a short description.
  """

  accelerator: Named
  recipe: Named | None
  label: str


class Design(NamedTuple):
  """An accelerator ready to price matmuls.

  Attributes:
    accelerator: From `hardware.accelerators`.
    name: Of its factory.
    clock_ghz: Its clock.
    default: What it is priced with where nothing is said.
  """

  accelerator: Any
  name: str
  clock_ghz: float
  default: Default


def unknown(what: str, name: str, known: Sequence[str]) -> ValueError:
  hint = config.nearest(name, list(known))
  if '; there are' not in hint:
    hint += f' (known are {", ".join(known)})'
  return ValueError(f'{what} {name!r}{hint}')


def _split(text: str) -> list[str]:
  """At commas outside of brackets."""
  return [part.strip() for part in re.split(r',(?![^(\[]*[)\]])', text)]


def recipe_of(
  name: str | None, bits: int | None, options: Sequence[str]
) -> Named | None:
  """What `--recipe`, `--bits` and `--option` say together.

  Raises:
    ValueError: for options without a recipe.
  """
  given = {} if bits is None else {'bits': bits}
  for option, value in config.options(options, '--option').items():
    if option in given:
      raise ValueError(f'--option {option}={value}: {option} is set twice')
    given[option] = value
  if name is None:
    if given:
      what = '--bits' if bits is not None else '--option'
      raise ValueError(f'{what}: is an option of a recipe; add --recipe NAME')
    return None
  return Named(name, tuple(given.items()))


def requests(
  accelerator: str | None,
  compare: Sequence[str] | None,
  recipe: Named | None = None,
) -> list[Request]:
  """What `--accelerator`, `--compare` and `--recipe` ask for together.

  Without `compare` it is the accelerator's own entry; with it, the
  accelerator is that of entries which begin with '/'. The recipe is that of
  entries without one.

  Raises:
    ValueError: for entries of another form, equal ones, or none.
  """
  if accelerator is None and not compare:
    raise ValueError('needs --accelerator NAME or --compare ENTRY ...')
  single = None if accelerator is None else parse(accelerator)
  if not compare:
    found = [single]
  elif single is None:
    found = [parse(text) for text in compare]
  elif single.recipe is not None:
    raise ValueError(
      f'--accelerator {accelerator}: with --compare it only names the '
      'accelerator of entries such as /gptq:bits=4; leave out its recipe'
    )
  else:
    found = [parse(text, single.accelerator) for text in compare]
    if all(r.accelerator is not single.accelerator for r in found):
      raise ValueError(
        f'--accelerator {accelerator}: no entry of --compare uses it; entries '
        'that do begin with /'
      )
  labels = [request.label for request in found]
  twice = next((x for i, x in enumerate(labels) if x in labels[:i]), None)
  if twice is not None:
    raise ValueError(f'{twice!r} stands there twice')
  if recipe is None:
    return found
  if all(request.recipe is not None for request in found):
    raise ValueError(
      f'--recipe {recipe.label}: every entry names its own recipe'
    )
  return [r if r.recipe else r._replace(recipe=recipe) for r in found]


def _named(text: str, where: str) -> Named:
  name, colon, rest = (part.strip() for part in text.partition(':'))
  if not name or (colon and not rest):
    raise ValueError(
      f'{where}: needs the form NAME[:OPTION,...][/RECIPE[:OPTION=VALUE,...]]'
    )
  options: dict[str, Any] = {}
  for i, part in enumerate(_split(rest) if rest else []):
    option, equals, value = (x.strip() for x in part.partition('='))
    if not equals and i == 0:
      option, value = '', part
    elif not equals or not value or not option:
      raise ValueError(f'{where}: option {part!r} needs the form OPTION=VALUE')
    if option in options:
      raise ValueError(f'{where}: {option or part!r} is set twice')
    options[option] = config.literal(value)
  return Named(name, tuple(options.items()))


def parse(text: str, accelerator: Named | None = None) -> Request:
  """Read an entry; names and options are looked up later.

  Args:
    text: See the top of this file.
    accelerator: Taken where the entry begins with '/'.

  Raises:
    ValueError: for a text of another form.

  Examples:
    >>> parse('gpu_roofline:h100/rtn:bits=4').accelerator
    Named(name='gpu_roofline', options=(('', 'h100'),))
    >>> parse('/gptq:bits=4', Named('olive')).recipe
    Named(name='gptq', options=(('bits', 4),))
  """
  where = f'entry {text!r}'
  left, slash, right = (part.strip() for part in text.partition('/'))
  if left:
    accelerator = _named(left, where)
  elif accelerator is None:
    raise ValueError(f'{where}: names no accelerator; add --accelerator NAME')
  recipe = _named(right, where) if slash else None
  return Request(accelerator, recipe, text)


def _fields(name: str) -> list[str]:
  """What `--set` and an entry can set."""
  factory = hardware.accelerators.BY_NAME[name]
  own = [x for x in inspect.signature(factory).parameters if x != 'memory']
  if DEFAULTS[name].clock_ghz is not None:
    own.append('clock_ghz')
  memory = dataclasses.fields(hardware.accelerators.Memory)
  return own + [f'memory.{field.name}' for field in memory]


def design(given: Named, more: Mapping[str, Any] | None = None) -> Design:
  """Build an accelerator.

  Args:
    given: Its name and options: those of its factory, `clock_ghz`, and
      `memory.FIELD`. The option '' stands for the factory's first one.
    more: Further options, as from `--set`; `given` counts for more.

  Raises:
    ValueError: for an unknown name, option or value, with what is possible.
  """
  factories = hardware.accelerators.BY_NAME
  if given.name not in factories:
    raise unknown('no accelerator', given.name, list(factories))
  name, known = given.name, _fields(given.name)
  options = dict(given.options)
  if '' in options:
    first = known[0]
    if first in options:
      raise ValueError(f'{given.label}: {first} is set twice')
    options[first] = options.pop('')
  options = {**(more or {}), **options}
  for option, value in options.items():
    if option not in known:
      raise unknown(f'{name}: no option', option, known)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if option == 'clock_ghz' or option.startswith('memory.'):
      if not number or not 0 < value < math.inf:
        raise ValueError(
          f'{name}: {option} = {value!r}; a positive number is needed'
        )
  of_memory = {
    option.removeprefix('memory.'): options.pop(option)
    for option in list(options)
    if option.startswith('memory.')
  }
  default = DEFAULTS[name]
  clock = options.pop('clock_ghz', default.clock_ghz)
  factory = factories[name]
  _check_kinds(name, factory, options)
  try:
    made = factory(**options)
  except TypeError as error:
    raise ValueError(f'{name}: {error}') from error
  if of_memory:
    memory = dataclasses.replace(made.memory, **of_memory)
    made = dataclasses.replace(made, memory=memory)
  if name == 'mixpe':
    default = _MIXPE.get(options.get('design'), default)
  clock = made.clock_ghz if clock is None else clock
  return Design(made, name, float(clock), default)


def _check_kinds(name: str, factory: Any, options: Mapping[str, Any]) -> None:
  """Refuse values of another kind than the default's."""
  parameters = inspect.signature(factory).parameters
  whole = {'rows', 'cols', 'recon_units', 'micro_block', 'node_nm', 'group'}
  for option, value in options.items():
    usual = parameters[option].default
    if isinstance(usual, bool):
      good, need = isinstance(value, bool), 'True or False'
    elif isinstance(usual, str):
      good, need = isinstance(value, str), 'a word'
    elif option in whole:
      good = type(value) is int and value >= 1
      need = 'a whole number >= 1'
    elif option == 'multiplier':
      good = isinstance(value, tuple) and [*map(type, value)] == [int, int]
      need = 'a pair of widths such as (8,8)'
    elif isinstance(usual, int | float):
      good = isinstance(value, int | float) and not isinstance(value, bool)
      need = 'a number'
    else:
      continue
    if not good:
      raise ValueError(f'{name}: {option} = {value!r}; {need} is needed')


def make_recipe(given: Named) -> Recipe:
  """A recipe of an entry.

  Raises:
    ValueError: for an unknown name or option.
  """
  options = dict(given.options)
  if '' in options:
    raise ValueError(
      f'recipe {given.label}: options need the form OPTION=VALUE'
    )
  try:
    return recipes.make(given.name, **options)
  except TypeError as error:
    raise ValueError(f'recipe {given.label}: {error}') from error


def width_of(recipe: Recipe) -> int:
  """Bits of a weight in the multiplier."""
  return hardware.weight_bits(quantize.layout_of(recipe))
