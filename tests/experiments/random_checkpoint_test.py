import math

import jax
import numpy as np
import pytest

from experiments import random_checkpoint
from mq_jax.models import huggingface


@pytest.mark.parametrize('shape', ['llama-tiny', 'mixtral-tiny'])
def test_a_checkpoint_is_written_and_read(tmp_path, shape, capsys):
  folder = tmp_path / shape
  random_checkpoint.main(
    ['--shape', shape, '--out', str(folder), '--shard-bytes', '100000']
  )
  found = huggingface.open_folder(folder)
  assert found.config == random_checkpoint.SHAPES[shape]
  assert len(list(folder.glob('model-*.safetensors'))) > 1
  params = found.params()
  count = sum(x.size for x in jax.tree.leaves(params))
  assert f'{count:,} parameters' in capsys.readouterr().out
  # Outputs are as large as inputs, whatever the size.
  kernel = np.asarray(params['layers'][1]['self_attn']['k_proj']['kernel'])
  assert kernel.std() * math.sqrt(kernel.shape[0]) == pytest.approx(1, rel=0.1)
  text = 'Wörter\n'
  tokens = found.tokenizer.encode(text).ids
  assert len(tokens) == len(text.encode())
  assert found.tokenizer.decode(tokens) == text
  assert (found.bos, found.eos) == (0, 1)


def test_weights_are_of_seed_and_name_alone(tmp_path):
  for name, options in (
    ('a', {}), ('b', {'shard_bytes': 10**9}), ('c', {'seed': 1})
  ):  # fmt: skip
    random_checkpoint.write('llama-tiny', tmp_path / name, **options)
  a, b, c = (huggingface.open_folder(tmp_path / n).rest() for n in 'abc')
  jax.tree.map(np.testing.assert_array_equal, a, b)
  assert (a['lm_head']['kernel'] != c['lm_head']['kernel']).any()
  with pytest.raises(ValueError, match="no shape 'gpt-5'; there are tinyllama"):
    random_checkpoint.write('gpt-5', tmp_path / 'd')


def test_large_shapes_have_their_published_sizes():
  for shape, count in (('tinyllama-1.1b', 1.1e9), ('llama-2-7b', 6.74e9)):
    entries = huggingface.expected_tensors(random_checkpoint.SHAPES[shape])
    found = sum(math.prod(e.shape) for e in entries.values())
    assert found == pytest.approx(count, rel=0.002)
