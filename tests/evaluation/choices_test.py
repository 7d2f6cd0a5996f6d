import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mq_jax.evaluation import choices
from mq_jax.evaluation.choices import Question


@pytest.fixture(scope='module')
def golden(golden_dir):
  return json.loads((golden_dir / 'evaluation.json').read_text())['questions']


def written(tmp_path, *lines):
  path = tmp_path / 'questions.jsonl'
  texts = [x if isinstance(x, str) else json.dumps(x) for x in lines]
  path.write_text('\n'.join(texts) + '\n', encoding='utf-8')
  return path


GOOD = {'query': 'Q: é', 'choices': ['yes', 'no'], 'gold': 1}


def test_both_spellings_are_read(tmp_path):
  other = {'context': 'x', 'choices': ['a', 'b', 'c'], 'answer': 'c', 'id': 7}
  path = written(tmp_path, GOOD, '', other)
  one, two = choices.read_questions(path)
  assert one == Question('Q: é', ('yes', 'no'), 1, f'{path}:1')
  assert two == Question('x', ('a', 'b', 'c'), 2, f'{path}:3')


@pytest.mark.parametrize(
  'change, words',
  [
    ('{"query": ', 'not JSON'),
    ('[1]', 'found a list'),
    ({'context': 'too'}, 'query and context'),
    ({'query': 3}, 'query must be text, found 3'),
    ({'choices': ['one']}, 'two texts or more'),
    ({'choices': ['one', '']}, 'none empty'),
    ({'choices': 'ab'}, 'two texts or more'),
    ({'gold': 2}, 'from 0 to 1, found 2'),
    ({'gold': -1}, 'found -1'),
    ({'gold': True}, 'found True'),
    ({'gold': 'maybe'}, "found 'maybe'"),
    ({'answer': 1}, 'gold and answer'),
  ],
)
def test_a_bad_line_is_named(tmp_path, change, words):
  bad = change if isinstance(change, str) else GOOD | change
  path = written(tmp_path, GOOD, bad)
  with pytest.raises(ValueError, match=words) as error:
    choices.read_questions(path)
  assert str(error.value).startswith(f'{path}:2: ')


def test_files_without_questions(tmp_path):
  with pytest.raises(FileNotFoundError, match='no such file'):
    choices.read_questions(tmp_path / 'absent.jsonl')
  with pytest.raises(ValueError, match='holds no questions'):
    choices.read_questions(written(tmp_path, '', '  '))
  path = written(tmp_path, GOOD)
  path.write_bytes(path.read_bytes() + b'{"query": "caf\xe9"}\n')
  with pytest.raises(ValueError, match=r'jsonl:2: not JSON in UTF-8'):
    choices.read_questions(path)


def test_log_likelihoods_are_those_of_transformers(babyllama, golden):
  sequences = [
    choices.continuation(babyllama.tokenizer, q['query'], ' ' + c, 1)
    for q in golden
    for c in q['choices']
  ]
  expected = [x for q in golden for x in q['log_likelihoods']]
  found = choices._log_likelihoods(
    babyllama.apply, babyllama.params, sequences, 256, 4, None
  )
  # Sums of up to a dozen float32 log probabilities.
  np.testing.assert_allclose(found, expected, atol=2e-4)


def uniform(params, tokens):
  """Every token of 300 as likely: a log likelihood counts tokens."""
  return jnp.zeros((*tokens.shape, 300))


class Letters:
  """A token for each letter, as a tokenizer; '-' joins the letter before."""

  def encode(self, text, add_special_tokens):
    assert not add_special_tokens
    ids = [1 + ord(c) % 256 for c in text.replace('x-', 'y')]
    return type('Encoding', (), {'ids': ids})


@pytest.mark.parametrize('batch', [1, 2, 16])
def test_the_likeliest_choice_counts(batch):
  # The letter after the one before is the likeliest.
  model = lambda params, tokens: 4.0 * jax.nn.one_hot(tokens + 1, 300)
  ask = lambda *c: Question('xyab', c, 0)
  questions = [ask('cde', 'cdd'), ask('a', 'c'), ask('cd', 'd' * 20, 'b')]
  seen = []
  found = choices.evaluate(
    model,
    {},
    Letters(),
    questions,
    length=64,
    prefix=0,
    delimiter='',
    batch=batch,
    progress=lambda done, total: seen.append((done, total)),
  )
  assert found.questions == 3 and seen[-1] == (7, 7)
  assert found.acc == found.acc_norm == pytest.approx(2 / 3)
  assert found.acc_error == pytest.approx(np.sqrt(2 / 9 / 2))


def test_norms_by_character_and_byte():
  q = Question('q', ('aa', 'é'), 1)
  found = choices.evaluate(
    uniform, {}, Letters(), [q], length=64, prefix=0, delimiter=''
  )
  # Each character is a token: the shorter is likelier, by character they are
  # equal (the first counts), by byte 'é' is twice as long.
  assert (found.acc, found.acc_norm, found.acc_bytes) == (1, 0, 1)
  assert found.acc_error is None


def test_boundary_between_context_and_choice():
  encode = lambda context, text, **more: choices.continuation(
    Letters(), context, text, 0, **more
  )
  code = lambda text: [1 + ord(c) for c in text]
  assert encode('ab', 'cd') == (code('abcd'), 2)
  # White space at the end of the context goes with the continuation.
  assert encode('ab ', 'cd') == (code('ab cd'), 3)
  assert encode('ab', 'cd', always=True) == ([0] + code('abcd'), 2)
  # Nothing before it: the prefix is what it is predicted from.
  assert encode('', 'cd') == ([0] + code('cd'), 2)
  assert encode(' ', 'cd') == ([0] + code(' cd'), 3)
  with pytest.raises(ValueError, match='no token of its own'):
    encode('abx', '-')
  with pytest.raises(ValueError, match='the context is empty'):
    choices.continuation(Letters(), '', 'a', None)


def test_long_contexts_lose_their_beginning():
  seen = []

  def model(params, tokens):
    seen.append(tokens.shape)
    return jnp.zeros((*tokens.shape, 300)).at[..., 1 + ord('c')].set(5.0)

  q = [Question('a' * 50, ('c', 'd'), 0, 'file:9')]
  found = choices.evaluate(
    model, {}, Letters(), q, length=20, prefix=0, delimiter=''
  )
  assert found.acc == 1 and seen == [(2, 20)]
  with pytest.raises(ValueError, match='file:9: choice 1 has 21 tokens'):
    choices.evaluate(
      model,
      {},
      Letters(),
      [Question('a', ('b', 'c' * 21), 0, 'file:9')],
      length=20,
      prefix=0,
      delimiter='',
    )


def test_what_can_not_be_evaluated():
  q = Question('a', ('b', 'c'), 0, 'file:1')
  with pytest.raises(ValueError, match='0 questions'):
    choices.evaluate(uniform, {}, Letters(), [], length=8, prefix=0)
  broken = lambda params, tokens: jnp.full((*tokens.shape, 300), jnp.nan)
  with pytest.raises(ValueError, match='file:1: .* not finite'):
    choices.evaluate(broken, {}, Letters(), [q], length=8, prefix=0)
