import json

import pytest

from mq_jax.lab import config, runs

STUDY = config.Study(
  models=('m',),
  rows=(config.Row('a', 'none'), config.Row('b', 'rtn', (('bits', 4),))),
  text=None,
  calibration_text=None,
  windows=2,
  calibration_windows=2,
  batch=1,
  artifact=None,
  seed=0,
)
DATA = {'text': {'source': 't', 'sha256': '0'}}


def opened(path, study=STUDY, data=DATA, device='cpu'):
  return runs.open_run(
    path, study, operative='compare.seed = 0\n', data=data, device=device
  )


def row(recipe, status='ok', **more):
  return {'model': 'm', 'recipe': recipe, 'status': status, **more}


def contents(path):
  return {p.name: p.read_bytes() for p in path.iterdir() if p.name != '.lock'}


def test_a_new_run_and_its_continuation(tmp_path):
  path = tmp_path / 'deep' / 'run'
  with opened(path) as folder:
    assert [r.label for _, r in folder.missing()] == ['a', 'b']
    folder.append(row('a'), [{'site': 's', 'ebw': 4.0}])
  assert (path / 'config.gin').read_text() == 'compare.seed = 0\n'
  begun = json.loads((path / 'versions.json').read_text())
  assert begun['seed'] == 0 and begun['run'] == STUDY.digest
  assert {'python', 'jax', 'jaxlib', 'flax', 'numpy'} <= begun[
    'versions'
  ].keys()
  with opened(path) as folder:
    assert [r.label for _, r in folder.missing()] == ['b']
    folder.append(row('b'), [])
  with opened(path) as folder:
    assert folder.missing() == []
    assert [r['recipe'] for r in folder.records()] == ['a', 'b']


def test_a_torn_line_is_a_missing_row(tmp_path):
  with opened(tmp_path) as folder:
    folder.append(row('a'), [{'site': 's'}])
    folder.append(row('b'), [{'site': 's'}])
  results = tmp_path / 'results.jsonl'
  results.write_bytes(results.read_bytes()[:-9])
  with opened(tmp_path) as folder:
    assert [r.label for _, r in folder.missing()] == ['b']
    folder.append(row('b'), [{'site': 's'}])
    assert len(folder.records()) == 2
  sites = [
    json.loads(line)['recipe']
    for line in (tmp_path / 'sites.jsonl').read_text().splitlines()
  ]
  assert sites == ['a', 'b']  # those of the torn row are not there twice


def test_failed_rows_are_tried_again_and_the_last_try_counts(tmp_path):
  with opened(tmp_path) as folder:
    folder.append(row('a', 'failed: ValueError: x'), [])
    folder.append(row('b'), [])
  with opened(tmp_path) as folder:
    assert [r.label for _, r in folder.missing()] == ['a']
    folder.append(row('a'), [])
    assert [r['status'] for r in folder.records()] == ['ok', 'ok']


def test_another_run_is_refused_and_kept(tmp_path):
  with opened(tmp_path) as folder:
    folder.append(row('a'), [])
  before = contents(tmp_path)
  other = config.Study(**{**vars(STUDY), 'seed': 1, 'windows': 3})
  with pytest.raises(runs.RunError, match='another run.*seed, windows'):
    with opened(tmp_path, other):
      pass
  assert contents(tmp_path) == before


def test_a_foreign_folder_is_refused_and_kept(tmp_path):
  (tmp_path / 'thesis.tex').write_text('years of work')
  with pytest.raises(runs.RunError, match='not of a run.*thesis.tex'):
    with opened(tmp_path):
      pass
  assert [p.name for p in tmp_path.iterdir()] == ['thesis.tex']
  with pytest.raises(runs.RunError, match='not a folder'):
    with opened(tmp_path / 'thesis.tex'):
      pass
  (tmp_path / 'versions.json').write_text('{"library": 1}')
  with pytest.raises(runs.RunError, match='not of a run'):
    with opened(tmp_path):
      pass
  assert (tmp_path / 'versions.json').read_text() == '{"library": 1}'


@pytest.mark.parametrize(
  'changed, words',
  [
    ({'data': {'text': {'source': 't', 'sha256': '1'}}}, 'other texts: text'),
    ({'device': 'gpu: H100'}, 'cpu .now gpu'),
  ],
)
def test_rows_under_other_conditions_are_not_mixed_in(tmp_path, changed, words):
  with opened(tmp_path) as folder:
    folder.append(row('a'), [])
  with pytest.raises(runs.RunError, match=words):
    with opened(tmp_path, **changed):
      pass
  with opened(tmp_path) as folder:
    folder.append(row('b'), [])
  with opened(tmp_path, **changed) as folder:  # finished: only looked at
    assert len(folder.records()) == 2


def test_a_second_process_is_kept_out(tmp_path):
  pytest.importorskip('fcntl')
  with opened(tmp_path):
    with pytest.raises(runs.RunError, match='another process'):
      with opened(tmp_path):
        pass
  with opened(tmp_path):
    pass


def test_numbers_json_does_not_have_are_not_written(tmp_path):
  with opened(tmp_path) as folder:
    with pytest.raises(ValueError):
      folder.append(row('a', nll=float('nan')), [])
    assert folder.records() == []
