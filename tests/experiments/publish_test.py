"""Publishing a run: the right one, whole, with its errors and figure."""

import json

import pytest

from experiments import publish
from mq_jax.lab import config

CONFIG = """
compare.models = ['reference']
compare.recipes = [
  {'recipe': 'none'},
  {'recipe': 'microscopiq', 'bits': 2, 'sigma': 2.0},
  {'recipe': 'microscopiq', 'bits': 2, 'sigma': 100.0},
]
"""


def record(row, **numbers):
  return {
    'model': 'reference',
    'recipe': row.label,
    'family': row.name,
    'bits': dict(row.options).get('bits', 16),
    'options': dict(row.options),
    'seconds': 1.5,
    'eval_seconds': 0.5,
    'status': 'ok',
    **numbers,
  }


@pytest.fixture
def finished(tmp_path):
  """A config, the folder of its finished run, and the run's records."""
  path, run = tmp_path / 'sweep.gin', tmp_path / 'run'
  path.write_text(CONFIG)
  run.mkdir()
  study, _ = config.load(path)
  records, sites = [], []
  for i, row in enumerate(study.rows):
    numbers = {'ebw': 16 - 6.5 * i, 'ebw_paper': 15 - 6.0 * i}
    numbers |= {'bits_per_byte': 1.0 + 0.1 * i, 'perplexity': 5.0, 'nll': 1.6}
    records.append(record(row, **numbers))
    for site in ('a', 'b'):
      sites.append(
        {
          'model': 'reference',
          'recipe': row.label,
          'site': site,
          'shape': [4, 8],
          'weight_mse': 0.1,
          'output_error': 0.2 if site == 'a' else 0.4,
        }
        | ({'outliers': 8} if i else {})
      )
  lines = lambda values: ''.join(json.dumps(v) + '\n' for v in values)
  (run / 'results.jsonl').write_text(lines(records))
  (run / 'sites.jsonl').write_text(lines(sites))
  begun = {
    'run': study.digest,
    'versions': {'mq_jax': '0', 'jax': '1', 'numpy': '2'},
    'device': 'cpu: cpu',
    'seed': 0,
    'git': None,
    'data': {'text': {'source': 'docs'}, 'calibration': {'source': 'docs'}},
  }
  (run / 'versions.json').write_text(json.dumps(begun))
  return path, run


def test_a_run_becomes_a_page_a_table_and_a_figure(finished, tmp_path):
  path, run = finished
  folder = publish.publish(path, run, over='sigma', results=tmp_path / 'out')
  page = (folder / 'README.md').read_text()
  assert folder.name == 'sweep'
  assert 'mq run configs/studies/sweep.gin' in page
  assert '6 s on cpu: cpu' in page
  row = next(line for line in page.splitlines() if 'sigma=2.0' in line)
  cells = [cell.strip() for cell in row.split('|')]
  assert {'9.500', '1.1000', '0.30000', '25.00'} <= set(cells)
  assert (folder / 'figure.png').read_bytes()[1:4] == b'PNG'
  assert len((folder / 'results.csv').read_text().splitlines()) == 4


def test_another_run_is_refused(finished):
  path, run = finished
  with pytest.raises(ValueError, match='give the bindings'):
    publish.publish(path, run, bindings=['compare.seed = 1'])


def test_an_unfinished_run_is_refused(finished, tmp_path):
  path, run = finished
  lines = (run / 'results.jsonl').read_text().splitlines()
  (run / 'results.jsonl').write_text('\n'.join(lines[:2]) + '\n')
  with pytest.raises(ValueError, match='2 of 3 rows'):
    publish.publish(path, run, results=tmp_path / 'out')


def test_a_row_done_again_counts_once_with_its_last_result(finished, tmp_path):
  path, run = finished
  last = json.loads((run / 'results.jsonl').read_text().splitlines()[-1])
  with open(run / 'results.jsonl', 'a') as file:
    file.write(json.dumps({**last, 'perplexity': 7.25}) + '\n')
  folder = publish.publish(path, run, results=tmp_path / 'out')
  page = (folder / 'README.md').read_text()
  assert page.count('sigma=100.0') == 1 and '7.25' in page


def test_sweep_names_thresholds_that_nothing_exceeds(finished):
  path, run = finished
  figure = publish.over_option(publish.read(run, 'results.jsonl'), 'sigma')
  axes = figure.axes[1]
  assert [t.get_text() for t in axes.get_xticklabels()] == ['2', 'none']
  assert 'bit/weight' in axes.get_ylabel()


def test_option_that_no_row_has_is_an_error(finished):
  with pytest.raises(ValueError, match="'block'"):
    publish.over_option(publish.read(finished[1], 'results.jsonl'), 'block')
