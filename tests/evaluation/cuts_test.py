"""Windows against the loops of the field, and transformers' figures."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from mq_jax.evaluation import cuts, perplexity


def characters(begin=False):
  """A token for each character; with <s> in front if the tokenizer adds it."""
  words = {'<s>': 0} | {c: i for i, c in enumerate('abcé😀 \n\r', 1)}
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(words, unk_token='<s>')
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split('', 'isolated')
  if begin:
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
      single='<s> $A', special_tokens=[('<s>', 0)]
    )
  return tokenizer


PLAIN, BEGUN = characters(), characters(begin=True)


@pytest.fixture(scope='module')
def golden(golden_dir):
  return json.loads((golden_dir / 'evaluation.json').read_text())


@pytest.fixture(scope='module')
def story(data_dir, golden):
  path = data_dir / 'tinystories-sample/tinystories_dev.txt'
  lines = path.read_text(encoding='utf-8').splitlines(keepends=True)
  return cuts.field_text(''.join(lines[: golden['lines']]))


def test_rows_of_a_file_are_joined():
  text = ' = A = \n \n\n b c \r\nd'
  # Rows: ' = A = \n', '', '', ' b c \n', 'd'.
  assert cuts.field_text(text) == ' = A = \n\n\n\n\n\n\n b c \n\n\nd'


def test_windows_of_gptq():
  found = cuts.field_windows(PLAIN, 'abcabcabca', 4)
  # Two windows of 4; the last two tokens are dropped.
  np.testing.assert_array_equal(found.tokens, [[1, 2, 3, 1], [2, 3, 1, 2]])
  assert found.counted is None
  assert found.n_bytes == 6  # three predicted characters a window
  begun = cuts.field_windows(BEGUN, 'aé😀bcabca', 5)
  np.testing.assert_array_equal(
    begun.tokens, [[0, 1, 4, 5, 2], [3, 1, 2, 3, 1]]
  )
  assert begun.n_bytes == (1 + 2 + 4 + 1) + 4
  assert len(cuts.field_windows(PLAIN, 'abcabcabca', 4, limit=1).tokens) == 1


def guide(ids, context, stride):
  """Positions that each window predicts, by the guide's loop."""
  found, seen = [], 0
  for begin in range(0, len(ids), stride):
    end = min(begin + context, len(ids))
    labels = np.arange(begin, end)
    labels = labels[len(labels) - (end - seen) :]  # others are masked
    found.append((begin, end, [p for p in labels if p > begin]))  # the shift
    seen = end
    if end == len(ids):
      return found


@given(
  text=st.text(st.sampled_from('abcé😀'), min_size=2, max_size=40),
  context=st.integers(2, 9),
  share=st.floats(0.01, 1.0),
)
def test_windows_of_the_guide(text, context, share):
  stride = max(1, round(share * context))
  found = cuts.field_windows(PLAIN, text, context, stride=stride)
  expected = guide(text, context, stride)
  ids = np.array(PLAIN.encode(text).ids)
  assert len(found.tokens) == len(expected)
  counted = []
  for row, mask, (begin, end, labels) in zip(
    found.tokens, found.counted, expected, strict=True
  ):
    np.testing.assert_array_equal(row[: end - begin], ids[begin:end])
    assert (1 + begin + np.flatnonzero(mask)).tolist() == labels
    counted += labels
  assert found.n_bytes == sum(len(text[i].encode()) for i in counted)
  if stride < context:  # every token but the first, once
    assert sorted(counted) == list(range(1, len(text)))


@pytest.mark.parametrize(
  'text, context, options, words',
  [
    ('abc', 4, {}, '3 tokens is shorter than one window of 4'),
    ('a', 4, {'stride': 2}, 'shorter than one window of 2'),
    ('abcabc', 3, {'stride': 4}, 'longer than a window of 3'),
    ('abcabc', 3, {'stride': 0}, 'stride=0 must be at least 1'),
    ('abcabc', 1, {}, 'context=0'),
    ('abcabc', 3, {'limit': 0}, 'limit=0'),
  ],
)
def test_bad_windows(text, context, options, words):
  with pytest.raises(ValueError, match=words):
    cuts.field_windows(PLAIN, text, context, **options)


def test_tokens_that_do_not_count_change_nothing():
  flat = lambda params, tokens: (
    jnp.zeros((*tokens.shape, 9)).at[..., 1].set(3.0)
  )
  windows = np.array([[1, 1, 2, 1], [2, 2, 1, 0]])
  mask = np.array([[True, False, True], [False, True, False]])
  found = perplexity.evaluate(flat, {}, windows, counted=mask)
  assert found.tokens == 3
  # All three are the token of logit 3 among eight of 0.
  assert found.nll == pytest.approx(np.log(np.exp(3) + 8) - 3, rel=1e-6)
  for bad in (mask[:1], mask.astype(int), np.zeros_like(mask)):
    with pytest.raises(ValueError, match='expected bool of shape'):
      perplexity.evaluate(flat, {}, windows, counted=bad)


def test_field_perplexity_is_that_of_transformers(babyllama, story, golden):
  found = cuts.field_windows(babyllama.tokenizer, story, golden['context'])
  scores = perplexity.evaluate(babyllama.apply, babyllama.params, found.tokens)
  assert len(found.tokens) == golden['tokens'] // golden['context']
  # Two float32 implementations on 187 windows.
  assert scores.perplexity == pytest.approx(golden['field'], rel=2e-5)


@pytest.mark.parametrize(
  'stride',
  [48, *(pytest.param(n, marks=pytest.mark.slow) for n in (16, 64))],
)
def test_stride_perplexity_is_that_of_transformers(
  babyllama, story, golden, stride
):
  found = cuts.field_windows(
    babyllama.tokenizer, story, golden['context'], stride=stride
  )
  scores = perplexity.evaluate(
    babyllama.apply,
    babyllama.params,
    found.tokens,
    batch=64,
    counted=found.counted,
    n_bytes=found.n_bytes,
  )
  expected = golden[f'stride {stride}']
  assert scores.tokens == expected['tokens']
  assert scores.perplexity == pytest.approx(expected['alike'], rel=2e-5)
  # The guide gives the windows but the first a little less weight.
  assert scores.perplexity == pytest.approx(expected['guide'], rel=2e-3)
  bits = scores.nll * scores.tokens / np.log(2) / found.n_bytes
  assert scores.bits_per_byte == pytest.approx(bits, rel=1e-9)
