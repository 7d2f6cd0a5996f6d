"""Closed form for lock-step temporal arrays."""

from typing import Any

PULSES = ('unary', 'weighted')


def check_pulses(where: str, pulses: str) -> None:
  """Refuse other forms of pulses, by ValueError."""
  if pulses not in PULSES:
    raise ValueError(
      f'{where}: pulses={pulses!r} is none of {", ".join(PULSES)}'
    )


def expected_step_cycles(
  f2: Any, f3: Any, group: Any, pulses: str = 'unary'
) -> Any:
  """Cycles of a step expected for independent weights of magnitude up to 3.

  The longest train is the number of lengths that some PE reaches, so its
  expectation is a sum of chances:

    unary:        1 + (1 - (1 - f2)^G) + (1 - (1 - f3)^G)
    weighted:     1 + (1 - (1 - f3)^G)

  With pulses of weight 2 a magnitude of 2 is as short as one of 1: f2 does
  not matter. Plain operators: numpy or JAX, broadcasting, differentiable;
  for G = 1 it is exact for any weights, and linear.

  Args:
    f2: Share of weights with a magnitude of at least 2.
    f3: Share of weights with a magnitude of at least 3.
    group: G, PEs in lock-step; of a ragged tile, those in use.
    pulses: One of `PULSES`, see `simulate.temporal_cycles`.

  Returns:
    Expected cycles, between 1 and 3 (or 2).

  Raises:
    ValueError: for other pulses.

  Source:
    FineQ, arXiv 2504.19746, says that PEs process by temporal coding; the
    lock-step and this form are ours.

  Examples:
    >>> round(expected_step_cycles(0.11, 0.03, 8), 2)
    1.82
  """
  check_pulses('expected_step_cycles', pulses)
  cycles = 1 + (1 - (1 - f3) ** group)
  if pulses == 'unary':
    cycles = cycles + (1 - (1 - f2) ** group)
  return cycles
