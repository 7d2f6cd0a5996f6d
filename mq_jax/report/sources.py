"""What folders hold, as data to compare: rows, sites, configs, seeds.

`lab.reporting` reads folders; here rows of runs that differ in nothing but
the seed become means, and rows that can be compared stand together.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]

# Of rows; less is better in each.
METRICS = (
  *('ebw', 'ebw_paper', 'nll', 'perplexity', 'bits_per_byte', 'seconds'),
)

# Of a config; no number depends on them.
_IDLE = ('seed', 'artifact')

_MOST_BEST = 3  # rows that may share the mark of the best


@dataclasses.dataclass(frozen=True)
class Source:
  """One folder.

  Attributes:
    kind: Command that wrote it: 'run', 'sweep', 'allocate', 'cost'.
    name: How it is called; no two sources of a report share it.
    path: Where it lies.
    state: 'finished', or how far it is.
    finished: Whether there is nothing left to do.
    config: All that its numbers depend on, and the seed; a list is compared
      by its members.
    operative: Its config as a file, if it has one.
    facts: More to know of it: commit, time.
    rows: A record for each result, with `model`, `text` (what its loss was
      measured on), `recipe`, `family`, and numbers named as in
      `tables.COLUMNS`.
    sites: Records of sites by (model, recipe), each by the site's name, with
      `ebw`, and `output_error` or `alone`.
    report: Of `mq allocate` and `mq cost`, theirs; of `mq sweep`, its trials.
  """

  kind: str
  name: str
  path: str
  state: str
  finished: bool
  config: Mapping[str, Any]
  operative: str = ''
  facts: Mapping[str, str] = dataclasses.field(default_factory=dict)
  rows: tuple[Record, ...] = ()
  sites: Mapping[tuple[str, str], Mapping[str, Record]] = dataclasses.field(
    default_factory=dict
  )
  report: Mapping[str, Any] | None = None

  @property
  def seed(self) -> int | None:
    """None where nothing is random."""
    return self.config.get('seed')

  @property
  def identity(self) -> str:
    """Equal for runs that differ in nothing but the seed."""
    config = {k: v for k, v in self.config.items() if k not in _IDLE}
    return json.dumps([self.kind, config], sort_keys=True)


@dataclasses.dataclass(frozen=True)
class Group:
  """Runs that differ in nothing but the seed.

  Attributes:
    sources: One for each seed.
    repeated: Others of a seed that is there; not counted.
  """

  sources: tuple[Source, ...]
  repeated: tuple[Source, ...]

  @property
  def name(self) -> str:
    """Of its runs, the first and last where they are many."""
    names = [source.name for source in self.sources]
    if len(names) <= 2:
      return ', '.join(names)
    return f'{names[0]} to {names[-1]} ({len(names)} seeds)'


def groups(sources: Sequence[Source]) -> list[Group]:
  """Sources by what they share but the seed, in their order."""
  found: dict[str, list[Source]] = {}
  for source in sources:
    found.setdefault(source.identity, []).append(source)
  out = []
  for members in found.values():
    first: dict[Any, Source] = {}
    for source in members:
      # Of two with one seed, the one that has more to show.
      known = first.get(source.seed)
      if known is None or len(source.rows) > len(known.rows):
        first[source.seed] = source
    kept = tuple(s for s in members if first[s.seed] is s)
    out.append(Group(kept, tuple(s for s in members if s not in kept)))
  return out


@dataclasses.dataclass(frozen=True)
class Bench:
  """Rows that can be compared: one model, one text.

  Attributes:
    model: Its name, as rows have it.
    text: What losses were measured on.
    rows: Means over seeds: fields of `METRICS`, those with several seeds
      also as `<metric>_range`, (least, most); `runs` names the group, `seeds`
      lists them.
  """

  model: str
  text: str
  rows: tuple[Record, ...]

  @property
  def quantized(self) -> list[Record]:
    """Rows with numbers but those of the unquantized model."""
    return [
      r
      for r in self.rows
      if r['family'] != 'none' and r['bits_per_byte'] is not None
    ]

  @property
  def unquantized(self) -> Record | None:
    """The row of the model as it is, if there is one."""
    own = (r for r in self.rows if r['family'] == 'none')
    return next((r for r in own if r['bits_per_byte'] is not None), None)

  def best(self) -> dict[str, float]:
    """The least of each metric over quantized rows, if few have it."""
    found = {}
    for metric in METRICS:
      values = [r[metric] for r in self.quantized if r[metric] is not None]
      # Bits that all have, as those that papers count, distinguish none.
      if len(values) > 1 and values.count(min(values)) <= _MOST_BEST:
        found[metric] = min(values)
    return found


def benches(found: Sequence[Group]) -> list[Bench]:
  """Results of all groups, by model and text."""
  rows: dict[tuple[str, str], list[Record]] = {}
  for group in found:
    keys = dict.fromkeys(
      (row['model'], row['text'], row['recipe'])
      for source in group.sources
      for row in source.rows
    )
    tries = {
      (row['model'], row['text'], row['recipe'], source.name): (source, row)
      for source in group.sources
      for row in source.rows
    }
    for key in keys:
      same = [
        tries[(*key, source.name)]
        for source in group.sources
        if (*key, source.name) in tries
      ]
      rows.setdefault(key[:2], []).append(_mean(group, same))
  return [
    Bench(model, text, tuple(members))
    for (model, text), members in rows.items()
  ]


def _mean(group: Group, tries: Sequence[tuple[Source, Record]]) -> Record:
  """One row of all seeds; failed ones count only where there is no other."""
  good = [pair for pair in tries if not pair[1]['status'].startswith('failed')]
  used = good or tries
  first = dict(used[0][1])
  merged = first | {
    'runs': group.name,
    'seeds': [source.seed for source, _ in used if source.seed is not None],
  }
  for metric in METRICS:
    values = [r[metric] for _, r in used if r.get(metric) is not None]
    merged[metric] = math.fsum(values) / len(values) if values else None
    if len(values) > 1:
      merged[f'{metric}_range'] = (min(values), max(values))
  lost = len(tries) - len(good)
  if good and lost:
    merged['status'] += f'; failed for {lost} of {len(tries)} seeds'
  return merged


def short_models(found: Sequence[Bench]) -> dict[str, str]:
  """Models by their last name, where that tells them apart."""
  names = {bench.model: bench.model.rpartition('/')[2] for bench in found}
  if len(set(names.values())) < len(names):
    return {name: name for name in names}
  return names


def differences(
  sources: Sequence[Source],
) -> tuple[list[str], list[list[str]]]:
  """Names of what differs between configs, and each source's values as text.

  Of lists only the members are given that not all have.
  """
  names = list(dict.fromkeys(n for s in sources for n in s.config))
  columns, cells = [], []
  for name in names:
    values = [source.config.get(name) for source in sources]
    if all(value == values[0] for value in values):
      continue
    columns.append(name)
    if all(isinstance(value, list) for value in values):
      shared = set.intersection(*map(set, values))
      cells.append([_listed(v, shared) for v in values])
    else:
      cells.append(['' if v is None else _plain(v) for v in values])
  return columns, [list(row) for row in zip(*cells)]


def _listed(members: Sequence[str], shared: set[str]) -> str:
  own = [member for member in members if member not in shared]
  if not own:
    return 'only what all have'
  more = f', and {len(own) - 4} more' if len(own) > 4 else ''
  return ', '.join(own[:4]) + more


def _plain(value: Any) -> str:
  if isinstance(value, list):
    return ', '.join(map(str, value))
  return str(value)
