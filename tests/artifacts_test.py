import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mq_jax import artifacts, quantize, recipes
from mq_jax.artifacts import _format

# One of each kind of layout: plain, nested in another, with tables.
RECIPES = {
  'none': {},
  'rtn': {'bits': 3, 'group': 32},
  'awq': {'clip': 'none'},
  'microscopiq': {'block': 32, 'compensate': False},
  'fineq': {'scale': 'absmax'},
}


@pytest.fixture(scope='module')
def params():
  key = jax.random.key(0)
  weight = jax.random.normal(key, (48, 40))
  quantized = {
    name: {
      'kernel': quantize.quantize_matrix(weight, recipes.make(name, **options))
    }
    for name, options in RECIPES.items()
  }
  return {
    'layers': {0: quantized},
    'norm': {'scale': jnp.arange(5, dtype=jnp.bfloat16)},
    'embed': jax.random.normal(key, (7, 3)),
  }


@pytest.fixture(scope='module')
def written(params, tmp_path_factory):
  folder = tmp_path_factory.mktemp('artifact') / 'model'
  artifacts.save(folder, params, model={'a': 1}, tokenizer='{"é": 1}')
  return folder


@pytest.fixture
def folder(written, tmp_path):
  """A copy to be damaged."""
  return shutil.copytree(written, tmp_path / 'copy')


def edit(folder, change, *, signed=True):
  """Change the manifest as an attacker would: with its checksum redone."""
  path = folder / 'manifest.json'
  manifest = json.loads(path.read_text())
  change(manifest)
  if signed:
    manifest['sha256'] = _format.manifest_sha256(manifest)
  path.write_text(json.dumps(manifest))


def matrices(tree):
  is_leaf = lambda x: isinstance(x, quantize.QuantizedMatrix)
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
  return {jax.tree_util.keystr(p): x for p, x in leaves}


def test_loads_to_the_same_bits(written, params):
  loaded = artifacts.load(written)
  assert loaded.model == {'a': 1}
  assert loaded.tokenizer == '{"é": 1}'
  ours, theirs = matrices(params), matrices(loaded.params)
  assert ours.keys() == theirs.keys()
  for name, leaf in ours.items():
    back = theirs[name]
    if isinstance(leaf, quantize.QuantizedMatrix):
      assert back.layout == leaf.layout and back.recipe == leaf.recipe
      assert (back.ebw, back.ebw_paper) == (leaf.ebw, leaf.ebw_paper)
      assert back.record.keys() == leaf.record.keys()
      for key, value in leaf.record.items():
        np.testing.assert_array_equal(back.record[key], value)
      back, leaf = back.dequantize(), leaf.dequantize()
    assert back.dtype == leaf.dtype
    np.testing.assert_array_equal(np.asarray(back), np.asarray(leaf))


def test_size_on_disk_is_what_is_claimed(written, params):
  packed = [
    x
    for x in matrices(params).values()
    if isinstance(x, quantize.QuantizedMatrix)
  ]
  size = (written / 'packed.bin').stat().st_size
  assert size == sum(m.pack().nbytes for m in packed)
  assert 8 * size == pytest.approx(sum(m.ebw * m.size for m in packed))
  totals = artifacts.load(written).totals
  assert totals['nbytes'] == size
  assert totals['ebw'] == 8 * size / totals['elements']


def test_the_rest_is_a_checkpoint_that_orbax_reads_alone(written, params):
  import orbax.checkpoint as ocp

  target = {
    'embed': jax.ShapeDtypeStruct((7, 3), jnp.float32),
    'norm': {'scale': jax.ShapeDtypeStruct((5,), jnp.bfloat16)},
  }
  with ocp.StandardCheckpointer() as checkpointer:
    found = checkpointer.restore(written / 'rest', target)
  np.testing.assert_array_equal(found['embed'], params['embed'])


def test_the_folder_holds_only_what_is_listed(written):
  names = {p.name for p in written.iterdir()}
  assert names == {'manifest.json', 'packed.bin', 'rest', 'tokenizer.json'}
  assert not list(written.parent.glob('.*'))  # nothing is left beside it


def test_everything_may_be_packed(tmp_path, params):
  only = {'w': params['layers'][0]['rtn']['kernel']}
  artifacts.save(tmp_path / 'a', only, model={})
  loaded = artifacts.load(tmp_path / 'a')
  assert loaded.params.keys() == {'w'} and loaded.tokenizer is None
  assert not (tmp_path / 'a' / 'rest').exists()


@pytest.mark.parametrize(
  'tree, words',
  [
    ({'a': jnp.ones(2)}, 'nothing is quantized'),
    ({'a/b': jnp.ones(2)}, "key 'a/b'"),
    ({1: jnp.ones(2), '1': jnp.ones(2)}, 'distinct'),
    ({'a': 'text'}, 'a str can not'),
    ({'a': np.array([None])}, 'dtype object'),
  ],
)
def test_what_cannot_be_stored_is_named(tmp_path, params, tree, words):
  if 'nothing' not in words:
    tree = {**tree, 'w': params['layers'][0]['rtn']['kernel']}
  with pytest.raises(ValueError, match=words):
    artifacts.save(tmp_path / 'a', tree, model={})
  assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_nothing(tmp_path, params):
  with pytest.raises(TypeError):
    artifacts.save(tmp_path / 'a', params, model={'x': object()})
  assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_unless_told(written, tmp_path, params):
  only = {'w': params['layers'][0]['rtn']['kernel']}
  foreign = tmp_path / 'foreign'
  foreign.mkdir()
  (foreign / 'manifest.json').write_text('{}')
  for overwrite in (False, True):
    with pytest.raises(FileExistsError, match='not an artifact'):
      artifacts.save(foreign, only, model={}, overwrite=overwrite)
  assert (foreign / 'manifest.json').read_text() == '{}'
  copy = shutil.copytree(written, tmp_path / 'copy')
  with pytest.raises(FileExistsError, match='artifact already'):
    artifacts.save(copy, only, model={})
  assert artifacts.load(copy).model == {'a': 1}
  artifacts.save(copy, only, model={'b': 2}, overwrite=True)
  assert artifacts.load(copy).model == {'b': 2}
  assert {p.name for p in tmp_path.iterdir()} == {'foreign', 'copy'}
  empty = tmp_path / 'empty'
  empty.mkdir()
  artifacts.save(empty, only, model={})
  assert artifacts.is_artifact(empty)


def test_is_artifact(written, tmp_path):
  assert artifacts.is_artifact(written)
  assert not artifacts.is_artifact(tmp_path)
  assert not artifacts.is_artifact(tmp_path / 'none')
  (tmp_path / 'manifest.json').write_text('[1]')
  assert not artifacts.is_artifact(tmp_path)


@pytest.mark.parametrize('name', ['packed.bin', 'tokenizer.json'])
def test_a_flipped_byte_and_a_truncated_file(folder, name):
  path = folder / name
  content = path.read_bytes()
  path.write_bytes(content[:3] + bytes([content[3] ^ 1]) + content[4:])
  with pytest.raises(ValueError, match=f'{name}: its SHA-256'):
    artifacts.load(folder)
  path.write_bytes(content[:-1])
  with pytest.raises(ValueError, match=f'{name}: {len(content) - 1} bytes'):
    artifacts.load(folder)
  path.unlink()
  with pytest.raises(FileNotFoundError, match=name):
    artifacts.load(folder)


def test_links_are_not_followed(folder, tmp_path):
  outside = tmp_path / 'outside'
  (folder / 'packed.bin').rename(outside)
  (folder / 'packed.bin').symlink_to(outside)
  with pytest.raises(FileNotFoundError, match='links'):
    artifacts.load(folder)


def test_damage_in_the_checkpoint_of_the_rest(folder):
  files = [p for p in (folder / 'rest').rglob('*') if p.is_file()]
  for path in files:
    content = path.read_bytes()
    if path.stat().st_size > 40 and b'zarr' not in content[:200]:
      path.write_bytes(content[: len(content) // 2])
  with pytest.raises(ValueError, match='rest'):
    artifacts.load(folder)
  shutil.rmtree(folder / 'rest')
  with pytest.raises(FileNotFoundError, match='rest'):
    artifacts.load(folder)


def test_another_value_in_the_rest_is_found(folder, params, tmp_path):
  other = {**params, 'embed': params['embed'] + 1}
  artifacts.save(tmp_path / 'other', other, model={})
  shutil.rmtree(folder / 'rest')
  shutil.copytree(tmp_path / 'other' / 'rest', folder / 'rest')
  with pytest.raises(ValueError, match='SHA-256 of embed'):
    artifacts.load(folder)


def test_a_manifest_that_is_none(folder):
  path = folder / 'manifest.json'
  for content, words in (
    ('{', 'not JSON'),
    ('[]', 'not the manifest'),
    ('{"format": "zip"}', 'not the manifest'),
    ('[' * 100_000, 'not JSON'),
  ):
    path.write_text(content)
    with pytest.raises(ValueError, match=words):
      artifacts.load(folder)
  path.unlink()
  with pytest.raises(FileNotFoundError, match='manifest.json'):
    artifacts.load(folder)


def test_another_version_and_a_damaged_manifest(folder):
  edit(folder, lambda m: m.update(version=2))
  with pytest.raises(ValueError, match='version 2.*reads version 1'):
    artifacts.load(folder)
  edit(folder, lambda m: m.update(version=1))
  edit(folder, lambda m: m['model'].update(a=2), signed=False)
  with pytest.raises(ValueError, match='damaged'):
    artifacts.load(folder)


def set_in(*path_and_value):
  *path, last, value = path_and_value

  def change(manifest):
    node = manifest
    for key in path:
      node = node[key]
    node[last] = value

  return change


@pytest.mark.parametrize(
  'change, words',
  [
    (set_in('files', '../secret', {}), r'\.\./secret'),
    (set_in('files', '/etc/passwd', {}), 'passwd'),
    (set_in('files', {}), 'packed.bin'),
    (set_in('files', 'packed.bin', 'nbytes', True), 'nbytes'),
    (set_in('packed', 0, 'path', ['..', None]), 'not the path'),
    (set_in('packed', 0, 'path', []), 'not the path'),
    (set_in('packed', 1, 'path', ['embed']), 'twice'),
    (set_in('packed', 1, 'path', ['layers']), 'twice'),
    (set_in('packed', 0, 'shape', [10**12, 10**12]), r'packed\[0\]'),
    (set_in('packed', 0, 'shape', [48, -40]), 'not a shape'),
    (set_in('packed', 0, 'shape', [48]), r'packed\[0\]'),
    (set_in('packed', 0, 'dtype', 'object'), "dtype 'object'"),
    (set_in('packed', 0, 'layout', {'layout': 'os.system'}), 'os.system'),
    (set_in('packed', 0, 'layout', 'x', 1), r'packed\[0\]'),
    (set_in('packed', 0, 'buffers', 0, 'offset', 1), 'at offset 1'),
    (set_in('packed', 0, 'buffers', 0, 'nbytes', -5), r'packed\[0\]'),
    (set_in('packed', 0, 'buffers', 0, 'nbytes', 10**15), 'ends at'),
    (set_in('packed', 0, 'buffers', 0, 'sha256', '0'), 'SHA-256'),
    (set_in('packed', 0, 'buffers', 0, 'name', 'x'), r'packed\[0\]'),
    (set_in('packed', 0, 'buffers', []), r'packed\[0\].*missing'),
    (set_in('packed', []), 'end at 0'),
    (lambda m: m['packed'].reverse(), 'expected once and at 0'),
    (set_in('packed', [None]), r'packed\[0\]'),
    (set_in('packed', 0, 'record', {'status': 3}), r'packed\[0\]'),
    (set_in('packed', 0, 'site', {'name': 3}), r'packed\[0\]'),
    (set_in('totals', 'nbytes', 1), 'totals'),
    (set_in('rest', 0, 'shape', [2, 2]), 'rest'),
    (set_in('rest', 0, 'dtype', 'O'), "dtype 'O'"),
    (set_in('rest', 0, 'path', ['nowhere']), 'rest'),
    (set_in('rest', None), 'rest'),
    (set_in('model', None), 'model'),
  ],
)
def test_a_lying_manifest_is_refused_by_name(folder, change, words):
  edit(folder, change)
  with pytest.raises((ValueError, FileNotFoundError), match=words):
    artifacts.load(folder)


def test_nothing_in_a_folder_is_executed(folder):
  (folder / 'evil.pkl').write_bytes(b'cos\nsystem\n(S"touch /tmp/x"\ntR.')
  artifacts.load(folder)  # files that are not listed are not looked at


def test_equal_params_give_equal_bytes(written, params, tmp_path):
  artifacts.save(tmp_path / 'b', params, model={'a': 1})
  digest = lambda p: hashlib.sha256((p / 'packed.bin').read_bytes()).digest()
  assert digest(tmp_path / 'b') == digest(written)
