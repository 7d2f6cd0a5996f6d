"""Write a checkpoint of random weights, of any size, in little memory.

    python -m experiments.random_checkpoint --shape tinyllama-1.1b --out DIR
        [--dtype bfloat16] [--shard-bytes 1000000000] [--seed 0]

For measuring how large models stream and how much memory they need, where no
trained one can be had: a Hugging Face folder in shards, with a tokenizer of
single bytes so that any text can be read. The weights of a tensor depend on
the seed and its name alone. Only one tensor is in memory at a time: 1.1 B
parameters took 94 s and at most 0.57 GB resident, on two cores with much else
to do (load 7).
"""

import argparse
import math
import pathlib
import sys
import time
import zlib

import numpy as np
import tokenizers

from mq_jax.models import huggingface
from mq_jax.models.decoder import DecoderConfig
from mq_jax.models.huggingface import names

# Sizes as in the public configurations, recalled; *-tiny are ours.
SHAPES = {
  'tinyllama-1.1b': DecoderConfig(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=2048,
    tie_word_embeddings=False,
  ),
  'llama-2-7b': DecoderConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
  ),
  'llama-tiny': DecoderConfig(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
    tie_word_embeddings=False,
  ),
  'mixtral-tiny': DecoderConfig(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
    tie_word_embeddings=False,
    family='mixtral',
    num_experts=8,
    experts_per_token=2,
  ),
}


def byte_tokenizer() -> tokenizers.Tokenizer:
  """A token for each byte, and <s> (0) and </s> (1)."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  words = ['<s>', '</s>', *alphabet]
  vocabulary = {word: i for i, word in enumerate(words)}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  return tokenizer


def draw(name: str, entry: names.Entry, seed: int) -> np.ndarray:
  """A tensor by its name: f32, of a scale that keeps activations near one."""
  rng = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
  values = rng.standard_normal(entry.shape, np.float32)
  leaf = entry.pieces[0].path[-1]
  if leaf == 'kernel':
    inputs = entry.shape[1 if entry.transposed else 0]
    values *= 1 / math.sqrt(inputs)
  elif leaf == 'scale':
    values = 1 + 0.1 * values
  else:
    values *= 0.02
  return values


def write(
  shape: str,
  out: pathlib.Path,
  *,
  dtype: str = 'bfloat16',
  shard_bytes: int = 1_000_000_000,
  seed: int = 0,
) -> int:
  """Write the folder; returns the number of parameters.

  Raises:
    ValueError: for a shape that is not known.
  """
  if shape not in SHAPES:
    raise ValueError(f'no shape {shape!r}; there are {", ".join(SHAPES)}')
  config = SHAPES[shape]
  entries = names.expected_tensors(config)
  huggingface.write_folder(
    out,
    config,
    lambda name: draw(name, entries[name], seed),
    dtype=dtype,
    tokenizer=byte_tokenizer(),
    bos=0,
    eos=1,
    max_shard_bytes=shard_bytes,
  )
  return sum(math.prod(entry.shape) for entry in entries.values())


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--shape', required=True, choices=SHAPES)
  parser.add_argument('--out', required=True, type=pathlib.Path)
  parser.add_argument('--dtype', default='bfloat16')
  parser.add_argument('--shard-bytes', type=int, default=1_000_000_000)
  parser.add_argument('--seed', type=int, default=0)
  options = parser.parse_args(argv)
  start = time.monotonic()
  count = write(
    options.shape,
    options.out,
    dtype=options.dtype,
    shard_bytes=options.shard_bytes,
    seed=options.seed,
  )
  seconds = time.monotonic() - start
  print(f'{options.out}: {count:,} parameters in {seconds:.0f} s')


if __name__ == '__main__':
  sys.exit(main())
