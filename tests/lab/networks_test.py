import json

import drawn
import jax
import numpy as np
import pytest
import tokenizers

from mq_jax import plans
from mq_jax.lab import cli, networks, opening
from mq_jax.models import modules, tensors
from mq_jax.models import networks as models

SIZES = {
  'num_hidden_layers': 1,
  'num_attention_heads': 2,
  'intermediate_size': 16,
  'hidden_size': 16,
}
CONFIGS = {
  'vit': {
    'architectures': ['ViTForImageClassification'],
    'image_size': 8,
    'patch_size': 4,
    'num_channels': 1,
    'num_labels': 6,
    **SIZES,
  },
  'dit': {
    'architectures': ['Dit'],
    'image_size': 8,
    'patch_size': 4,
    'patch_channels': 8,
    'num_channels': 1,
    'attention_size': 16,
    'num_labels': 6,
    'num_steps': 20,
    **SIZES,
  },
  'bert': {
    'architectures': ['BertForMaskedLM'],
    'vocab_size': 100,
    'max_position_embeddings': 12,
    **SIZES,
  },
}


def write(folder, config):
  """A network of weights drawn by name, under our names of tensors."""
  folder.mkdir()
  architecture, read = models.read_config(config, 'here')
  module = models.ARCHITECTURES[architecture].module
  wanted = modules.abstract(lambda: module.make(read))
  weights = {
    name: drawn.tensor(name, part.shape)
    for name, part in models._checkpoints.parts(wanted).items()
  }
  tensors.write_safetensors(folder / 'model.safetensors', weights)
  (folder / 'config.json').write_text(json.dumps(config))
  return folder


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  root = tmp_path_factory.mktemp('networks')
  found = {name: write(root / name, raw) for name, raw in CONFIGS.items()}
  letters = [chr(i) for i in range(33, 127)]
  words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *letters]
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(
      {word: i for i, word in enumerate(words)}, unk_token='[UNK]'
    )
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split('', 'isolated')
  tokenizer.save(str(found['bert'] / 'tokenizer.json'))
  return found


@pytest.fixture(scope='module')
def images(tmp_path_factory):
  rng = np.random.default_rng(0)
  path = tmp_path_factory.mktemp('images') / 'images.npz'
  x = rng.integers(0, 256, (20, 8, 8)).astype(np.uint8)
  np.savez(path, x=x, y=rng.integers(0, 6, 20))
  return path


def evaluated(capsys, *arguments):
  capsys.readouterr()
  assert cli.main(['eval', '--json', *map(str, arguments)]) == 0
  return json.loads(capsys.readouterr().out)


def test_quantized_and_evaluated(folders, images, tmp_path, capsys):
  out = tmp_path / 'w3'
  quantize = ['quantize', '--recipe', 'rtn', '--bits', '3', '--out', str(out)]
  quantize += ['--model', str(folders['vit']), '--calibration', str(images)]
  assert cli.main([*quantize, '--windows', '8', '--set', 'group=16']) == 0
  assert 'vit by rtn' in capsys.readouterr().out
  plain = evaluated(
    capsys, '--model', folders['vit'], '--data', images, '--windows', 10
  )
  more = ['--data', images, '--against', folders['vit'], '--batch', 6]
  packed = evaluated(capsys, '--model', out, *more)
  assert plain['images'] == 10 and plain['ebw'] is None
  assert packed['images'] == 20 and 3 < packed['ebw'] < 6
  # Three bits: alike, and not the same.
  assert 3 < packed['sqnr_db'] < 40 and 0.5 < packed['cosine'] < 1
  net = opening.open_model(out)
  data = networks.read_data(images)
  again = networks.scores(net, net.params, data, batch=20)
  assert again['nll'] == pytest.approx(packed['nll'], rel=1e-6)
  assert net.pixels == ((0.5,), (0.5,))
  assert net.config == opening.open_model(folders['vit']).config


def test_shown_without_json(folders, images, capsys):
  arguments = ['eval', '--model', str(folders['dit']), '--data', str(images)]
  assert cli.main(arguments) == 0
  shown = capsys.readouterr().out
  assert 'mse 16-19' in shown and 'mse_error' in shown


def test_calibration_is_not_what_is_evaluated_on(folders, images):
  net = opening.open_model(folders['dit'])
  data = networks.read_data(images)
  batches = networks.calibration_batches(net, data, 12, 5, 0)
  assert [x.shape for x in batches[1]] == [(5, 8, 8, 1), (5,), (5,)]
  assert len(batches) == 2  # whole batches only
  other = networks.calibration_batches(net, data, 12, 5, 1)
  assert (batches[0][0] != other[0][0]).any()
  # The same images at other steps and with other noise.
  drawn_again = networks.diffusion.draw(0, np.arange(20), (8, 8, 1), 20)
  steps = np.concatenate([b[1] for b in batches])
  chosen = np.sort(np.random.default_rng(0).permutation(20)[:12])[:10]
  assert (steps != np.asarray(drawn_again[0])[chosen]).mean() > 0.5


def test_masked_words(folders, tmp_path):
  net = opening.open_model(folders['bert'])
  text = tmp_path / 'text.txt'
  rng = np.random.default_rng(0)
  text.write_text(''.join(chr(i) for i in rng.integers(33, 127, 75)))
  data = networks.read_data(text)
  (batch,) = networks.calibration_batches(net, data, 4, 8, 0)[0]
  assert batch.shape == (4, 12)
  assert (batch[:, 0] == 2).all() and (batch[:, -1] == 3).all()
  found = networks.scores(net, net.params, data, batch=3, reference=net.params)
  assert found['tokens'] == 7 * 2  # 15 % of 10 in each of 7 windows
  # The oracle: mask, look at the scores in float64.
  windows = networks._windows(net, data)
  nlls = []
  for i, window in enumerate(windows):
    order = np.random.default_rng([0, i]).permutation(np.arange(1, 11))
    places = np.sort(order[:2])
    asked = window.copy()
    asked[places] = 4
    scores = np.asarray(jax.jit(net.apply)(net.params, asked[None]), float)[0]
    log_z = np.log(np.exp(scores).sum(-1))
    nlls += list(log_z[places] - scores[places, window[places]])
  assert found['nll'] == pytest.approx(np.mean(nlls), rel=1e-5)
  assert found['cosine'] == pytest.approx(1.0)
  assert found['relative_mse'] == 0.0 and found['rows'] == 7 * 12
  assert found['sqnr_db'] is None  # JSON holds no infinity
  half = networks.scores(net, net.params, data, batch=3, limit=4)
  assert half['tokens'] == 8


def test_refused(folders, images, tmp_path, text, tiny, capsys):
  def refused(command, match):
    assert cli.main(list(map(str, command))) == 2
    assert match in ' '.join(capsys.readouterr().err.split())

  run = ['eval', '--model', folders['vit']]
  refused([*run, '--text', text], 'no language model; mq quantize and mq eval')
  refused([*run, '--data', text], 'is a text; vit reads images')
  refused([*run, '--data', images, '--cut', 'field'], '--cut is for language')
  refused([*run, '--data', images, '--stride', 2], '--stride is for language')
  refused(
    [*run, '--data', images, '--against', folders['dit']],
    'no network of the architecture and sizes',
  )
  refused(
    ['eval', '--model', tiny, '--data', images], 'give --text instead of --data'
  )
  refused(
    ['eval', '--model', folders['bert'], '--data', images],
    'holds images; bert reads text',
  )
  quantize = ['quantize', '--recipe', 'rtn', '--out', tmp_path / 'out']
  refused(
    [*quantize, '--model', folders['vit']],
    'a ViTForImageClassification needs --calibration FILE',
  )
  assert not (tmp_path / 'out').exists()


def test_data_that_do_not_fit(folders, tmp_path):
  net = opening.open_model(folders['vit'])

  def refused(match, x, y=None):
    path = tmp_path / 'x.npz'
    np.savez(path, x=x, **({} if y is None else {'y': y}))
    data = networks.read_data(path)
    with pytest.raises(ValueError, match=match):
      networks.scores(net, net.params, data)

  x = np.zeros((3, 8, 8), np.uint8)
  refused('has no labels', x)
  refused('has label 6; vit knows 6', x, np.array([0, 1, 6]))
  refused('images of 2 channels; vit needs 1', x.reshape(3, 8, 4, 2))
  refused('images of shape .4, 16, 1.', x.reshape(3, 4, 16), np.zeros(3, int))
  broken = jax.tree.map(lambda w: w * np.nan, net.params)
  data = networks.read_data(tmp_path / 'x.npz')
  data = data._replace(
    images=networks.images_lib.Images(x[..., None], np.zeros(3, np.int32))
  )
  with pytest.raises(ValueError, match='predicts nothing any more'):
    networks.scores(net, broken, data)


def test_first_and_last(images):
  data = networks.read_data(images)
  pixels, labels = data.images
  head, tail = networks.first(data, 3), networks.last(data, 4)
  np.testing.assert_array_equal(head.images.pixels, pixels[:3])
  np.testing.assert_array_equal(tail.images.labels, labels[-4:])
  assert len(networks.first(data, None).images.pixels) == 20
  assert len(networks.last(data, 99).images.pixels) == 20


@pytest.mark.slow
def test_equal_on_a_mesh(folders, images):
  net = opening.open_model(folders['dit'], 'data=2')
  one = opening.open_model(folders['dit'])
  data = networks.read_data(images)
  found, wanted = (
    networks.scores(n, n.params, data, batch=10) for n in (net, one)
  )
  assert found['mse'] == pytest.approx(wanted['mse'], rel=1e-5)
  assert plans.size(net.params).elements == 0
