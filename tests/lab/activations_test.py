"""Quantized inputs through the lab: rows, artifacts, the command line."""

import json

import numpy as np
import pytest

import mq_jax as mq
from mq_jax import artifacts
from mq_jax.lab import cli, comparison, config, measure, opening


@pytest.fixture(scope='module')
def bench(tiny, text):
  model = opening.open_any(tiny)
  source = measure.calibration_text(str(text))
  batches = measure.calibration_batches(model, source, 4, 4, 0)
  sites = mq.sites.find(model.apply, model.params, batches[0])
  statistics = mq.calibrate(model.apply, model.params, batches, sites=sites)
  windows = measure.windows(model, source, 4)
  return model, batches, sites, statistics, windows


def quantized(bench, activations, **options):
  model, batches, sites, statistics, _ = bench
  recipe = mq.recipes.make('rtn', **options, activations=activations)
  plan = mq.plans.uniform(sites, recipe)
  return comparison.quantize(model, plan, statistics, None, batches)[0]


def nll(bench, params):
  model, *_, windows = bench
  return measure.scores(model, params, windows, 4)['nll']


@pytest.mark.slow
def test_an_artifact_gives_the_numbers_of_the_model_in_memory(bench, tmp_path):
  model = bench[0]
  spec = {'format': 'mx_int', 'bits': 3, 'group': 16, 'smooth': 0.7}
  packed = quantized(bench, {**spec, 'rotate': True}, bits=4, group=16)
  plain = quantized(bench, None, bits=4, group=16)
  folder = tmp_path / 'artifact'
  opening.save_artifact(folder, model, packed)
  again = opening.open_any(folder)
  before, after = nll(bench, packed), nll(bench, again.params)
  assert before == after
  assert before != nll(bench, plain)  # inputs are quantized at all
  names = mq.plans.matrices(again.params)
  assert len(names) == 7
  for matrix in names.values():
    assert matrix.inputs == mq.activations.MXInt(3, 16)
    assert matrix.layout.inner.features == matrix.shape[-2]
  # What is stored is counted: 2 bytes of scale and a bit of sign an input.
  extra = sum(2 * m.site.k + -(-m.site.k // 8) for m in names.values())
  size = lambda p: mq.plans.size(p).bits // 8
  assert size(packed) - size(plain) == extra
  entry = artifacts.load(folder).manifest['packed'][0]
  assert entry['inputs'] == {'format': 'mx_int', 'bits': 3, 'group': 16}


@pytest.mark.parametrize('largest', ['text', [float('nan')]])
def test_a_bad_quantizer_in_a_manifest_is_refused(largest):
  good = mq.activations.Tensor(8, largest=np.float32(2.5))
  data = mq.activations.quantizer_to_json(good)
  again = mq.activations.quantizer_from_json(json.loads(json.dumps(data)))
  assert (again.bits, float(again.largest)) == (8, 2.5)
  with pytest.raises(ValueError):
    mq.activations.quantizer_from_json({**data, 'largest': largest})
  with pytest.raises(ValueError, match='no quantizer'):
    mq.activations.quantizer_from_json({'format': 'none'})


@pytest.mark.slow
def test_folding_stores_nothing_and_does_the_same_to_inputs(bench):
  spec = {'format': 'token', 'bits': 8, 'smooth': 0.5}
  folded = quantized(bench, {**spec, 'fold': True}, bits=8, group=16)
  plain = quantized(bench, None, bits=8, group=16)
  size = lambda p: mq.plans.size(p).bits
  assert size(folded) == size(plain)
  found = mq.plans.matrices(folded).values()
  assert {type(m.layout).__name__ for m in found} == {'Integer'}
  # At 8 bits both are close to the unquantized model: the fold is exact.
  reference = nll(bench, bench[0].params)
  assert abs(nll(bench, folded) - reference) < 0.02 * reference


@pytest.mark.slow
def test_mq_quantize_takes_activations(tiny, text, tmp_path, capsys):
  out = tmp_path / 'w4a8'
  arguments = ['quantize', '--model', str(tiny), '--recipe', 'gptq']
  arguments += ['--bits', '4', '--set', 'group=16', '--windows', '4']
  arguments += ['--activations', 'token:bits=8,smooth=search,sees=quantized']
  arguments += ['--calibration', str(text), '--out', str(out)]
  assert cli.main(arguments) == 0
  found = mq.plans.matrices(opening.open_any(out).params)
  assert {m.inputs for m in found.values()} == {mq.activations.Token(8)}
  bad = [x if x != str(out) else str(out) + '2' for x in arguments]
  bad[bad.index('--activations') + 1] = 'mxint'
  assert cli.main(bad) == 2
  assert 'mx_int' in capsys.readouterr().err


def test_rows_have_labels_and_bad_ones_their_line(tmp_path):
  path = tmp_path / 'study.gin'
  row = "{{'recipe': 'gptq', 'bits': 4, 'activations': {}}}"
  write = lambda spec: path.write_text(
    f"compare.models = ['reference']\ncompare.recipes = [{row.format(spec)}]"
  )
  write("{'format': 'mx_int', 'bits': 4, 'smooth': 0.7, 'rotate': True}")
  study, _ = config.load(path)
  assert study.rows[0].label == 'gptq w4 a4 mx_int smooth=0.7 rotate'
  assert config.label_of('gptq', {'activations': 'token'}) == 'gptq token'
  write("{'format': 'mx_int', 'bits': 4, 'smoth': 0.7}")
  with pytest.raises(config.ConfigError, match='nearest are smooth'):
    config.load(path)
