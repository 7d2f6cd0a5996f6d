"""Runs that are there already: listed, shown, resumed, done again; options."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from mq_jax import recipes as recipes_lib
from mq_jax.lab import (
  allocating,
  cli,
  files,
  listing,
  measure,
  opening,
  process,
  smoke,
)
from mq_jax.lab import config as config_lib


def rows(path):
  """Records without times."""
  found = files.read_lines(path / 'results.jsonl')
  return [{k: v for k, v in r.items() if 'seconds' not in k} for r in found]


def listed(capsys, folder):
  capsys.readouterr()
  assert cli.main(['runs', str(folder), '--json']) == 0
  return json.loads(capsys.readouterr().out)


def test_the_life_of_a_run(study, tmp_path, capsys, monkeypatch):
  # Names of files in the config are those of where the command is given.
  recipes = ["'none'", "{'recipe': 'rtn', 'bits': 3, 'group': 16}"]
  work = tmp_path / 'work'
  work.mkdir()
  monkeypatch.chdir(work)
  lines = study.read_text().splitlines()
  text = next(x for x in lines if 'compare.text' in x).split("'")[1]
  pathlib.Path('words.txt').write_bytes(pathlib.Path(text).read_bytes())
  given = ['--set', f'compare.recipes = [{", ".join(recipes)}]']
  given += ['--set', 'compare.artifact = None']
  given += ['--set', "compare.text = 'words.txt'"]
  run = ['run', str(study), *given]

  assert cli.main([*run, '--out', 'whole']) == 0
  assert not list(work.glob('whole*.before*'))

  # Killed: it is listed, shown as far as it is, and goes on from elsewhere.
  scores, calls = measure.scores, []

  def killed(*arguments):
    calls.append(1)
    if len(calls) == 2:
      raise KeyboardInterrupt
    return scores(*arguments)

  with monkeypatch.context() as patch:
    patch.setattr(measure, 'scores', killed)
    assert cli.main([*run, '--out', 'out']) == 130
  by_name = {e['path']: e for e in listed(capsys, '.')}
  assert by_name['whole']['state'] == 'finished'
  assert 'rtn w3 g16' in by_name['whole']['best']
  assert by_name['out']['state'] == 'interrupted'
  assert (by_name['out']['done'], by_name['out']['total']) == (1, 2)
  assert cli.main(['runs', '.']) == 0
  assert 'interrupted, 1 of 2' in capsys.readouterr().out
  with files.locked(work / 'out'):
    (entry,) = listed(capsys, 'out')
    assert entry['state'] == 'running'
    assert cli.main(['show', 'out']) == 0
    captured = capsys.readouterr()
    assert '1 of 2 rows are missing' in captured.out
    assert 'is being run' in captured.err
    assert cli.main(['resume', 'out']) == 2
    assert 'another process' in capsys.readouterr().err
  monkeypatch.chdir(tmp_path)
  assert cli.main(['resume', str(work / 'out')]) == 0
  assert rows(work / 'out') == rows(work / 'whole')
  log = (work / 'out' / 'log.txt').read_text().splitlines()
  assert 'KeyboardInterrupt' in log[3]
  assert '"resume"' in log[4] and 'rtn w3 g16' in log[-1]
  command = json.loads((work / 'out' / 'command.json').read_text())
  assert command['command'] == [*run, '--out', 'out']
  assert command['directory'] == str(work)

  # Drawn again from records alone.
  with monkeypatch.context() as patch:
    patch.setattr(opening, 'open_any', None)
    drawn = {n: (work / 'whole' / n).read_bytes() for n in ('results.csv',)}
    for name in ('figure.png', 'results.md', 'results.csv'):
      (work / 'whole' / name).unlink()
    capsys.readouterr()
    assert cli.main(['show', str(work / 'whole')]) == 0
    assert 'rtn w3 g16' in capsys.readouterr().out
    assert (work / 'whole' / 'figure.png').read_bytes()[:4] == b'\x89PNG'
    assert 'rtn w3' in (work / 'whole' / 'results.md').read_text()
    assert (work / 'whole' / 'results.csv').read_bytes() == drawn['results.csv']

  # Finished says so; --force does it again and keeps the old one.
  monkeypatch.chdir(work)
  assert cli.main([*run, '--out', 'out']) == 0
  assert 'finished' in capsys.readouterr().err
  before = (work / 'out' / 'results.jsonl').read_bytes()
  assert cli.main([*run, '--out', 'out', '--force']) == 0
  assert 'out.before-1' in capsys.readouterr().err
  old = work / 'out.before-1' / 'results.jsonl'
  assert old.read_bytes() == before
  assert rows(work / 'out') == rows(work / 'whole')
  # Another run is not moved away.
  other = [*run, '--set', 'compare.seed = 1', '--out', 'out', '--force']
  assert cli.main(other) == 2
  assert 'another run' in capsys.readouterr().err
  assert not (work / 'out.before-2').exists()


def test_an_allocation_is_resumed_by_its_own_command(
  tmp_path, monkeypatch, capsys
):
  asked = []

  def run(ask, out, display, *, artifact):
    asked.append((ask.model, ask.steps, str(out), artifact, os.getcwd()))
    state = pathlib.Path(out) / 'state'
    display.say('packed')
    begun = (state / 'setup.json').exists()
    assert (state.parent / 'command.json').exists() == begun
    state.mkdir(parents=True, exist_ok=True)
    (state / 'setup.json').write_text('{"model": "m", "solvers": ["a", "b"]}')
    with display.rows(0, 1):
      display.steps('table')(1, 2)
    assert (state.parent / 'command.json').exists()
    raise KeyboardInterrupt

  monkeypatch.setattr(allocating, 'run', run)
  work = tmp_path / 'work'
  work.mkdir()
  monkeypatch.chdir(work)
  command = ['allocate', '--model', 'm', '--budget', 'ebw=3', '--out', 'out']
  assert cli.main([*command, '--steps', '5', '--artifact']) == 130
  (entry,) = listed(capsys, '.')
  assert entry['kind'] == 'allocate' and entry['state'] == 'interrupted'
  moved = tmp_path / 'moved'
  (work / 'out').rename(moved)
  monkeypatch.chdir(tmp_path)
  assert cli.main(['resume', str(moved)]) == 130
  assert asked[0] == ('m', 5, 'out', True, str(work))
  assert asked[1] == ('m', 5, str(moved), True, str(work))
  assert cli.main(['show', str(moved)]) == 0
  assert '0 of 2 solvers' in capsys.readouterr().out


def test_what_is_no_run_is_refused(tmp_path, capsys):
  for command in ('show', 'resume'):
    for folder, words in ((tmp_path, 'is no run'), (tmp_path / 'x', 'no such')):
      assert cli.main([command, str(folder)]) == 2
      assert words in capsys.readouterr().err
  assert cli.main(['runs', str(tmp_path / 'x')]) == 2
  assert 'no such folder' in capsys.readouterr().err
  assert cli.main(['runs', str(tmp_path)]) == 0
  assert 'no runs' in capsys.readouterr().out
  (tmp_path / 'versions.json').write_text('{"a": 1}')
  assert listing.describe(tmp_path).state == 'damaged'


def test_smoke_on_the_tiny_model(study, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  recipes = [{'recipe': 'rtn', 'bits': b, 'group': 16} for b in (2, 3, 4)]
  given = ['--set', f'compare.recipes = {recipes!r}']
  given += ['--set', 'compare.artifact = None']
  given += ['--set', "compare.text = 'not/there.txt'"]
  before = set(tmp_path.iterdir())
  assert cli.main(['run', str(study), *given, '--smoke']) == 0
  captured = capsys.readouterr()
  assert 'rtn w2 g16' in captured.out and 'rtn w3' not in captured.out
  assert 'not/there.txt is not there' in captured.err
  assert '1 of 3 rows' in captured.err
  assert set(tmp_path.iterdir()) == before


def test_smoke_keeps_a_row_of_every_kind(tmp_path):
  path = (
    pathlib.Path(__file__).parents[2] / 'configs/studies/fineq_ablation.gin'
  )
  study, _ = config_lib.load(path)
  small, _ = smoke.tiny(study)
  options = lambda s: {
    (r.name, k, v if isinstance(v, str | bool) else None)
    for r in s.rows
    for k, v in r.options
  }
  assert options(small) == options(study)
  assert 3 < len(small.rows) < len(study.rows)
  assert small.windows == 2 and small.models == ('reference',)
  written = tmp_path / 'small.gin'
  written.write_text(smoke.operative(small))
  assert config_lib.load(written)[0] == small


def test_smoke_learns_in_few_steps():
  path = pathlib.Path(__file__).parents[2] / 'configs/studies/learned.gin'
  study, _ = config_lib.load(path)
  small, _ = smoke.tiny(study)
  made = [
    recipes_lib.make(row.name, **dict(row.options)).learning
    for row in small.rows
  ]
  learned = [options for options in made if options is not None]
  assert learned and all(x.steps <= 2 and x.finish <= 2 for x in learned)
  assert {x.optimizer for x in learned} == {'adam', 'sign_sgd'}


CONFIGS = sorted((pathlib.Path(__file__).parents[2] / 'configs').rglob('*.gin'))


@pytest.mark.slow
@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_smoke_of_every_comparison(path, monkeypatch):
  if 'mq run' not in path.read_text():
    pytest.skip('not of mq run')
  monkeypatch.chdir(
    path.parents[len(path.parts) - path.parts.index('configs') - 1]
  )
  assert cli.main(['run', str(path), '--smoke']) == 0


# Options of every command.


def test_traceback_is_shown_when_it_is_asked_for(capsys):
  for arguments in (
    ['--traceback', 'show', 'nowhere'],
    ['show', 'nowhere', '--traceback'],
  ):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert 'Traceback' in error and error.splitlines()[-1].startswith('mq: ')
  assert cli.main(['show', 'nowhere']) == 2
  assert 'Traceback' not in capsys.readouterr().err


def test_debug_nans_and_trace_hold_for_the_command_only(tmp_path):
  with process.watched(True, None):
    with pytest.raises(FloatingPointError):
      jnp.log(jnp.float32(-1.0)).block_until_ready()
  assert not jax.config.jax_debug_nans
  with process.watched(False, str(tmp_path / 'deep' / 'trace')):
    jnp.ones(3).block_until_ready()
  assert list((tmp_path / 'deep' / 'trace').rglob('*.xplane.pb'))


def cache_of(*more, **environment):
  """The folder that a process without jax sets, and what it says."""
  code = (
    'import os; from mq_jax.lab import process; process.use_compile_cache();'
    'print(os.environ.get("JAX_COMPILATION_CACHE_DIR"))'
  )
  kept = {k: v for k, v in os.environ.items() if 'CACHE' not in k}
  done = subprocess.run(
    [sys.executable, '-c', code],
    env=kept | environment,
    capture_output=True,
    text=True,
    check=True,
  )
  return done.stdout.strip(), done.stderr


def test_the_compile_cache_is_where_it_is_asked_for(tmp_path):
  home, file = tmp_path / 'home', tmp_path / 'file'
  file.write_text('in the way')
  assert cache_of(HOME=str(home)) == (f'{home}/.cache/mq_jax/jax', '')
  assert cache_of(XDG_CACHE_HOME=str(home)) == (f'{home}/mq_jax/jax', '')
  assert cache_of(MQ_COMPILE_CACHE='off', HOME=str(home)) == ('None', '')
  asked = str(tmp_path / 'asked')
  assert cache_of(MQ_COMPILE_CACHE=asked) == (asked, '')
  assert cache_of(JAX_COMPILATION_CACHE_DIR='/x', HOME=str(home))[0] == '/x'
  # One that can't be used costs time only; it is told of if it was asked for.
  assert cache_of(XDG_CACHE_HOME=str(file)) == ('None', '')
  folder, said = cache_of(MQ_COMPILE_CACHE=str(file))
  assert folder == 'None' and str(file) in said


def test_the_compile_cache_stays_small(tmp_path, monkeypatch):
  monkeypatch.setattr(process, '_CACHE_BYTES', 250)
  for i, name in enumerate('abc'):
    (tmp_path / name).write_bytes(bytes(100))
    os.utime(tmp_path / name, (i, i))
  process._make_room(tmp_path)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['b', 'c']


@pytest.mark.slow
def test_results_are_the_same_with_and_without_the_cache(study, tmp_path):
  cache = tmp_path / 'cache'
  found = []
  for name, setting in (
    ('off', 'off'),
    ('cold', str(cache)),
    ('warm', str(cache)),
    ('torn', str(cache)),
  ):
    if name == 'torn':  # as kills leave them
      entries = [p for p in cache.iterdir() if p.is_file()]
      assert len(entries) > 5
      for entry in entries:
        with contextlib.suppress(OSError):
          os.truncate(entry, entry.stat().st_size // 2)
    out = tmp_path / name
    command = [sys.executable, '-m', 'mq_jax.lab.cli', 'run', str(study)]
    done = subprocess.run(
      [*command, '--out', str(out)],
      env=os.environ | {'MQ_COMPILE_CACHE': setting},
      capture_output=True,
      text=True,
    )
    assert done.returncode == 0, done.stderr
    assert 'Warning' not in done.stderr
    packed = (out / 'artifact' / 'packed.bin').read_bytes()
    found.append((rows(out), (out / 'sites.jsonl').read_bytes(), packed))
  assert all(each == found[0] for each in found)
