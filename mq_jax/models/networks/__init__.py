"""Networks other than language models: one door to all of them.

Text encoders, vision transformers, ResNets and a diffusion transformer, read
from folders in the Hugging Face layout, or known by their tensors.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from mq_jax import equalization
from mq_jax.models import modules, tensors
from mq_jax.models.networks import _checkpoints
from mq_jax.models.networks._architectures import ARCHITECTURES, inferred

TASKS = ('features', 'tokens', 'sequence', 'classes', 'noise')

# (share, scale) of the channels planted in each kind of pair. Chosen, not
# fitted: as extreme as those of the bundled language model
# (`mq_jax.models.bundled.PLANTED`); 'conv' scales columns only.
PLANTED = {
  'norm': ((0.03, 16.0), (0.03, 1 / 8)),
  'conv': ((0.04, 8.0),),
  'hidden': ((0.04, 8.0), (0.03, 1 / 8)),
  'value': ((0.04, 8.0), (0.03, 1 / 8)),
  'key': ((0.04, 8.0), (0.03, 1 / 8)),
}

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Pixels(NamedTuple):
  """How bytes become what a network sees: (byte / 255 - mean) / std."""

  mean: tuple[float, ...]
  std: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Network:
  """A network: a function, its parameters, and what it is for.

  Attributes:
    architecture: One of `ARCHITECTURES`.
    config: Sizes and options, a frozen dataclass of the family.
    params: Nested dict of arrays.
    apply: `(params, *batch) -> result`; the same object for equal configs.
    task: What it maps to what:
      'features', 'tokens', 'sequence': tokens i32[b, t] (and perhaps a mask
        and types) to hidden states [b, t, d], scores of words [b, t, v], or
        scores of classes [b, n];
      'classes': pixels f32[b, h, w, c] to scores [b, n];
      'noise': noisy pixels, steps i32[b] and labels i32[b] to noise.
    name: What to call it in tables.
    pixels: How images are normalized; None for text.
    tokenizer: Text to tokens; None without one.
  """

  architecture: str
  config: Any
  params: dict
  apply: Callable[..., jax.Array]
  task: str
  name: str
  pixels: Pixels | None = None
  tokenizer: tokenizers.Tokenizer | None = None


def load(
  folder: str | os.PathLike,
  *,
  dtype: Any = jnp.float32,
  name: str | None = None,
) -> Network:
  """Read a network from a folder.

  Args:
    folder: Holds config.json and model.safetensors (or shards with an index),
      and perhaps preprocessor_config.json and tokenizer.json. The config may
      be missing for ResNets of the CIFAR type and DiTs, see `inferred`.
    dtype: Type of the parameters, whatever the checkpoint stores.
    name: By default that of the folder.

  Raises:
    FileNotFoundError: if the folder or a file is missing.
    ValueError: if the architecture or an option is not supported, or a file
      is malformed, or the tensors are not those that the config calls for.
  """
  folder = pathlib.Path(folder)
  path = folder / 'config.json'
  stored = None
  if path.is_file():
    raw = tensors.read_json_object(path)
    architecture, config = read_config(raw, str(path))
    pixels = _read_pixels(folder, architecture, config)
    stored = tensors.read_folder(folder)
  else:
    stored = tensors.read_folder(folder)
    raw = inferred(stored)
    if raw is None:
      raise FileNotFoundError(
        f'{path}: no such file, and the tensors are of no network that is '
        'known without it (ResNet of the CIFAR type, DiT)'
      )
    architecture, config = read_config(raw, str(folder))
    pixels = _read_pixels(folder, architecture, config)
  params = _to_params(architecture, config, stored, dtype, str(folder))
  return network(
    architecture,
    config,
    params,
    name or folder.resolve().name,
    pixels=pixels,
    tokenizer=_read_tokenizer(folder, config),
  )


def is_network(folder: str | os.PathLike) -> bool:
  """Whether a folder holds one of `ARCHITECTURES`, by its config or tensors.

  Only looks: what is malformed is none, and `load` says why.
  """
  folder = pathlib.Path(folder)
  try:
    if (folder / 'config.json').is_file():
      raw = tensors.read_json_object(folder / 'config.json')
      return named(raw) in ARCHITECTURES
    return folder.is_dir() and inferred(tensors.read_folder(folder)) is not None
  except (ValueError, OSError):
    return False


def read_config(raw: Mapping[str, Any], where: str) -> tuple[str, Any]:
  """The architecture that a config names, and its sizes and options.

  Args:
    raw: A parsed config.json, or `to_json` of a network.
    where: Its path, for messages.

  Raises:
    ValueError: for another architecture, an option that would change the
      function, or a size that is missing or makes no sense.
  """
  architecture = named(raw)
  if architecture not in ARCHITECTURES:
    raise ValueError(
      f'{where}: architectures={str(raw.get("architectures"))[:80]} is not '
      f'supported; supported is one of {", ".join(ARCHITECTURES)}'
    )
  found = ARCHITECTURES[architecture]
  quantized = raw.get('quantization_config')
  if quantized is not None:
    raise ValueError(
      f'{where}: quantization_config={str(quantized)[:80]} is not supported'
    )
  options = _checkpoints.Options(raw, where)
  return architecture, found.config(options, architecture)


def to_json(net: Network) -> dict[str, Any]:
  """A config that `read_config` reads back as it was."""
  plain = lambda x: list(x) if isinstance(x, tuple) else x
  fields = dataclasses.asdict(net.config)
  known = {'architectures': [net.architecture]}
  return known | {name: plain(x) for name, x in fields.items()}


def network(
  architecture: str,
  config: Any,
  params: dict,
  name: str,
  *,
  pixels: Pixels | None = None,
  tokenizer: tokenizers.Tokenizer | None = None,
) -> Network:
  """A network of parts; its function and task follow from the config."""
  found = ARCHITECTURES[architecture]
  return Network(
    architecture=architecture,
    config=config,
    params=params,
    apply=found.module.functional(config),
    task=found.task(config),
    name=name,
    pixels=pixels,
    tokenizer=tokenizer,
  )


def channel_pairs(
  net: Network,
) -> dict[str, tuple[equalization.ChannelPair, ...]]:
  """Where a factor may move from one weight to the next, by kind."""
  return ARCHITECTURES[net.architecture].module.channel_pairs(net.config)


def plant(net: Network, seed: int = 0) -> Network:
  """The same function with outlier channels planted in its parameters.

  Args:
    net: Any network.
    seed: Chooses the channels.
  """
  params, key = net.params, jax.random.key(seed)
  for kind, pairs in channel_pairs(net).items():
    for share, scale in PLANTED[kind]:
      key, used = jax.random.split(key)
      params = equalization.plant_outliers(
        params, pairs, used, share=share, scale=scale
      )
  return dataclasses.replace(net, params=params, name=f'{net.name}-planted')


def named(raw: Mapping[str, Any]) -> str | None:
  """The one architecture that a config names, supported or not."""
  names = raw.get('architectures')
  one = isinstance(names, list) and len(names) == 1
  return names[0] if one and isinstance(names[0], str) else None


def _to_params(
  architecture: str,
  config: Any,
  stored: Mapping[str, np.ndarray],
  dtype: Any,
  where: str,
) -> dict:
  """Nested parameters from a checkpoint's tensors, all checked first."""
  found = ARCHITECTURES[architecture]
  layers = getattr(
    config, 'num_hidden_layers', sum(getattr(config, 'depths', ()))
  )
  if layers > len(stored):
    # Also keeps a lying config from making up names by the billion.
    raise ValueError(
      f'{where}: the config calls for {layers} layers, the checkpoint has only '
      f'{len(stored)} tensors'
    )
  named = _checkpoints.renamed(stored, found.rules(config), where)
  for copy, original in found.ties(config):
    _checkpoints.drop_copy(named, copy, original, where)
  if 'head.decoder_bias' in named:
    # Untied, transformers adds the decoder's own bias and not the other.
    named['head.bias'] = named.pop('head.decoder_bias')
  wanted = modules.abstract(lambda: found.module.make(config))
  return _checkpoints.to_params(named, wanted, dtype, where)


def _read_pixels(
  folder: pathlib.Path, architecture: str, config: Any
) -> Pixels | None:
  """Normalization of images: of preprocessor_config.json, or the usual one."""
  channels = getattr(config, 'num_channels', None)
  if channels is None:
    return None
  path = folder / 'preprocessor_config.json'
  if not path.is_file():
    if architecture.startswith(('ResNet', 'Cifar')) and channels == 3:
      return Pixels(*_IMAGENET)
    return Pixels((0.5,) * channels, (0.5,) * channels)
  raw = tensors.read_json_object(path)
  options = _checkpoints.Options(raw, str(path))
  scale = options.positive('rescale_factor', 1 / 255)
  if not math.isclose(scale, 1 / 255, rel_tol=1e-4):
    raise options.wrong('rescale_factor', '1/255 to be supported', scale)
  if not options.flag('do_rescale', True):
    raise options.wrong('do_rescale', 'true to be supported', False)
  if not options.flag('do_normalize', True):
    return Pixels((0.0,) * channels, (1.0,) * channels)
  given = {'mean': raw.get('image_mean'), 'std': raw.get('image_std')}
  return read_pixels(given, config, str(path))


def read_pixels(raw: Any, config: Any, where: str) -> Pixels | None:
  """Normalization of images from plain data, `mean` and `std`.

  Raises:
    ValueError: if they are not a number for each channel, deviations
      positive. Networks without channels have none.
  """
  channels = getattr(config, 'num_channels', None)
  if channels is None:
    return None
  options = _checkpoints.Options(raw if isinstance(raw, dict) else {}, where)
  found = []
  for field, least in (('mean', -math.inf), ('std', 0.0)):
    value = options.raw.get(field)
    numbers = isinstance(value, list | tuple) and all(
      type(x) in (int, float) and least < x < math.inf for x in value
    )
    if not numbers or len(value) != channels:
      raise options.wrong(f'{field} of images', f'{channels} numbers', value)
    found.append(tuple(map(float, value)))
  return Pixels(*found)


def _read_tokenizer(
  folder: pathlib.Path, config: Any
) -> tokenizers.Tokenizer | None:
  path = folder / 'tokenizer.json'
  words = getattr(config, 'vocab_size', None)
  if words is None or not path.is_file():
    return None
  tensors.read_json_object(path)
  try:
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # the library raises no narrower type
    raise ValueError(f'{path}: not a tokenizer: {error}') from None
  tokenizer.no_truncation()  # some were saved with limits of their training
  tokenizer.no_padding()
  largest = max(tokenizer.get_vocab().values(), default=-1)
  if largest >= words:
    raise ValueError(f'{path}: has token {largest}, the network only {words}')
  return tokenizer
