import json

import pytest

from mq_jax import caches, generation
from mq_jax.lab import cli, opening
from mq_jax.lab.commands import generate as command


def ran(capsys, *arguments):
  assert cli.main(['generate', *map(str, arguments)]) == 0
  return capsys.readouterr()


def refused(capsys, *arguments):
  assert cli.main([str(a) for a in arguments]) == 2
  captured = capsys.readouterr()
  assert captured.out == ''
  assert captured.err.startswith('mq: ') and captured.err.count('\n') == 1
  return captured.err


def test_text_as_it_comes_and_the_same_as_json(tiny, capsys):
  """Greedy, through a cache of two bits that all tokens but four are in."""
  cache = ['--cache', 'kivi', '--cache-bits', 2, '--cache-dtype', 'float32']
  cache += ['--cache-set', 'group=4', '--cache-set', 'residual=4']
  arguments = [tiny, 'The café', '--tokens', 12, *cache]
  found = json.loads(ran(capsys, *arguments, '--json').out)
  model = opening.open_any(tiny)
  prompt = [model.bos, *model.tokenizer.encode('The café').ids]
  states = generation.stream(
    model.config,
    model.params,
    prompt,
    12,
    policy=caches.kivi(2, group=4, residual=4),
  )
  tokens = [int(state.token[0]) for state in states]
  whole = model.tokenizer.decode(prompt + tokens)
  assert '<s>The café' + found['text'] == whole
  assert found['tokens'] == 12 and found['prompt_tokens'] == len(prompt) == 10
  # 21 tokens in the cache, 16 channels: 20 keys and 17 values in 2 bits, with
  # 32 of scale for 4 numbers; the others in 32.
  bits = (20 + 17) * (2 + 32 / 4) + (1 + 4) * 32
  assert found['cache_ebw'] == pytest.approx(bits / 42)
  assert found['cache_bytes'] == bits * 16 / 8
  captured = ran(capsys, *arguments)
  assert captured.out == found['text'] + '\n'
  assert 'tokens/s' in captured.err
  assert f'{found["cache_ebw"]:.4g} bits per element' in captured.err


def test_seeds_and_what_may_not_go_together(tiny, text, capsys):
  draw = [tiny, 'The', '--tokens', 8, '--temperature', 1, '--json']
  one, same, other = (
    json.loads(ran(capsys, *draw, '--top-k', 50, '--seed', seed).out)['text']
    for seed in (1, 1, 2)
  )
  assert one == same != other
  for arguments, message in (
    ([tiny, 'x', '--tokens', 0], '--tokens 0: needs at least 1'),
    ([tiny, 'x', '--tokens', 40], 'the model is made for 32'),
    ([tiny, 'x', '--top-k', 3], 'give a --temperature'),
    ([tiny, 'x', '--temperature', -1], 'temperature=-1.0'),
    ([tiny, 'x', '--cache', 'kivy'], 'nearest: kivi'),
    ([tiny, 'x', '--cache-set', 'bits'], 'option=value'),
    ([tiny, 'x', '--cache-bits', 2], 'unknown option'),
    (['nowhere', 'x'], 'is no model'),
  ):
    assert message in refused(capsys, 'generate', *arguments)
  evaluate = ['eval', '--model', tiny, '--text', text]
  message = refused(capsys, *evaluate, '--cache-bits', 2)
  assert 'need a --cache' in message
  message = refused(capsys, *evaluate, '--cache', 'full', '--mesh', 'data=2')
  assert 'does not go together with --mesh' in message


def test_evaluation_through_a_cache(tiny, text, capsys):
  def nll(*options):
    arguments = ['eval', '--model', tiny, '--text', text, '--windows', 4]
    arguments += ['--batch', 4, '--json', *options]
    assert cli.main([str(a) for a in arguments]) == 0
    return json.loads(capsys.readouterr().out)

  plain = nll()
  two = nll(
    '--cache', 'kivi', '--cache-bits', 1, '--cache-set', 'residual=0',
    '--cache-set', 'group=16', '--cache-chunk', 8,
  )  # fmt: skip
  assert two['cache_ebw'] == 1 + 32 / 16
  assert abs(two['nll'] - plain['nll']) > 1e-3


def test_a_character_is_written_once_it_is_whole(capsys):
  class Bytes:
    def decode(self, ids, skip_special_tokens):
      assert skip_special_tokens
      return bytes(ids).decode('utf-8', errors='replace')

  class Out:
    written = []

    def write(self, text):
      self.written.append(text)

    def flush(self):
      pass

  data = 'aé😀'.encode()
  text = command._Text(Bytes(), list(data[:1]), Out())
  for byte in data[1:]:
    text.add(byte)
  assert Out.written == ['é', '😀']
  text.add(0xC3)  # never completed
  text.finish()
  assert text.shown == 'é😀\ufffd'
