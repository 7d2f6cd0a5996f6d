"""Models that come with the package, and one door to all models."""

import dataclasses
import difflib
import os
import pathlib

import jax

from mq_jax import equalization
from mq_jax.models import decoder, huggingface

_FOLDER = pathlib.Path(__file__).parent / 'reference'
_NAMES = ('reference', 'reference-planted')

# (share, scale) of the channels planted in each kind of pair, chosen with
# experiments/planted_statistics.py. Norm outputs get channels about as extreme
# as OPT's (17 times the median; OPT 9 to 14, single layers up to 26). Of the
# weights within reach, 1 to 2 % go beyond 3 sigma of their group of 128, and
# about one micro-block of 8 in ten holds one. That takes more outlier channels
# than OPT has: over 6 times the median are 0.8 % before q and gate (OPT 0.1 to
# 0.2 %) and 1.2 to 1.4 % before o and down (OPT 0 to 0.13 %).
PLANTED = {
  'norm': ((0.01, 16.0), (0.03, 1 / 8)),
  'hidden': ((0.04, 8.0), (0.03, 1 / 8)),
  'value': ((0.04, 8.0), (0.03, 1 / 8)),
  'key': ((0.04, 8.0), (0.03, 1 / 8)),
}


def names() -> tuple[str, ...]:
  """Names of the bundled models.

  'reference': a small trained Llama with byte-level tokens.
  'reference-planted': the same function with outlier channels planted, as
    large models have them and small ones do not.
  """
  return _NAMES


def load(name: str) -> huggingface.LanguageModel:
  """A bundled model by name.

  Raises:
    ValueError: for an unknown name.
    FileNotFoundError: if the package was installed without its files.
  """
  if name not in _NAMES:
    near = difflib.get_close_matches(name, _NAMES) or _NAMES
    raise ValueError(f'no bundled model {name!r}; nearest: {", ".join(near)}')
  if not _FOLDER.is_dir():
    raise FileNotFoundError(
      f'{_FOLDER}: missing; this installation lacks the bundled model'
    )
  model = huggingface.load(_FOLDER, name='reference')
  planted = name == 'reference-planted'
  return plant(model) if planted else model


def open_model(name_or_path: str | os.PathLike) -> huggingface.LanguageModel:
  """A bundled model, a Hugging Face folder, or a name on the hub.

  Raises:
    ValueError: if it is none of them, with the nearest bundled names, or
      if the checkpoint is refused (see `huggingface.load`).
    FileNotFoundError: if a file is missing, or the hub does not answer.
  """
  text = os.fspath(name_or_path)
  if text in _NAMES:
    return load(text)
  folder = pathlib.Path(text)
  on_hub = text.count('/') == 1 and text[0] not in '/.~'
  if (text and folder.is_dir()) or on_hub:
    return huggingface.load(text)
  near = difflib.get_close_matches(text, _NAMES, cutoff=0.4) or _NAMES
  raise ValueError(
    f'{text!r} is no model: accepted are a bundled name (nearest: '
    f'{", ".join(near)}), a folder in the Hugging Face layout, or a name on '
    'its hub such as org/name'
  )


def plant(
  model: huggingface.LanguageModel, seed: int = 0
) -> huggingface.LanguageModel:
  """The same function with outlier channels planted in its parameters.

  Along the outputs, the weights of o_proj, gate_proj and down_proj stay as
  they were: no exact rescaling reaches their columns.

  Args:
    model: Any decoder. Kinds of pairs that it has not are left out.
    seed: Chooses the channels.
  """
  params, key = model.params, jax.random.key(seed)
  for kind, pairs in decoder.channel_pairs(model.config).items():
    for share, scale in PLANTED[kind]:
      key, used = jax.random.split(key)
      params = equalization.plant_outliers(
        params, pairs, used, share=share, scale=scale
      )
  return dataclasses.replace(model, params=params, name=f'{model.name}-planted')
