"""Prompts as arrays, and whether there is room for them."""

from collections.abc import Sequence

import numpy as np

from mq_jax.models import decoder

NO_TOKEN = -1


def pad(
  prompts: Sequence[Sequence[int]], vocabulary: int, multiple: int = 1
) -> tuple[np.ndarray, np.ndarray]:
  """Prompts of different lengths as one array, filled up at the end.

  Args:
    prompts: Tokens of each.
    vocabulary: Tokens that there are.
    multiple: Of the array's width, so that fewer widths are compiled.

  Returns:
    Tokens i32[b, t], 0 behind a prompt; positions i32[b, t], -1 there.

  Raises:
    ValueError: if there is no prompt, or one is empty or has an unknown
      token; names it.
  """
  if len(prompts) == 0:
    raise ValueError('generate: no prompt')
  for i, prompt in enumerate(prompts):
    found = np.asarray(prompt)
    if found.ndim != 1 or found.size == 0:
      raise ValueError(f'generate: prompt {i} has no tokens')
    if not np.issubdtype(found.dtype, np.integer):
      raise ValueError(f'generate: prompt {i} is of {found.dtype}, not tokens')
    if found.min() < 0 or found.max() >= vocabulary:
      raise ValueError(
        f'generate: prompt {i} has tokens {found.min()} to {found.max()}, the '
        f'model knows 0 to {vocabulary - 1}'
      )
  longest = max(map(len, prompts))
  width = -(-longest // multiple) * multiple
  tokens = np.zeros((len(prompts), width), np.int32)
  positions = np.full((len(prompts), width), NO_TOKEN, np.int32)
  for i, prompt in enumerate(prompts):
    tokens[i, : len(prompt)] = prompt
    positions[i, : len(prompt)] = np.arange(len(prompt))
  return tokens, positions


def check_room(
  config: decoder.DecoderConfig, longest: int, count: int, capacity: int
) -> None:
  """Refuse more tokens than there is room for, before any work.

  Args:
    config: Of the model.
    longest: Tokens of the longest prompt.
    count: Tokens to generate.
    capacity: Tokens that a row's cache holds.

  Raises:
    ValueError: that says what is too small.
  """
  if count < 1:
    raise ValueError(f'generate: {count} tokens asked for; needs at least 1')
  total = longest + count
  if total > capacity:
    raise ValueError(
      f'generate: a prompt of {longest} tokens and {count} new ones are '
      f'{total}; the cache has room for {capacity}'
    )
  if total > config.max_position_embeddings:
    raise ValueError(
      f'generate: a prompt of {longest} tokens and {count} new ones are '
      f'{total}; the model is made for {config.max_position_embeddings}'
    )
