"""The studies' configs: complete, in the paper's order, and they trace."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from experiments import stories
from mq_jax import quantize, recipes
from mq_jax.lab import config

ROOT = pathlib.Path(__file__).parents[2]
STUDIES = sorted(ROOT.glob('configs/studies/*.gin'))


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
  monkeypatch.chdir(ROOT)  # an include is read from there


def load(name):
  return config.load(ROOT / 'configs' / 'studies' / f'{name}.gin')[0]


@pytest.mark.parametrize('path', STUDIES, ids=lambda p: p.stem)
def test_config_loads_with_plain_and_planted_models(path):
  study, _ = config.load(path)
  assert [m.endswith('planted') for m in study.models] == [False, True]
  assert study.rows[0].name == 'none'
  head = path.read_text().split('\n\ncompare')[0]
  assert f'mq run configs/studies/{path.name}' in head


def test_there_are_studies():
  assert len(STUDIES) >= 6


def test_ablation_has_the_rows_of_table_7_in_order():
  labels = [row.label for row in load('microscopiq_ablation').rows]
  assert labels[1:9] == [
    'INT-4 g128',
    'MX-INT-4_128',
    'MX-INT-2_128',
    '+ outliers MX-FP-4_{128,128}',
    '+ outliers MX-FP-4_{8,8}',
    '+ pre-scaling',
    '+ pruning',
    '+ compensation',
  ]


def test_each_ablation_step_changes_one_thing():
  rows = load('microscopiq_ablation').rows[3:9]
  made = [recipes.make(row.name, **dict(row.options)) for row in rows]
  fields = ('sigma', 'micro_block', 'prescale', 'prune')
  settings = [
    {f: getattr(m.rows, f) for f in fields} | {'solver': bool(m.compensation)}
    for m in made
  ]
  changed = [
    {name for name in a if a[name] != b[name]}
    for a, b in zip(settings, settings[1:])
  ]
  assert changed == [
    {'sigma', 'micro_block'},  # outliers appear, in blocks of 128
    {'micro_block'},
    {'prescale'},
    {'prune'},
    {'solver'},
  ]


def test_block_sweep_goes_from_2_to_256():
  rows = load('microscopiq_block_sweep').rows[1:]
  sizes = [dict(row.options)['micro_block'] for row in rows]
  assert sizes == [2**i for i in range(1, 9)]


@pytest.mark.parametrize(
  'path',
  [
    pytest.param(
      p, id=p.stem, marks=[] if p.stem == 'equal_bits' else pytest.mark.slow
    )
    for p in STUDIES
  ],
)
def test_every_row_traces(path):
  shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
  for row in config.load(path)[0].rows:
    recipe = recipes.make(row.name, **dict(row.options))
    codes, record = jax.eval_shape(
      quantize.quantize_batch, shape(1, 24, 40), recipe, shape(1, 24, 24)
    )
    assert codes and {'status', 'output_error'} <= set(record), row.label


def test_stories_are_dealt_out_in_turn():
  text = 'One.\n<|endoftext|>\nTwo.\n<|endoftext|>\nThree.\n<|endoftext|>\n'
  assert stories.split(text) == ('One.\nThree.\n', 'Two.\n')
