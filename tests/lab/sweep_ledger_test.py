"""Each trial is done once, whoever is killed, and wherever it is stored."""

import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import optuna
import pytest
from lab import sweep_worker

from mq_jax.lab import runs
from mq_jax.lab.sweeping import ledger, storage

WORKER = pathlib.Path(__file__).with_name('sweep_worker.py')
ROOT = WORKER.parents[2]


def book_of(folder, sweep, url=None, name='test', conditions=None):
  store = storage.open_storage(url, folder)
  try:
    return store, ledger.Ledger(sweep, store, name, conditions or {})
  except runs.RunError:
    store.close()
    raise


def start(folder, url, sampler, trials, seconds):
  arguments = [str(folder), url or '', sampler, str(trials), str(seconds)]
  return subprocess.Popen(
    [sys.executable, str(WORKER), *arguments],
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    stdout=subprocess.PIPE,
    text=True,
  )


def kill_and_finish(folder, url, sampler, trials, kills, seed=0):
  """Three workers, some of which are killed and replaced at random times.

  Returns:
    Indices that workers said they finished, of all that ever lived.
  """
  rng = random.Random(seed)
  begin = lambda: start(folder, url, sampler, trials, 0.01)
  living, ended = [begin() for _ in range(3)], []
  for _ in range(kills):
    time.sleep(rng.uniform(0.2, 1.2))
    victim = living.pop(rng.randrange(3))
    victim.send_signal(signal.SIGKILL)
    ended.append(victim)
    living.append(begin())
  lines = [p.communicate(timeout=240)[0].split() for p in (*living, *ended)]
  assert all(p.returncode == 0 for p in living)
  return [int(index) for said in lines for index in said]


def check_once(folder, url, sampler, trials, said):
  """Every index has one complete trial, and no worker did another's again."""
  sweep = sweep_worker.sweep(sampler, trials)
  store, book = book_of(folder, sweep, url)
  study = optuna.load_study(study_name='test', storage=store.optuna)
  complete = [
    t.user_attrs['index']
    for t in study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
  ]
  assert sorted(complete) == list(range(trials))
  open_states = [s for s in optuna.trial.TrialState if not s.is_finished()]
  assert not study.get_trials(states=open_states)
  # Said once at most: a worker may be killed between the trial and its line.
  assert len(said) == len(set(said)) <= trials
  for r in book.records():
    assert r['x2'] == pytest.approx(r['setting']['x'] ** 2, rel=1e-12)
  store.close()


@pytest.mark.parametrize('sampler', ['random', 'tpe'])
def test_what_a_dead_process_held_is_done_again_once(tmp_path, sampler):
  sweep = sweep_worker.sweep(sampler, 6)
  dead, book = book_of(tmp_path, sweep)
  held = book.claim(4)
  assert [c.index for c in held] == [0, 1, 2, 3]
  store, other = book_of(tmp_path, sweep)
  # It lives: only the rest is free.
  rest = other.claim(6)
  assert [c.index for c in rest] == [4, 5]
  assert other.claim(6) == []
  assert book.finish(held[0], [sweep_worker.record(held[0].setting)])
  dead.close()  # as the system does for a killed one
  again = other.claim(6)
  assert [c.index for c in again] == [1, 2, 3]
  # The same settings, also of a sampler that would choose others now.
  assert [c.setting for c in again] == [c.setting for c in held[1:]]
  assert other.claim(6) == []
  for claim in (*rest, *again):
    assert other.finish(claim, [sweep_worker.record(claim.setting)])
  # What was thought dead comes back: too late.
  assert not book.finish(held[1], [sweep_worker.record(held[1].setting)])
  assert other.unfinished() == 0
  assert [r['trial'] for r in other.records()] == list(range(6))
  store.close()


def test_a_line_torn_by_a_kill_is_cut_off(tmp_path):
  sweep = sweep_worker.sweep('random', 3)
  store, book = book_of(tmp_path, sweep)
  (claim,) = book.claim(1)
  with open(tmp_path / storage.JOURNAL, 'ab') as file:
    file.write(b'{"op_code":8,"worker_id":"x","tri')
  assert book.finish(claim, [sweep_worker.record(claim.setting)])
  store.close()
  store, book = book_of(tmp_path, sweep)
  assert list(book.finished()) == [0]
  store.close()


def test_a_failed_trial_keeps_its_reason_and_is_not_tried_again(tmp_path):
  sweep = sweep_worker.sweep('random', 2)
  store, book = book_of(tmp_path, sweep)
  first, second = book.claim(2)
  bad = {'x2': None, 'status': 'failed: ValueError: too small'}
  assert book.finish(first, [bad])
  assert book.finish(second, [sweep_worker.record(second.setting)])
  assert book.unfinished() == 0 and book.claim(2) == []
  assert book.records()[0]['status'] == bad['status']
  store.close()


def test_more_trials_go_on_where_it_ended(tmp_path):
  for trials in (2, 5):
    store, book = book_of(tmp_path, sweep_worker.sweep('random', trials))
    for claim in book.claim(9):
      book.finish(claim, [sweep_worker.record(claim.setting)])
    store.close()
  settings = [r['setting'] for r in book.records()]
  assert settings == sweep_worker.sweep('random', 5).design


@pytest.mark.parametrize('sampler', ['tpe', 'nsga2'])
def test_adaptive_samplers_learn_in_rounds_of_several(tmp_path, sampler):
  objectives = ('x2',) if sampler == 'tpe' else ('x2', 'far')
  sweep = sweep_worker.sweep(sampler, 48, objectives)
  store, book = book_of(tmp_path, sweep)
  while claims := book.claim(4):
    assert len({str(c.setting) for c in claims}) > 1
    for claim in claims:
      book.finish(claim, [sweep_worker.record(claim.setting)])
  store.close()
  found = book.records()
  assert len(found) == 48
  if sampler == 'tpe':  # beyond its first draws it proposes what is better
    cost = lambda part: sum(r['x2'] for r in part)
    assert cost(found[-16:]) < 0.8 * cost(found[:16])
  else:  # after the first generation, children have numbers of their parents
    first = {r['setting']['x'] for r in found[:16]}
    assert sum(r['setting']['x'] in first for r in found[16:]) > 8


def test_what_is_there_and_not_of_this_sweep_is_refused(tmp_path):
  sweep = sweep_worker.sweep('random', 2)
  store, _ = book_of(tmp_path, sweep, conditions={'jax': '1'})
  store.close()
  with pytest.raises(runs.RunError, match='other conditions .jax: 1, now 2'):
    book_of(tmp_path, sweep, conditions={'jax': '2'})
  with pytest.raises(runs.RunError, match='holds another sweep'):
    book_of(tmp_path, sweep, name='mine')
  sweep.digest = 'ffff0000'
  with pytest.raises(runs.RunError, match='not of this sweep'):
    book_of(tmp_path, sweep)
  bad = tmp_path / 'bad'
  bad.mkdir()
  (bad / storage.JOURNAL).write_text('what is this\nand this\n')
  with pytest.raises(runs.RunError, match='not a journal'):
    storage.open_storage(None, bad)


@pytest.mark.parametrize(
  'url, words',
  [
    ('nonsense', 'not an address'),
    ('sqlite:///a.db', 'not a postgresql'),
    ('postgresql://me:secret@127.0.0.1:1/base', 'cannot be used'),
  ],
)
def test_a_storage_that_cannot_be_used_is_named(tmp_path, url, words):
  pytest.importorskip('psycopg2')
  with pytest.raises(runs.RunError, match=words) as caught:
    storage.open_storage(url, tmp_path)
  assert '\n' not in str(caught.value) and 'secret' not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize('sampler, trials', [('random', 150), ('tpe', 30)])
def test_no_trial_is_lost_or_done_twice(tmp_path, sampler, trials):
  said = kill_and_finish(tmp_path, None, sampler, trials, kills=10)
  check_once(tmp_path, None, sampler, trials, said)


@pytest.fixture(scope='module')
def postgres(tmp_path_factory):
  """Address of a server of our own, on a free port of the loopback."""
  pytest.importorskip('psycopg2')
  found = sorted(pathlib.Path('/usr/lib/postgresql').glob('*/bin/initdb'))
  where = found[-1].parent if found else None
  if where is None and shutil.which('initdb'):
    where = pathlib.Path(shutil.which('initdb')).parent
  if where is None:
    pytest.skip('no PostgreSQL server here: apt-get install postgresql')
  if os.getuid() == 0 and not shutil.which('runuser'):
    pytest.skip('PostgreSQL does not run as root, and there is no runuser')
  folder = pathlib.Path('/tmp') / f'mq-postgres-{os.getpid()}'
  folder.mkdir()
  user = []
  if os.getuid() == 0:
    shutil.chown(folder, 'postgres')
    user = ['runuser', '-u', 'postgres', '--']
  quiet = subprocess.DEVNULL  # a pipe would stay open in the server
  run = lambda *command: subprocess.run(
    [*user, *map(str, command)], check=True, stdout=quiet, cwd=folder
  )
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  data = folder / 'data'
  run(where / 'initdb', '-D', data, '-U', 'mq', '-A', 'trust', '-N')
  options = f'-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off'
  log = folder / 'log'
  run(where / 'pg_ctl', '-D', data, '-w', '-l', log, '-o', options, 'start')
  try:
    yield f'postgresql://mq@127.0.0.1:{port}/postgres'
  finally:
    run(where / 'pg_ctl', '-D', data, '-m', 'immediate', 'stop')
    shutil.rmtree(folder)


@pytest.mark.slow
def test_a_database_is_shared_and_survives_kills(tmp_path, postgres):
  said = kill_and_finish(tmp_path, postgres, 'random', 40, kills=4)
  check_once(tmp_path, postgres, 'random', 40, said)
  # Others live there side by side; ours is told apart by its name.
  sweep = sweep_worker.sweep('random', 1)
  store, _ = book_of(tmp_path, sweep, postgres, name='another')
  assert sorted(optuna.get_all_study_names(store.optuna)) == ['another', 'test']
  sweep.digest = 'ffff0000'
  with pytest.raises(runs.RunError, match='not of this sweep'):
    book_of(tmp_path, sweep, postgres, name='test')
  store.close()
