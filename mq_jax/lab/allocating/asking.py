"""What the command line asks for, in words: candidates, ties, solvers.

--candidate '[PATTERN@]RECIPE[:OPTION=VALUE,...]'
    gptq:bits=4,group=64        for every site
    '*/mlp/*@microscopiq:bits=2'  for the sites that the glob matches

--tie 'PATTERN[,PATTERN...]'
    '*/mlp/up_proj/*'           all matching sites choose alike
    'layers/{}/*/[qkv]_proj/*'  those with the same {} choose alike;
                                {} stands for a part of the name without /
"""

import collections
import contextlib
import difflib
import fnmatch
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mq_jax import allocation, hardware
from mq_jax.lab import costing
from mq_jax.lab.costing.entries import unknown
from mq_jax.recipes import Recipe

_GROUP = 64
# Designs that are made for integers of any kind; others for one system.
_GENERIC = ('rtn', 'none')


class Candidate(NamedTuple):
  """A recipe, and globs of the sites that may have it."""

  recipe: Recipe
  patterns: tuple[str, ...] = ('*',)


def candidates(
  texts: Sequence[str], design: costing.Design | None = None
) -> tuple[Candidate, ...]:
  """Read candidates; the default ones where there are none.

  Raises:
    ValueError: for another form, an unknown recipe or option, or less than
      two recipes.
  """
  if not texts:
    return _default(design)
  found: dict[str, Candidate] = {}
  for text in texts:
    pattern, at, name = text.rpartition('@')
    pattern, name = pattern.strip() if at else '*', name.strip()
    try:
      if not pattern or '/' in name:
        raise ValueError('a part of it is empty, or has a slash')
      # The recipe of an entry of `mq cost`, which stands behind a slash.
      given = costing.parse(f'/{name}', costing.Named('')).recipe
    except ValueError as error:
      raise ValueError(
        f'--candidate {text!r}: needs the form '
        f'[PATTERN@]RECIPE[:OPTION=VALUE,...]: {error}'
      ) from error
    try:
      recipe = costing.make_recipe(given)
    except ValueError as error:
      raise ValueError(f'--candidate {text!r}: {error}') from error
    before = found.get(recipe.label, Candidate(recipe, ()))
    found[recipe.label] = Candidate(recipe, (*before.patterns, pattern))
  if len(found) < 2:
    raise ValueError(
      f'--candidate {texts[0]}: one recipe leaves nothing to choose; give two '
      'or more'
    )
  return tuple(found.values())


def _default(design: costing.Design | None) -> tuple[Candidate, ...]:
  """Integers of several widths and FineQ; of an accelerator, what it runs."""
  make = lambda name, **options: costing.make_recipe(
    costing.Named(name, tuple(options.items()))
  )
  if design is None or design.default.recipe in _GENERIC:
    found = [make('gptq', bits=b, group=_GROUP) for b in (2, 3, 4, 6)]
    found.insert(1, make('fineq', compensate=True))
  elif design.default.recipe == 'fineq':
    found = [make('fineq', compensate=True)]
  else:
    found = []
    for bits in (2, 3, 4, 6, 8):
      with contextlib.suppress(ValueError):  # of widths that it does not have
        found.append(make(design.default.recipe, bits=bits))
  if design is not None:
    found = [r for r in found if not refusal(design, r)]
  if len(found) < 2:
    raise ValueError(
      f'{design.name}: runs only {len(found)} of the default candidates; say '
      'which with --candidate, two or more'
    )
  return tuple(map(Candidate, found))


def refusal(
  design: costing.Design, recipe: Recipe, activation_bits: int | None = None
) -> str:
  """Why an accelerator does not run a recipe; '' if it does."""
  bits = activation_bits or design.default.activation_bits
  width = costing.width_of(recipe)
  try:
    design.accelerator.check(hardware.precision(width, bits, output_bits=16))
  except ValueError as error:
    return str(error)
  return ''


def allowed(asked: Sequence[Candidate], sites: Sequence[str]) -> np.ndarray:
  """Which candidates each site may have. bool[l, c].

  Raises:
    ValueError: for a pattern that matches no site, or a site that none does.
  """
  table = np.zeros((len(sites), len(asked)), bool)
  for j, candidate in enumerate(asked):
    for pattern in candidate.patterns:
      hits = [fnmatch.fnmatchcase(site, pattern) for site in sites]
      if not any(hits):
        raise ValueError(
          f'--candidate {pattern}@{candidate.recipe.label}: matches no site'
          + _nearest(pattern, sites)
        )
      table[:, j] |= hits
  empty = ~table.any(axis=1)
  if empty.any():
    raise ValueError(
      f'{sites[int(np.argmax(empty))]}: has no candidate ({int(empty.sum())} '
      'such sites); give one without a PATTERN@, or leave it out by --exclude'
    )
  return table


def exclude(patterns: Sequence[str], sites: Sequence[str]) -> list[int]:
  """Sites that no pattern matches, by number.

  Raises:
    ValueError: for a pattern that matches nothing, or if no site is left.
  """
  left = list(range(len(sites)))
  for pattern in patterns:
    hits = {i for i, s in enumerate(sites) if fnmatch.fnmatchcase(s, pattern)}
    if not hits:
      raise ValueError(
        f'--exclude {pattern}: matches no site{_nearest(pattern, sites)}'
      )
    left = [i for i in left if i not in hits]
  if not left:
    raise ValueError(f'--exclude {" ".join(patterns)}: leaves no site')
  return left


def ties(texts: Sequence[str], sites: Sequence[str]) -> list[list[str]]:
  """Groups of sites that must choose alike.

  Raises:
    ValueError: for a pattern that matches no site, or ties no two.

  Examples:
    >>> ties(['{}/[qk]'], ['0/q', '0/k', '0/v', '1/q', '1/k'])
    [['0/q', '0/k'], ['1/q', '1/k']]
  """
  groups = []
  for text in texts:
    members = collections.defaultdict(list)
    for pattern in (part.strip() for part in text.split(',')):
      matched = [(s, _same_part(pattern, s)) for s in sites]
      if all(part is None for _, part in matched):
        raise ValueError(
          f'--tie {text}: {pattern!r} matches no site{_nearest(pattern, sites)}'
        )
      for site, part in matched:
        if part is not None and site not in members[part]:
          members[part].append(site)
    found = [group for group in members.values() if len(group) > 1]
    if not found:
      raise ValueError(f'--tie {text}: ties no two sites to each other')
    groups += found
  return groups


def _same_part(pattern: str, site: str) -> tuple[str, ...] | None:
  """What the {} of a pattern stand for in a name; None if it doesn't match."""
  # translate gives (?s:...)\Z; the parts are joined, the end is kept once.
  parts = [fnmatch.translate(part) for part in pattern.split('{}')]
  inner = [part[4 : part.rindex(')')] for part in parts]
  found = re.fullmatch('(?s:' + '([^/]+)'.join(inner) + ')', site)
  return None if found is None else found.groups()


def check(
  table: np.ndarray,
  sites: Sequence[str],
  groups: Sequence[Sequence[str]],
) -> None:
  """Refuse ties between sites that have no candidate in common.

  Raises:
    ValueError: naming one of the sites.
  """
  # Of a problem without losses and costs: only who may have what.
  allocation.make_problem(
    np.where(table, 0.0, np.inf),
    {'nothing': np.zeros(table.shape)},
    {},
    sites=sites,
    ties=groups,
  )


def _nearest(pattern: str, sites: Sequence[str]) -> str:
  near = difflib.get_close_matches(pattern, sites, n=3, cutoff=0.0)
  return f'; nearest are {", ".join(near)}'


def names(text: str, solver: str, known: Sequence[str]) -> tuple[str, ...]:
  """Solvers to run, the one whose plan is written first.

  Args:
    text: 'all', 'none', or names with commas between them.
    solver: The one whose plan is written.
    known: Names there are.

  Raises:
    ValueError: for unknown names.
  """
  if solver not in known:
    raise unknown('--solver: no solver', solver, known)
  if text == 'none':
    return (solver,)
  also = known if text == 'all' else [part.strip() for part in text.split(',')]
  for name in also:
    if name not in known:
      raise unknown('--also: no solver', name, [*known, 'all', 'none'])
  return tuple(dict.fromkeys([solver, *also]))
