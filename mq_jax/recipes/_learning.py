"""How the codes of a recipe are learned on calibration data: plain data."""

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

SCOPES = ('block', 'model', 'site')
ROUNDINGS = ('straight', 'sigmoid', 'tanh', 'nearest')


@dataclasses.dataclass(frozen=True)
class Learning:
  """Options of `mq_jax.learn`; the defaults are near those of AutoRound.

  Attributes:
    scope: What is compared with the original, and trained together: the
      output of each 'block', one after the other; the output of the 'model';
      or that of each 'site' alone.
    loss: 'mse', 'l1', 'cosine' or 'divergence' (of predictions, for scope
      'model'), or a function as `mq_jax.learn.losses` has them. None is
      'divergence' for the scope 'model', and else 'mse'.
    steps: Of the optimizer, for each block, site or model.
    finish: Steps on the divergence of the whole model's predictions, once its
      blocks or sites have been learned.
    learning_rate: At the first step, falling to 0 along a line (but for soft
      rounding, which is to end on the grid). Offsets are
      learned in steps of the grid: a sign descent goes `learning_rate * steps
      / 2` of them at most.
    optimizer: 'sign_sgd' (AutoRound, arXiv 2309.05516, does so), 'adam',
      'adamw', 'adamax' or 'sgd'; or a function of a schedule that gives an
      Optax transformation.
    batch: Examples a step: windows of text, or images.
    held: Share of the examples that is held back; the state with the least
      loss on them is kept, the start among them.
    rounding: How weights move on their grid. 'straight': by offsets, gradients
      passing rounding straight through. 'sigmoid': up or down, by AdaRound's
      rectified sigmoid (arXiv 2004.10568, equation 23), soft until training
      ends. 'tanh': offsets of at most `reach` steps, soft as well. 'nearest':
      not at all but with the grid, which alone is learned (OmniQuant, arXiv
      2308.13137); not for recipes with error compensation.
    reach: Of 'tanh', in steps of the grid; 0.5 is up or down.
    anneal: Of the soft ones, the weight of the penalty that drives them to the
      grid, in units of the loss at the start.
    numbers: Whether numbers of the codes are learned: scales and with them
      clipping, zero points, scales of inputs.
    choices: Names of those of the codes that are learned, by softmax, with the
      best taken ('straight' and 'nearest' only): 'pattern' of FineQ's pairs;
      'role' of MicroScopiQ's elements (inlier, outlier, pruned), 'osf' and
      'isf', its exponents. Learning 'isf' did harm wherever it was tried.
    near: How far towards its own value a weight begins from its place on the
      grid, at most, in steps of the grid. Just under 0.5, rounding to nearest
      is where training begins, and half a step changes it.
    every: Steps between two looks at the examples held back.
    patience: Looks without improvement after which training stops; None for
      never.
    seed: Of which examples are held back, and of the order of the rest.
  """

  scope: str = 'block'
  loss: str | Callable[..., Any] | None = None
  steps: int = 200
  finish: int = 0
  learning_rate: float = 0.005
  optimizer: str | Callable[..., Any] = 'sign_sgd'
  batch: int = 8
  held: float = 0.2
  rounding: str = 'straight'
  reach: float = 0.5
  anneal: float = 20.0
  numbers: bool = True
  choices: tuple[str, ...] = ()
  near: float = 0.49
  every: int = 20
  patience: int | None = None
  seed: int = 0

  def __post_init__(self):
    if self.scope not in SCOPES:
      raise ValueError(
        f'learning: scope={self.scope!r} must be one of {", ".join(SCOPES)}'
      )
    if self.rounding not in ROUNDINGS:
      raise ValueError(
        f'learning: rounding={self.rounding!r} must be one of '
        f'{", ".join(ROUNDINGS)}'
      )
    if not isinstance(self.numbers, bool):
      raise ValueError(
        f'learning: numbers={self.numbers!r} must be True or False'
      )
    names = self.choices
    if not isinstance(names, tuple) or not all(
      isinstance(name, str) for name in names
    ):
      raise ValueError(f'learning: choices={names!r} must be a tuple of names')
    if self.choices and self.soft:
      raise ValueError(
        f"learning: choices={self.choices!r} go with rounding='straight' or "
        f"'nearest', not {self.rounding!r}"
      )
    if self.rounding == 'nearest' and not (self.numbers or self.choices):
      raise ValueError(
        "learning: rounding='nearest' leaves nothing to learn without numbers "
        'and choices'
      )
    for name in ('steps', 'batch', 'every'):
      value = getattr(self, name)
      if type(value) is not int or value < 1:
        raise ValueError(f'learning: {name}={value!r} must be a whole number')
    patience = self.patience
    if patience is not None and (type(patience) is not int or patience < 1):
      raise ValueError(f'learning: patience={patience!r} is no whole number')
    for name in ('finish', 'seed'):
      value = getattr(self, name)
      if type(value) is not int or value < 0:
        raise ValueError(
          f'learning: {name}={value!r} must be a whole number from 0'
        )
    for name, least, most in (
      ('learning_rate', 0.0, math.inf),
      ('held', 0.0, 1.0),
      ('near', 0.0, 0.5),
      ('reach', 0.0, math.inf),
      ('anneal', 0.0, math.inf),
    ):
      value = getattr(self, name)
      # 0 is fine for `near` (weights begin at their places) and no penalty.
      good = isinstance(value, int | float) and least <= value < most
      if not good or (value == 0 and name not in ('near', 'anneal')):
        raise ValueError(
          f'learning: {name}={value!r} must be between {least:g} and {most:g}'
        )

  @property
  def soft(self) -> bool:
    """Whether weights are off the grid until training ends."""
    return self.rounding in ('sigmoid', 'tanh')

  @property
  def label(self) -> str:
    """The scope and what differs from the defaults, e.g. 'block steps=50'."""
    rest = {k: v for k, v in self.to_json().items() if k != 'scope'}
    text = lambda x: '+'.join(x) if isinstance(x, list) else x
    return ' '.join([self.scope, *(f'{k}={text(v)}' for k, v in rest.items())])

  def to_json(self) -> dict[str, Any]:
    """Plain data: what differs from the defaults.

    Raises:
      ValueError: for functions, which have no name in JSON.
    """
    given = {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if getattr(self, field.name) != field.default
    }
    for name, value in given.items():
      if callable(value):
        raise ValueError(
          f'learning: {name}={value!r} has no name to be written down by'
        )
    return {n: [*x] if isinstance(x, tuple) else x for n, x in given.items()}


def from_json(data: Any) -> Learning:
  """Options from a mapping, from True (the defaults), or as they are.

  Choices may be a list, or text with '+' between their names.

  Raises:
    ValueError: for unknown options, with the nearest, and values out of range.
  """
  if isinstance(data, Learning):
    return data
  if data is True:
    return Learning()
  if not isinstance(data, Mapping):
    raise ValueError(
      f'learning: {data!r:.60} must be true, or a mapping of its options'
    )
  known = [field.name for field in dataclasses.fields(Learning)]
  for name in data:
    if name not in known:
      near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known
      raise ValueError(
        f'learning: no option {name!r}; did you mean {", ".join(near)}?'
      )
  names = data.get('choices', ())
  if isinstance(names, str):
    names = names.split('+')
  if isinstance(names, list):
    data = {**data, 'choices': tuple(names)}
  return Learning(**data)
