import pytest

from mq_jax.data import docs


def test_docstrings_of_a_module():
  source = '''
"""Module."""
class A:
  """Class.

     Indented.
  """
  def f(self):
    """Method."""
if True:
  def g():
    """Inside if."""
def no(): "Also one."
x = """No docstring."""
'''
  assert list(docs.docstrings(source)) == [
    'Module.',
    'Class.\n\nIndented.',
    'Also one.',
    'Method.',
    'Inside if.',
  ]


def test_unknown_split():
  with pytest.raises(ValueError, match="'dev' is not one of"):
    next(docs.documents('dev'))


def test_split_follows_from_the_path_alone():
  splits = [docs.split_of(f'numpy/{i}.py') for i in range(4000)]
  shares = {s: splits.count(s) / len(splits) for s in docs.SPLITS}
  assert shares['valid'] == pytest.approx(10 / 256, abs=0.01)
  assert shares['test'] == pytest.approx(13 / 256, abs=0.01)


@pytest.fixture(scope='module')
def held_out():
  return {s: list(docs.documents(s)) for s in ('valid', 'test')}


def test_documents_are_of_their_split(held_out):
  for split, documents in held_out.items():
    assert documents
    assert all(docs.split_of(d.path) == split for d in documents)


def test_no_paragraph_is_in_two_splits(held_out):
  paragraphs = lambda documents: [
    ' '.join(p.split()) for d in documents for p in d.text.split('\n\n')
  ]
  valid, test = (paragraphs(held_out[s]) for s in ('valid', 'test'))
  assert len(set(valid)) == len(valid) and len(set(test)) == len(test)
  assert not set(valid) & set(test)


def test_text_is_cut_to_its_length(held_out):
  whole = docs.docs_text('valid')
  assert docs.docs_text('valid', 1000) == whole[:1000]
  assert whole.startswith(held_out['valid'][0].text)
