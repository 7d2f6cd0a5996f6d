"""Plans of mixed precision under budgets: what `mq allocate` does."""

from mq_jax.lab.allocating.asking import candidates, names, refusal
from mq_jax.lab.allocating.budgets import QUANTITIES, Budget, parse
from mq_jax.lab.allocating.output import show
from mq_jax.lab.allocating.running import run
from mq_jax.lab.allocating.setup import LOSSES, Ask
from mq_jax.lab.allocating.solving import SOLVERS

__all__ = [
  'LOSSES',
  'QUANTITIES',
  'SOLVERS',
  'Ask',
  'Budget',
  'candidates',
  'names',
  'parse',
  'refusal',
  'run',
  'show',
]
