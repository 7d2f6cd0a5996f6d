"""`mq cost`: what is said, priced, refused and written."""

import csv
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import random_checkpoint
from mq_jax import hardware, plans, quantize, recipes
from mq_jax.lab import cli, costing, opening
from mq_jax.sites import find

SHAPES = ['--model', 'opt-125m', '--batch', '2', '--context', '8']


def priced(capsys, *arguments):
  """The JSON of a command that works."""
  assert cli.main(['cost', *map(str, arguments), '--json']) == 0
  out = capsys.readouterr().out
  assert out.count('\n') == 1
  return json.loads(out)


def refused(capsys, *arguments):
  """The one line of a command that does not."""
  assert cli.main(['cost', *map(str, arguments)]) == 2
  captured = capsys.readouterr()
  assert captured.out == ''
  assert captured.err.startswith('mq: ')
  assert captured.err.count('\n') == 1
  return captured.err


@pytest.fixture
def no_quantizing(monkeypatch):
  """Fails where weights are quantized, or a Gaussian in their place."""

  def busy(*_, **__):
    raise AssertionError('was refused too late')

  monkeypatch.setattr(plans, 'compress', busy)
  monkeypatch.setattr(hardware, 'of_recipe', busy)


# Entries.


@pytest.mark.parametrize(
  'text, accelerator, recipe',
  [
    ('olive', ('olive', {}), None),
    ('gpu_roofline:h100', ('gpu_roofline', {'': 'h100'}), None),
    ('fineq/fineq', ('fineq', {}), ('fineq', {})),
    (
      'systolic:os,rows=8,multiplier=(8,8)/rtn:bits=3,symmetric=True',
      ('systolic', {'': 'os', 'rows': 8, 'multiplier': (8, 8)}),
      ('rtn', {'bits': 3, 'symmetric': True}),
    ),
    (
      'microscopiq : memory.l2_bytes=1e6',
      ('microscopiq', {'memory.l2_bytes': 1e6}),
      None,
    ),
  ],
)
def test_entries_are_read(text, accelerator, recipe):
  found = costing.parse(text)
  assert found.accelerator == costing.Named(
    accelerator[0], tuple(accelerator[1].items())
  )
  assert (found.recipe and (found.recipe.name, dict(found.recipe.options))) == (
    recipe
  )
  assert costing.parse(found.accelerator.label).accelerator == found.accelerator


def test_an_entry_without_accelerator_takes_the_given_one():
  gptq, rtn = costing.requests('olive:rows=8', ['/gptq:bits=4', '/rtn'])
  assert (
    gptq.accelerator
    == rtn.accelerator
    == costing.parse('olive:rows=8').accelerator
  )
  assert gptq.recipe.name == 'gptq'


@pytest.mark.parametrize('name', hardware.accelerators.BY_NAME)
def test_every_accelerator_has_defaults_that_run(name):
  made = costing.design(costing.Named(name))
  recipe = recipes.make(made.default.recipe, **dict(made.default.options))
  model = costing.open_model('opt-125m', 'decode')
  chosen = [recipe] * len(model.workload.names)
  costing.check(made, model, chosen, made.default.activation_bits)
  assert 0.1 < made.clock_ghz < 4


@pytest.mark.parametrize('design', ['w4a16', 'int8', 'fp16', 'ant'])
def test_every_design_of_mixpe_has_defaults_that_run(design):
  made = costing.design(costing.Named('mixpe', (('', design),)))
  recipe = recipes.make(made.default.recipe, **dict(made.default.options))
  model = costing.open_model('opt-125m', 'decode')
  chosen = [recipe] * len(model.workload.names)
  costing.check(made, model, chosen, made.default.activation_bits)


def test_the_widths_are_those_of_of_matrix():
  weight = jax.random.normal(jax.random.key(0), (32, 32))
  for name in ('fineq', 'none', 'awq'):
    recipe = recipes.make(name)
    found = hardware.of_matrix(quantize.quantize_matrix(weight, recipe))
    assert costing.width_of(recipe) == found.weight_bits


# Prices.


def test_published_shapes_cost_what_the_model_says(capsys):
  found = priced(
    capsys,
    *SHAPES,
    *('--accelerator', 'systolic:os,rows=16,cols=8', '--recipe', 'rtn'),
    *('--bits', 4, '--option', 'group=64', '--option', 'symmetric=True'),
  )
  (entry,) = found['entries']
  ebw = 4 + 16 / 64
  want = hardware.cost(
    hardware.accelerators.systolic('os', 16, 8),
    hardware.workload.model('opt-125m', batch=2, context=8),
    hardware.precision(4, 8, output_bits=16, ebw=ebw),
  )
  sites = entry['sites']
  assert [s['site'] for s in sites][-2:] == ['fc1', 'fc2']
  assert {s['ebw'] for s in sites} == {ebw}
  for field in ('compute_cycles', 'total_cycles', 'dram_bytes', 'utilization'):
    np.testing.assert_allclose([s[field] for s in sites], getattr(want, field))
  total, summed = entry['total'], want.sum()
  for field in ('total_cycles', 'macs', 'utilization', 'conflict_rate'):
    np.testing.assert_allclose(total[field], getattr(summed, field))
  np.testing.assert_allclose(total['total_pj'], summed.energy_pj.total)
  np.testing.assert_allclose(total['total_um2'], summed.area_um2.total)
  assert total['time_s'] == pytest.approx(1e-9 * total['total_cycles'])
  assert total['recipe'] == 'rtn(bits=4, group=64, symmetric=True)'


def test_parts_add_up(capsys):
  found = priced(
    capsys,
    *SHAPES,
    *('--activation-bits', 8, '--recipe', 'rtn', '--bits', 4),
    *('--set', 'memory.dram_bytes_per_cycle=2', '--compare'),
    *('microscopiq:rows=16', 'mixpe', 'gpu_roofline:h100', 'olive'),
  )
  for entry in found['entries']:
    for row in (*entry['sites'], entry['total']):
      cycles = sum(
        row[f'{part}_cycles']
        for part in (
          *('compute', 'fill'),
          *('stall_noc', 'stall_sram', 'stall_dram'),
        )
      )
      assert cycles == pytest.approx(row['total_cycles'])
      parts = ('array', 'noc', 'sram', 'dram', 'leakage')
      pj = sum(row[f'{part}_pj'] for part in parts)
      assert pj == pytest.approx(row['total_pj'])
    total = entry['total']
    assert total['stall_dram_cycles'] > 0.5 * total['total_cycles']
    clock = {'mixpe': 0.5, 'gpu_roofline': 1.98}.get(entry['accelerator'], 1)
    assert entry['clock_ghz'] == total['clock_ghz'] == clock
    assert total['time_s'] == pytest.approx(
      1e-9 * total['total_cycles'] / clock
    )
  assert any('activations' not in note for note in found['notes'])


def test_defaults_are_said(capsys):
  found = priced(capsys, *SHAPES, '--accelerator', 'gpu_roofline')
  assert found['notes'][0] == 'by default: gpu_roofline: none, A16'
  assert found['entries'][0]['total']['ebw'] == 16


def test_options_of_an_entry_count_more_than_set(capsys):
  found = priced(
    capsys,
    *('--model', 'opt-125m', '--phase', 'decode', '--recipe', 'none'),
    *('--set', 'rows=16', '--set', 'clock_ghz=2'),
    *('--activation-bits', 16),
    *('--compare', 'systolic', 'systolic:rows=32'),
  )
  areas = [e['total']['array_um2'] for e in found['entries']]
  assert areas[1] == 2 * areas[0]
  assert [e['clock_ghz'] for e in found['entries']] == [2, 2]


def test_a_plan_of_shapes(capsys, tmp_path):
  plan = tmp_path / 'plan.json'
  plan.write_text(
    json.dumps(
      {
        'fc1': {'recipe': 'rtn', 'bits': 4},
        '3/fc1': {'recipe': 'rtn', 'bits': 8},
      }
    )
  )
  found = priced(
    capsys, *SHAPES, '--plan', plan, '--accelerator', 'gpu_roofline'
  )
  sites = {s['site']: s for s in found['entries'][0]['sites']}
  assert len(sites) == 12 * 6
  assert sites['3/fc1']['weight_bits'] == 8
  assert sites['4/fc1']['weight_bits'] == 4
  assert sites['4/fc2']['recipe'] == 'bf16'
  assert sites['4/fc2']['ebw'] == sites['4/fc2']['activation_bits'] == 16
  assert '60 sites without a recipe: bf16, activations too' in found['notes']
  groups = costing.grouped(found['entries'][0]['sites'])
  assert [g['site'] for g in groups][4:] == ['*/fc1', '3/fc1', '*/fc2']


@pytest.mark.slow
def test_real_weights_are_quantized_and_measured(capsys, tiny, tmp_path):
  arguments = ['--model', tiny, '--accelerator', 'systolic:rows=8,cols=8']
  given = ['--recipe', 'rtn', '--option', 'group=16']
  found = priced(capsys, *arguments, *given)
  assert found['context'] == 32  # of the model
  sites = found['entries'][0]['sites']
  assert len(sites) == 7 and {s['m'] for s in sites} == {32}
  assert {s['ebw'] for s in sites} == {4 + (16 + 4) / 16}
  assert found['notes'][0] == 'not priced: embed_tokens/embedding'
  assert found['notes'][-1].endswith('measured on the quantized weights')

  # The same by a plan, and packed.
  plan = tmp_path / 'plan.json'
  rtn = {'recipe': 'rtn', 'group': 16}
  plan.write_text(json.dumps({s['site']: rtn for s in sites}))
  planned = priced(capsys, *arguments, '--plan', plan)
  assert planned['entries'][0]['sites'] == sites
  model = opening.open_any(tiny)
  calls = find(model.apply, model.params, jnp.zeros((1, 4), jnp.int32))
  uniform = plans.uniform(calls, recipes.make('rtn', group=16))
  out = tmp_path / 'packed'
  opening.save_artifact(out, model, plans.compress(model.params, uniform))
  packed = priced(capsys, '--model', out, *arguments[2:])
  for a, b in zip(packed['entries'][0]['sites'], sites, strict=True):
    assert {**a, 'recipe': ''} == {**b, 'recipe': ''}
  again = refused(capsys, '--model', out, *arguments[2:], *given)
  assert 'quantized already' in again


def test_a_plan_may_leave_sites_out(capsys, tiny, tmp_path):
  arguments = ['--model', tiny, '--accelerator', 'systolic:rows=8,cols=8']
  name = 'layers/0/self_attn/k_proj/kernel'
  gptq = {'recipe': 'gptq', 'group': 16}
  plan = tmp_path / 'plan.json'
  plan.write_text(json.dumps({name: gptq}))
  found = priced(capsys, *arguments, '--plan', plan)
  bits = {s['site']: s['weight_bits'] for s in found['entries'][0]['sites']}
  assert sorted(bits.values()) == [4] + 6 * [16] and bits[name] == 4
  assert 'without calibration or compensation' in found['notes'][-2]
  olive = ('--model', tiny, '--accelerator', 'olive', '--plan', plan)
  message = refused(capsys, *olive)
  assert 'bf16' in message and 'possible are 4, 8' in message
  plan.write_text(json.dumps({name.replace('k_proj', 'k_prok'): gptq}))
  assert name in refused(capsys, *arguments, '--plan', plan)


# What is written and shown.


def test_files_and_tables(capsys, tmp_path):
  out = tmp_path / 'new' / 'cost'
  arguments = ['cost', *SHAPES, '--recipe', 'rtn', '--out', str(out)]
  one = [*arguments, '--accelerator', 'olive', '--option', 'bits=4']
  assert cli.main(one) == 0
  shown = capsys.readouterr().out
  for words in (
    'opt-125m, prefill, batch 2 x 8 tokens',
    'cycles [',
    'energy [',
  ):
    assert words in shown
  assert 'fc2' in shown and 'area' in shown and f'written to {out}' in shown
  assert sorted(p.name for p in out.iterdir()) == [
    'cost.csv',
    'cost.json',
    'cost.png',
  ]
  assert (out / 'cost.png').read_bytes()[:4] == b'\x89PNG'
  report = json.loads((out / 'cost.json').read_text())
  with open(out / 'cost.csv') as file:
    rows = list(csv.DictReader(file))
  assert [r['site'] for r in rows][-1] == 'total'
  total = report['entries'][0]['total']
  assert float(rows[-1]['total_pj']) == total['total_pj']
  several = [*arguments, '--compare', 'olive', 'gpu_roofline:h100']
  assert cli.main(several) == 0
  shown = capsys.readouterr().out
  assert 'side by side' in shown and 'gpu_roofline:h100' in shown
  (out / 'notes.txt').write_text('mine')
  assert 'notes.txt' in refused(capsys, *several[1:])


def test_help_says_the_grammar(capsys):
  with pytest.raises(SystemExit):
    cli.main(['cost', '--help'])
  shown = capsys.readouterr().out
  assert 'NAME[:OPTION,...][/RECIPE[:OPTION=VALUE,...]]' in shown
  for name in hardware.accelerators.BY_NAME:
    assert name in shown


# Bad input.


@pytest.mark.parametrize(
  'more, words',
  [
    ([], 'needs --accelerator'),
    (['--accelerator', 'olve'], "'olive'"),
    (['--accelerator', 'olive:'], 'NAME[:OPTION'),
    (['--accelerator', 'olive:rows=8,8'], 'OPTION=VALUE'),
    (['--accelerator', 'olive:rows=8,rows=9'], 'set twice'),
    (['--accelerator', 'olive:row=8'], "'rows'"),
    (['--accelerator', 'olive', '--set', 'recon_units=2'], 'recon_units'),
    (['--accelerator', 'olive', '--set', 'rows'], 'option=value'),
    (['--accelerator', 'olive', '--set', 'rows=0'], 'rows = 0'),
    (['--accelerator', 'olive', '--set', 'rows=2.5'], 'rows = 2.5'),
    (['--accelerator', 'olive', '--set', 'rows=x'], "rows = 'x'"),
    (['--accelerator', 'olive', '--set', 'memory.l2=1'], 'memory.l2_bytes'),
    (['--accelerator', 'olive', '--set', 'memory.l2_bytes=-1'], 'positive'),
    (['--accelerator', 'olive', '--set', 'clock_ghz=1e999'], 'positive'),
    (['--accelerator', 'olive', '--set', 'node_nm=3'], '3 nm'),
    (
      ['--accelerator', 'olive', '--set', 'memory.weight_bytes=9'],
      'memory.weight_bytes = 9',
    ),
    (['--accelerator', 'gpu_roofline:h1000'], "'h1000'"),
    (['--accelerator', 'gpu_roofline', '--set', 'clock_ghz=2'], 'clock_ghz'),
    (['--accelerator', 'systolic:xs'], "'xs'"),
    (['--accelerator', 'systolic:multiplier=3'], 'multiplier'),
    (['--accelerator', 'olive/gtpq'], 'gptq'),
    (['--accelerator', 'olive/gptq:4'], 'OPTION=VALUE'),
    (['--accelerator', 'olive/gptq:bitts=4'], 'bits'),
    (['--accelerator', 'olive/gptq:bits=3'], 'possible are 4, 8'),
    (['--accelerator', 'olive', '--recipe', 'none'], '= 16'),
    (['--accelerator', 'olive', '--bits', '4'], '--recipe'),
    (['--accelerator', 'olive/rtn', '--recipe', 'rtn'], 'its own recipe'),
    (['--accelerator', 'olive', '--activation-bits', '16'], '= 16'),
    (['--accelerator', 'olive', '--activation-bits', '0'], 'at least 1'),
    (['--accelerator', 'olive', '--batch', '0'], '--batch'),
    (['--accelerator', 'olive', '--context', '0'], '--context'),
    (['--accelerator', 'olive', '--plan', 'no.json'], 'no.json'),
    (['--compare', 'olive', 'olive'], 'twice'),
    (['--compare', '/gptq'], '--accelerator'),
    (['--accelerator', 'olive', '--compare', 'gobo'], 'uses it'),
    (['--accelerator', 'olive/rtn', '--compare', '/rtn'], 'leave out'),
  ],
)
def test_bad_input_is_one_line_before_any_work(
  capsys, no_quantizing, more, words
):
  assert words in refused(capsys, '--model', 'opt-125m', *more)


@pytest.mark.parametrize(
  'content, words',
  [
    ('{', 'not JSON'),
    ('[]', 'maps site names'),
    ('{"fc1": "rtn"}', 'fc1'),
    ('{"fc1": {"recipe": "rnt"}}', 'rtn'),
    ('{"fc1": {"recipe": "rtn", "bit": 4}}', 'bits'),
    ('{"fc9": {"recipe": "rtn"}}', 'nearest are fc'),
    ('{"99/fc1": {"recipe": "rtn"}}', '/fc1'),
    ('{"fc1": {"recipe": "rtn"}}', 'does not run bf16'),
  ],
)
def test_bad_plans_are_refused(capsys, tmp_path, no_quantizing, content, words):
  plan = tmp_path / 'plan.json'
  plan.write_text(content)
  arguments = (*SHAPES, '--accelerator', 'olive', '--plan', plan)
  assert words in refused(capsys, *arguments)


@pytest.mark.parametrize(
  'model, words',
  [
    ('lama-2-7b', "'llama-2-7b'"),
    ('referense', "'reference'"),
    ('no/such/folder', 'no model'),
  ],
)
def test_unknown_models_name_the_nearest(capsys, model, words):
  found = refused(capsys, '--model', model, '--accelerator', 'olive')
  assert words in found


def test_images_have_no_decoding(capsys):
  arguments = ('--model', 'vit-b-16', '--accelerator', 'olive')
  assert 'decode' in refused(capsys, *arguments, '--phase', 'decode')


def test_an_out_that_is_a_file_is_refused(capsys, tmp_path, no_quantizing):
  out = pathlib.Path(tmp_path / 'x')
  out.write_text('')
  found = refused(capsys, *SHAPES, '--accelerator', 'olive', '--out', out)
  assert 'is a file' in found


def test_experts_are_priced_by_their_own_tokens(tmp_path):
  random_checkpoint.write('mixtral-tiny', tmp_path / 'm')
  work = costing.open_model(str(tmp_path / 'm'), batch=1, context=64).workload
  rows = dict(zip(work.names, work.m.tolist(), strict=True))
  # Two of eight experts see a token.
  assert rows['layers/0/mlp/experts/up_proj/kernel'] == 16
  assert rows['layers/0/self_attn/q_proj/kernel'] == 64
  assert not any('router' in name for name in rows)
