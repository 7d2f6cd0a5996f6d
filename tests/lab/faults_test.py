"""What a run does when the machine fails it: disk, rights, clock, damage."""

import contextlib
import json
import os
import pathlib
import resource
import shutil
import tempfile
import time

import pytest

from mq_jax.lab import cli, config, files, journal, opening, runs

RECORD = {'model': 'm', 'recipe': 'a', 'status': 'ok', 'nll': 1.25}


@contextlib.contextmanager
def largest_file(size):
  """No file may grow beyond a size: writes fail half-way, as on a full disk."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def no_rights():
  """As a user who may not write everywhere; root becomes nobody."""
  root = os.geteuid() == 0
  if root:
    os.seteuid(65534)
  try:
    yield
  finally:
    if root:
      os.seteuid(0)


@pytest.fixture
def read_only():
  """A folder that can be read and not written, even by tests run as root."""
  folder = pathlib.Path(tempfile.mkdtemp())
  folder.chmod(0o555)
  yield folder
  folder.chmod(0o755)
  shutil.rmtree(folder)


@pytest.fixture
def quick(study):
  """A run of three rows, two programs."""
  rows = ["'none'"]
  rows += [f"{{'recipe': 'rtn', 'bits': {b}, 'group': 16}}" for b in (3, 2)]
  bindings = f'compare.recipes = [{", ".join(rows)}]', 'compare.artifact = None'
  return ['run', str(study), '--set', bindings[0], '--set', bindings[1]]


def refused(capsys, *arguments):
  assert cli.main([str(a) for a in arguments]) == 2
  error = capsys.readouterr().err
  assert 'Traceback' not in error
  return error.splitlines()[-1]


def nll(path):
  """What rows came to; times differ."""
  return [
    (r['recipe'], r['nll'], r['ebw'], r['status'])
    for r in files.read_lines(path / 'results.jsonl')
  ]


def test_a_full_disk_leaves_whole_lines(tmp_path):
  path = tmp_path / 'results.jsonl'
  files.append(path, [RECORD])
  before = path.read_bytes()
  with largest_file(len(before) + 20):
    with pytest.raises(OSError, match='results.jsonl'):
      files.append(path, [RECORD])
  assert path.read_bytes() == before
  files.append(path, [RECORD])
  assert files.read_lines(path) == [RECORD, RECORD]


def test_a_full_disk_keeps_the_file_that_was_there(tmp_path):
  path = tmp_path / 'report.json'
  files.write_whole(path, 'old')
  with largest_file(100):
    with pytest.raises(OSError, match='report.json'):
      files.write_whole(path, 'new' * 100)
  assert path.read_text() == 'old'
  assert [p.name for p in tmp_path.iterdir()] == ['report.json']


def test_a_device_that_is_full_is_named():
  if not os.path.exists('/dev/full'):
    pytest.skip('no /dev/full')
  with pytest.raises(OSError, match='/dev/full'):
    files.append(pathlib.Path('/dev/full'), [RECORD])


def test_a_run_on_a_full_disk_stops_and_goes_on(quick, tmp_path, capsys):
  whole, out = tmp_path / 'whole', tmp_path / 'out'
  assert cli.main([*quick, '--out', str(whole)]) == 0
  sites = (whole / 'sites.jsonl').read_bytes()
  # The second row's sites do not fit.
  size = len(sites.splitlines(keepends=True)[0]) * 9
  assert len(sites) > size > len((whole / 'versions.json').read_bytes())
  with largest_file(size):
    message = refused(capsys, *quick, '--out', out)
  assert 'sites.jsonl' in message and 'large' in message
  done = nll(out)
  assert 0 < len(done) < 3
  assert done == nll(whole)[: len(done)]
  assert 'sites.jsonl' in (out / 'log.txt').read_text()  # says why it stopped
  assert cli.main(['resume', str(out)]) == 0
  assert nll(out) == nll(whole)
  assert (out / 'sites.jsonl').read_bytes() == sites


def test_a_folder_that_cannot_be_written_is_named(read_only):
  files.check_writable(read_only.parent / 'new' / 'out')
  with no_rights(), pytest.raises(PermissionError) as caught:
    files.check_writable(read_only / 'deep' / 'out')
  assert f'{read_only} cannot be written' in str(caught.value)
  assert list(read_only.iterdir()) == []


@pytest.mark.parametrize('command', ['run', 'quantize', 'allocate'])
def test_a_folder_that_cannot_be_written_is_told_of_at_once(
  study, text, tmp_path, capsys, monkeypatch, command
):
  # Nobody could import what a command needs: root is only told that it can't.
  locked = tmp_path / 'locked'
  locked.mkdir()
  access = lambda path, *_, **__: path != locked
  monkeypatch.setattr(os, 'access', access)
  monkeypatch.setattr(opening, 'open_any', None)  # no model is opened
  arguments = {
    'run': ['run', study],
    'quantize': ['quantize', '--model', 'm', '--recipe', 'rtn'],
    'allocate': ['allocate', '--model', 'm', '--budget', 'ebw=3'],
  }[command]
  if command == 'quantize':
    arguments += ['--calibration', text]
  message = refused(capsys, *arguments, '--out', locked / 'deep' / 'out')
  assert f'{locked} cannot be written' in message and '--out' in message
  assert list(locked.iterdir()) == []


def test_a_damaged_record_is_named_and_nothing_is_lost(quick, tmp_path, capsys):
  out = tmp_path / 'out'
  assert cli.main([*quick, '--out', str(out)]) == 0
  results = out / 'results.jsonl'
  good = results.read_bytes()
  lines = good.splitlines(keepends=True)
  whole = nll(out)
  for bad in (b'{"model": "m", "rec\x00\n', b'\xff\xfe\n', b'[]\n', b'x\n'):
    damaged = b''.join([lines[0], bad, lines[2]])
    results.write_bytes(damaged)
    for command in (
      [*quick, '--out', str(out)],
      ['show', str(out)],
      ['resume', str(out)],
    ):
      message = refused(capsys, *command)
      assert f'{results}:2: damaged' in message and 'delete it' in message
      assert results.read_bytes() == damaged
    assert cli.main(['runs', str(out), '--json']) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry['state'] == 'damaged' and ':2:' in entry['best']
  # As the message says: without the line its row is done again.
  results.write_bytes(lines[0] + lines[2])
  assert cli.main(['resume', str(out)]) == 0
  assert sorted(nll(out)) == sorted(whole)
  with open(out / 'results.csv') as file:
    assert [row.split(',')[1] for row in file][1:] == [r[0] for r in whole]


def test_a_clock_that_runs_backwards(quick, tmp_path, monkeypatch):
  now = [2e9]

  def backwards():
    now[0] -= 1000.0
    return now[0]

  class Clock(journal.datetime.datetime):
    @classmethod
    def now(cls, zone=None):
      return cls.fromtimestamp(backwards(), zone)

  monkeypatch.setattr(time, 'time', backwards)
  for module in (journal, runs):
    fake = type('fake', (), {'datetime': Clock, 'UTC': journal.datetime.UTC})
    monkeypatch.setattr(module, 'datetime', fake)
  out = tmp_path / 'out'
  assert cli.main([*quick, '--out', str(out)]) == 0
  records = files.read_lines(out / 'results.jsonl')
  assert [r['recipe'] for r in records] == ['none', 'rtn w3 g16', 'rtn w2 g16']
  assert all(r['seconds'] >= 0 and r['eval_seconds'] >= 0 for r in records)
  log = (out / 'log.txt').read_text().splitlines()
  stamps = [line.split()[0] for line in log]
  assert stamps == sorted(stamps, reverse=True) and len(set(stamps)) > 2
  seconds = [float(line.split()[1][:-1]) for line in log]
  assert seconds == sorted(seconds) and seconds[0] >= 0


def test_who_only_looks_does_not_keep_a_run_out(tmp_path):
  pytest.importorskip('fcntl')
  (tmp_path / '.lock').touch()
  assert not files.in_use(tmp_path)
  with files.locked(tmp_path):
    assert files.in_use(tmp_path)
    with pytest.raises(runs.RunError, match='another process'):
      with files.locked(tmp_path):
        pass
  assert not files.in_use(tmp_path)


def test_study_of_a_folder_is_the_study(tmp_path):
  study = config.Study(
    models=('m',),
    rows=(config.Row('a', 'none'), config.Row('b', 'rtn', (('bits', 4),))),
    text='t',
    calibration_text=None,
    windows=2,
    calibration_windows=2,
    batch=1,
    artifact='b',
    seed=0,
  )
  made = {'operative': '', 'data': {}, 'device': 'cpu', 'name': 'x.gin'}
  with runs.open_run(tmp_path, study, **made):
    pass
  begun, folder = runs.read(tmp_path)
  assert folder.study == study and folder.study.digest == study.digest
  assert begun['config'] == 'x.gin'
