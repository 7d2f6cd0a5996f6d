import pytest

from mq_jax.data import wikitext
from mq_jax.evaluation import cuts


def test_the_whole_test_split_is_restored(data_dir):
  text = wikitext.test_text(data_dir / 'wikitext-2')
  assert len(text.encode('utf-8')) == 1_290_590  # as distributed
  assert text.startswith(' \n = Robert Boulter = \n \n Robert Boulter is an')
  assert text.count('\n') == 4358  # rows of Hugging Face's test split
  joined = cuts.field_text(text)
  assert joined.startswith('\n\n = Robert Boulter = \n\n\n\n\n Robert')


def test_other_files_are_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match='wiki.test.raw'):
    wikitext.test_text(tmp_path)
  (tmp_path / 'wiki.test.raw').write_text('something else')
  with pytest.raises(ValueError, match='do not make the raw test split'):
    wikitext.test_text(tmp_path)
  (tmp_path / 'wiki.test.raw').unlink()
  (tmp_path / 'test.raw.txt').write_bytes(b'a\r\nb\r\n')
  (tmp_path / 'test.txt').write_bytes(b'a\n\nb\n\nc\n')
  with pytest.raises(ValueError, match='do not make the raw test split'):
    wikitext.test_text(tmp_path)
  assert wikitext._with_empty_lines(b'a\r\nb\r\n', b'x\n \ny\n') == b'a\n \nb\n'
