"""Several recipes inside one matrix: a recipe for each block of it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from mq_jax import layouts
from mq_jax._pytrees import pytree_dataclass, static
from mq_jax.recipes._recipe import Recipe


@pytree_dataclass
class BlockParts:
  """What stands in the place of `Recipe.rows`; see `blocks`.

  Attributes:
    parts: The recipe of each block.
    axis: 'rows' or 'columns'.
    sizes: Of the blocks; empty for equal ones.
  """

  parts: tuple[Recipe, ...]
  axis: str = static('rows')
  sizes: tuple[int, ...] = static(())

  def cut(
    self, weight: jax.Array, hessian: jax.Array | None
  ) -> Iterator[tuple[Recipe, jax.Array, jax.Array | None]]:
    """Recipe, weight [..., k', n'] and Hessian [..., k', k'] of each block.

    Raises:
      ValueError: if the weight can't be cut so, see `layouts.blocks.spans`.
    """
    axis = layouts.blocks.AXES.index(self.axis) - 2
    found = layouts.blocks.spans(
      weight.shape[axis], len(self.parts), self.sizes
    )
    for part, span in zip(self.parts, found, strict=True):
      if self.axis == 'columns':
        yield part, weight[..., span], hessian
      else:
        inner = None if hessian is None else hessian[..., span, span]
        yield part, weight[..., span, :], inner

  def check(self, k: int, n: int) -> None:
    """Raises ValueError unless a matrix [k, n] can be cut so, all the way."""
    layout = layouts.Blocks(
      tuple(layouts.Dense() for _ in self.parts), self.axis, self.sizes
    )
    for part, shape in zip(self.parts, layout.shapes(k, n), strict=True):
      if isinstance(part.rows, BlockParts):
        part.rows.check(*shape)


def blocks(
  parts: Sequence[Recipe | Mapping[str, Any]],
  axis: str = 'rows',
  sizes: Sequence[int] = (),
) -> Recipe:
  """Cut the matrix into blocks and quantize each by a recipe of its own.

  A block is quantized as if it were the whole matrix, on the inputs that it
  sees: its result does not depend on the recipes of the others, so bits can
  be allocated to blocks one by one. Groups, clusters and tables of a recipe
  begin anew in each block, and are stored for each.

  What is lost: with blocks of columns nothing of the error compensation,
  whose columns are independent anyway (but a Hessian is factorized for each
  block). With blocks of rows, errors are made up for by later rows of the
  same block only; the Hessian's diagonal block is used, its damping relative
  to that block's mean.

  Counts of the record are sums over the blocks whose recipes count them, its
  status is the worst.

  Args:
    parts: Recipes, or mappings {'recipe': name, option: value, ...} of them.
      One for each block; they may be blocks again, for tiles.
    axis: 'rows' (inputs) or 'columns' (outputs).
    sizes: Of the blocks; none for as many equal ones as there are parts.

  Raises:
    ValueError: for parts that are no recipes or have activations or learning
      of their own, an unknown axis, or sizes that
      are not whole numbers >= 1, one for each part.

  Source:
    Ours. Recipes by row or column blocks of a layer are the granularity of
    mixed precision inside one matrix.

  Examples:
    >>> from mq_jax.recipes.rtn import rtn
    >>> recipe = blocks([rtn(bits=2), rtn(bits=2), {'recipe': 'none'}])
    >>> recipe.label
    'blocks(parts=[2 x rtn(bits=2), none], axis=rows)'
  """
  from mq_jax import recipes  # late: that module lists this recipe

  if isinstance(parts, str | Mapping) or not isinstance(parts, Sequence):
    raise ValueError(f'blocks: parts={parts!r:.60} is not a list of recipes')
  parts = tuple(
    part if isinstance(part, Recipe) else recipes.from_json(part)
    for part in parts
  )
  for part in parts:
    if part.activations is not None or part.learning is not None:
      raise ValueError(
        f'blocks: {part.label}: a site has one kind of activations and of '
        'learning; give them to the whole, not to its parts'
      )
  if axis not in layouts.blocks.AXES:
    raise ValueError(
      f'blocks: axis={axis!r} is not one of {layouts.blocks.AXES}'
    )
  sizes = tuple(sizes)
  whole = all(type(size) is int and size > 0 for size in sizes)
  if not parts or not whole or len(sizes) not in (0, len(parts)):
    raise ValueError(
      f'blocks: {len(parts)} parts of sizes {list(sizes)}; at least one part '
      'and no sizes, or a whole number >= 1 for each, are needed'
    )
  # Not by the decorator: options are compared and hashed, lists can't be.
  options = (('parts', parts), ('axis', axis))
  return Recipe(
    rows=BlockParts(parts, axis, sizes),
    name='blocks',
    options=options + ((('sizes', sizes),) if sizes else ()),
  )
