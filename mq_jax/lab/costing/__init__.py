"""Prices of models on accelerators: what `mq cost` does."""

from mq_jax.lab.costing.entries import (
  Default,
  Design,
  Named,
  Request,
  design,
  make_recipe,
  parse,
  recipe_of,
  requests,
  width_of,
)
from mq_jax.lab.costing.models import (
  Model,
  assign,
  open_model,
  read_plan,
)
from mq_jax.lab.costing.output import (
  as_json,
  check_target,
  figure,
  show,
  write,
)
from mq_jax.lab.costing.pricing import (
  Priced,
  check,
  grouped,
  price,
  run,
)

__all__ = [
  'Default',
  'Design',
  'Model',
  'Named',
  'Priced',
  'Request',
  'as_json',
  'assign',
  'check',
  'check_target',
  'design',
  'figure',
  'grouped',
  'make_recipe',
  'open_model',
  'parse',
  'price',
  'read_plan',
  'recipe_of',
  'requests',
  'run',
  'show',
  'width_of',
  'write',
]
