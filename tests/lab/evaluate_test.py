"""`mq eval` beyond perplexity by the default cut, which cli_test covers."""

import json
import math

import pytest

from mq_jax.lab import cli


def evaluated(capsys, *arguments):
  assert cli.main(['eval', *map(str, arguments), '--json']) == 0
  return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments):
  assert cli.main(['eval', *map(str, arguments)]) == 2
  captured = capsys.readouterr()
  assert captured.out == '' and captured.err.count('\n') == 1
  return captured.err


@pytest.fixture(scope='module')
def packed(tiny, text, tmp_path_factory):
  out = tmp_path_factory.mktemp('packed') / 'artifact'
  arguments = ['quantize', '--model', tiny, '--recipe', 'rtn', '--bits', 4]
  arguments += ['--calibration', text, '--windows', 4, '--batch', 4]
  assert cli.main([*map(str, arguments), '--out', str(out)]) == 0
  return out


@pytest.fixture(scope='module')
def questions(tmp_path_factory):
  path = tmp_path_factory.mktemp('choices') / 'questions.jsonl'
  lines = [
    {'query': 'The 3rd café had', 'choices': ['9 guests.', 'none'], 'gold': 0},
    {'context': '', 'choices': ['a', 'b'], 'answer': 'b'},
  ]
  path.write_text('\n'.join(map(json.dumps, lines)))
  return path


def test_cuts_and_strides(tiny, text, capsys):
  model = ('--model', tiny, '--text', text, '--batch', 8)
  ours = evaluated(capsys, *model)
  field = evaluated(capsys, *model, '--cut', 'field')
  strided = evaluated(capsys, *model, '--cut', 'field', '--stride', 8)
  short = evaluated(capsys, *model, '--cut', 'field', '--context', 16)
  joined = len(text.read_text('utf-8').encode()) + 59 * 2
  # Byte-level tokens; the tokenizer adds none; windows of 32 predict 31.
  assert strided['tokens'] == strided['bytes'] == joined - 1
  assert field['tokens'] == joined // 32 * 31
  assert short['tokens'] == joined // 16 * 15
  assert len({x['nll'] for x in (ours, field, strided, short)}) == 4
  for found in (ours, field, strided, short):
    assert found['perplexity'] == pytest.approx(math.exp(found['nll']))


def test_against_the_unquantized_model(tiny, packed, text, capsys):
  model = ('--model', packed, '--text', text, '--windows', 8)
  alone = evaluated(capsys, *model)
  found = evaluated(capsys, *model, '--against', tiny)
  assert found['nll'] == pytest.approx(alone['nll'], rel=1e-6)
  assert found['against'] == str(tiny) and found['ebw'] == alone['ebw'] > 4
  assert found['divergence'] > 0 and 0 < found['top1'] < 1
  plain = evaluated(capsys, '--model', tiny, '--text', text, '--windows', 8)
  assert found['reference_nll'] == pytest.approx(plain['nll'], rel=1e-6)
  itself = ('--model', packed, '--text', text, '--against', packed)
  same = evaluated(capsys, *itself, '--windows', 8)
  assert same['divergence'] == 0 and same['top1'] == 1


def test_questions(tiny, packed, questions, text, capsys):
  found = evaluated(capsys, '--model', tiny, '--choices', questions)
  assert found.keys() == {'model', 'choices', 'ebw', 'seconds'}
  assert found['choices']['questions'] == 2
  assert found['choices']['acc'] in (0, 0.5, 1)
  both = evaluated(
    capsys,
    *('--model', packed, '--choices', questions),
    *('--text', text, '--windows', 4, '--cut', 'field'),
  )
  assert both['choices']['questions'] == 2 and both['nll'] > 0
  assert (
    cli.main(['eval', '--model', str(tiny), '--choices', str(questions)]) == 0
  )
  assert 'acc_bytes' in capsys.readouterr().out


@pytest.mark.parametrize(
  'more, words',
  [
    ([], 'give --text, --choices'),
    (['--text', 'TEXT', '--stride', 4], '--stride needs --cut field'),
    (['--text', 'TEXT', '--stride', 0], '--stride 0'),
    (['--text', 'TEXT', '--cut', 'field', '--stride', 40], 'stride=40'),
    (['--text', 'TEXT', '--context', 64], 'its context is 32'),
    (['--choices', 'absent.jsonl'], 'absent.jsonl'),
    (['--choices', 'TEXT'], 'text.txt:1: not JSON'),
    (['--choices', 'QUESTIONS', '--against', 'x'], 'give --text'),
    (['--text', 'TEXT', '--against', 'no/such'], 'no/such'),
    (['--text', 'TEXT', '--against', 'reference'], 'different tokens'),
  ],
)
def test_bad_options(tiny, text, questions, capsys, more, words):
  names = {'TEXT': text, 'QUESTIONS': questions}
  more = [names.get(x, x) for x in more]
  assert words in refused(capsys, '--model', tiny, *more)
