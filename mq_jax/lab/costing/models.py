"""What is priced: published shapes, models, artifacts, and plans of them."""

import dataclasses
import difflib
import fnmatch
import json
import os
import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from mq_jax import artifacts, hardware, plans, recipes
from mq_jax import sites as sites_lib
from mq_jax.lab import opening
from mq_jax.models import bundled
from mq_jax.recipes import Recipe
from mq_jax.sites import Site

MODELS = tuple(hardware.shapes.MODELS)
_CONTEXT = 2048
_LAYER = re.compile(r'^\d+/')


class Model(NamedTuple):
  """Matmuls of a model and, where there are weights, how to quantize them.

  Attributes:
    name: For tables.
    kind: 'shapes', 'weights' or 'packed'.
    workload: One entry a site, [l].
    language_model: With weights, else None.
    sites: In the workload's order; () for shapes.
    left_out: Names of sites that quantizers leave alone: heads, ties.
    notes: What a reader must know.
    context: Tokens of a sequence that the workload was made for; None for
      models of images.
  """

  name: str
  kind: str
  workload: hardware.Workload
  language_model: Any = None
  sites: tuple[Site, ...] = ()
  left_out: tuple[str, ...] = ()
  notes: tuple[str, ...] = ()
  context: int | None = _CONTEXT


def open_model(
  name: str,
  phase: str = 'prefill',
  *,
  batch: int = 1,
  context: int | None = None,
  named: Collection[str] = (),
  mesh: str | None = None,
) -> Model:
  """Open a model of whichever kind, and list its matmuls.

  Embeddings, output heads and tied weights are left out, as quantizers leave
  them, unless they are packed or named.

  Args:
    name: One of `hardware.shapes.MODELS`, a bundled model, a Hugging Face
      folder or name, or an artifact.
    phase: 'prefill' or 'decode'.
    batch: Sequences or images.
    context: Tokens of a sequence; by default 2048, or the model's own
      context if that is shorter.
    named: Sites of a plan. Where they are those of single layers, as
      '3/q_proj', shapes are listed layer by layer.
    mesh: See `opening.open_any`.

  Raises:
    ValueError: for a name that is nothing, with the nearest ones, and for
      whatever `hardware.workload` refuses.
    FileNotFoundError: if a file of it is missing.
  """
  if name in MODELS:
    context = _CONTEXT if context is None else context
    work = hardware.workload.model(
      name,
      phase,
      batch=batch,
      context=context,
      each_layer=any(_LAYER.match(x) for x in named),
    )
    images = hardware.shapes.MODELS[name].images
    return Model(name, 'shapes', work, context=None if images else context)
  on_hub = name.count('/') == 1 and name[0] not in '/.~'
  names = bundled.names()
  if not (name in names or pathlib.Path(name).is_dir() or on_hub):
    near = difflib.get_close_matches(name, [*MODELS, *names], 3, 0.5)
    hint = f'; did you mean {" or ".join(map(repr, near))}?' if near else ''
    raise ValueError(
      f'no model {name!r}{hint}; accepted are published shapes '
      f'({", ".join(MODELS)}), bundled models ({", ".join(names)}), a folder '
      'of Hugging Face or `mq quantize`, and org/name on the hub'
    )
  packed = artifacts.is_artifact(name)
  # A refusal of phase, batch or context must not wait for the weights.
  hardware.workload.model('opt-125m', phase, batch=batch, context=context or 1)
  model = opening.open_any(name, mesh)
  own = model.config.max_position_embeddings
  context = min(_CONTEXT, own) if context is None else context
  notes = []
  if context > own:
    notes.append(f'context {context} is longer than the model reads, {own}')
  tokens = min(8, own)
  params = plans.dequantize(model.params) if packed else model.params
  found = sites_lib.find(model.apply, params, jnp.zeros((1, tokens), jnp.int32))
  kept = [site for site in found if site.kind != 'attention']
  present = {*plans.matrices(model.params), *named}
  outside = lambda site: (
    site.path is None
    or site.tied
    or any(fnmatch.fnmatchcase(site.name, p) for p in plans.EXCLUDED)
  )
  left = [s for s in kept if outside(s) and s.name not in present]
  kept = [s for s in kept if s not in left]
  work = hardware.workload.from_sites(
    kept, phase, batch=batch, context=context, tokens=tokens
  )
  work = _own_rows(work, model.config)
  return Model(
    model.name,
    'packed' if packed else 'weights',
    work,
    model,
    tuple(kept),
    tuple(site.name for site in left),
    tuple(notes),
    context,
  )


def _own_rows(work: hardware.Workload, config: Any) -> hardware.Workload:
  """Rows of experts: each sees its share of the tokens, not all of them.

  `models.decoder` gives an expert zero rows for the others, which hardware
  that knows of experts does not compute.
  """
  if not config.num_experts:
    return work
  share = config.experts_per_token / config.num_experts
  rows = [
    max(1, round(int(m) * share)) if '/experts/' in name else int(m)
    for name, m in zip(work.names, work.m, strict=True)
  ]
  return dataclasses.replace(work, m=np.array(rows))


def read_plan(path: str | os.PathLike) -> dict[str, Recipe]:
  """Recipes by site name from a file as `Plan.to_json` makes it.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: for a file of another form, an unknown recipe or option.
  """
  try:
    data = json.loads(pathlib.Path(path).read_text('utf-8'))
  except FileNotFoundError:
    raise FileNotFoundError(f'{path}: no such plan') from None
  except (UnicodeDecodeError, json.JSONDecodeError) as error:
    raise ValueError(f'{path}: not JSON: {error}') from error
  if not isinstance(data, dict) or not data:
    raise ValueError(f'{path}: a plan maps site names to recipes')
  found = {}
  for site, given in data.items():
    if not isinstance(given, dict) or not isinstance(given.get('recipe'), str):
      raise ValueError(
        f"{path}: {site}: needs {{'recipe': name, option: value, ...}}, got "
        f'{given!r:.60}'
      )
    options = {k: v for k, v in given.items() if k != 'recipe'}
    try:
      found[site] = recipes.make(given['recipe'], **options)
    except (ValueError, TypeError) as error:
      raise ValueError(f'{path}: {site}: {error}') from error
  return found


def assign(model: Model, plan: Mapping[str, Recipe]) -> list[Recipe | None]:
  """The recipe of each matmul of a model; None where the plan has none.

  Of shapes, '3/q_proj' is one layer and 'q_proj' all layers not named so.

  Raises:
    ValueError: for sites that the model does not have, with the nearest.
  """
  names = list(model.workload.names)
  general = [_LAYER.sub('', n) if model.kind == 'shapes' else n for n in names]
  known = dict.fromkeys([*general, *names])
  for name in plan:
    if name not in known:
      near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.0)
      raise ValueError(f'plan: no site {name!r}; nearest are {", ".join(near)}')
  return [plan.get(n, plan.get(g)) for n, g in zip(names, general, strict=True)]
