"""Exports, read back; errors leave nothing behind.

That transformers and the compressed-tensors package read them is checked by
experiments/check_exports.py, which needs torch.
"""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mq_jax import exporting, layouts, plans
from mq_jax.lab import cli, opening
from mq_jax.models import huggingface, tensors
from mq_jax.models.huggingface import compressed_tensors
from mq_jax.quantize import QuantizedMatrix

PACKED = {
  'asymmetric': layouts.Integer(4, 16, False),
  'symmetric': layouts.Integer(4, 32, True),
  '8 bits by output': layouts.Integer(8, 96, False),
  '8 bits symmetric': layouts.Integer(8, 16, True),
}


def random_matrix(shape, layout, seed):
  """Random codes of a layout, all that it can hold."""
  rng = np.random.default_rng(seed)
  k, n = shape
  groups = -(-k // layout.group)
  low = 1 - 2 ** (layout.bits - 1) if layout.symmetric else 0
  high = (2 ** (layout.bits - 1) if layout.symmetric else 2**layout.bits) - 1
  # Rows beyond k are padding of the last group, and ignored.
  rows = groups * layout.group
  codes = {
    'level': rng.integers(low, high, (rows, n), np.int16, endpoint=True),
    'scale': rng.lognormal(-4, 1, (groups, n)).astype(np.float16),
    'zero': np.zeros((groups, n), np.uint8),
  }
  if not layout.symmetric:
    codes['zero'] = rng.integers(0, high, (groups, n), np.uint8, endpoint=True)
  codes = jax.tree.map(jnp.asarray, codes)
  return QuantizedMatrix(codes, {}, layout, shape, recipe='rtn(bits=4)')


def quantized(model, layout_of):
  """A model whose kernels are packed; None leaves one as it is."""
  paths = [
    (name, piece.path)
    for name, entry in huggingface.expected_tensors(model.config).items()
    for piece in entry.pieces
    if entry.transposed
  ]
  params = jax.tree.map(lambda x: x, model.params)
  for seed, (name, path) in enumerate(paths):
    layout = layout_of(name)
    if layout is not None:
      inner = huggingface.leaf(params, path[:-1])
      inner[path[-1]] = random_matrix(inner[path[-1]].shape, layout, seed)
  return dataclasses.replace(model, params=params)


@pytest.fixture(scope='module')
def plain(tiny):
  return huggingface.load(tiny)


@pytest.fixture(scope='module')
def packed(plain):
  """By name of a recipe."""
  return {
    name: quantized(plain, lambda _, layout=layout: layout)
    for name, layout in PACKED.items()
  }


def values(model, dtype):
  """Parameters as arrays of a dtype, on the host."""
  return jax.tree.map(
    lambda x: np.asarray(x).astype(dtype), plans.decode(model.params)
  )


def assert_same(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(
      np.asarray(a).view('u1'), np.asarray(b).view('u1')
    ),
    found,
    expected,
  )


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_plain_weights_are_those_of_the_model(packed, tmp_path, dtype):
  model = packed['asymmetric']
  exporting.to_huggingface(
    tmp_path / 'a/out', model, dtype=dtype, max_shard_bytes=20_000
  )
  assert [p.name for p in (tmp_path / 'a').iterdir()] == ['out']
  assert len(list((tmp_path / 'a/out').glob('model-*.safetensors'))) > 1
  again = huggingface.load(tmp_path / 'a/out', dtype=dtype)
  assert_same(again.params, values(model, jnp.dtype(dtype)))
  assert again.bos == model.bos
  assert again.tokenizer.to_str() == model.tokenizer.to_str()


@pytest.mark.parametrize('name', PACKED)
@pytest.mark.parametrize('dtype', ['float16', 'float32'])
def test_packed_weights_are_those_of_the_model(packed, tmp_path, name, dtype):
  model, out = packed[name], tmp_path / 'out'
  exporting.to_compressed_tensors(out, model, dtype=dtype)
  again = huggingface.load(out, dtype=dtype)
  assert_same(again.params, values(model, dtype))
  found = tensors.read_folder(out)
  assert not any(n.endswith('proj.weight') for n in found)
  raw = json.loads((out / 'config.json').read_text())['quantization_config']
  (group,) = raw['config_groups'].values()
  weights, layout = group['weights'], PACKED[name]
  assert weights['num_bits'] == layout.bits
  assert weights['symmetric'] is layout.symmetric
  # The packed words take up what was asked for.
  words = found['model.layers.0.mlp.up_proj.weight_packed']
  assert words.nbytes == 64 * 32 * layout.bits // 8


def by_hand(found, module, scheme):
  """A weight [out, in] from its parts, as the format is described."""
  bits, group = scheme['num_bits'], scheme['group_size']
  n, k = found[f'{module}.weight_shape']
  words = found[f'{module}.weight_packed']
  scale = found[f'{module}.weight_scale']
  zeros = found.get(f'{module}.weight_zero_point')
  out = np.zeros((n, k), np.float64)

  def field(words, i):
    """Level i of a row of words: bits i * bits and on, lowest first."""
    number = sum(int(w) % 2**32 << 32 * j for j, w in enumerate(words))
    return (number >> i * bits) % 2**bits

  for row in range(n):
    for column in range(k):
      g = 0 if group is None else column // group
      zero = 2 ** (bits - 1) if zeros is None else field(zeros[:, g], row)
      out[row, column] = float(scale[row, g]) * (
        field(words[row], column) - zero
      )
  return out


@pytest.mark.parametrize('name', PACKED)
def test_the_format_by_hand(packed, tmp_path, name):
  model = packed[name]
  exporting.to_compressed_tensors(tmp_path / 'out', model, dtype='float32')
  found = tensors.read_folder(tmp_path / 'out')
  raw = json.loads((tmp_path / 'out/config.json').read_text())
  scheme = raw['quantization_config']['config_groups']['group_0']['weights']
  weight = by_hand(found, 'model.layers.0.self_attn.k_proj', scheme)
  kernel = plans.decode(model.params)['layers'][0]['self_attn']['k_proj']
  np.testing.assert_array_equal(weight.T, np.asarray(kernel['kernel'], float))


@pytest.mark.parametrize('bits', [4, 8])
@pytest.mark.parametrize('n', [1, 4, 7, 8, 16, 19])
def test_packing_of_odd_lengths(bits, n):
  levels = np.random.default_rng(n).integers(0, 1 << bits, (3, n))
  words = compressed_tensors.pack(levels, bits)
  assert words.dtype == np.int32 and words.shape == (3, -(-n * bits // 32))
  np.testing.assert_array_equal(
    compressed_tensors.unpack(words, bits, n), levels
  )


def test_layouts_of_a_plan_side_by_side(plain, tmp_path):
  def layout_of(name):
    if 'k_proj' in name:
      return None
    return PACKED['8 bits symmetric' if 'mlp' in name else 'asymmetric']

  model = quantized(plain, layout_of)
  exporting.to_compressed_tensors(tmp_path / 'out', model)
  again = huggingface.load(tmp_path / 'out', dtype='float16')
  assert_same(again.params, values(model, 'float16'))
  raw = json.loads((tmp_path / 'out/config.json').read_text())
  quantization = raw['quantization_config']
  assert 'model.layers.0.self_attn.k_proj' in quantization['ignore']
  targets = [g['targets'] for g in quantization['config_groups'].values()]
  assert sorted(map(len, targets)) == [3, 3]
  assert 'model.layers.0.mlp.up_proj' in sum(targets, [])


def replaced(model, **changes):
  """A model with all its packed matrices changed."""
  is_matrix = lambda x: isinstance(x, QuantizedMatrix)
  change = lambda x: dataclasses.replace(x, **changes) if is_matrix(x) else x
  params = jax.tree.map(change, model.params, is_leaf=is_matrix)
  return dataclasses.replace(model, params=params)


REFUSED = {
  'width': ({'layout': layouts.Integer(3, 16, False)}, 'has 3 bits'),
  'group': ({'layout': layouts.Integer(4, 24, True)}, 'no multiple of its'),
  'layout': ({'layout': layouts.Olive(4)}, 'stored as Olive'),
  'inputs': ({'inputs': 'a quantizer'}, 'quantizes inputs'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_the_format_can_not_hold_is_named(packed, tmp_path, case):
  change, words = REFUSED[case]
  model = replaced(packed['asymmetric'], **change)
  with pytest.raises(ValueError, match=words) as error:
    exporting.to_compressed_tensors(tmp_path / 'out', model)
  assert 'rtn(bits=4)' in str(error.value) and '_proj' in str(error.value)
  assert not list(tmp_path.iterdir())


def test_other_models_are_refused(plain, packed, tmp_path):
  with pytest.raises(ValueError, match='tiny has no packed matrix'):
    exporting.to_compressed_tensors(tmp_path / 'out', plain)
  gpt2 = dataclasses.replace(plain.config, family='gpt2')
  model = dataclasses.replace(packed['symmetric'], config=gpt2)
  with pytest.raises(ValueError, match='Conv1D'):
    exporting.to_compressed_tensors(tmp_path / 'out', model)
  params = jax.tree.map(lambda x: x, packed['symmetric'].params)
  params['embed_tokens']['embedding'] = random_matrix(
    plain.params['embed_tokens']['embedding'].shape, PACKED['symmetric'], 0
  )
  model = dataclasses.replace(plain, params=params)
  with pytest.raises(ValueError, match='embed_tokens.* no weight of a Linear'):
    exporting.to_compressed_tensors(tmp_path / 'out', model)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('scale', [1.0, 2.0])
def test_scales_of_inputs(packed, tmp_path, scale):
  def change(matrix):
    ones = jnp.full(matrix.shape[-2:-1], scale, jnp.float16)
    return dataclasses.replace(
      matrix,
      codes={**matrix.codes, 'input_scale': ones},
      layout=layouts.InputScaled(matrix.layout),
    )

  is_matrix = lambda x: isinstance(x, QuantizedMatrix)
  model = packed['asymmetric']
  params = jax.tree.map(
    lambda x: change(x) if is_matrix(x) else x, model.params, is_leaf=is_matrix
  )
  model = dataclasses.replace(model, params=params)
  if scale == 1:
    exporting.to_compressed_tensors(tmp_path / 'out', model)
    return
  with pytest.raises(ValueError, match='a scale for each input'):
    exporting.to_compressed_tensors(tmp_path / 'out', model)


def test_bfloat16_can_not_hold_scales(packed, tmp_path):
  with pytest.raises(ValueError, match='scales are float16'):
    exporting.to_compressed_tensors(
      tmp_path / 'out', packed['symmetric'], dtype=ml_dtypes.bfloat16
    )
  assert not list(tmp_path.iterdir())


def test_targets_that_are_there_stay(packed, tmp_path):
  model = packed['symmetric']
  (tmp_path / 'empty').mkdir()
  exporting.to_huggingface(tmp_path / 'empty', model)
  (tmp_path / 'file').write_text('mine')
  (tmp_path / 'link').symlink_to(tmp_path / 'nowhere')
  for write in (exporting.to_huggingface, exporting.to_compressed_tensors):
    for name in ('empty', 'file', 'link'):
      with pytest.raises(FileExistsError, match='is there already'):
        write(tmp_path / name, model)
  assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize('to', ['huggingface', 'compressed_tensors'])
def test_a_full_disk_leaves_nothing(packed, tmp_path, monkeypatch, to):
  import errno

  def full(*arguments):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(tensors.os, 'fsync', full)
  write = getattr(exporting, f'to_{to}')
  with pytest.raises(OSError, match='No space left') as error:
    write(tmp_path / 'out', packed['symmetric'])
  assert str(tmp_path / 'out') in str(error.value)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('to', ['huggingface', 'compressed_tensors'])
def test_a_weight_that_reads_back_as_another_is_found(
  packed, tmp_path, monkeypatch, to
):
  write_shards = tensors.write_shards

  def flipped(folder, like, get, max_shard_bytes):
    def other(name):
      value = np.array(get(name), order='C')
      if 'layers.0.mlp.down_proj.weight' in name and value.dtype != np.int64:
        value.reshape(-1).view(np.uint8)[5] ^= 1
      return value

    write_shards(folder, like, other, max_shard_bytes)

  monkeypatch.setattr(tensors, 'write_shards', flipped)
  with pytest.raises(ValueError, match='down_proj.weight: .* read back as'):
    getattr(exporting, f'to_{to}')(tmp_path / 'out', packed['symmetric'])
  assert not list(tmp_path.iterdir())


@pytest.fixture(scope='module')
def folder(packed, tmp_path_factory):
  out = tmp_path_factory.mktemp('folders') / 'out'
  exporting.to_compressed_tensors(out, packed['asymmetric'])
  return out


CHANGED = {
  'format': ({'format': 'marlin-24'}, 'format=marlin-24'),
  'status': ({'quantization_status': 'frozen'}, 'quantization_status=frozen'),
  'cache': ({'kv_cache_scheme': {'num_bits': 8}}, 'kv_cache_scheme'),
  'no groups': ({'config_groups': {}}, 'config_groups'),
  'group': ({'config_groups': {'g': 'W4A16'}}, 'weights must be an object'),
}
WEIGHTS = {
  'bits': ({'num_bits': 3}, 'num_bits=3'),
  'true': ({'num_bits': True}, 'num_bits=True'),
  'float': ({'type': 'float'}, 'type=float'),
  'strategy': ({'strategy': 'block'}, 'strategy=block'),
  'order': ({'actorder': 'group'}, 'actorder=group'),
  'size': ({'group_size': 0}, 'group_size'),
  'other size': ({'group_size': 8}, 'of none of the schemes'),
  'other width': ({'num_bits': 8}, 'of none of the schemes'),
  'symmetric': ({'symmetric': True}, 'of none of the schemes'),
}


@pytest.mark.parametrize('case', [*CHANGED, *WEIGHTS])
def test_other_packed_checkpoints_are_refused_by_name(folder, tmp_path, case):
  copy = tmp_path / 'copy'
  shutil.copytree(folder, copy)
  path = copy / 'config.json'
  raw = json.loads(path.read_text())
  if case in CHANGED:
    change, words = CHANGED[case]
    raw['quantization_config'] |= change
  else:
    change, words = WEIGHTS[case]
    raw['quantization_config']['config_groups']['group_0']['weights'] |= change
  path.write_text(json.dumps(raw))
  with pytest.raises(ValueError, match=words):
    huggingface.load(copy)


@pytest.mark.parametrize(
  'part, change, words',
  [
    ('scale', None, 'weight_scale must be .* found nothing'),
    ('shape', None, 'weight_shape must be .* found nothing'),
    ('packed', lambda x: x[:, :-1], 'of none of the schemes'),
    ('scale', lambda x: x[:-1], 'of none of the schemes'),
    ('scale', lambda x: x.astype(np.int32), 'weight_scale must be'),
    ('shape', lambda x: x[:1], 'of none of the schemes'),
    ('shape', lambda x: x * 2**40, 'of none of the schemes'),
    ('zero_point', lambda x: x[:-1], 'of none of the schemes'),
    ('scale', lambda x: x * np.float16(np.nan), 'not finite'),
  ],
)
def test_damaged_parts_are_refused_by_name(
  folder, tmp_path, part, change, words
):
  copy = tmp_path / 'copy'
  shutil.copytree(folder, copy)
  found = {k: np.array(v) for k, v in tensors.read_folder(folder).items()}
  name = f'model.layers.0.mlp.gate_proj.weight_{part}'
  if change is None:
    del found[name]
  else:
    found[name] = change(found[name])
  tensors.write_safetensors(copy / 'model.safetensors', found)
  with pytest.raises(ValueError, match=words) as error:
    huggingface.load(copy)
  assert 'gate_proj.weight' in str(error.value)


def command(*arguments):
  return cli.main(['export', *map(str, arguments)])


def test_from_the_shell(packed, tiny, text, tmp_path, capsys):
  artifact = tmp_path / 'artifact'
  model = packed['asymmetric']
  opening.save_artifact(artifact, model, model.params)
  outs = [tmp_path / 'plain', tmp_path / 'packed']
  assert command(artifact, '--to', 'hf', outs[0]) == 0
  assert command(artifact, '--to', 'compressed-tensors', outs[1]) == 0
  assert 'bit for bit' in capsys.readouterr().out
  assert_same(huggingface.load(outs[0]).params, values(model, 'float32'))
  nll = []
  for folder in (artifact, outs[1]):
    arguments = ['eval', '--model', folder, '--text', text, '--windows', 8]
    assert cli.main([*map(str, arguments), '--json']) == 0
    nll.append(json.loads(capsys.readouterr().out)['nll'])
  assert nll[1] == pytest.approx(nll[0], abs=0.01)  # rounded to float16
  new = tmp_path / 'new'
  for arguments, words in (
    ((artifact, '--to', 'hf', outs[0]), 'is there already'),
    ((tiny, '--to', 'compressed-tensors', new), 'no packed matrix'),
    ((artifact, '--to', 'hf', '/proc/x/y'), '/proc'),
    ((artifact, '--to', 'hf', new, '--shard-bytes', 0), '--shard-bytes 0'),
    ((tmp_path / 'absent', '--to', 'hf', new), 'absent'),
  ):
    assert command(*arguments) == 2
    assert words in capsys.readouterr().err
  names = {p.name for p in tmp_path.iterdir()}
  assert names == {'artifact', 'plain', 'packed'}
