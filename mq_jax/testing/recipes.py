"""Checks that every recipe must pass."""

import inspect
from collections.abc import Callable, Mapping, Sequence

from mq_jax.recipes import Recipe
from mq_jax.testing import _recipe_checks, _suite
from mq_jax.testing._suite import Report


def check_recipe(
  recipe: Recipe | Callable[..., Recipe],
  *,
  finer: Recipe | None = None,
  variants: Sequence[Recipe] = (),
  worst: float = 0.6,
  skip: Mapping[str, str] | None = None,
) -> Report:
  """Run the suite on a recipe.

  A matrix of 44 inputs and 21 outputs with heavy tails is quantized with the
  Hessian of correlated inputs. The checks, by name:
    quantizes: shape and dtype as given, finite, status ok.
    did_something: values are not the weights, and not far: the error of the
      layer's output is at most `worst` of the output.
    recorded: the record's errors are those of the values.
    bits_are_bytes: `ebw` is what `pack` stores, in bytes, over all weights.
    unpack: the packed bytes give the same values, and pack to the same bytes.
    json: the layout survives JSON (skipped for layouts of one's own).
    damaged: buffers that are too short or missing raise a ValueError.
    deterministic: the same bits twice, and the same program traced twice.
    vmap: matrices side by side give what they give one by one; so does
      decoding under `jit` and `vmap`.
    sharding: so do matrices spread over all devices (skipped with one).
    degenerate: all-zero, constant, one-outlier and two-scale matrices stay
      finite, pack, and zeros stay zeros.
    scaling: an eighth of the weight gives an eighth of the values.
    calibration: with the true Hessian the layer's output is better than with
      one that says nothing (skipped for recipes that use none).
    one_compile: other numbers in the leaves, and `variants`, compile nothing.
    size: twice as many inputs take no longer program.
    finer: the error of `finer` is smaller.

  Gradients are not asked for: quantizing a matrix has none. Those of its
  steps are in `check_step`.

  Args:
    recipe: The recipe, or its factory; its defaults are checked then, and
      `finer` is the factory's result with more `bits`, if it has any.
    finer: The same recipe with more bits.
    variants: Recipes that differ in numbers only, and must share the program.
    worst: Of 1, the error of the layer's output.
    skip: Reasons by name of checks to leave out.

  Returns:
    The checks that passed, and those skipped.

  Raises:
    AssertionError: naming every check that failed, and what was found.
    ValueError: if `skip` names no check.
    TypeError: for what is neither a recipe nor makes one.

  Examples:
    >>> from mq_jax import recipes
    >>> print(check_recipe(recipes.rtn(bits=3, group=16)).thing)
    rtn(bits=3, group=16)
  """
  if not isinstance(recipe, Recipe):
    factory = recipe
    recipe = factory() if callable(factory) else None
    if not isinstance(recipe, Recipe):
      raise TypeError(
        f'check_recipe: {factory!r:.80} is no Recipe, nor a factory of one'
      )
    finer = finer or _finer(factory)
  suite = _recipe_checks.Checks(recipe, finer, tuple(variants), worst)
  names = (
    *('quantizes', 'did_something', 'recorded', 'bits_are_bytes', 'unpack'),
    *('json', 'damaged', 'deterministic', 'vmap', 'sharding', 'degenerate'),
    *('scaling', 'calibration', 'one_compile', 'size', 'finer'),
  )
  checks = {name: getattr(suite, name) for name in names}
  return _suite.run('check_recipe', suite.label(recipe), checks, skip or {})


def _finer(factory) -> Recipe | None:
  """What the factory makes of the next width that it takes."""
  bits = inspect.signature(factory).parameters.get('bits')
  if bits is None or not isinstance(bits.default, int):
    return None
  for more in range(bits.default + 1, 17):
    try:
      return factory(bits=more)
    except ValueError:
      continue  # not a width of this recipe
  return None
