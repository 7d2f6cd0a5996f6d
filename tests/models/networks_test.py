import json

import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mq_jax import calibration, plans, recipes, sites
from mq_jax.models import modules, networks, tensors


@pytest.fixture(scope='module')
def listing(golden_dir):
  return json.loads((golden_dir / 'networks.json').read_text())


@pytest.fixture(scope='module')
def golden(golden_dir):
  return dict(np.load(golden_dir / 'networks_golden.npz'))


def write(folder, config, weights):
  folder.mkdir(exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(config))
  tensors.write_safetensors(folder / 'model.safetensors', weights)
  return folder


@pytest.fixture
def folder(listing, tmp_path):
  """Makes a checkpoint of a case, as transformers saves it."""

  def make(case, **changes):
    config = listing[case]['config'] | changes
    config = {k: v for k, v in config.items() if v != 'absent'}
    weights = drawn.tensors(listing[case]['saved'])
    return write(tmp_path / case, config, weights)

  return make


def batch(golden, net):
  """The golden inputs, as transformers had them."""
  if net.task == 'classes':
    return (golden['pixels'][..., : net.config.num_channels],)
  mask = golden['mask'].astype(np.int32)
  padding = net.config.pad_token_id
  tokens = np.where(mask == 1, golden['tokens'], padding).astype(np.int32)
  if net.config.model_type == 'bert':
    return tokens, mask, golden['types'].astype(np.int32)
  return tokens, mask


CASES = (
  'bert-tokens',
  'bert-untied',
  'bert-features',
  'bert-sequence',
  'roberta-tokens',
  'roberta-sequence',
  'distilbert-tokens',
  'distilbert-sequence',
  'distilbert-features',
  'vit',
  'vit-no-bias',
  'deit',
  'deit-teacher',
  'resnet-basic',
  'resnet-bottleneck',
  'resnet-bottleneck-first',
)


# One of each kind by default; the others, with other heads, by -m slow.
OF_EACH_KIND = (
  *('bert-tokens', 'roberta-tokens', 'distilbert-tokens', 'vit', 'deit'),
  *('resnet-basic', 'resnet-bottleneck'),
)


def agrees(net, golden, case):
  found = jax.jit(net.apply)(net.params, *batch(golden, net))
  assert np.abs(golden[case]).max() > 0.5  # the comparison is not of zeros
  np.testing.assert_allclose(found, golden[case], atol=1e-4)


@pytest.mark.parametrize(
  'case',
  [
    pytest.param(c, marks=[] if c in OF_EACH_KIND else pytest.mark.slow)
    for c in CASES
  ],
)
def test_agrees_with_transformers(case, folder, golden):
  agrees(networks.load(folder(case)), golden, case)


def test_all_cases_are_tested(listing):
  assert set(CASES) == set(listing)


@pytest.mark.parametrize(
  'case', [c for c in CASES if c.endswith('-tokens') or 'it' in c[:4]]
)
def test_names_that_transformers_holds(case, folder, listing, golden):
  """Names of transformers 5 for ViT; elsewhere tied tensors stored twice."""
  path = folder(case)
  shapes = listing[case]['saved']
  held = listing[case]['held']
  assert held.keys() != shapes.keys()
  weights = {
    name: drawn.tensor(saved, tuple(shapes[saved][0]))
    for name, saved in held.items()
  }
  write(path, listing[case]['config'], weights)
  net = networks.load(path)
  if case in ('vit', 'bert-tokens'):
    agrees(net, golden, case)
  # Of a tie both are stored: equal, or refused.
  copy = next((n for n in weights if n.endswith('ecoder.weight')), None)
  if copy is not None:
    weights[copy] = weights[copy] + 1
    write(path, listing[case]['config'], weights)
    with pytest.raises(ValueError, match=f'{copy} differs from .*word_embed'):
      networks.load(path)


def test_old_names_of_norms(folder, listing, golden):
  path = folder('bert-tokens')
  weights = drawn.tensors(listing['bert-tokens']['saved'])
  old = {
    n.replace('LayerNorm.weight', 'LayerNorm.gamma').replace(
      'LayerNorm.bias', 'LayerNorm.beta'
    ): x
    for n, x in weights.items()
  }
  assert old.keys() != weights.keys()
  # What masked language models of the hub hold besides
  old['bert.pooler.dense.weight'] = np.ones((32, 32), np.float32)
  old['cls.seq_relationship.weight'] = np.ones((2, 32), np.float32)
  write(path, listing['bert-tokens']['config'], old)
  agrees(networks.load(path), golden, 'bert-tokens')


def test_mask_hides_padding(folder, golden):
  net = networks.load(folder('bert-features'))
  tokens, mask, types = batch(golden, net)
  apply = jax.jit(net.apply)
  short = apply(net.params, tokens[1:, :9], None, types[1:, :9])
  padded = apply(net.params, tokens, mask, types)
  np.testing.assert_allclose(padded[1:, :9], short, atol=1e-5)


@pytest.mark.parametrize('case', CASES)
def test_config_as_json_reads_back(case, listing):
  config = networks.read_config(listing[case]['config'], 'x')
  net = networks.network(*config, {}, 'x')
  raw = json.loads(json.dumps(networks.to_json(net)))
  again = networks.read_config(raw, 'x')
  assert again == config == (net.architecture, net.config)
  # Equal configs share what compiles.
  assert networks.network(*again, {}, 'y').apply is net.apply


@pytest.mark.parametrize(
  'case',
  [
    'bert-untied',
    pytest.param('vit-no-bias', marks=pytest.mark.slow),
    pytest.param('deit', marks=pytest.mark.slow),
    'resnet-bottleneck-first',
  ],
)
def test_planting_keeps_the_function(case, folder, golden):
  # With relu also where an activation lies between two weights.
  changes = {'hidden_act': 'relu'}
  net = networks.load(folder(case, **changes))
  planted = networks.plant(net, seed=1)
  inputs = batch(golden, net)
  apply = jax.jit(net.apply)
  before, after = (apply(n.params, *inputs) for n in (net, planted))
  # Powers of two: not even the rounding changes.
  np.testing.assert_array_equal(before, after)
  largest = lambda n: {
    name: float(jnp.abs(sites.get(n.params, site)).max())
    for site in sites.find(net.apply, net.params, *inputs)
    if site.path is not None
    for name in [site.name]
  }
  old, new = largest(net), largest(planted)
  assert sum(new[name] > 2 * old[name] for name in old) > len(old) / 4


@pytest.mark.slow
@pytest.mark.parametrize(
  'case, pattern',
  [
    ('deit', 'layers/?/attention/?_proj/*'),
    ('resnet-basic', 'stages/1/0/convs/1/conv/*'),
  ],
)
def test_calibrated_and_compressed(case, pattern, folder, golden):
  net = networks.load(folder(case))
  inputs = batch(golden, net)
  found = sites.find(net.apply, net.params, *inputs)
  named = [site for site in found if site.path is not None]
  assert {site.kind for site in named} == {'matmul', 'conv'}
  statistics = calibration.calibrate(
    net.apply, net.params, [inputs], sites=found
  )
  assert statistics.keys() == {site.name for site in named}
  recipe = recipes.gptq(bits=5, group=16)
  plan = plans.plan(found, [(pattern, recipe)])
  packed = plans.compress(net.params, plan, statistics=statistics)
  out = jax.jit(net.apply)(plans.dequantize(packed), *inputs)
  error = float(jnp.abs(out - golden[case]).max() / np.abs(golden[case]).max())
  # Five bits: something changed, and little.
  assert 1e-4 < error < 0.2


REFUSED = {
  'architecture': (
    'vit',
    {'architectures': ['ViTForMaskedImageModeling']},
    'ViTForMaskedImageModeling.* is not supported; supported is one of',
  ),
  'none': ('vit', {'architectures': 'absent'}, 'None is not supported'),
  'quantized': (
    'vit',
    {'quantization_config': {'b': 4}},
    'quantization_config',
  ),
  'decoder': ('bert-tokens', {'is_decoder': True}, 'is_decoder'),
  'positions': (
    'bert-tokens',
    {'position_embedding_type': 'relative_key'},
    'position_embedding_type=relative_key .* supported: absolute',
  ),
  'sinus': (
    'distilbert-tokens',
    {'sinusoidal_pos_embds': True},
    'sinusoidal_pos_embds',
  ),
  'activation': (
    'vit',
    {'hidden_act': 'selu'},
    'hidden_act=selu .* supported: gelu',
  ),
  'heads': ('bert-tokens', {'num_attention_heads': 5}, 'a divisor of 32'),
  'padding': ('bert-tokens', {'pad_token_id': 61}, 'pad_token_id .* below 61'),
  'size': ('vit', {'hidden_size': 'absent'}, 'hidden_size .* nothing'),
  'fraction': ('vit', {'hidden_size': 32.0}, 'hidden_size .* 32.0'),
  'true': ('vit', {'num_hidden_layers': True}, 'num_hidden_layers'),
  'huge': ('vit', {'num_hidden_layers': 10**9}, 'only 40 tensors'),
  'patches': ('vit', {'image_size': 25}, 'a multiple of patch_size=8'),
  'oblong': ('vit', {'image_size': [24, 32]}, 'image_size'),
  'epsilon': ('vit', {'layer_norm_eps': 0}, 'layer_norm_eps'),
  'layer': ('resnet-basic', {'layer_type': 'wide'}, 'layer_type'),
  'depths': ('resnet-basic', {'depths': [1]}, 'as many as hidden_sizes'),
  'list': ('resnet-basic', {'depths': 3}, 'list of positive whole numbers'),
  'quarter': (
    'resnet-bottleneck',
    {'hidden_sizes': [16, 18]},
    'multiples of 4',
  ),
}


@pytest.mark.parametrize('case', REFUSED)
def test_config_is_refused_before_weights_are_read(case, folder):
  which, changes, message = REFUSED[case]
  path = folder(which, **changes)
  if case != 'huge':
    (path / 'model.safetensors').unlink()
  with pytest.raises(ValueError, match=message) as error:
    networks.load(path)
  assert str(path) in str(error.value)


def test_every_wrong_tensor_is_named(folder, listing):
  path = folder('vit')
  weights = drawn.tensors(listing['vit']['saved'])
  norm, head = 'vit.layernorm.weight', 'classifier.weight'
  weights['vit.layernorm.wait'] = weights.pop(norm)
  weights[head] = weights[head][:-1]
  weights['classifier.bias'] = weights['classifier.bias'].astype(np.float64)
  weights['extra'] = np.ones(3, np.float32)
  write(path, listing['vit']['config'], weights)
  with pytest.raises(ValueError) as error:
    networks.load(path)
  for part in (
    'norm.weight is missing (there is vit.layernorm.wait)',
    'classifier.weight is of shape (4, 32), expected (5, 32)',
    'classifier.bias is float64',
    'extra is not part of the architecture',
  ):
    assert part in str(error.value)


def test_twice_the_same_and_not_finite(folder, listing):
  path = folder('vit')
  config = listing['vit']['config']
  weights = drawn.tensors(listing['vit']['saved'])
  weights['norm.bias'] = weights['vit.layernorm.bias']
  write(path, config, weights)
  with pytest.raises(ValueError, match='are the same parameter, norm.bias'):
    networks.load(path)
  del weights['norm.bias']
  weights['vit.layernorm.bias'][1] = np.inf
  write(path, config, weights)
  with pytest.raises(ValueError, match='layernorm.bias: 1 of 32 .* not finite'):
    networks.load(path)


def test_other_parameters_are_refused(folder, golden):
  net = networks.load(folder('resnet-basic'))
  params = dict(net.params)
  params['head'] = params.pop('classifier')
  with pytest.raises(ValueError, match='missing .*classifier/bias.*head/bias'):
    net.apply(params, golden['pixels'])
  with pytest.raises(ValueError, match=r'shape \(24, 24, 2\).*\[h, w, 3\]'):
    net.apply(net.params, golden['pixels'][..., :2])


def test_folders_without_config(tmp_path):
  weights = {'a.weight': np.ones((2, 2), np.float32)}
  tensors.write_safetensors(tmp_path / 'model.safetensors', weights)
  assert not networks.is_network(tmp_path)
  with pytest.raises(FileNotFoundError, match='known without it'):
    networks.load(tmp_path)
  assert not networks.is_network(tmp_path / 'absent')
  with pytest.raises(FileNotFoundError, match='no such folder'):
    networks.load(tmp_path / 'absent')


@pytest.mark.parametrize('module', [False, True])
@pytest.mark.parametrize(
  'case', ['CifarResNet basic', 'CifarResNet bottleneck', 'Dit']
)
def test_known_without_config(case, module, tmp_path):
  """Random networks, written under the names of the known checkpoints."""
  architecture, *kind = case.split()
  raw = {'architectures': [architecture]}
  if kind:
    raw |= {'hidden_sizes': [8, 16], 'depths': [2, 1], 'layer_type': kind[0]}
    raw |= {'embedding_size': 8, 'num_labels': 4, 'num_channels': 2}
  else:
    raw |= {'image_size': 12, 'patch_size': 4, 'num_channels': 1}
    raw |= {'patch_channels': 5, 'hidden_size': 8, 'attention_size': 16}
    raw |= {'num_hidden_layers': 2, 'num_attention_heads': 2}
    raw |= {'intermediate_size': 12, 'num_labels': 4}
  _, config = networks.read_config(raw, 'here')
  found = networks.ARCHITECTURES[architecture].module
  wanted = modules.abstract(lambda: found.make(config))
  weights = {
    name: drawn.tensor(name, part.shape)
    for name, part in networks._checkpoints.parts(wanted).items()
  }
  ours = dict(weights)
  if kind:
    old = {}
    for name, array in weights.items():
      name = name.replace('stem.conv', 'conv1').replace('stem.norm', 'bn1')
      name = name.replace('classifier', 'linear')
      for i in range(3):
        name = name.replace(f'stages.{i}', f'layer{i + 1}')
        name = name.replace(f'convs.{i}.conv', f'conv{i + 1}')
        name = name.replace(f'convs.{i}.norm', f'bn{i + 1}')
      old[('module.' if module else '') + name] = array
    weights = old
  elif module:
    pytest.skip('DiTs are not trained in parallel')
  tensors.write_safetensors(tmp_path / 'model.safetensors', weights)
  assert networks.is_network(tmp_path)
  net = networks.load(tmp_path, name='x')
  assert net.config == config and net.name == 'x'
  again = networks._checkpoints.to_tensors(net.params, wanted)
  jax.tree.map(np.testing.assert_array_equal, again, ours)


def test_pixels(folder):
  assert networks.load(folder('vit')).pixels == ((0.5,) * 3, (0.5,) * 3)
  path = folder('resnet-basic')
  assert networks.load(path).pixels.mean[0] == 0.485
  preprocessor = path / 'preprocessor_config.json'
  put = lambda **raw: preprocessor.write_text(json.dumps(raw))
  put(image_mean=[0.1, 0.2, 0.3], image_std=[1, 1, 2])
  assert networks.load(path).pixels == ((0.1, 0.2, 0.3), (1, 1, 2))
  put(do_normalize=False)
  assert networks.load(path).pixels == ((0.0,) * 3, (1.0,) * 3)
  for bad in (
    {'image_mean': [0.1], 'image_std': [1, 1, 2]},
    {'image_mean': [0, 0, 0], 'image_std': [1, 1, 0]},
    {'rescale_factor': 1.0},
    {'do_rescale': False},
  ):
    put(**bad)
    with pytest.raises(ValueError, match='preprocessor_config.json'):
      networks.load(path)
