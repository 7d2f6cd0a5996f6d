"""Plans of mixed precision under budgets: what `mq allocate` does."""

from mq_jax.lab.allocating.asking import candidates, names, refusal
from mq_jax.lab.allocating.budgets import QUANTITIES, Budget, parse
from mq_jax.lab.allocating.output import show
from mq_jax.lab.allocating.running import run
from mq_jax.lab.allocating.setup import Ask, language_loss
from mq_jax.lab.allocating.solving import SOLVERS

__all__ = [
  'QUANTITIES',
  'SOLVERS',
  'Ask',
  'Budget',
  'candidates',
  'language_loss',
  'names',
  'parse',
  'refusal',
  'run',
  'show',
]
