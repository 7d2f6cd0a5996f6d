import csv
import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from mq_jax import artifacts, plans, recipes, sites
from mq_jax.lab import cli, measure, opening, runs
from mq_jax.models import huggingface

FIELDS = {
  'model',
  'recipe',
  'bits',
  'ebw',
  'ebw_paper',
  'nll',
  'perplexity',
  'bits_per_byte',
  'seconds',
  'eval_seconds',
  'status',
}


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
  monkeypatch.delenv('MQ_DATA', raising=False)


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def refused(capsys, *arguments):
  """The one line that a command ends with when the input is at fault."""
  assert cli.main([str(a) for a in arguments]) == 2
  captured = capsys.readouterr()
  assert captured.out == ''
  assert captured.err.startswith('mq: ')
  assert captured.err.count('\n') == 1
  return captured.err


def evaluated(capsys, model, text, *more):
  arguments = ['eval', '--model', model, '--text', text, '--json', *more]
  assert cli.main([str(a) for a in arguments]) == 0
  out = capsys.readouterr().out
  assert out.count('\n') == 1
  return json.loads(out)


@pytest.fixture(scope='module')
def finished(tmp_path_factory, tiny, text):
  """A finished run of three rows, only read by the tests below."""
  folder = tmp_path_factory.mktemp('finished')
  path = folder / 'study.gin'
  path.write_text(f"""
compare.models = ['{tiny}']
compare.recipes = [
  {{'recipe': 'none'}},
  {{'recipe': 'rtn', 'bits': 3, 'group': 16}},
  {{'recipe': 'gptq', 'bits': 2, 'group': 16, 'label': 'two'}},
]
compare.text = '{text}'
compare.calibration_text = '{text}'
compare.windows = 8
compare.calibration_windows = 6
compare.batch = 4
compare.artifact = 'two'
""")
  out = folder / 'out'
  assert cli.main(['run', str(path), '--out', str(out)]) == 0
  return path, out


def test_a_run_leaves_records_tables_figure_config_and_artifact(finished):
  _, out = finished
  records = lines(out / 'results.jsonl')
  assert [r['recipe'] for r in records] == ['none', 'rtn w3 g16', 'two']
  for record in records:
    assert FIELDS <= record.keys()
    assert record['status'] == 'ok'
    assert record['seconds'] > 0
  assert [r['bits'] for r in records] == [16, 3, 2]
  none, rtn, two = records
  assert none['ebw'] == none['ebw_paper'] == 16
  assert rtn['ebw'] == 3 + (16 + 3) / 16
  assert rtn['ebw_paper'] == 3
  assert none['nll'] != rtn['nll'] != two['nll']  # it did something
  with open(out / 'results.csv') as file:
    rows = list(csv.DictReader(file))
  assert [float(r['nll']) for r in rows] == [r['nll'] for r in records]
  assert 'rtn w3 g16' in (out / 'results.md').read_text()
  assert (out / 'figure.png').read_bytes()[:4] == b'\x89PNG'
  versions = json.loads((out / 'versions.json').read_text())
  assert versions['versions']['jax'] and versions['seed'] == 0
  assert len(versions['data']['text']['sha256']) == 64
  sites = lines(out / 'sites.jsonl')
  assert len(sites) == 3 * 7
  assert {s['recipe'] for s in sites} == {'none', 'rtn w3 g16', 'two'}


def test_the_artifact_is_as_large_as_the_table_claims(finished):
  _, out = finished
  two = lines(out / 'results.jsonl')[2]
  manifest = json.loads((out / 'artifact' / 'manifest.json').read_text())
  elements = manifest['totals']['elements']
  assert elements == 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64
  size = (out / 'artifact' / 'packed.bin').stat().st_size
  assert 8 * size == two['ebw'] * elements


def test_the_artifact_evaluates_to_the_same_numbers(finished, text, capsys):
  _, out = finished
  two = lines(out / 'results.jsonl')[2]
  found = evaluated(
    capsys, out / 'artifact', text, '--windows', 8, '--batch', 4
  )
  for field in ('nll', 'perplexity', 'bits_per_byte', 'ebw', 'tokens'):
    assert found[field] == two[field]


def test_a_finished_run_says_so_and_keeps_everything(finished, capsys):
  path, out = finished
  before = {p: p.read_bytes() for p in out.rglob('*') if p.is_file()}
  assert cli.main(['run', str(path), '--out', str(out)]) == 0
  captured = capsys.readouterr()
  assert 'finished' in captured.err
  assert 'rtn w3 g16' in captured.out
  assert {p: p.read_bytes() for p in out.rglob('*') if p.is_file()} == before


def test_the_operative_config_runs_to_the_same_folder(finished, capsys):
  _, out = finished
  assert cli.main(['run', str(out / 'config.gin'), '--out', str(out)]) == 0
  assert 'finished' in capsys.readouterr().err


def test_another_run_is_refused(finished, capsys):
  path, out = finished
  before = {p: p.read_bytes() for p in out.rglob('*') if p.is_file()}
  message = refused(
    capsys, 'run', path, '--out', out, '--set', 'compare.seed = 1'
  )
  assert 'another run' in message and 'seed' in message
  assert {p: p.read_bytes() for p in out.rglob('*') if p.is_file()} == before


def test_a_killed_run_continues_to_the_same_rows(
  finished, study, tmp_path, monkeypatch
):
  _, whole = finished
  out = tmp_path / 'out'
  scores, calls = measure.scores, []

  def killed(*arguments):
    calls.append(arguments)
    if len(calls) == 2:
      raise KeyboardInterrupt
    return scores(*arguments)

  monkeypatch.setattr(measure, 'scores', killed)
  arguments = ['run', str(study), '--out', str(out)]
  assert cli.main(arguments) == 130
  assert len(lines(out / 'results.jsonl')) == 1
  assert cli.main(arguments) == 0
  assert len(calls) == 4  # the first row was not done again
  times = ('seconds', 'eval_seconds')
  strip = lambda rows: [
    {k: v for k, v in r.items() if k not in times} for r in rows
  ]
  assert strip(lines(out / 'results.jsonl')) == strip(
    lines(whole / 'results.jsonl')
  )
  assert lines(out / 'sites.jsonl') == lines(whole / 'sites.jsonl')


def test_a_failing_recipe_is_a_status_and_loses_nothing(
  study, tmp_path, monkeypatch, capsys
):
  make = recipes.make

  def broken(name, **options):
    recipe = make(name, **options)
    return None if name == 'rtn' else recipe

  monkeypatch.setattr(recipes, 'make', broken)
  out = tmp_path / 'out'
  assert cli.main(['run', str(study), '--out', str(out)]) == 1
  records = lines(out / 'results.jsonl')
  assert [r['status'].split(':')[0] for r in records] == ['ok', 'failed', 'ok']
  assert records[1]['nll'] is None
  assert 'failed' in capsys.readouterr().out
  assert (out / 'figure.png').exists()
  monkeypatch.undo()
  assert cli.main(['run', str(study), '--out', str(out)]) == 0


def test_a_foreign_folder_is_refused(study, tmp_path, capsys):
  out = tmp_path / 'mine'
  out.mkdir()
  (out / 'notes.txt').write_text('mine')
  assert 'notes.txt' in refused(capsys, 'run', study, '--out', out)
  assert [p.name for p in out.iterdir()] == ['notes.txt']


def test_the_default_folder_is_named_by_config_and_digest(
  study, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  arguments = ['run', str(study), '--set', "compare.recipes = ['none']"]
  assert cli.main([*arguments, '--set', 'compare.artifact = None']) == 0
  (folder,) = (tmp_path / 'runs').iterdir()
  digest = json.loads((folder / 'versions.json').read_text())['run']
  assert folder.name == f'study-{digest}'


@pytest.mark.parametrize(
  'binding, words',
  [
    ('compare.sed = 1', "'seed'"),
    ("compare.recipes = ['gtpq']", 'gptq'),
    ("compare.recipes = [{'recipe': 'rtn', 'bitts': 3}]", 'bits'),
    ("compare.models = ['no/such/folder']", 'no/such/folder'),
    ("compare.models = ['referense']", 'reference'),
    ("compare.text = 'no_such.txt'", 'no_such.txt'),
    ('compare.windows = 0', 'compare.windows'),
  ],
)
def test_bad_bindings_stop_a_run_before_any_work(
  study, tmp_path, capsys, binding, words
):
  out = tmp_path / 'out'
  message = refused(capsys, 'run', study, '--out', out, '--set', binding)
  assert words in message
  assert not out.exists()


@pytest.mark.parametrize(
  'content, words',
  [
    (b'', 'holds no text'),
    (b' \n ', 'holds no text'),
    (b'caf\xe9 au lait', 'not UTF-8'),
    (b'short', 'shorter than one window'),
  ],
)
def test_bad_texts_are_refused_everywhere(
  study, tiny, tmp_path, capsys, content, words
):
  bad, out = tmp_path / 'bad.txt', tmp_path / 'out'
  bad.write_bytes(content)
  for arguments in (
    ('run', study, '--text', bad, '--out', out),
    ('eval', '--model', tiny, '--text', bad, '--json'),
    (
      *('quantize', '--model', tiny, '--recipe', 'gptq', '--out', out),
      *('--calibration', bad),
    ),
  ):
    message = refused(capsys, *arguments)
    assert words in message and 'bad.txt' in message
    assert not out.exists()


def test_text_option_and_mq_data(study, tmp_path, text, monkeypatch):
  quick = ['run', str(study), '--set', "compare.recipes = ['none']"]
  quick += ['--set', 'compare.artifact = None']
  source = lambda out: json.loads((out / 'versions.json').read_text())['data'][
    'text'
  ]['source']
  other = tmp_path / 'other.txt'
  other.write_text(pathlib.Path(text).read_text('utf-8') + ' more', 'utf-8')
  out = tmp_path / 'a'
  assert cli.main([*quick, '--text', str(other), '--out', str(out)]) == 0
  assert source(out) == str(other)
  wiki = tmp_path / 'data' / 'wikitext-2' / 'test.txt'
  wiki.parent.mkdir(parents=True)
  wiki.write_bytes(other.read_bytes())
  monkeypatch.setenv('MQ_DATA', str(tmp_path / 'data'))
  out = tmp_path / 'b'  # the config binds a text, which counts for more
  assert cli.main([*quick, '--out', str(out)]) == 0
  assert source(out) == str(text)
  kept = [x for x in study.read_text().splitlines() if '.text' not in x]
  study.write_text('\n'.join(kept))
  out = tmp_path / 'c'
  assert cli.main([*quick, '--out', str(out)]) == 0
  assert source(out) == str(wiki)


def test_quantize_then_eval(tiny, text, tmp_path, capsys):
  out = tmp_path / 'packed'
  arguments = ['quantize', '--model', tiny, '--recipe', 'gptq', '--bits', 4]
  # As in the run above but for a number: no new program is compiled.
  arguments += ['--set', 'group=16', '--calibration', text, '--out', out]
  arguments += ['--windows', 6, '--batch', 4]
  assert cli.main([str(a) for a in arguments]) == 0
  assert 'ebw 5.2500' in capsys.readouterr().out  # 4 + (16 + 4) / 16
  plain = evaluated(capsys, tiny, text)
  packed = evaluated(capsys, out, text)
  assert (
    packed.keys()
    == plain.keys()
    >= FIELDS - {*('recipe', 'bits', 'ebw_paper', 'eval_seconds', 'status')}
  )
  assert plain['ebw'] is None and packed['ebw'] == 5.25
  assert plain['tokens'] == packed['tokens'] > 0
  assert plain['bytes'] == packed['bytes'] >= plain['tokens']
  assert 0 < abs(packed['nll'] - plain['nll']) < 1
  before = (out / 'manifest.json').read_bytes()
  assert 'holds an artifact already' in refused(capsys, *arguments)
  assert (out / 'manifest.json').read_bytes() == before
  again = refused(
    capsys,
    'quantize',
    '--model',
    out,
    '--recipe',
    'rtn',
    '--out',
    tmp_path / 'x',
  )
  assert 'is quantized already' in again


def test_quantize_by_a_plan_and_learn_it(tiny, text, tmp_path, capsys):
  model = opening.open_any(tiny)
  found = sites.find(model.apply, model.params, np.zeros((1, 8), np.int32))
  rtn = {'recipe': 'rtn', 'group': 16}
  plan = {site.name: {**rtn, 'bits': 2 + i} for i, site in enumerate(found[:3])}
  path = tmp_path / 'plan.json'
  path.write_text(json.dumps(plan))
  given = ['quantize', '--model', tiny, '--calibration', text, '--plan', path]
  given += ['--windows', 6, '--batch', 3]
  run = lambda *more: cli.main([str(a) for a in (*given, *more)])
  packed = {}
  for name, more in (
    ('plain', ()),
    ('learned', ('--learn', 'block:steps=2,every=1,batch=2,held=0.3')),
  ):
    assert run(*more, '--out', tmp_path / name) == 0
    assert 'plan.json' in capsys.readouterr().out
    packed[name] = artifacts.load(tmp_path / name).params
    matrices = plans.matrices(packed[name])
    assert {n: m.layout.bits for n, m in matrices.items()} == {
      n: x['bits'] for n, x in plan.items()
    }
  moved = [
    m.record['moved'] for m in plans.matrices(packed['learned']).values()
  ]
  assert len(moved) == 3
  out = ('--out', tmp_path / 'x')
  assert 'leave out --bits' in refused(capsys, *given, *out, '--bits', 3)
  path.write_text(json.dumps({'layers/0/q': rtn}))
  assert "no site 'layers/0/q'" in refused(capsys, *given, *out)
  assert 'no such plan' in refused(capsys, *given[:-5], 'absent.json', *out)


def test_eval_for_people(tiny, text, capsys):
  assert cli.main(['eval', '--model', str(tiny), '--text', str(text)]) == 0
  assert 'bits_per_byte' in capsys.readouterr().out


@pytest.mark.parametrize(
  'more, words',
  [
    (['--recipe', 'gtpq'], 'gptq'),
    (['--recipe', 'gptq', '--set', 'gruop=64'], 'group'),
    (['--recipe', 'gptq', '--bits', '77'], '77'),
    (['--recipe', 'fineq', '--bits', '2'], 'bits'),
    (['--recipe', 'rtn', '--set', 'group'], 'option=value'),
    (['--recipe', 'rtn', '--windows', '0'], '--windows'),
  ],
)
def test_quantize_names_what_is_wrong(tiny, tmp_path, capsys, more, words):
  out = tmp_path / 'out'
  assert words in refused(
    capsys, 'quantize', '--model', tiny, '--out', out, *more
  )
  assert not out.exists()


def test_a_damaged_artifact_is_refused(finished, text, tmp_path, capsys):
  import shutil

  out = tmp_path / 'damaged'
  shutil.copytree(finished[1] / 'artifact', out)
  packed = bytearray((out / 'packed.bin').read_bytes())
  packed[7] ^= 1
  (out / 'packed.bin').write_bytes(packed)
  message = refused(capsys, 'eval', '--model', out, '--text', text)
  assert 'packed.bin' in message and 'SHA-256' in message


def test_help_answers_at_once_without_heavy_modules():
  heavy = ('flax', 'gin', 'jax', 'matplotlib', 'numpy', 'orbax', 'rich')
  code = (
    'import sys; from mq_jax.lab import cli\n'
    'try: cli.main(["--help"])\n'
    f'except SystemExit: print([m for m in {heavy} if m in sys.modules])'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert 'quantize' in done.stdout
  assert done.stdout.splitlines()[-1] == '[]'


def test_run_error_is_an_error_of_the_user():
  assert issubclass(runs.RunError, ValueError)


def test_learned_on_windows_of_its_own(tiny, text, tmp_path):
  """The flags and the config say the same."""
  run = lambda *given: cli.main([str(x) for x in given]) == 0 or pytest.fail()
  command = [
    *('quantize', '--model', tiny, '--recipe', 'rtn', '--bits', 3),
    *('--set', 'group=16', '--calibration', text, '--windows', 2),
    *('--batch', 2, '--generated', 3, '--learn'),
  ]
  first, second = tmp_path / 'first', tmp_path / 'second'
  options = 'steps=10,every=1,batch=2,learning_rate=0.01'
  run(*command, f'block:{options}', '--out', first)
  study = tmp_path / 'study.gin'
  learning = {'steps': 10, 'every': 1, 'batch': 2, 'learning_rate': 0.01}
  study.write_text(f"""
compare.models = ['{tiny}']
compare.recipes = [
  {{'recipe': 'rtn', 'bits': 3, 'group': 16, 'learning': {learning},
   'label': 'learned'}},
]
compare.text = '{text}'
compare.calibration_text = '{text}'
compare.windows = 2
compare.calibration_windows = 2
compare.generated_windows = 3
compare.batch = 2
compare.artifact = 'learned'
""")
  run('run', study, '--out', second)
  packed = [
    (folder / 'packed.bin').read_bytes()
    for folder in (first, second / 'artifact')
  ]
  assert packed[0] == packed[1]
  plain = tmp_path / 'plain'
  run(*command[:-1], '--out', plain)
  assert (plain / 'packed.bin').read_bytes() != packed[0]
  assert len((plain / 'packed.bin').read_bytes()) == len(packed[0])


def test_a_model_that_begins_no_texts_writes_none(tiny, text, tmp_path, capsys):
  model = huggingface.load(tiny)
  folder = tmp_path / 'model'
  huggingface.save(folder, dataclasses.replace(model, bos=None))
  command = [
    *('quantize', '--model', folder, '--recipe', 'rtn', '--bits', 3),
    *('--calibration', text, '--windows', 2, '--batch', 2),
  ]
  assert 'begins a text' in refused(
    capsys, *command, '--generated', 2, '--out', tmp_path / 'a'
  )
  assert '--generated 0' in refused(
    capsys, *command, '--generated', 0, '--out', tmp_path / 'a'
  )
  assert cli.main([str(x) for x in (*command, '--out', tmp_path / 'b')]) == 0
