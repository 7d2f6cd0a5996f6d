"""`mq config`: every config of the repository, and bad ones."""

import inspect
import pathlib
import re

import gin
import pytest

from mq_jax.lab import checking, cli, config, statements

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = sorted(ROOT.glob('configs/**/*.gin'))
FIELDS = ('Paper', 'Run', 'Time', 'Expect', 'Must be set', 'Often set')


def header(path):
  """What a config says above its first line, and its fields."""
  lines = path.read_text('utf-8').splitlines()
  end = next(i for i, line in enumerate(lines) if not line.startswith('#'))
  text = '\n'.join(line[2:] for line in lines[:end])
  parts = re.split(rf'^({"|".join(FIELDS)}):', text, flags=re.MULTILINE)
  names = [part.strip() for part in parts[1::2]]
  return parts[0], dict(zip(names, parts[2::2], strict=True))


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
  monkeypatch.chdir(ROOT)  # files that are included are named from there


def test_all_configs_are_valid(capsys):
  assert len(CONFIGS) >= 20
  assert cli.main(['config', 'validate', *map(str, CONFIGS)]) == 0
  assert f'{len(CONFIGS)} files, no errors' in capsys.readouterr().out


@pytest.mark.parametrize(
  'path', [str(p.relative_to(ROOT)) for p in CONFIGS if 'sweeps' not in p.parts]
)
def test_headers_have_one_form_and_say_what_is_so(path):
  what, fields = header(ROOT / path)
  assert len(what) > 40
  assert tuple(fields) == FIELDS
  assert all(len(line) <= 78 for line in what.splitlines())
  # The command is of this file, and its module is there.
  assert path in re.sub(r'\\\n\s*', '', fields['Run'])
  time = fields['Time']
  assert 'core' in time or 'not measured' in time or 'any machine' in time
  # What must be set is what has no default, and the file sets it.
  names, root = ' '.join(fields['Must be set'].split()).rsplit(' of ', 1)
  said = {name.strip() for name in names.split(',')}
  root = root.strip(' .\n')
  source = statements.read(path)
  checking.errors(path)  # imports the script
  wrapped = gin.config._REGISTRY.get_match(root).wrapped
  parameters = inspect.signature(wrapped).parameters
  needed = {n for n, p in parameters.items() if p.default is gin.REQUIRED}
  assert said == needed
  found = statements.scan([source], None)
  assert {f'{root}.{name}' for name in needed} <= found.bound.keys()
  often = re.findall(r'\b\w+\.(\w+)', fields['Often set'].split('(')[0])
  assert often and set(often) <= parameters.keys()


BAD = """\
compare.models = ['reference', 3]
compare.recipes = [
  {'recipe': 'rtm', 'bits': 3},
  {'recipe': 'rtn', 'bitts': 3},
  'none',
]
compare.windows = 'many'
compare.seed = -1
"""


def test_all_errors_of_all_files_in_one_go(tmp_path, capsys):
  values, names, none = (tmp_path / f'{n}.gin' for n in 'abc')
  values.write_text(BAD)
  names.write_text('compare.modls = []\ncomparee.seed = 1\ncompare.seed = %s\n')
  arguments = ['config', 'validate', *map(str, (values, names, none))]
  assert cli.main(arguments) == 2
  lines = capsys.readouterr().err.splitlines()
  for line, (where, word) in zip(
    lines,
    [
      (f'{values}:1', 'names and folders are text, got 3'),
      (f'{values}:3', 'did you mean rtn'),
      (f'{values}:4', 'did you mean bits'),
      (f'{values}:7', "whole number >= 1, got 'many'"),
      (f'{values}:8', '-1'),
      (f'{names}:1', "'models'"),
      (f'{names}:2', "'compare'"),
      (f'{names}:3', 'unknown macro %s'),
      (f'{none}', 'no such config file'),
    ],
    strict=True,
  ):
    assert line.startswith(f'mq: {where}: ') and word in line, line


@pytest.mark.parametrize(
  'text, word',
  [
    ('# python -m experiments.codesign x.gin\ncodesign.outt = 1\n', "'out'"),
    ('# python -m experiments.codesin x.gin\ncodesin.out = 1\n', 'No module'),
    ("compare.models = ['reference']\n", 'compare.recipes must be set'),
    ("compare.recipes = ['none']\n", 'compare.models must be set'),
  ],
)
def test_scripts_and_what_must_be_set(tmp_path, text, word):
  path = tmp_path / 'x.gin'
  path.write_text(text)
  (error,) = checking.errors(path)
  assert error.startswith(f'{path}:') and word in error


def test_what_is_shown_is_a_config_of_the_same_study(tmp_path, capsys):
  path = 'configs/studies/microscopiq_sigma_sweep.gin'
  assert cli.main(['config', 'show', path]) == 0
  shown = capsys.readouterr().out
  assert 'compare.batch = 8' in shown  # a default
  again = tmp_path / 'again.gin'
  again.write_text(shown)
  assert config.load(again)[0] == config.load(path)[0]


def test_differences_are_of_values_and_entries(tmp_path, capsys):
  plain = 'configs/studies/equal_bits.gin'
  stories = 'configs/studies/equal_bits_stories.gin'
  assert cli.main(['config', 'diff', plain, plain]) == 0
  assert 'no differences' in capsys.readouterr().out
  assert cli.main(['config', 'diff', plain, stories]) == 1
  found = checking.differences(*map(checking.values, (plain, stories)))
  assert {d.name for d in found} == {
    *('compare.models', 'compare.text', 'compare.calibration_text')
  }
  other = tmp_path / 'other.gin'
  other.write_text(
    f"include '{plain}'\ncompare.recipes = ['none']\ncompare.seed = 1\n"
  )
  found = checking.differences(*map(checking.values, (plain, other)))
  assert checking.Difference('compare.seed', '0', '1') in found
  rows = [d for d in found if d.name == 'compare.recipes']
  assert checking.Difference('compare.recipes', '-', "'none'") in rows
