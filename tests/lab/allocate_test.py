"""`mq allocate`: plans found, kept, continued, refused."""

import csv
import json
import os
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from mq_jax import calibration, hardware, plans, sites
from mq_jax.allocation import measured, search
from mq_jax.lab import cli, costing, measure, opening
from mq_jax.lab.allocating import asking, budgets, checkpoints, setup, solving

RTN = [f'rtn:bits={b},group=16' for b in (2, 3, 4)]
Q = 'layers/0/self_attn/q_proj/kernel'
V = 'layers/0/self_attn/v_proj/kernel'


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
  monkeypatch.delenv('MQ_DATA', raising=False)


@pytest.fixture(scope='module')
def texts(tmp_path_factory):
  """Two texts: to calibrate and search on, and to test on."""
  folder = tmp_path_factory.mktemp('allocate')
  cakes = [f'The {i}th café had {i * i} guests, {i * 7 % 13} cakes.' for i in
           range(60)]  # fmt: skip
  rain = [f'In year {1900 + i} no rain fell, nor {3 * i * i} snow!' for i in
          range(40)]  # fmt: skip
  for name, lines in (('cakes', cakes), ('rain', rain)):
    (folder / name).write_text('\n'.join(lines), encoding='utf-8')
  return folder / 'cakes', folder / 'rain'


@pytest.fixture(scope='module')
def base(tiny, texts):
  """Arguments that all commands share, and with them compiled programs."""
  given = ['--model', tiny, '--calibration', texts[0], '--text', texts[1]]
  for kind in ('calibration', 'search', 'test'):
    given += [f'--{kind}-windows', 8]
  return [str(x) for x in given]


@pytest.fixture(scope='module')
def usual(base):
  """A search of some seconds."""
  given = [*base, '--steps', '12', '--front', '2']
  for candidate in RTN:
    given += ['--candidate', candidate]
  given += ['--accelerator', 'systolic:rows=8,cols=8']
  return [*given, '--budget', 'ebw=3.6', '--budget', 'energy_pj=0.99x']


@pytest.fixture(scope='module')
def finished(usual, tmp_path_factory):
  out = tmp_path_factory.mktemp('finished') / 'new' / 'plan'
  also = ['--also', 'uniform,integer_program,lagrangian,random,inverse_order']
  arguments = [*usual, *also, '--artifact', '--out', str(out)]
  assert cli.main(['allocate', *arguments]) == 0
  return arguments, out


def read(path):
  return json.loads(path.read_text())


def result(out):
  """What must not depend on when a search was interrupted."""
  report = read(out / 'report.json')
  report['seconds'] = None
  return (
    report,
    (out / 'plan.json').read_bytes(),
    (out / 'sites.csv').read_bytes(),
  )


def refused(capsys, *arguments):
  """The one line of a command that does not."""
  assert cli.main(['allocate', *map(str, arguments)]) == 2
  captured = capsys.readouterr()
  assert captured.out == ''
  lines = captured.err.splitlines()
  assert lines[-1].startswith('mq: ')
  assert sum(line.startswith('mq: ') for line in lines) == 1
  return lines[-1]


# What is written.


def test_files_agree_with_each_other(finished, tiny, capsys):
  _, out = finished
  report = read(out / 'report.json')
  assert (out / 'pareto.png').read_bytes()[:4] == b'\x89PNG'
  achieved = report['achieved']
  for budget in report['budgets']:
    assert budget['achieved'] == achieved[budget['quantity']]
    assert budget['achieved'] <= budget['limit'] * (1 + 1e-9)
    assert budget['room'] == 1 - budget['achieved'] / budget['limit']
  with open(out / 'sites.csv') as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == 7
  plan = read(out / 'plan.json')
  assert [r['site'] for r in rows] == list(plan)
  for quantity in ('bytes', 'cycles', 'energy_pj'):
    total = sum(float(r[quantity]) for r in rows)
    np.testing.assert_allclose(total, achieved[quantity], rtol=1e-12)
  assert sum(bool(r['cheaper']) + bool(r['dearer']) for r in rows) >= 7
  assert all('alone' in r['why'] for r in rows)

  # The plan made again.
  model = opening.open_any(tiny)
  found = sites.find(model.apply, model.params, jnp.zeros((1, 4), jnp.int32))
  packed = plans.compress(model.params, plans.from_json(plan, found))
  assert plans.size(packed).ebw == achieved['ebw']
  assert plans.size(packed).bits == 8 * achieved['bytes']
  # Priced by the other command, as a plan and as an artifact.
  for given in (
    ['--model', tiny, '--plan', out / 'plan.json'],
    ['--model', out / 'artifact'],
  ):
    given += ['--accelerator', 'systolic:rows=8,cols=8', '--json']
    assert cli.main(['cost', *map(str, given)]) == 0
    (entry,) = json.loads(capsys.readouterr().out)['entries']
    total = entry['total']
    for name, field in (
      ('cycles', 'total_cycles'),
      ('time_s', 'time_s'),
      ('energy_pj', 'total_pj'),
      ('dram_bytes', 'dram_bytes'),
    ):
      np.testing.assert_allclose(achieved[name], total[field], rtol=1e-12)
  size = (out / 'artifact' / 'packed.bin').stat().st_size
  assert size == achieved['bytes']


def test_losses_are_those_of_the_packed_model(finished, texts, capsys):
  arguments, out = finished
  report = read(out / 'report.json')
  given = ['--model', out / 'artifact', '--text', texts[1], '--windows', 8]
  assert cli.main(['eval', *map(str, given), '--json']) == 0
  found = json.loads(capsys.readouterr().out)
  assert found['nll'] == report['scores']['nll']
  np.testing.assert_allclose(found['nll'], report['loss']['test'], rtol=1e-6)
  assert report['loss']['test'] != report['loss']['unquantized_test']


def test_every_solver_keeps_the_budgets(finished):
  _, out = finished
  report = read(out / 'report.json')
  solvers = {point['solver'] for point in report['front']}
  assert {'gradient', 'integer_program', 'lagrangian', 'random'} <= solvers
  for point in report['front']:
    for quantity, limit in point['budget'].items():
      assert point['costs'][quantity] <= limit * (1 + 1e-9)
  high = max(p['costs']['energy_pj'] for p in report['uniform'])
  assert report['budgets'][1]['limit'] == 0.99 * high
  (mine,) = (
    p for p in report['front'] if p['solver'] == 'gradient' and p['asked']
  )
  for quantity, value in mine['costs'].items():
    np.testing.assert_allclose(value, report['achieved'][quantity])
  assert len(report['uniform']) == 3


# Continued.


def test_a_finished_folder_says_so_and_draws_again(finished, capsys):
  arguments, out = finished
  before = {p: p.read_bytes() for p in out.rglob('*') if p.is_file()}
  (out / 'pareto.png').unlink()
  assert cli.main(['allocate', *arguments]) == 0
  captured = capsys.readouterr()
  assert 'finished' in captured.err
  for words in ('budgets', 'achieved', 'self_attn/q_proj', 'all rtn w3 g16'):
    assert words in captured.out
  after = {p: p.read_bytes() for p in out.rglob('*') if p.is_file()}
  assert {p.name for p in after} == {p.name for p in before}
  assert after[out / 'report.json'] == before[out / 'report.json']


@pytest.mark.parametrize(
  'name, count',
  [pytest.param('table', 1, marks=pytest.mark.slow), ('search', 3)],
)
def test_a_killed_search_continues_to_the_same_bits(
  finished, tmp_path, monkeypatch, name, count
):
  arguments, whole = finished
  out = tmp_path / 'out'
  arguments = [*arguments[:-1], str(out)]
  save, calls = checkpoints.Folder.save_arrays, []

  def killed(self, what, arrays):
    save(self, what, arrays)
    calls.append(what)
    if calls.count(name) == count:
      monkeypatch.undo()
      raise KeyboardInterrupt

  monkeypatch.setattr(checkpoints.Folder, 'save_arrays', killed)
  assert cli.main(['allocate', *arguments]) == 130
  assert not (out / 'report.json').exists()
  # What a kill in the middle of writing leaves.
  torn = out / 'state' / f'{name}-00000099.orbax-checkpoint-tmp'
  torn.mkdir()
  bad = out / 'state' / f'{name}-00000098'
  bad.mkdir()
  (bad / 'manifest.ocdbt').write_bytes(b'half')
  seen = []
  front = search.front
  watched = lambda *a, state=None, **k: (
    seen.append(state) or front(*a, state=state, **k)
  )
  monkeypatch.setattr(search, 'front', watched)
  assert cli.main(['allocate', *arguments]) == 0
  assert result(out) == result(whole)
  assert not torn.exists()
  (state,) = seen
  if name == 'search':  # it did not begin again
    done = int(np.sum(np.asarray(state.relaxations.step)))
    assert done == (np.asarray(state.losses) != 0).sum() == 18


@pytest.mark.parametrize(
  'more, words',
  [
    (['--steps', 13], 'steps 12 (now 13)'),
    (['--seed', 1], 'seed 0 (now 1)'),
    (['--budget', 'bytes=9e9'], 'budgets.bytes null (now 9000000000)'),
    (['--test-windows', 7], 'texts.test.windows 8 (now 7)'),
    (['--tie', '*/mlp/*'], 'ties [] (now ["*/mlp/*"])'),
    (['--phase', 'decode'], 'accelerator.phase prefill (now decode)'),
  ],
)
def test_a_changed_setup_is_refused(finished, capsys, more, words):
  arguments, out = finished
  before = {p: p.read_bytes() for p in out.rglob('*') if p.is_file()}
  message = refused(capsys, *arguments, *more)
  assert words in message and 'nothing was written' in message
  assert {p: p.read_bytes() for p in out.rglob('*') if p.is_file()} == before


def test_a_changed_model_is_refused(finished, tmp_path, capsys, monkeypatch):
  arguments, _ = finished
  digest = setup._digest
  monkeypatch.setattr(setup, '_digest', lambda x: digest(x)[::-1])
  assert 'parameters' in refused(capsys, *arguments)


def test_a_foreign_folder_is_refused(usual, tmp_path, capsys, no_work):
  (tmp_path / 'notes.txt').write_text('mine')
  message = refused(capsys, *usual, '--out', tmp_path)
  assert 'notes.txt' in message
  assert [p.name for p in tmp_path.iterdir()] == ['notes.txt']


@pytest.mark.slow
def test_a_process_killed_at_any_moment(finished, tmp_path):
  """kill -9 again and again, until it gets through."""
  arguments, whole = finished
  out = tmp_path / 'out'
  command = [sys.executable, '-m', 'mq_jax.lab.cli', 'allocate']
  command += [*arguments[:-1], str(out)]
  for seconds in (14, 18, 22, 26, None):
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
      try:
        process.wait(seconds)
        break
      except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)
  assert result(out) == result(whole)


# Refused.


@pytest.fixture
def no_work(monkeypatch):
  """Fails where a model is calibrated."""

  def busy(*_, **__):
    raise AssertionError('was refused too late')

  monkeypatch.setattr(calibration, 'calibrate', busy)


@pytest.mark.parametrize(
  'more, words',
  [
    ([], 'needs a budget'),
    (['--budget', 'ebw'], 'NAME=VALUE'),
    (['--budget', 'ebw=two'], 'positive number'),
    (['--budget', 'ebw=nan'], 'positive number'),
    (['--budget', 'ebw=-1x'], 'positive number'),
    (['--budget', 'ebv=2'], "'ebw'"),
    (['--budget', 'cycles=2x'], 'add --accelerator'),
    (['--budget', 'ebw=2', '--budget', 'ebw=3'], 'a budget already'),
    (['--budget', 'ebw=2', '--solver', 'gradiant'], "'gradient'"),
    (['--budget', 'ebw=2', '--also', 'greedy,radnom'], "'random'"),
    (['--budget', 'ebw=2', '--candidate', 'rtn'], 'two or more'),
    (['--budget', 'ebw=2', '--candidate', 'rnt'], 'did you mean rtn'),
    (['--budget', 'ebw=2', '--candidate', 'rtn:4'], 'OPTION=VALUE'),
    (['--budget', 'ebw=2', '--candidate', 'rtn:bit=4'], 'bits'),
    (['--budget', 'ebw=2', '--candidate', 'olive/rtn'], '[PATTERN@]RECIPE'),
    (['--budget', 'ebw=2', '--set', 'rows=8'], 'add --accelerator'),
    (['--budget', 'ebw=2', '--axis', 'rows'], '--blocks'),
    (['--budget', 'ebw=2', '--steps', 0], '--steps'),
    (['--budget', 'ebw=2', '--accelerator', 'olve'], "'olive'"),
    (['--budget', 'ebw=2', '--accelerator', 'olive/rtn'], 'leave out'),
    (['--budget', 'ebw=2', '--accelerator', 'fineq'], '--candidate'),
    (
      [*('--budget', 'ebw=2', '--accelerator', 'olive'),
       *('--candidate', 'rtn:bits=3', '--candidate', 'rtn')],
      'rtn(bits=3) does not run',
    ),
    (['--budget', 'ebw=2', '--exclude', '*/qq_proj/*'], 'q_proj'),
    (['--budget', 'ebw=2', '--exclude', '*'], 'leaves no site'),
    (['--budget', 'ebw=2', '--tie', '*/qq_proj/*'], 'q_proj'),
    (['--budget', 'ebw=2', '--tie', '*/q_proj/*'], 'ties no two'),
    (
      [*('--budget', 'ebw=2', '--candidate', '*/mlp/*@rtn'),
       *('--candidate', '*/q_proj/*@rtn:bits=3')],
      'k_proj/kernel: has no candidate (3 such sites)',
    ),
    (
      [*('--budget', 'ebw=2', '--candidate', '*/mlp/*@rtn'),
       *('--candidate', '*attn*@rtn:bits=3', '--tie', '*/[qv]_*,*/up_proj/*')],
      'no candidate in common',
    ),
    (['--budget', 'ebw=2', '--search-windows', 9999], 'fewer windows'),
    (['--budget', 'ebw=2', '--model', 'opt-125m'], 'only shapes'),
    (['--budget', 'ebw=2', '--model', 'referense'], "'reference'"),
    (['--budget', 'ebw=2', '--text', 'no_such.txt'], 'no_such.txt'),
  ],
)  # fmt: skip
def test_bad_input_is_one_line_before_any_work(
  base, capsys, tmp_path, no_work, more, words
):
  out = tmp_path / 'out'
  assert words in refused(capsys, *base, '--out', out, *more)
  assert not out.exists()


def test_test_and_search_may_not_share_text(
  base, texts, tmp_path, capsys, no_work
):
  given = [*base, '--budget', 'ebw=2', '--out', tmp_path / 'out']
  assert 'both' in refused(capsys, *given, '--text', texts[0])
  copy = tmp_path / 'copy'
  copy.write_bytes(b'Once more: ' + texts[0].read_bytes())
  message = refused(capsys, *given, '--text', copy, '--test-windows', 99)
  assert 'repeat the test text' in message


@pytest.mark.slow
def test_an_infeasible_budget_names_the_smallest(
  usual, tmp_path, capsys, monkeypatch
):
  monkeypatch.setattr(measured, 'one_site_table', None)  # before any loss
  out = tmp_path / 'out'
  message = refused(capsys, *usual, '--budget', 'bytes=100', '--out', out)
  assert 'bytes = 100 cannot be met; the smallest feasible is 3600' in message
  assert 'of which layers/0/mlp' in message
  assert not out.exists()


def test_a_loss_that_is_no_number(usual, tmp_path, capsys, monkeypatch):
  nan = lambda params, x: jnp.float32(jnp.nan)
  broken = lambda bench: (nan, jnp.asarray(bench.windows.search))
  monkeypatch.setattr(setup, 'objective', broken)
  message = refused(capsys, *usual, '--out', tmp_path / 'out')
  assert 'loss of the unquantized model is nan' in message


def test_a_diverging_search_keeps_its_last_good_state(
  finished, tmp_path, capsys, monkeypatch
):
  arguments, whole = finished
  out = tmp_path / 'out'
  arguments = [*arguments[:-1], str(out)]
  front, advance, calls = search.front, search._advance, []

  def diverging(*args, **kwargs):
    state, trace = advance(*args, **kwargs)
    calls.append(1)
    if len(calls) == 2:
      trace = trace._replace(loss=trace.loss.at[4].set(jnp.nan))
    return state, trace

  monkeypatch.setattr(search, '_advance', diverging)
  message = refused(capsys, *arguments)
  assert 'not finite at step 10' in message and f'{out}/state' in message
  assert [p.name for p in (out / 'state').glob('search-*')] == [
    'search-00000000'
  ]
  monkeypatch.undo()
  assert search.front is front
  assert cli.main(['allocate', *arguments]) == 0
  assert result(out) == result(whole)


# Parts.


def test_ties_hold(usual, tmp_path):
  out = tmp_path / 'out'
  given = [*usual, '--tie', 'layers/{}/*/[qv]_proj/*,*/{}/mlp/up_proj/*']
  given += ['--solver', 'integer_program', '--also', 'none', '--front', '1']
  assert cli.main(['allocate', *given, '--out', str(out)]) == 0
  plan = read(out / 'plan.json')
  assert plan[Q] == plan[V] == plan['layers/0/mlp/up_proj/kernel']
  rows = {r['site']: r for r in read(out / 'report.json')['sites']}
  assert rows[V]['tied_to'] == Q and not rows[V]['label'] == ''


@pytest.mark.parametrize('name', hardware.accelerators.BY_NAME)
def test_default_candidates_run(name):
  design = costing.design(costing.Named(name))
  if name in ('fineq', 'olive'):  # of one width that is run
    with pytest.raises(ValueError, match='say which with --candidate'):
      asking.candidates([], design)
    return
  found = asking.candidates([], design)
  assert len(found) >= 2
  assert not any(asking.refusal(design, c.recipe) for c in found)


def test_patterns_of_ties():
  names = ['a/0/q', 'a/0/k', 'a/0/v', 'b/1/q', 'b/1/k', 'b/10/k']
  assert asking.ties(['?/{}/[qk]'], names) == [
    ['a/0/q', 'a/0/k'],
    ['b/1/q', 'b/1/k'],
  ]
  assert asking.ties(['{}/*/q,{}/*/v', 'b/*'], names) == [
    ['a/0/q', 'a/0/v'],
    ['b/1/q', 'b/1/k', 'b/10/k'],
  ]


def test_candidates_of_some_sites():
  found = asking.candidates(
    ['rtn:bits=4', '*/q@rtn:bits=3', '*/k @ rtn:bits=3']
  )
  assert [c.recipe.label for c in found] == ['rtn(bits=4)', 'rtn(bits=3)']
  allowed = asking.allowed(found, ['0/q', '0/k', '0/v'])
  assert allowed.tolist() == [[True, True], [True, True], [True, False]]


def test_budgets_are_relative_to_the_costliest_uniform_candidate():
  table = np.array([[1.0, 5.0, 9.0], [2.0, 2.0, 9.0]])
  allowed = np.array([[True, True, True], [True, True, False]])
  found = budgets.parse(['cycles=0.5x', 'ebw=3'], True)
  limits = budgets.resolve(found, {'cycles': table, 'ebw': table}, allowed)
  assert limits == {'cycles': 3.5, 'ebw': 3.0}
  none = np.array([[True, False, False], [False, True, False]])
  assert budgets.span(table, none) == (3.0, 3.0)


def test_windows_that_repeat_the_test_are_found():
  rng = np.random.default_rng(0)
  windows = rng.integers(0, 9, (4, 33))
  test = rng.integers(0, 9, (3, 33))
  assert setup.disjoint(windows, test).all()
  windows[2, 5:21] = test[1, 9:25]  # half a window
  assert setup.disjoint(windows, test).tolist() == [True, True, False, True]


def test_texts_are_disjoint_and_follow_the_seed(base, tiny, texts):
  model = opening.open_any(tiny)
  ask = setup.Ask('', (), (), (), text=str(texts[1]),
                  calibration_text=str(texts[0]), calibration_windows=6,
                  search_windows=5, test_windows=7)  # fmt: skip
  found = setup.cut(model, ask)
  assert [x.shape for x in found.calibration] == [(6, 32)]
  assert found.search.shape == (5, 1, 33) and found.test.shape == (1, 7, 33)
  every = measure.windows(model, measure.calibration_text(texts[0])).tokens
  key = lambda rows: {row[1:].tobytes() for row in rows.reshape(-1, 33)}
  chosen = key(found.search) | {
    x.tobytes() for x in found.calibration[0][:, 1:]
  }
  assert key(found.search) <= key(every.astype(np.int32))
  assert len(chosen) == 11 and not chosen & key(found.test)


def test_every_solver_has_a_line_and_a_name(capsys):
  from mq_jax.report import allocation

  assert set(solving.SOLVERS) == set(allocation.LOOKS)
  with pytest.raises(SystemExit):
    cli.main(['allocate', '--help'])
  shown = capsys.readouterr().out
  for name in (*solving.SOLVERS, *budgets.QUANTITIES):
    assert name in shown


@pytest.mark.slow
def test_all_solvers_run(usual, tmp_path):
  out = tmp_path / 'out'
  given = [*usual, '--also', 'all', '--out', str(out)]
  assert cli.main(['allocate', *given]) == 0
  report = read(out / 'report.json')
  assert {p['solver'] for p in report['front']} == set(solving.SOLVERS)
  assert report['notes'] == []


@pytest.mark.slow
def test_blocks_of_sites_choose_by_themselves(base, tmp_path):
  out = tmp_path / 'out'
  given = [*base, '--budget', 'ebw=3.6', '--blocks', '2', '--axis', 'columns']
  for candidate in RTN[:2]:
    given += ['--candidate', candidate]
  given += ['--solver', 'greedy', '--also', 'none', '--front', '1']
  assert cli.main(['allocate', *given, '--out', str(out)]) == 0
  report = read(out / 'report.json')
  assert len(report['sites']) == 14 and len(report['plan']) == 7
  total = sum(r['bytes'] for r in report['sites'])
  assert total == report['achieved']['bytes']
  assert report['achieved']['ebw'] <= 3.6
