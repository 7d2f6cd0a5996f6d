"""Everything that we ship runs through the suite: a new thing, a new line."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mq_jax import allocation, clusters, formats, recipes, steps, testing

# A recipe, and what is known about it beyond the suite's defaults.
RECIPES = (
  (recipes.none(), {'skip': {'scaling': 'trivial for bfloat16'}}),
  (
    recipes.rtn(bits=4, group=16),
    {
      'finer': recipes.rtn(bits=5, group=16),
      'variants': [recipes.rtn(bits=2, group=16)],
    },
  ),
  (recipes.rtn(bits=3, group=10, symmetric=True, clip='search'), {}),
  (
    recipes.rtn(bits=2, group=16, clip=0.7),
    {'variants': [recipes.rtn(bits=3, group=16, clip=0.9)]},
  ),
  (
    recipes.gptq(bits=2, group=16),
    {
      'finer': recipes.gptq(bits=3, group=16),
      'variants': [recipes.gptq(bits=8, group=16, damping=0.1)],
    },
  ),
  (recipes.gptq(bits=5, group=8, order='activation'), {}),
  (
    recipes.awq(bits=3, group=16, steps=4),
    {
      'variants': [recipes.awq(bits=4, group=16, steps=4)],
      'skip': {'calibration': 'its clipping takes inputs as uncorrelated'},
    },
  ),
  # What it begins with: `mq_jax.learn` needs more than one matrix.
  (recipes.autoround(bits=4, group=16).with_learning(None), {}),
  (
    recipes.omniquant(bits=3, group=16).with_learning(None),
    {'skip': {'calibration': 'its clipping takes inputs as uncorrelated'}},
  ),
  (
    recipes.omni_microscopiq(bits=2, sigma=1.5, block=16).with_learning(None),
    {},
  ),
  (recipes.learned_fineq().with_learning(None), {}),
  (
    recipes.balanced(levels=5, group=16),
    {
      'finer': recipes.balanced(levels=11, group=16),
      'variants': [recipes.balanced(levels=5, group=16, damping=0.1)],
    },
  ),
  (recipes.balanced(levels=3, group=10, compensate=False), {}),
  (recipes.olive(), {}),
  (recipes.olive(bits=2), {}),
  (
    recipes.gobo(bits=3, log_probability=-1.0),
    {'skip': {'scaling': 'what is an outlier depends on the scale'}},
  ),
  (
    recipes.microscopiq(bits=2, sigma=1.5, block=16),
    {
      'finer': recipes.microscopiq(bits=4, sigma=1.5, block=16),
      'variants': [
        recipes.microscopiq(bits=4, sigma=2.0, block=16, damping=0.1)
      ],
    },
  ),
  (recipes.microscopiq(bits=4, sigma=1.5, block=16, micro_block=4), {}),
  (recipes.microscopiq(bits=3, sigma=1.5, block=16, axis='in'), {}),
  (recipes.microscopiq(bits=2, sigma=1.5, block=16, prune=False), {}),
  (recipes.fineq(), {}),
  (recipes.fineq(compensate=True, scales=2, share=1), {}),
  (recipes.fineq(cluster=4, rule='sigma', scale='absmax', share=4), {}),
  (
    recipes.blocks([recipes.gptq(bits=3, group=16), recipes.rtn(group=16)]),
    {},
  ),
  (
    recipes.blocks(
      [recipes.awq(bits=3, group=16, steps=4), recipes.none()],
      axis='columns',
      sizes=[8, 13],
    ),
    {},
  ),
)

DETECT = steps.DetectOutliers(1.5)

# One line a step: what is applied to a cluster of 12, or 8 where it must.
STEPS = {
  'clip': (steps.Clip(0.7), {'smooth': True}),
  'detect': (DETECT, {}),
  'largest': (clusters.chain(DETECT, steps.KeepLargestOutliers(2)), {}),
  'prune': (clusters.chain(DETECT, steps.PruneForOutliers()), {}),
  'nearest': (
    steps.RoundToNearest(3),
    {
      'finer': steps.RoundToNearest(4),
      'variants': [steps.RoundToNearest(2, clip=0.5)],
    },
  ),
  'stochastic': (
    steps.RoundToNearest(3, rounding='stochastic'),
    {
      'key': jax.random.key(0),
      'skip': {'gradient': 'the square of a scale below 1e-19 underflows'},
    },
  ),
  'straight_through': (
    steps.RoundInliers(3, rounding='straight_through'),
    {'finer': steps.RoundInliers(4, rounding='straight_through')},
  ),
  'format': (steps.RoundToFormat(formats.E2M1), {}),
  'format_mx': (steps.RoundToFormat(formats.E2M1, scale='exponent'), {}),
  'pattern': (steps.RoundToPattern(jnp.ones(4), rule='mse'), {}),
  'pattern_ratio': (steps.RoundToPattern(jnp.ones(4), rule='ratio'), {}),
  'pattern_sigma': (
    steps.RoundToPattern(jnp.ones(4), threshold=2.0, rule='sigma'),
    {},
  ),
  'full': (
    clusters.chain(
      DETECT,
      steps.KeepLargestOutliers(4),
      steps.PruneForOutliers(),
      steps.RoundInliers(2),
      steps.RoundOutliers(2),
      steps.SplitOutliers(2),
    ),
    {'size': 8},
  ),
}


def _order(problem):
  return np.arange(len(problem.sites))


SOLVERS = {
  'brute_force': (allocation.brute_force, {'within': 0.0}),
  'dynamic_program': (allocation.dynamic_program, {'within': 0.0}),
  'integer_program': (allocation.integer_program, {'within': 0.0}),
  'lagrangian': (allocation.lagrangian, {'within': 0.1}),
  'gradient': (allocation.gradient.gradient, {'within': 0.1}),
  'greedy': (allocation.greedy, {'within': 0.25}),
  'greedy_up': (
    functools.partial(allocation.greedy, start='cheapest'),
    {'within': 0.25},
  ),
  'in_order': (lambda p: allocation.in_order(p, _order(p)), {}),
  'inverse_order': (
    lambda p: allocation.inverse_order(p, np.sin(7.0 * _order(p))),
    {},
  ),
  'random_choice': (functools.partial(allocation.random_choice, seed=0), {}),
  'evolve': (
    functools.partial(allocation.evolve, seed=0, population=16, generations=20),
    {'within': 0.1},
  ),
  'policy_gradient': (
    functools.partial(
      allocation.policy_gradient, key=jax.random.key(0), steps=100
    ),
    {'within': 0.25, 'problems': 3, 'sites': 4},
  ),
}


# What runs by default, by id; the others: by -m slow. The steps are all there,
# most of them in 'full'.
QUICK = {
  'none',
  'rtn(bits=4, group=16)',
  'gptq(bits=2, group=16)',
  'microscopiq(bits=2, sigma=1.5, block=16)',
  'fineq',
  *('clip', 'nearest', 'format_mx', 'pattern', 'full'),
  *('dynamic_program', 'lagrangian', 'gradient', 'greedy', 'in_order'),
  'evolve',
}


def _marked(value, name):
  marks = [] if name in QUICK else [pytest.mark.slow]
  return pytest.param(value, marks=marks, id=name)


@pytest.mark.parametrize('recipe', [_marked(x, x[0].label) for x in RECIPES])
def test_recipe(recipe):
  testing.check_recipe(recipe[0], **recipe[1])


@pytest.mark.parametrize('name', [_marked(name, name) for name in STEPS])
def test_step(name):
  step, options = STEPS[name]
  testing.check_step(step, **options)


@pytest.mark.parametrize('name', [_marked(name, name) for name in SOLVERS])
def test_solver(name):
  solve, options = SOLVERS[name]
  testing.check_solver(solve, **options)


def test_nothing_is_left_out():
  assert {recipe.name for recipe, _ in RECIPES} == set(recipes.NAMES)
  classes = {
    type(leaf).__name__
    for step, _ in STEPS.values()
    for leaf in (step.steps if isinstance(step, clusters.Chain) else (step,))
  }
  offered = {name for name in steps.__all__ if inspect.isclass(_of(name))}
  assert classes == offered
  # What takes a problem, and nothing else that it needs, and chooses.
  solvers = {
    name
    for name in allocation.__all__
    if name.islower() and _takes_a_problem(getattr(allocation, name))
  }
  rest = {
    *('collapse', 'evaluate', 'feasible', 'lagrangian_bound', 'levels'),
    'random_choices',  # many at a time
    'monotone_pareto',  # refuses what no choice in the order of costs meets
    'bisection',  # of an accuracy, not of the problem's losses
  }
  assert solvers - rest <= set(SOLVERS) | {'gradient'}


def _of(name):
  return getattr(steps, name)


def _takes_a_problem(thing):
  return callable(thing) and 'problem' in inspect.signature(thing).parameters
