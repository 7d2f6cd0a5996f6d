"""Plans: which recipe each site gets, and carrying them out."""

import dataclasses
import difflib
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax import activations, quantize, recipes, sharding
from mq_jax import sites as sites_lib
from mq_jax.calibration import Statistics, check_coverage
from mq_jax.compensation import Status
from mq_jax.quantize import QuantizedMatrix
from mq_jax.recipes import Recipe
from mq_jax.sites import Site

# Left as they are by default: embeddings, output heads, and what sends tokens
# to experts: it is small, and a wrong choice costs more than a wrong weight.
EXCLUDED = ('*embed*', '*lm_head*', '*router*')

_BATCH_ELEMENTS = 1 << 24  # weights and Hessians quantized at a time


class Plan(NamedTuple):
  """Sites and the recipe of each."""

  entries: tuple[tuple[Site, Recipe], ...]

  def to_json(self) -> dict[str, Any]:
    """Plain data: site name to recipe name and options."""
    return {site.name: recipe.to_json() for site, recipe in self.entries}


class Coverage(NamedTuple):
  """What becomes of matrices that calibration data hardly reached.

  Of the experts of a mixture each sees the tokens sent to it. A Gram matrix of
  too few of them has directions without any weight, in which compensation is
  free to do harm.

  Attributes:
    least: Rows that a matrix must have seen.
    uncovered: 'error', or 'round': matrices that saw fewer are rounded
      without compensation, and their status says so.
  """

  least: int = 1
  uncovered: str = 'error'


COVERED = Coverage()


def from_json(data: Mapping[str, Any], sites: Sequence[Site]) -> Plan:
  """Undo `Plan.to_json`, for the sites of a model.

  Raises:
    ValueError: for sites, recipes or options that are not known.
  """
  found = {}
  for name, given in data.items():
    try:
      found[name] = recipes.from_json(given)
    except ValueError as error:
      raise ValueError(f'plan: {name}: {error}') from error
  return named(found, sites)


def named(recipes_of: Mapping[str, Recipe], sites: Sequence[Site]) -> Plan:
  """Give sites recipes by their names; the others stay as they are.

  Raises:
    ValueError: for a name of no site, with the nearest.
  """
  by_name = {site.name: site for site in sites}
  for name in recipes_of:
    if name not in by_name:
      near = difflib.get_close_matches(name, by_name, n=3)
      raise ValueError(f'plan: no site {name!r}; nearest are {near}')
  return Plan(tuple((by_name[n], recipe) for n, recipe in recipes_of.items()))


def plan(sites: Sequence[Site], rules: Sequence[tuple[str, Recipe]]) -> Plan:
  """Give every site the recipe of the first rule that matches its name.

  Args:
    sites: Sites of a model, from `sites.find`.
    rules: (glob pattern, recipe) pairs, e.g. ('layers/*/mlp/*', recipe).

  Returns:
    The plan; sites that no rule matches are left as they are.

  Raises:
    ValueError: if a rule matches no site, or one whose parameter can't be
      replaced.
  """
  entries, used = [], set()
  for site in sites:
    if site.kind == 'attention':
      continue
    for index, (pattern, recipe) in enumerate(rules):
      if fnmatch.fnmatchcase(site.name, pattern):
        if site.path is None:
          raise ValueError(
            f'plan: rule {pattern!r} matches {site.name}, whose parameter '
            f'cannot be replaced: {site.reason}'
          )
        entries.append((site, recipe))
        used.add(index)
        break
  for index, (pattern, _) in enumerate(rules):
    if index not in used:
      names = [site.name for site in sites if site.kind != 'attention']
      near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
      raise ValueError(
        f'plan: rule {pattern!r} matches no site (or only sites of earlier '
        f'rules); nearest names are {near}'
      )
  return Plan(tuple(entries))


def uniform(
  sites: Sequence[Site], recipe: Recipe, exclude: Sequence[str] = EXCLUDED
) -> Plan:
  """One recipe for every site that has a parameter of its own.

  Left out are tied parameters (they serve elsewhere, as embeddings do) and
  names that match a pattern of `exclude`.

  Raises:
    ValueError: if no site is left.
  """
  entries = tuple(
    (site, recipe)
    for site in sites
    if site.path is not None
    and not site.tied
    and not any(fnmatch.fnmatchcase(site.name, p) for p in exclude)
  )
  if not entries:
    names = ', '.join(site.name for site in sites) or 'none at all'
    raise ValueError(f'plan: no site left to quantize among: {names}')
  return Plan(entries)


def is_matrix(leaf: Any) -> bool:
  """Whether a leaf stands for a quantized matrix."""
  return isinstance(leaf, QuantizedMatrix)


def _hessian(
  site: Site, statistics, recipe: Recipe, coverage: Coverage
) -> tuple[jax.Array | None, np.ndarray | None]:
  """Of a site the Hessian, and the rows each of its matrices has seen.

  What is not covered gets the Hessian of no preference, the identity.
  """
  found = None if statistics is None else statistics.get(site.name)
  if found is None:
    if statistics is not None and recipe.calibrated:
      raise ValueError(
        f'{site.name}: {recipe.label} compensates errors, but calibration has '
        'no statistics of this site; calibrate with it'
      )
    return None, None
  if not isinstance(found, Statistics):
    return found, None
  if coverage.uncovered == 'error':
    check_coverage(site.name, found.count, coverage.least)
    return found.gram, np.asarray(found.count)
  count = np.asarray(found.count)
  short = count < coverage.least
  if not short.any():
    return found.gram, count
  eye = jnp.eye(found.gram.shape[-1], dtype=found.gram.dtype)
  return jnp.where(short[..., None, None], eye, found.gram), count


def _covered(
  matrix: QuantizedMatrix,
  count: np.ndarray | None,
  recipe: Recipe,
  coverage: Coverage,
) -> QuantizedMatrix:
  """With the rows that each of several matrices has seen in its record."""
  if count is None or not count.ndim:
    return matrix
  record = matrix.record | {'rows_seen': jnp.asarray(count, jnp.int32)}
  if recipe.calibrated:
    floor = np.where(count < coverage.least, int(Status.no_hessian), 0)
    record['status'] = jnp.maximum(
      record['status'], jnp.asarray(floor, record['status'].dtype)
    )
  return dataclasses.replace(matrix, record=record)


def _count(shape: Sequence[int]) -> int:
  return int(np.prod(shape, dtype=np.int64))


def _quantize_chunk(
  recipe: Recipe,
  members: Sequence[tuple[Site, jax.Array, Any]],
  inputs: Mapping[str, activations.Inputs],
) -> dict[Site, QuantizedMatrix]:
  """Sites of one shape and recipe, by one program."""
  # On a mesh, of these matrices each device has its own copy.
  members = [(s, *sharding.whole((leaf, h))) for s, leaf, h in members]
  members = [
    (site, leaf, *activations.as_seen(inputs.get(site.name), site, leaf, h))
    for site, leaf, h in members
  ]
  matrices = [matrix for _, _, matrix, _ in members]
  stack = lambda arrays: jnp.concatenate(
    [x.astype(jnp.float32).reshape(-1, *x.shape[-2:]) for x in arrays]
  )
  hessians = None
  if members[0][3] is not None:
    hessians = stack([hessian for *_, hessian in members])
  codes, record = jax.block_until_ready(
    quantize.quantize_batch(stack(matrices), recipe, hessians)
  )
  layout = quantize.layout_of(recipe)
  done, at = {}, 0
  for site, leaf, matrix, _ in members:
    batch = matrix.shape[:-2]
    span = slice(at, at + _count(batch))
    mine = lambda x, span=span, batch=batch: x[span].reshape(
      *batch, *x.shape[1:]
    )
    found = QuantizedMatrix(
      jax.tree.map(mine, codes),
      jax.tree.map(mine, record),
      layout,
      matrix.shape,
      str(leaf.dtype),
      site=site,
      recipe=recipe.label,
    )
    done[site] = activations.attach(found, inputs.get(site.name))
    at = span.stop
  return done


def runnable(
  f: Callable[..., Any], params: Any
) -> tuple[Callable[..., Any], Any]:
  """A function and parameters that run as quantized: weights and inputs.

  Args:
    f: `f(params, *batch)`.
    params: Its parameters, compressed or not.

  Returns:
    `g` and `given`: `g(given, *batch)` is `f` with plain parameters, or, where
    inputs are quantized, `activations.quantize_inputs(f)`, which is one object
    for an `f`.
  """
  found = {n: activations.of_matrix(m) for n, m in matrices(params).items()}
  inputs = {n: x for n, x in found.items() if x is not None}
  if not inputs:
    return f, decode(params)
  return activations.quantize_inputs(f), (decode(params), inputs)


def compress(
  params: Any,
  plan: Plan,
  *,
  statistics: Mapping[str, Statistics | jax.Array] | None = None,
  inputs: Mapping[str, activations.Inputs] | None = None,
  coverage: Coverage = COVERED,
  progress: Callable[[int, int], None] | None = None,
) -> Any:
  """Quantize the parameters of a plan's sites.

  Everything is checked before anything is computed. Matrices of one shape
  and recipe are quantized together; recipes that differ in numbers only share
  a compiled program.

  Args:
    params: The model's parameters.
    plan: Which recipe each site gets.
    statistics: From `calibrate`, by site name (or Hessians themselves). None
      lets recipes that compensate errors round plainly, as their records say.
    inputs: What is done to the inputs of sites whose recipes have
      `activations`, from `activations.choose`; None chooses here. Statistics
      are of inputs as they come, or as `calibrate(..., inputs=...)` has them.
    coverage: What becomes of matrices that calibration hardly reached.
    progress: Called with the matrices done and their number.

  Returns:
    `params` with a `QuantizedMatrix` in place of every site's parameter.

  Raises:
    TypeError, ValueError: for weights or statistics that can't be used, by
      site.
  """
  if inputs is None:
    for site, recipe in plan.entries:
      if recipe.activations and recipe.activations.sees == 'quantized':
        raise ValueError(
          f'{site.name}: {recipe.label}: needs statistics of quantized inputs; '
          'give inputs and statistics of mq_jax.activations.prepare'
        )
    inputs = activations.choose(params, plan.entries, statistics)
  if coverage.uncovered not in ('error', 'round'):
    raise ValueError(
      f"coverage: uncovered={coverage.uncovered!r} must be 'error' or 'round'"
    )
  jobs: dict[Any, list] = {}
  counts: dict[Site, np.ndarray | None] = {}
  total = 0
  for site, recipe in plan.entries:
    leaf = sites_lib.get(params, site)
    if is_matrix(leaf):
      raise ValueError(f'{site.name}: is quantized already')
    leaf = jnp.asarray(leaf)
    hessian, counts[site] = _hessian(site, statistics, recipe, coverage)
    matrix = site.matrix(leaf)
    quantize.check_matrix(site.name, matrix, hessian, recipe)
    key = (matrix.shape[-2:], hessian is None, recipe)
    jobs.setdefault(key, []).append((site, leaf, hessian))
    total += _count(matrix.shape[:-2])

  chunks = []
  for ((k, n), _, recipe), members in jobs.items():
    room = max(1, _BATCH_ELEMENTS // (k * (n + k)))
    if isinstance(recipe.rows, recipes.BlockParts):
      # Programs of another batch size may sum in another order. One site at
      # a time, a block comes out the same bits whatever the rest of the plan.
      room = 1
    for start in range(0, len(members), room):
      chunks.append((recipe, members[start : start + room]))
  new, done = {}, 0
  for recipe, members in chunks:
    part = _quantize_chunk(recipe, members, inputs)
    new |= {
      site: _covered(matrix, counts[site], recipe, coverage)
      for site, matrix in part.items()
    }
    done += sum(_count(matrix.shape[:-2]) for matrix in part.values())
    if progress is not None:
      progress(done, total)
  return sites_lib.put(params, new)


def dequantize(params: Any) -> Any:
  """Plain arrays in place of all quantized matrices; may be jitted."""

  def plain(leaf):
    if not is_matrix(leaf):
      return leaf
    values = leaf.dequantize()
    return values if leaf.site is None else leaf.site.unmatrix(values)

  return jax.tree.map(plain, params, is_leaf=is_matrix)


@jax.jit
def _decode(matrix: QuantizedMatrix) -> jax.Array:
  return matrix.dequantize()


def decode(params: Any) -> Any:
  """As `dequantize`, compiled once for each layout and shape.

  One program for a whole model would take long to compile; op by op it would
  take long to run.
  """

  def one(leaf):
    if not is_matrix(leaf):
      return leaf
    # What only names the matrix would make each a program of its own.
    bare = dataclasses.replace(
      leaf, record={}, site=None, recipe='', inputs=None
    )
    values = _decode(bare)
    return values if leaf.site is None else leaf.site.unmatrix(values)

  return jax.tree.map(one, params, is_leaf=is_matrix)


def matrices(params: Any) -> dict[str, QuantizedMatrix]:
  """The quantized matrices of a model, by site name."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_matrix)
  return {
    leaf.site.name if leaf.site else jax.tree_util.keystr(path): leaf
    for path, leaf in leaves
    if is_matrix(leaf)
  }


def records(params: Any) -> list[dict[str, Any]]:
  """One record a site: recipe, shape, bits, errors (means), counts (sums).

  Of sites with several matrices also the rows that calibration gave them, all
  together and to the one with the fewest.
  """
  rows = []
  for name, matrix in matrices(params).items():
    row = {
      'site': name,
      'recipe': matrix.recipe,
      'shape': list(matrix.shape),
      'ebw': matrix.ebw,
      'ebw_paper': matrix.ebw_paper,
      'status': matrix.status.name,
    }
    if matrix.inputs is not None:
      k = matrix.shape[-2]
      row['activation_bits'] = float(matrix.inputs.bits_per_element(k))
    for key, value in matrix.record.items():
      if key != 'status':
        value = np.asarray(value)
        whole = np.issubdtype(value.dtype, np.integer)
        row[key] = int(value.sum()) if whole else float(value.mean())
      if key == 'rows_seen':
        row['rows_seen_least'] = int(value.min())
    rows.append(row)
  return rows


class Size(NamedTuple):
  """Stored bits of a model's quantized matrices, all together."""

  bits: int
  elements: int
  ebw: float
  ebw_paper: float


def size(params: Any) -> Size:
  """What the quantized matrices of a model take up."""
  found = matrices(params).values()
  elements = sum(matrix.size for matrix in found)
  bits = sum(8 * matrix.nbytes for matrix in found)
  paper = sum(matrix.ebw_paper * matrix.size for matrix in found)
  share = max(1, elements)
  return Size(bits, elements, bits / share, paper / share)
