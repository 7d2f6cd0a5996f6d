"""The suite for steps, recipes and solvers: ours, and anybody else's.

from mq_jax import testing

def test_mine():
  testing.check_recipe(my_recipe)

Each function runs named checks and raises one AssertionError which names all
that failed, with what was found; it returns a `Report` of those that passed
and those that were left out, and why. Everything that mq_jax ships runs
through the same functions.
"""

from mq_jax.testing._suite import Report
from mq_jax.testing.problems import random_problem
from mq_jax.testing.recipes import check_recipe
from mq_jax.testing.solvers import check_solver
from mq_jax.testing.steps import check_step

__all__ = [
  'Report',
  'check_recipe',
  'check_solver',
  'check_step',
  'random_problem',
]
