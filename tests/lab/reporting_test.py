"""`mq report`: what it reads, what it says, and what it refuses."""

import html.parser
import json
import re

import pytest
from report import allocation_test, browser, folders

from mq_jax.lab import cli, reporting
from mq_jax.report import documents, pages, plain, results, sources
from mq_jax.report import html as html_report


def of(kind, document):
  return [block for block in document.blocks() if isinstance(block, kind)]


def table(document, words):
  (found,) = (
    t for t in of(documents.Table, document) if t.caption.startswith(words)
  )
  return found


def column(found, heading):
  (at,) = (
    i for i, c in enumerate(found.columns) if c.heading.startswith(heading)
  )
  return [row[at] for row in found.rows]


def texts(cells):
  return [cell.text for cell in cells]


def plan():
  """A report of an allocation, as its own tests have it."""
  found = allocation_test.report()
  found['scores'] |= {'nll': 1.1, 'tokens': 96, 'bytes': 300}
  for site in found['sites']:
    site['cheaper_saves'] = None
  return found


@pytest.fixture(scope='module')
def compared(tmp_path_factory):
  """Two seeds, another config, a plan and prices, as one document."""
  path = tmp_path_factory.mktemp('runs')
  found = [
    folders.run(path / 'a', folders.three(2.5, 2.0)),
    folders.run(path / 'b', folders.three(2.7, 1.9), seed=1),
    folders.run(path / 'c', folders.three(2.4, 2.2)[:2], windows=5),
    folders.allocation(path / 'plan', plan()),
    folders.cost(path / 'cost'),
  ]
  return pages.make(reporting.read(found))


def test_seeds_become_a_mean_with_its_range_and_the_best_is_marked(compared):
  found = table(compared, 'm: 96 tokens of a text (01234567)')
  assert texts(column(found, 'recipe')) == [
    *('none', 'rtn w2', 'gptq w3', 'none', 'rtn w2')
  ]
  assert texts(column(found, 'run')) == ['a, b'] * 3 + ['c'] * 2
  assert texts(column(found, 'seeds')) == ['0, 1'] * 3 + ['0'] * 2
  losses = column(found, 'bits_per_byte')
  assert texts(losses) == [
    *('1.5000', '2.6000 (2.5000–2.7000)', '1.9500 (1.9000–2.0000)'),
    *('1.5000', '2.4000'),
  ]
  assert [cell.best for cell in losses] == [False, False, True, False, False]
  # Both rows of rtn have the fewest bits; the unquantized is no competitor.
  marked = [cell.best for cell in column(found, 'ebw [')]
  assert marked == [False, True, False, False, True]
  assert texts(column(found, 'on the front')) == ['', '', 'yes', '', 'yes']


def test_hypervolume_by_hand(compared):
  found = table(compared, 'm: hypervolume')
  assert '8 bit/weight, 3.0000 bit/byte' in found.caption
  # Corner (8, 2 x 1.5); points (2.25, 2.4) and (3.25, 1.95) of the means.
  whole = (3.25 - 2.25) * 0.6 + (8 - 3.25) * 1.05
  assert column(found, 'hypervolume')[0].text == f'{whole:.4f}'
  by_set = dict(
    zip(texts(column(found, 'rows of')), texts(column(found, 'hyper')))
  )
  assert by_set['c'] == f'{(8 - 2.25) * 0.6:.4f}'


def test_every_section_has_its_data(compared):
  assert [s.title for s in compared.sections] == [
    *('What was run', 'Differences', 'Results', 'Fronts', 'Budgets'),
    *('Solvers', 'Bits by site', 'Errors by site', 'Cost'),
  ]
  warnings = [b.text for b in of(documents.Text, compared) if b.warning]
  assert warnings == ['c is not finished: 2 of 3 rows.']
  differ = table(compared, 'What differs between the configs of mq run')
  assert [c.heading for c in differ.columns] == ['run', 'windows', 'seed']
  asked = table(compared, 'Budgets asked')
  assert texts(column(asked, 'achieved'))[0] == '2.4750'
  assert 'W4A8' in str(table(compared, 'side by side'))
  (listing,) = of(documents.Listing, compared)
  assert listing.name == 'config of a, b, c'


def test_figures_name_their_runs_seeds_and_units(compared):
  figures = of(documents.Figure, compared)
  front = next(f for f in figures if f.caption.startswith('m: bits per byte'))
  assert 'a, b, c; seeds 0, 1' in front.image.get_supxlabel()
  (bits,) = (f for f in figures if f.caption.startswith('m: effective bit'))
  assert '[bit/weight]' in bits.image.axes[1].get_ylabel()
  ticks = [t.get_text() for t in bits.image.axes[0].get_xticklabels()]
  assert ticks == ['rtn w2, a, b', 'rtn w2, c', 'gptq w3']


def test_sections_without_data_are_left_out(tmp_path):
  source = reporting.read([folders.cost(tmp_path / 'x', entries=['one'])])
  document = pages.make(source, 'prices')
  assert [s.title for s in document.sections] == ['What was run', 'Cost']
  assert document.title == 'prices'
  said = [block.text for block in of(documents.Text, document)]
  assert any('on one: 20.0 Mcycles' in text for text in said)


class Page(html.parser.HTMLParser):
  """Names, links and tags of a page; end tags may be left out in tables."""

  def __init__(self, text):
    super().__init__()
    self.names, self.links, self.tags, self.open = [], [], [], []
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    self.tags.append(tag)
    for name, value in attributes:
      assert not name.startswith('on'), (tag, name)
      if name == 'id':
        self.names.append(value)
      if name in ('src', 'href', 'action', 'data', 'srcset'):
        self.links.append(value)


def check(text):
  """A page that asks for nothing, with links that lead somewhere."""
  page = Page(text)
  assert len(set(page.names)) == len(page.names)
  for link in page.links:
    assert link.startswith('data:image/png;base64,') or link[1:] in page.names
  assert not re.search(r'@import|https?:|url\((?!#)', text)
  return page


EVIL = 'rtn </table><script>alert(1)</script> $x_1$ & 100% | a\\b "q"'


def test_nothing_of_a_label_is_markup(tmp_path):
  labels = ('none', EVIL, 'gptq w3')
  rows = folders.three()
  rows[1]['recipe'] = EVIL
  folder = folders.run(tmp_path / '<b>x', rows, labels=labels)
  document = pages.make(reporting.read([folder]), '<img src=x onerror=y>')
  page = check(html_report.page(document))
  assert page.tags.count('script') == 1 and 'img' not in page.tags
  assert page.tags.count('table') == len(of(documents.Table, document))
  markdown = plain.markdown(document)
  assert '<script' not in markdown.replace('\\<', '')
  found = table(document, 'm: 96 tokens')
  (line,) = (x for x in markdown.splitlines() if 'alert' in x and '2.2' in x)
  assert len(re.findall(r'(?<!\\)\|', line)) == len(found.columns) + 1
  latex = plain.latex(document)
  assert r'\$x\_1\$ \& 100\% \textbar{} a\textbackslash{}b' in latex
  inside = latex[latex.index('alert') :].splitlines()[0]
  assert inside.count(' & ') == len(found.columns) - 1


def test_latex_has_a_table_for_each_and_marks_the_best(compared):
  text = plain.latex(compared)
  count = len(of(documents.Table, compared))
  for word in (r'\begin{tabular}', r'\toprule', r'\midrule', r'\bottomrule'):
    assert text.count(word) == count
  assert r'\textbf{1.9500 (1.9000--2.0000)}' in text


def test_a_page_of_all_kinds_asks_for_nothing(compared):
  text = html_report.page(compared)
  check(text)
  assert text.count('<svg ') == len(of(documents.Figure, compared))
  assert "default-src 'none'" in text


@pytest.fixture(scope='module')
def large(tmp_path_factory):
  """The page of 200 runs of 26 recipes on 36 sites."""
  path = tmp_path_factory.mktemp('large') / 'large.html'
  document = pages.make(folders.many(200))
  path.write_text(html_report.page(document), encoding='utf-8')
  return path, document


def test_200_runs_are_a_small_page(large):
  path, document = large
  assert path.stat().st_size < 2e6
  check(path.read_text('utf-8'))
  found = table(document, 'm: 96 tokens')
  assert len(found.rows) == results.MOST_ROWS
  assert 'of 2600' in found.caption
  losses = [float(t.split()[0]) for t in texts(column(found, 'bits_per_byte'))]
  (bench,) = sources.benches(sources.groups(folders.many(200)))
  assert min(losses) == pytest.approx(
    min(r['bits_per_byte'] for r in bench.rows), abs=1e-4
  )


def test_same_seed_twice_is_counted_once(tmp_path):
  a = folders.run(tmp_path / 'a', folders.three(2.5))
  b = folders.run(tmp_path / 'b', folders.three(2.9)[:2])
  found = reporting.read([a, b, tmp_path / 'b' / '..' / 'a'])
  assert len(found) == 2
  (group,) = sources.groups(found)
  assert group.name == 'a' and group.repeated == (found[1],)
  (bench,) = sources.benches([group])
  assert bench.rows[1]['bits_per_byte'] == 2.5


def test_failed_rows_and_rows_being_written(tmp_path):
  rows = folders.three()
  broken = dict.fromkeys(rows[1]) | {'model': 'm', 'recipe': 'rtn w2'}
  broken |= {'family': 'rtn', 'status': 'failed: ValueError: too bad'}
  path = folders.run(tmp_path / 'a', [rows[0], broken])
  with open(path / 'results.jsonl', 'a') as file:
    file.write('{"model": "m", "rec')  # and here it was killed
  (source,) = reporting.read([path])
  assert source.state == '2 of 3 rows, 1 failed' and not source.finished
  document = pages.make([source])
  assert texts(column(table(document, 'm: '), 'status')) == ['ok', 'failed']
  assert any('too bad' in b.text for b in of(documents.Text, document))


def test_a_run_without_rows_is_reported_as_such(tmp_path):
  (source,) = reporting.read([folders.run(tmp_path / 'a', [])])
  assert source.state == '0 of 3 rows'
  assert [s.title for s in pages.make([source]).sections] == ['What was run']


def test_names_tell_folders_apart(tmp_path):
  for name in ('x', 'y'):
    (tmp_path / name).mkdir()
  found = [folders.run(tmp_path / n / 'run', []) for n in ('x', 'y')]
  assert [s.name for s in reporting.read(found)] == ['x/run', 'y/run']


def spoiled(path, name, change):
  """A folder with one file changed."""
  text = (path / name).read_text()
  (path / name).write_text(change(text))
  return path


def refused(capsys, folder, out):
  assert cli.main(['report', str(folder), '--out', str(out)]) == 2
  captured = capsys.readouterr()
  assert captured.out == '' and captured.err.count('\n') == 1
  assert not out.exists()
  return captured.err


def second_line(change):
  def apply(text):
    lines = text.splitlines()
    lines[1] = change(lines[1])
    return '\n'.join(lines) + '\n'

  return apply


@pytest.mark.parametrize(
  ('name', 'change', 'words'),
  [
    ('results.jsonl', second_line(lambda x: x[:-9]), ':2: damaged'),
    (
      'results.jsonl',
      second_line(lambda x: x.replace('"ebw": 2.25', '"ebw": NaN')),
      ':2: damaged: ebw is nan, not a finite number',
    ),
    (
      'results.jsonl',
      second_line(lambda x: x.replace('"ebw": 2.25', '"ebw": "2"')),
      ":2: damaged: ebw is '2'",
    ),
    (
      'results.jsonl',
      second_line(lambda x: x.replace('rtn w2', 'rtn w9')),
      ':2: a record of m, rtn w9, which this run does not have',
    ),
    (
      'sites.jsonl',
      second_line(lambda x: x.replace('"site"', '"place"')),
      ":2: has no 'site'",
    ),
    ('versions.json', lambda x: x[:100], 'damaged: not JSON'),
    (
      'versions.json',
      lambda x: x.replace('"study"', '"plan"'),
      "has no 'study'; is it a run of another version",
    ),
  ],
)
def test_damage_is_named_by_file_and_line(
  tmp_path, capsys, name, change, words
):
  path = spoiled(folders.run(tmp_path / 'a', folders.three()), name, change)
  message = refused(capsys, path, tmp_path / 'r.html')
  assert f'{path / name}' in message and words in message


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    (lambda r: r.pop('uniform'), "has no 'uniform'; it was made by another"),
    (lambda r: r['front'][0].update(solver='new'), "no solver 'new'"),
    (lambda r: r['sites'][0].update(ebw='x'), 'sites: 0: damaged: ebw'),
    (lambda r: r['budgets'].clear(), 'has no budgets'),
  ],
)
def test_allocations_of_other_versions(tmp_path, capsys, change, words):
  found = plan()
  change(found)
  path = folders.allocation(tmp_path / 'a', found)
  message = refused(capsys, path, tmp_path / 'r.html')
  assert words in message and str(path) in message


def test_what_is_no_run_is_refused(tmp_path, capsys):
  out = tmp_path / 'r.html'
  assert 'no such folder' in refused(capsys, tmp_path / 'none', out)
  inside = tmp_path / 'runs'
  folders.cost(tmp_path / 'c')
  inside.mkdir()
  assert 'not a folder of mq run' in refused(capsys, inside, out)
  folders.run(inside / 'a', [])
  assert '1 inside are: name them' in refused(capsys, inside, out)
  report = tmp_path / 'c' / 'cost.json'
  assert 'is a file' in refused(capsys, report, out)
  text = json.loads(report.read_text())
  del text['entries'][0]['sites'][0]['macs']
  report.write_text(json.dumps(text))
  assert "has no 'macs'" in refused(capsys, tmp_path / 'c', out)


def test_only_reports_are_written_over(tmp_path, capsys):
  folder = folders.run(tmp_path / 'a', [])
  out = tmp_path / 'r.html'
  command = ['report', str(folder), '--out', str(out), '--markdown', '--latex']
  for _ in range(2):
    assert cli.main(command) == 0
    assert 'not finished: 0 of 3 rows' in capsys.readouterr().out
  assert {p.name for p in tmp_path.iterdir()} == {
    *('a', 'r.html', 'r.md', 'r.tex')
  }
  out.with_suffix('.md').write_text('# my notes')
  assert cli.main(command) == 2
  assert 'holds something else than a report' in capsys.readouterr().err
  assert out.with_suffix('.md').read_text() == '# my notes'
  assert cli.main(['report', str(folder), '--out', str(folder)]) == 2
  assert 'is a folder' in capsys.readouterr().err
  same = ['report', str(folder), '--out', 'x.md', '--markdown']
  assert cli.main(same) == 2
  assert 'needs another ending' in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not browser.executable(), reason='there is no Chromium')
def test_in_a_browser(large, compared, tmp_path):
  small = tmp_path / 'small.html'
  small.write_text(html_report.page(compared), encoding='utf-8')
  found = browser.Browser(tmp_path / 'profile')
  try:
    for path in (small, large[0]):
      for width in (1280, 390):
        found.open(path, width)
        asked = found.requests()
        assert asked.pop(0) == path.resolve().as_uri()
        assert all(url.startswith('data:') for url in asked)
        said = [e for e in found.events if e.get('method') in _TROUBLES]
        assert not said
        milliseconds = found.value(
          'performance.getEntriesByType("navigation")[0].loadEventEnd'
        )
        assert milliseconds < 1000, path.name
        # All of it, not only what is in view.
        found.value(
          'document.querySelectorAll("section").forEach('
          '(s) => { s.style.contentVisibility = "visible"; })'
        )
        size = found.value('document.documentElement.scrollWidth')
        assert size <= width
        assert found.value('document.querySelectorAll("th button").length')
    _sorted_by_click(found, small)
  finally:
    found.close()


_TROUBLES = ('Log.entryAdded', 'Runtime.exceptionThrown')


def _sorted_by_click(found, path):
  found.open(path, 1280)
  head = '[...document.querySelectorAll("#results th")]'
  click = f'{head}.find((h) => h.textContent.startsWith("bits_per")).firstChild'
  column = (
    f'(() => {{ const h = {click}.parentNode;'
    'return [...h.closest("table").tBodies[0].rows].map('
    '(r) => parseFloat(r.cells[h.cellIndex].textContent)); })()'
  )
  for sign in (1, -1):
    found.value(f'{click}.click()')
    values = found.value(column)
    assert len(values) > 3 and values == sorted(values, reverse=sign < 0)
