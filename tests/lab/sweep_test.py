"""`mq sweep` on a tiny model, from the file to the figure."""

import csv
import json

import pytest

from mq_jax.lab import cli, config, listing, reporting, runs
from mq_jax.lab.sweeping import spec
from mq_jax.report import documents, pages


@pytest.fixture
def sweep(tmp_path, tiny, text):
  """A sweep file of four settings and two rows, one of which stays."""
  path = tmp_path / 'sweep.gin'
  path.write_text(f"""
compare.models = ['{tiny}']
compare.recipes = [
  {{'recipe': 'rtn', 'bits': %bits, 'group': 16, 'clip': %clip}},
]
compare.text = '{text}'
compare.calibration_text = '{text}'
compare.windows = 4
compare.calibration_windows = 4
compare.batch = 4
bits = 2
clip = 1.0
unused = 3
sweep.space = {{
  'bits': [2, 4],
  'clip': ('linear', 0.6, 1.0, 2),
}}
sweep.objectives = ('bits_per_byte', 'ebw')
sweep.at_once = 2
""")
  return path


def fails(path, *bindings, **options):
  with pytest.raises(config.ConfigError) as caught:
    spec.load(path, bindings, **options)
  assert '\n' not in str(caught.value)
  return str(caught.value)


def test_a_sweep_is_run_once_and_continued(sweep, tmp_path, capsys):
  out = tmp_path / 'out'
  assert (
    cli.main(['sweep', str(sweep), '--trials', '3', '--out', str(out)]) == 0
  )
  first = (out / 'results.jsonl').read_text()
  assert len(first.splitlines()) == 3
  assert cli.main(['sweep', str(sweep), '--out', str(out)]) == 0
  said = capsys.readouterr()
  assert '3 of 4 trials are there' in said.err
  assert 'settings were quantized by' in said.out
  text = (out / 'results.jsonl').read_text()
  assert text.startswith(first)
  records = [json.loads(line) for line in text.splitlines()]
  settings = [r['setting'] for r in records]
  assert settings == [
    {'bits': b, 'clip': c} for b in (2, 4) for c in (0.6, 1.0)
  ]
  with open(out / 'results.csv') as file:
    rows = list(csv.DictReader(file))
  assert [r['clip'] for r in rows] == ['0.6', '1.0', '0.6', '1.0']
  assert (out / 'figure.png').stat().st_size > 5000
  assert '*' in (out / 'results.md').read_text()
  (entry,) = listing.find(out)
  assert (entry.state, entry.done, entry.total) == ('finished', 4, 4)
  # All of it can be drawn again, by itself and on a page.
  figure = (out / 'figure.png').read_bytes()
  (out / 'figure.png').unlink()
  assert cli.main(['show', str(out)]) == 0
  assert (out / 'figure.png').read_bytes() == figure
  (source,) = reporting.read([out])
  assert source.finished and len(source.rows) == 4
  document = pages.make([source])
  titles = [s.title for s in document.sections]
  assert titles == ['What was run', 'Results', 'Fronts', 'Sweeps']
  (front,) = (
    b for b in document.sections[-1].blocks if isinstance(b, documents.Table)
  )
  trials = {int(row[0].text) for row in front.rows}
  best = min(records, key=lambda r: r['bits_per_byte'])['trial']
  assert best in trials and len(trials) < 4
  assert cli.main(['sweep', str(sweep), '--out', str(out)]) == 0
  assert 'this sweep is finished' in capsys.readouterr().err
  other = ['--set', 'sweep.seed = 1', '--out', str(out)]
  assert cli.main(['sweep', str(sweep), *other]) == 2
  assert 'holds another sweep' in capsys.readouterr().err


@pytest.mark.slow
def test_a_trial_is_what_mq_run_says(sweep, tmp_path):
  out = tmp_path / 'out'
  assert cli.main(['sweep', str(sweep), '--out', str(out)]) == 0
  text = (out / 'results.jsonl').read_text()
  records = [json.loads(line) for line in text.splitlines()]
  bindings = ['--set', 'bits = 4', '--set', 'clip = 0.6']
  plain = tmp_path / 'plain.gin'
  lines = sweep.read_text().split('sweep.space')[0]
  plain.write_text(lines)
  one = tmp_path / 'one'
  assert cli.main(['run', str(plain), *bindings, '--out', str(one)]) == 0
  alone = json.loads((one / 'results.jsonl').read_text())
  for name in ('ebw', 'bits_per_byte', 'nll'):
    assert records[2][name] == pytest.approx(alone[name], rel=1e-5)


@pytest.mark.slow
def test_workers_find_what_one_process_finds(sweep, tmp_path):
  found = []
  for workers in ('1', '2'):
    out = tmp_path / workers
    arguments = ['sweep', str(sweep), '--workers', workers, '--out', str(out)]
    assert cli.main(arguments) == 0
    records = map(json.loads, (out / 'results.jsonl').read_text().splitlines())
    found.append([(r['trial'], r['bits_per_byte'], r['ebw']) for r in records])
  assert found[0] == found[1]


@pytest.mark.parametrize(
  'line, words',
  [
    ("sweep.space = {'clipp': [1.0]}", ["'clipp'", "did you mean 'clip'"]),
    ("sweep.space = {'unused': [1]}", ['no value uses %unused']),
    ("sweep.space = {'compare.sed': [1]}", ["did you mean 'compare.seed'"]),
    ("sweep.space = {'bits': [2, 9]}", ['bits = 9', '2..8']),
    ("sweep.space = {'clip': ('linear', -1.0, 1.0, 3)}", ['clip = -1.0']),
    ('sweep.space = {}', ['at least one name']),
    ("sweep.sampler = 'gird'", ["did you mean 'grid'"]),
    ("sweep.objectives = ('ebww',)", ["did you mean 'ebw'"]),
    ('sweep.at_once = 0', ['at_once', '>= 1']),
    ("sweep.sampler = 'sobol'", ['sweep.trials', 'must be set']),
  ],
)
def test_a_bad_sweep_is_named_before_any_work(sweep, line, words):
  text = sweep.read_text()
  sweep.write_text(text + line + '\n')
  message = fails(sweep)
  number = len(text.splitlines()) + 1
  if 'must be set' not in words:
    assert message.startswith(f'{sweep}:{number}: ')
  for word in words:
    assert word in message


def test_a_swept_name_is_not_set_too(sweep):
  assert 'swept by sweep.space' in fails(sweep, 'clip = 0.5')


def test_mq_run_says_what_a_sweep_is_for(sweep):
  with pytest.raises(config.ConfigError, match='use mq sweep'):
    config.load(sweep)


def test_a_folder_of_something_else_is_left_alone(sweep, tmp_path, capsys):
  out = tmp_path / 'notes'
  out.mkdir()
  (out / 'mine.txt').write_text('x')
  assert cli.main(['sweep', str(sweep), '--out', str(out)]) == 2
  assert 'mine.txt' in capsys.readouterr().err
  assert not (out / 'sweep.json').exists()
  assert issubclass(runs.RunError, ValueError)
