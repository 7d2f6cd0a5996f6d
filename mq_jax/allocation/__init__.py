"""Bit allocation: which recipe for which site, under hardware budgets.

Every solver is a function of a `Problem` that returns a choice, the number of
a candidate for each site, which keeps all budgets and ties.
"""

from mq_jax.allocation import (
  candidates,
  codesign,
  gradient,
  hessians,
  leaves,
  losses,
  measured,
  search,
  sensitivities,
)
from mq_jax.allocation.exact import (
  Bound,
  brute_force,
  dynamic_program,
  integer_program,
  lagrangian,
  lagrangian_bound,
)
from mq_jax.allocation.heuristics import (
  bisection,
  greedy,
  in_order,
  inverse_order,
  levels,
  monotone_pareto,
  random_choice,
  random_choices,
)
from mq_jax.allocation.population import evolve, policy_gradient
from mq_jax.allocation.problem import (
  InfeasibleError,
  Problem,
  collapse,
  evaluate,
  feasible,
  make_problem,
)

__all__ = [
  'Bound',
  'InfeasibleError',
  'Problem',
  'bisection',
  'brute_force',
  'candidates',
  'codesign',
  'collapse',
  'dynamic_program',
  'evaluate',
  'evolve',
  'feasible',
  'gradient',
  'greedy',
  'hessians',
  'in_order',
  'integer_program',
  'inverse_order',
  'lagrangian',
  'lagrangian_bound',
  'leaves',
  'levels',
  'losses',
  'make_problem',
  'measured',
  'monotone_pareto',
  'policy_gradient',
  'random_choice',
  'random_choices',
  'search',
  'sensitivities',
]
