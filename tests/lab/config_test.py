import pathlib

import gin
import pytest

from mq_jax.lab import config

GOOD = """
compare.models = ['reference']
compare.recipes = [
  'none',
  {'recipe': 'rtn', 'bits': 4},
  {'recipe': 'rtn', 'bits': 3, 'label': 'three'},
]
"""


@pytest.fixture
def write(tmp_path):
  def write(text, name='study.gin'):
    path = tmp_path / name
    path.write_text(text)
    return path

  return write


def fails(path, *bindings):
  with pytest.raises(config.ConfigError) as caught:
    config.load(path, bindings)
  message = str(caught.value)
  assert '\n' not in message
  return message


def test_resolves_to_a_complete_study(write):
  study, operative = config.load(write(GOOD))
  assert study.models == ('reference',)
  assert [r.label for r in study.rows] == ['none', 'rtn w4', 'three']
  assert study.rows[1].options == (('bits', 4),)
  assert (study.seed, study.text, study.artifact) == (0, None, None)
  assert 'compare.windows = 64' in operative  # defaults are written out


def test_operative_config_is_a_config_of_the_same_study(write):
  bindings = ['compare.seed = 3', "compare.artifact = 'three'"]
  study, operative = config.load(write(GOOD), bindings)
  again, _ = config.load(write(operative, 'operative.gin'))
  assert again == study
  assert again.digest == study.digest


def test_options_are_in_the_order_of_the_recipe_however_written(write):
  """Gin writes mappings sorted: the run's own config must be the same study."""
  text = """
compare.models = ['reference']
compare.recipes = [
  {'group': 32, 'recipe': 'gptq', 'bits': 2, 'damping': 0.1, 'clip': 'search',
   'learning': {'optimizer': 'adam', 'batch': 4, 'steps': 5},
   'activations': {'smooth': 0.7, 'format': 'mx_int', 'bits': 8}},
]
"""
  study, operative = config.load(write(text))
  (row,) = study.rows
  assert row.label == (
    'gptq w2 g32 clip=search damping=0.1 a8 mx_int smooth=0.7 '
    'learned steps=5 optimizer=adam batch=4'
  )
  again, _ = config.load(write(operative, 'operative.gin'))
  assert again == study and again.digest == study.digest


def test_digest_is_of_what_is_run_not_of_how_it_is_written(write):
  study, _ = config.load(write(GOOD))
  same, _ = config.load(write(GOOD + '\n# seed\ncompare.seed = 0\n', 'b.gin'))
  other, _ = config.load(write(GOOD, 'c.gin'), ['compare.seed = 1'])
  assert same.digest == study.digest != other.digest


def test_set_overrides_and_the_next_load_knows_nothing_of_it(write):
  path = write(GOOD)
  assert config.load(path, ['compare.seed = 5'])[0].seed == 5
  assert config.load(path)[0].seed == 0
  assert gin.config_str().strip() == ''


def test_default_text_yields_to_a_binding(write):
  path = write(GOOD)
  assert config.load(path, default_text='a.txt')[0].text == 'a.txt'
  bound = ["compare.text = 'b.txt'"]
  assert config.load(path, bound, default_text='a.txt')[0].text == 'b.txt'


def test_macros_and_includes(write):
  base = write('BITS = 4\n' + GOOD, 'base.gin')
  path = write(
    f"include '{base}'\ncompare.recipes = [{{'recipe': 'rtn', 'bits': %BITS}}]"
  )
  study, _ = config.load(path)
  assert study.rows[0].options == (('bits', 4),)


@pytest.mark.parametrize(
  'line, words',
  [
    ('compare.sed = 1', ['has no parameter', "'sed'", "'seed'"]),
    ('comparee.seed = 1', ["unknown configurable 'comparee'", "'compare'"]),
    ('compare.seed = %SEEDS', ['unknown macro %SEEDS']),
    ('compare.seed = @sed()', ["unknown configurable 'sed'"]),
    ('a/compare.seed = 1', ["nothing uses scope 'a'"]),
    ('compare.seed = [', ['syntax']),
    ('compare.seed 1', ['syntax']),
    ('compare.seed = -1', ['compare.seed', '>= 0', '-1']),
    ("compare.windows = 'many'", ['compare.windows', 'whole number']),
    ('compare.models = []', ['compare.models', 'at least one']),
    ("compare.models = ['a', 'a']", ["'a' stands there twice"]),
    ("compare.artifact = 'thre'", ["did you mean 'three'"]),
    ("compare.recipes = ['rtn', 'rtn']", ['twice', "'label'"]),
    ("compare.recipes = [{'bits': 3}]", ['a row is']),
    ('import no_such_module', ['import', 'no_such_module']),
    ("include 'no_such.gin'", ['include', 'no_such.gin']),
  ],
)
def test_a_bad_line_is_named_in_the_file_and_on_the_command_line(
  write, line, words
):
  path = write(GOOD + line + '\n')
  message = fails(path)
  if 'syntax' not in words:  # an open bracket ends where the file does
    assert f'{path}:{len(GOOD.splitlines()) + 1}: ' in message
  else:
    assert f'{path}:' in message
  for word in words:
    assert word in message
  if not line.startswith(('import', 'include')):
    message = fails(write(GOOD), line)
    assert message.startswith(f'--set {line!r}: ')
    for word in words:
      assert word in message


def test_unknown_recipe_and_option_are_found_on_their_line(write):
  path = write(GOOD.replace("'rtn', 'bits': 3", "'rtm', 'bits': 3"))
  message = fails(path)
  assert message.startswith(f'{path}:6: ')
  assert 'rtm' in message and 'rtn' in message
  path = write(GOOD.replace("'bits': 4", "'bitts': 4"))
  message = fails(path)
  assert message.startswith(f'{path}:5: ')
  assert 'bitts' in message and 'bits' in message


def test_what_must_be_set_is_named(write):
  message = fails(write('compare.seed = 1\n'))
  assert 'compare.models and compare.recipes must be set' in message


def test_a_file_that_cannot_be_read(tmp_path):
  assert 'no such config file' in fails(tmp_path / 'none.gin')
  path = tmp_path / 'latin.gin'
  path.write_bytes(b'# caf\xe9\n')
  assert 'UTF-8' in fails(path)


def test_configurables_that_nothing_uses_are_refused(write):
  @gin.configurable('orphan_of_config_test')
  def orphan(x=1):
    return x

  del orphan
  message = fails(write(GOOD + 'orphan_of_config_test.x = 2\n'))
  assert 'nothing uses orphan_of_config_test' in message


def test_options_of_a_recipe():
  found = config.options(['group=64', 'axis = out', "rule='a'", 'on=False'])
  assert found == {'group': 64, 'axis': 'out', 'rule': 'a', 'on': False}
  for bad in ('group', '=3', 'a b=3', 'group='):
    with pytest.raises(config.ConfigError, match='option=value'):
      config.options([bad])
  with pytest.raises(config.ConfigError, match='twice'):
    config.options(['a=1', 'a=2'])


def test_the_quickstart_can_be_read():
  path = pathlib.Path(__file__).parents[2] / 'configs' / 'quickstart.gin'
  study, _ = config.load(path)
  assert len(study.rows) >= 12
  assert study.artifact is not None
