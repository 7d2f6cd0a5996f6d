"""What a report says of its sources: sections, each only where it has data."""

import itertools
from collections.abc import Iterator, Sequence

from mq_jax.report import allocation as allocation_report
from mq_jax.report import fronts, results, sitemaps, sources
from mq_jax.report import hardware as hardware_report
from mq_jax.report import sweeps as sweep_report
from mq_jax.report.documents import (
  Block,
  Cell,
  Column,
  Document,
  Figure,
  Listing,
  Section,
  Table,
  Text,
  from_rich,
  joined,
)
from mq_jax.report.sources import Group, Source

# Of more there are tables only, or only what they have in common.
MOST_LISTINGS = 12
_MOST_ENTRIES = 48


def make(found: Sequence[Source], title: str = '') -> Document:
  """The report of some sources.

  Args:
    found: At least one.
    title: Its heading; by default it names them.

  Returns:
    The document.
  """
  runs = sources.groups(found)
  benches = sources.benches(runs)
  names = [source.name for source in found]
  more = f' and {len(names) - 3} more' if len(names) > 3 else ''
  parts = (
    ('What was run', _what(found, runs)),
    ('Differences', _differences(found)),
    ('Results', results.tables_of(benches)),
    ('Fronts', results.fronts_of(benches)),
    ('Sweeps', _sweeps(found)),
    ('Budgets', _budgets(found)),
    ('Solvers', _solvers(found)),
    ('Bits by site', sitemaps.bits(runs, benches)),
    ('Errors by site', sitemaps.errors(runs, benches)),
    ('Cost', _costs(found)),
  )
  sections = [Section(name, tuple(blocks)) for name, blocks in parts]
  return Document(
    title or f'Report of {", ".join(names[:3])}{more}',
    tuple(section for section in sections if section.blocks),
  )


def without_blanks(table: Table) -> Table:
  """A table without the columns that have nothing in any row."""
  full = [any(cell.text for cell in column) for column in zip(*table.rows)]
  keep = lambda items: tuple(itertools.compress(items, full))
  rows = tuple(keep(row) for row in table.rows)
  return Table(table.caption, keep(table.columns), rows, table.sortable)


def _what(found: Sequence[Source], runs: Sequence[Group]) -> Iterator[Block]:
  for source in found:
    if not source.finished:
      yield Text(f'{source.name} is not finished: {source.state}.', True)
  for group in runs:
    for source in group.repeated:
      yield Text(
        f'{source.name} has config and seed of another run ({group.name}); it '
        'is not counted in means.',
        True,
      )
  names = ('run', 'command', 'model', 'seed', 'config', 'commit', 'begun')
  columns = [Column(name, name == 'seed') for name in names]
  rows = []
  for source in found:
    seconds = _seconds(source)
    models = source.config.get('models', source.config.get('model', ''))
    cells = (
      source.name,
      f'mq {source.kind}',
      ', '.join(models) if isinstance(models, list) else str(models),
      '' if source.seed is None else str(source.seed),
      *(source.facts.get(name, '') for name in ('config', 'commit', 'begun')),
      '' if seconds is None else f'{seconds:.0f}',
      source.state,
    )
    rows.append(tuple(map(Cell, cells)))
  columns += [Column('time [s]', True), Column('state')]
  yield without_blanks(Table('', tuple(columns), tuple(rows), len(rows) > 1))
  shared = _shared(found)
  if shared:
    yield Text(shared)
  listings: dict[str, list[str]] = {}
  for source in found:
    if source.operative:
      listings.setdefault(source.operative, []).append(source.name)
  if len(listings) <= MOST_LISTINGS:
    for content, names in listings.items():
      yield Listing(f'config of {", ".join(names)}', content)


def _seconds(source: Source) -> float | None:
  """What all rows took; of the rows of allocations only the plan has any."""
  times = [
    (row.get('seconds') or 0) + (row.get('eval_seconds') or 0)
    for row in source.rows
  ]
  return sum(times) if any(times) else None


def _shared(found: Sequence[Source]) -> str:
  """Device and versions that all with any have in common."""
  configs = [source.config for source in found if 'device' in source.config]
  if not configs:
    return ''
  names = [n for n in configs[0] if n == 'device' or n.startswith('versions.')]
  same = [n for n in names if len({str(c.get(n)) for c in configs}) == 1]
  words = [
    f'{name.removeprefix("versions.")} {configs[0][name]}' for name in same
  ]
  return f'Alike: {", ".join(words)}.' if words else ''


def _differences(found: Sequence[Source]) -> Iterator[Block]:
  kinds = dict.fromkeys(source.kind for source in found)
  for kind in kinds:
    mine = [source for source in found if source.kind == kind]
    names, cells = sources.differences(mine)
    if names:
      yield Table(
        f'What differs between the configs of mq {kind}; of lists, what not '
        'all have.',
        (Column('run'), *map(Column, names)),
        tuple(
          (Cell(source.name), *map(Cell, row))
          for source, row in zip(mine, cells, strict=True)
        ),
        sortable=True,
      )
    elif len(mine) > 1:
      yield Text(f'The configs of mq {kind} do not differ.')


def _sweeps(found: Sequence[Source]) -> Iterator[Block]:
  mine = [s for s in found if s.kind == 'sweep']
  if len(mine) > results.MOST_FIGURES:
    yield Text(f'Of {len(mine)} sweeps the first {results.MOST_FIGURES}:')
  for source in mine[: results.MOST_FIGURES]:
    report = source.report
    summaries, objectives = report['summaries'], report['objectives']
    best = sweep_report.front(summaries)
    if not best:
      yield Text(f'{source.name}: no trial has a result.', True)
      continue
    words = f'{source.name}, {report["sampler"]}, seed {report["seed"]}'
    yield Figure(
      sweep_report.figure(
        summaries, objectives, report['logarithmic'], footnote=words
      ),
      f'{source.name}: {", ".join(objectives)} of {len(summaries)} trials.',
    )
    names = list(dict.fromkeys(n for s in best for n in s['setting']))
    what = 'The best trial' if len(objectives) == 1 else 'Trials on the front'
    yield Table(
      f'{source.name}: {what}.',
      (
        Column('trial', True),
        *(Column(name, True) for name in (*names, *objectives)),
      ),
      tuple(
        (
          Cell(str(s['trial'])),
          *(Cell(sweep_report.shown(s['setting'].get(n))) for n in names),
          *(Cell(f'{x:.5g}') for x in s['values']),
        )
        for s in best
      ),
      sortable=True,
    )


def _allocations(found: Sequence[Source]) -> list[Source]:
  return [s for s in found if s.kind == 'allocate' and s.report is not None]


def _budgets(found: Sequence[Source]) -> Iterator[Block]:
  tables = []
  for source in _allocations(found):
    report = source.report
    before = (
      (Column('run'), source.name),
      (Column('model'), report['model']),
      (Column('plan by'), report['solver']),
      (Column('seed', True), str(report['seed'])),
    )
    tables.append(from_rich(allocation_report.budgets_table(report), before))
  if tables:
    table = joined(tables)
    yield Table(
      'Budgets asked and achieved, measured on the packed weights; room is '
      'what was left of a budget. Without one: what else the plan takes.',
      table.columns,
      table.rows,
      sortable=True,
    )
  for source in _allocations(found):
    for note in source.report['notes']:
      yield Text(f'{source.name}: {note}')


def _solvers(found: Sequence[Source]) -> Iterator[Block]:
  mine = _allocations(found)
  if len(mine) > results.MOST_FIGURES:
    yield Text(f'Of {len(mine)} allocations the first {results.MOST_FIGURES}:')
  for source in mine[: results.MOST_FIGURES]:
    report = source.report
    where = f'{source.name}, seed {report["seed"]}'
    yield Text(f'{source.name}: {allocation_report.sentence(report)}.')
    yield Figure(
      allocation_report.pareto(report),
      f'{where}: loss on the test text over the first budget, by solver.',
    )
    table = from_rich(allocation_report.solvers_table(report))
    yield Table(f'{where}: {table.caption}', table.columns, table.rows)
    yield from _solver_volumes(report, where)


def _solver_volumes(report, where: str) -> Iterator[Block]:
  """Hypervolume by solver; the corner depends on candidates only."""
  first = report['budgets'][0]['quantity']
  factor, unit = allocation_report.unit_of(first, report['budgets'][0]['limit'])
  place = lambda p: (p['costs'][first] / factor, p['test'])
  uniform = [place(p) for p in report['uniform'] if p['test'] is not None]
  by_solver: dict[str, list] = {}
  for point in report['front']:
    if point['test'] is not None:
      by_solver.setdefault(point['solver'], []).append(place(point))
  if len(uniform) < 2 or not by_solver:
    return
  corner = tuple(map(max, zip(*uniform)))
  volumes = {n: fronts.hypervolume(p, corner) for n, p in by_solver.items()}
  best = max(volumes.values())
  yield Table(
    f'{where}: hypervolume of each solver over the budgets of the front, more '
    f'is better; up to the reference point {corner[0]:.4g} {unit}, '
    f'{corner[1]:.4f} nat/token: the most that a uniform candidate takes, and '
    'the most that one loses.',
    (
      Column('solver'),
      Column('points', True),
      Column(f'hypervolume [{unit} x nat/token]', True),
    ),
    tuple(
      (
        Cell(name.replace('_', ' ')),
        Cell(str(len(by_solver[name]))),
        Cell(f'{volume:.4f}', volume == best),
      )
      for name, volume in sorted(volumes.items(), key=lambda item: -item[1])
    ),
    sortable=True,
  )


def _costs(found: Sequence[Source]) -> Iterator[Block]:
  mine = [source for source in found if source.kind == 'cost']
  subjects: dict[str, list[Source]] = {}
  for source in mine:
    subjects.setdefault(_subject(source.report), []).append(source)
  for subject, alike in subjects.items():
    totals = [
      entry['total'] | {'entry': _entry_name(source, entry, alike)}
      for source in alike
      for entry in source.report['entries']
    ]
    if len(totals) > 1:
      yield Text(f'{subject}:')
      if len(totals) <= _MOST_ENTRIES:
        yield Figure(
          hardware_report.where_it_goes(
            totals,
            label='entry',
            in_time=True,
            title=subject,
            footnote=_names(alike),
          ),
          f'{subject}: where time and energy go, by entry.',
        )
      for table in (
        hardware_report.comparison_table(totals),
        hardware_report.cycles_table(totals, label='entry'),
        hardware_report.energy_table(totals, label='entry'),
      ):
        yield from_rich(table)
    single = [s for s in alike if len(s.report['entries']) == 1]
    for source in single[: results.MOST_FIGURES]:
      yield from _one_cost(source, subject)
    for note in dict.fromkeys(n for s in alike for n in s.report['notes']):
      yield Text(note)


def _one_cost(source: Source, subject: str) -> Iterator[Block]:
  """Where it goes within one entry, by matmul."""
  (entry,) = source.report['entries']
  rows, total = entry['grouped'], entry['total']
  where = f'{subject}, on {entry["entry"]}'
  yield Text(f'{where}: {hardware_report.sentence(total)}.')
  yield Figure(
    hardware_report.where_it_goes(rows, title=where, footnote=source.name),
    f'{where}: where cycles and energy go, by matmul.',
  )
  for table in (
    hardware_report.sizes_table(rows, total),
    hardware_report.cycles_table(rows, total),
    hardware_report.energy_table(rows, total),
  ):
    yield from_rich(table)


def _names(found: Sequence[Source]) -> str:
  return ', '.join(source.name for source in found[:6])


def _entry_name(source, entry, alike) -> str:
  """The entry, with its folder where several have one of its name."""
  count = sum(
    other['entry'] == entry['entry']
    for one in alike
    for other in one.report['entries']
  )
  name = entry['entry']
  return f'{name} ({source.name})' if count > 1 else name


def _subject(report) -> str:
  words = f'{report["model"]}, {report["phase"]}, batch {report["batch"]}'
  if report.get('context') is None:
    return words
  return f'{words} x {report["context"]} tokens'
