"""`mq quantize --stream`: an artifact block by block, killed and continued."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from mq_jax import artifacts
from mq_jax.lab import cli, files, listing
from mq_jax.models import huggingface, tensors


@pytest.fixture(scope='module')
def two_blocks(tiny, tmp_path_factory):
  """Folder of a model of two blocks that differ."""
  one = huggingface.load(tiny)
  first = one.params['layers'][0]
  second = jax.tree.map(lambda x: x[..., ::-1], first)
  config = dataclasses.replace(one.config, num_hidden_layers=2)
  folder = tmp_path_factory.mktemp('models') / 'two'
  params = {**one.params, 'layers': {0: first, 1: second}}
  model = dataclasses.replace(one, config=config, params=params)
  huggingface.save(folder, model)
  return folder


@pytest.fixture
def command(two_blocks, text):
  """What to quantize; --out is to be added."""
  return [
    *('quantize', '--model', str(two_blocks), '--recipe', 'gptq'),
    *('--bits', '3'),
    *('--set', 'group=16', '--calibration', str(text)),
    *('--windows', '4', '--batch', '2'),
  ]


def _bytes(folder):
  return (folder / 'packed.bin').read_bytes()


@pytest.mark.parametrize(
  'inputs', [pytest.param('original', marks=pytest.mark.slow), 'quantized']
)
def test_streaming_equals_the_whole_model_bit_for_bit(
  command, tmp_path, inputs
):
  command += ['--inputs', inputs]
  whole, streamed = tmp_path / 'whole', tmp_path / 'streamed'
  assert cli.main([*command, '--out', str(whole)]) == 0
  assert cli.main([*command, '--stream', '--out', str(streamed)]) == 0
  assert _bytes(whole) == _bytes(streamed)
  a, b = artifacts.load(whole), artifacts.load(streamed)
  assert a.model == b.model and a.totals == b.totals
  rest = {json.dumps(e['path']): e['sha256'] for e in a.manifest['rest']}
  assert rest == {
    json.dumps(e['path']): e['sha256'] for e in b.manifest['rest']
  }
  names = {path.name for path in streamed.iterdir()} - {'.lock'}
  assert names == {
    *('manifest.json', 'packed.bin', 'rest', 'stream.json'),
    *('command.json', 'log.txt'),
    *(['tokenizer.json'] if (whole / 'tokenizer.json').exists() else []),
  }


def test_evaluation_by_blocks_says_the_same(
  two_blocks, command, text, tmp_path, capsys
):
  out = tmp_path / 'out'
  assert cli.main([*command, '--stream', '--out', str(out)]) == 0
  for model in (two_blocks, out):
    found = []
    for stream in ([], ['--stream']):
      capsys.readouterr()
      arguments = ['eval', '--model', str(model), '--text', str(text), '--json']
      assert cli.main([*arguments, *stream]) == 0
      found.append(json.loads(capsys.readouterr().out))
    assert found[0]['nll'] == pytest.approx(found[1]['nll'], rel=1e-6)
    assert found[0]['ebw'] == found[1]['ebw']
  assert cli.main([*arguments, '--stream', '--against', str(model)]) == 2
  assert 'without --against' in capsys.readouterr().err


def test_stopped_between_blocks_it_goes_on_to_the_same_bits(
  command, tmp_path, monkeypatch, capsys
):
  """Stopped before the line of block 0 is written, then before that of 1."""
  command += ['--stream']
  straight = tmp_path / 'straight'
  assert cli.main([*command, '--out', str(straight)]) == 0
  out = tmp_path / 'stopped'
  monkeypatch.setattr(files, 'append', _stop)
  assert cli.main([*command, '--out', str(out)]) == 130
  assert not (out / 'blocks.jsonl').exists()
  (entry,) = listing.find(out)
  assert (entry.kind, entry.state, entry.done) == (
    *('quantize', 'interrupted', 0),
  )
  monkeypatch.undo()
  monkeypatch.setattr(files, 'append', _once(files.append))
  assert cli.main(['resume', str(out)]) == 130
  assert listing.describe(out).done == 1
  monkeypatch.undo()
  with open(out / 'blocks.jsonl', 'a') as file:
    file.write('{"block": 1, "entr')  # torn by a kill
  with open(out / 'packed.bin', 'ab') as file:
    file.write(b'cut short')
  assert cli.main(['resume', str(out)]) == 0
  assert '1 of 2 blocks are there' in capsys.readouterr().err
  assert _bytes(out) == _bytes(straight)
  manifest = json.loads((out / 'manifest.json').read_text())
  assert manifest['totals']['nbytes'] == len(_bytes(out))
  artifacts.load(out)


def _stop(path, records):
  raise KeyboardInterrupt


def _once(append):
  calls = []

  def stop_at_the_second(path, records):
    calls.append(path)
    if len(calls) > 1:
      raise KeyboardInterrupt
    append(path, records)

  return stop_at_the_second


def test_what_does_not_fit_is_refused_before_any_work(
  command, tmp_path, monkeypatch, capsys
):
  command += ['--stream']
  out = tmp_path / 'out'
  monkeypatch.setattr(files, 'append', _stop)
  assert cli.main([*command, '--out', str(out)]) == 130
  before = sorted((p.name, p.stat().st_mtime) for p in out.iterdir())
  assert cli.main([*command, '--seed', '1', '--out', str(out)]) == 2
  assert 'another setup: seed 0 (now 1)' in capsys.readouterr().err
  after = sorted((p.name, p.stat().st_mtime) for p in out.iterdir())
  assert [x for x in after if x[0] != '.lock'] == [
    x for x in before if x[0] != '.lock'
  ]
  other = tmp_path / 'other'
  other.mkdir()
  (other / 'thesis.tex').touch()
  assert cli.main([*command, '--out', str(other)]) == 2
  assert 'thesis.tex' in capsys.readouterr().err


def test_a_bad_weight_of_the_last_block_is_found_first(
  two_blocks, command, tmp_path, capsys
):
  bad = tmp_path / 'bad'
  shutil.copytree(two_blocks, bad)
  found = {n: np.array(x) for n, x in tensors.read_folder(bad).items()}
  name = 'model.layers.1.mlp.down_proj.weight'
  found[name][0, 0] = np.nan
  tensors.write_safetensors(bad / 'model.safetensors', found)
  command[2] = str(bad)
  out = tmp_path / 'out'
  assert cli.main([*command, '--stream', '--out', str(out)]) == 2
  said = capsys.readouterr().err
  assert name in said and 'block 1 of' not in said
  assert not (out / 'stream.json').exists()


def test_learned_blocks_go_on_to_the_same_bits(
  command, tmp_path, monkeypatch, capsys
):
  """Stopped after block 0: both streams of activations are kept."""
  command += ['--learn', 'block:steps=3,every=2,batch=2,learning_rate=0.2']
  plain, straight, out = (tmp_path / n for n in ('plain', 'straight', 'out'))
  assert cli.main([*command, '--out', str(plain)]) == 0
  assert cli.main([*command, '--stream', '--out', str(straight)]) == 0
  assert _bytes(plain) == _bytes(straight)
  monkeypatch.setattr(files, 'append', _once(files.append))
  assert cli.main([*command, '--stream', '--out', str(out)]) == 130
  kept = tensors.read_safetensors(out / 'carried-1.safetensors')
  assert set(kept) == {'carried-0', 'carried-1', 'original-0', 'original-1'}
  monkeypatch.undo()
  assert cli.main(['resume', str(out)]) == 0
  assert _bytes(out) == _bytes(straight)
  capsys.readouterr()
  model = [
    *command,
    '--learn',
    'model',
    '--stream',
    '--out',
    str(tmp_path / 'x'),
  ]
  assert cli.main(model) == 2
  assert '--stream has one block at a time' in capsys.readouterr().err
