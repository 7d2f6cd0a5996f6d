"""One door to models: bundled, Hugging Face folders, and artifacts.

Most of the lab works on language models; `open_model` also opens networks of
other kinds.
"""

import os
import pathlib
from typing import Any

import tokenizers

from mq_jax import artifacts, equalization, sharding, streaming
from mq_jax.models import bundled, decoder, huggingface, networks

LanguageModel = huggingface.LanguageModel
Network = networks.Network


def open_any(
  name_or_path: str | os.PathLike, mesh: str | None = None
) -> LanguageModel:
  """A bundled language model, a Hugging Face folder or name, or an artifact.

  Args:
    name_or_path: Of the model.
    mesh: Devices that compute it, as 'data=4,model=2'; see `sharding`.

  Returns:
    The model; of an artifact, `params` holds packed matrices.

  Raises:
    ValueError: if it is none of them, or is refused by its reader, or there
      are too few devices.
    FileNotFoundError: if a file of it is missing.
  """
  model = open_model(name_or_path, mesh)
  if isinstance(model, Network):
    raise ValueError(
      f'{name_or_path}: is a {model.architecture}, no language model; mq '
      'quantize and mq eval take it'
    )
  return model


def open_model(
  name_or_path: str | os.PathLike, mesh: str | None = None
) -> LanguageModel | Network:
  """As `open_any`, but also a folder or artifact of another network."""
  devices = sharding.open_mesh(mesh)  # before weights are read
  if artifacts.is_artifact(name_or_path):
    model = _from_artifact(pathlib.Path(name_or_path))
  elif networks.is_network(name_or_path):
    model = networks.load(name_or_path)
  else:
    model = bundled.open_model(name_or_path)
  return model if devices is None else sharding.on_mesh(model, devices)


def open_blocks(
  name_or_path: str | os.PathLike, mesh: str | None = None
) -> tuple[huggingface.Checkpoint | LanguageModel, streaming.Blocks]:
  """A model that is read a block at a time where it lies in a folder.

  Args:
    name_or_path: Of the model; bundled ones and artifacts are read whole, but
      packed matrices are decoded a block at a time.
    mesh: As for `open_any`.

  Returns:
    What is known of the model without its weights, and its blocks.

  Raises:
    ValueError, FileNotFoundError: as `open_any`.
  """
  devices = sharding.open_mesh(mesh)
  packed = artifacts.is_artifact(name_or_path)
  if packed or os.fspath(name_or_path) in bundled.names():
    model = open_any(name_or_path)
    return model, streaming.on_mesh(blocks_of(model), devices)
  found = huggingface.open_folder(name_or_path)
  parts = decoder.parts(found.config)
  blocks = streaming.Blocks(
    count=found.config.num_hidden_layers,
    read=found.block,
    rest=found.rest,
    block=parts.block,
    embed=parts.embed,
    head=parts.head,
  )
  return found, streaming.on_mesh(blocks, devices)


def blocks_of(model: LanguageModel) -> streaming.Blocks:
  """The blocks of a model in memory."""
  return streaming.of_params(decoder.parts(model.config), model.params)


def channel_pairs(
  model: LanguageModel | Network,
) -> dict[str, tuple[equalization.ChannelPair, ...]]:
  """Where a factor may move from one weight to the next, by kind."""
  if isinstance(model, Network):
    return networks.channel_pairs(model)
  return decoder.channel_pairs(model.config)


def described(
  model: huggingface.Checkpoint | LanguageModel | Network,
) -> tuple[dict[str, Any], str | None]:
  """What an artifact keeps of a model beside weights: config and tokenizer."""
  if isinstance(model, Network):
    kept = {'config': networks.to_json(model)}
    kept['pixels'] = None if model.pixels is None else model.pixels._asdict()
  else:
    kept = {
      'config': {
        **huggingface.write_config(model.config),
        'bos_token_id': model.bos,
        'eos_token_id': model.eos,
      }
    }
  tokenizer = model.tokenizer
  return (
    {'name': model.name, **kept},
    None if tokenizer is None else tokenizer.to_str(pretty=True),
  )


def save_artifact(
  folder: str | os.PathLike,
  model: LanguageModel | Network,
  params: dict,
  *,
  overwrite: bool = False,
) -> dict:
  """Write `model` with the compressed `params`; returns the manifest."""
  described_as, tokenizer = described(model)
  return artifacts.save(
    folder,
    params,
    model=described_as,
    tokenizer=tokenizer,
    overwrite=overwrite,
  )


def _from_artifact(folder: pathlib.Path) -> LanguageModel | Network:
  loaded = artifacts.load(folder)
  where = f'{folder / "manifest.json"}: model'
  raw = loaded.model.get('config')
  if not isinstance(raw, dict):
    raise ValueError(f'{where}: has no config')
  tokenizer = None
  if loaded.tokenizer is not None:
    try:
      tokenizer = tokenizers.Tokenizer.from_str(loaded.tokenizer)
    except Exception as error:  # the library raises no narrower type
      raise ValueError(f'{folder}: not a tokenizer: {error}') from None
  name = str(loaded.model.get('name') or folder.name)
  if networks.named(raw) in networks.ARCHITECTURES:
    architecture, config = networks.read_config(raw, where)
    return networks.network(
      architecture,
      config,
      loaded.params,
      name,
      pixels=networks.read_pixels(loaded.model.get('pixels'), config, where),
      tokenizer=tokenizer,
    )
  config = huggingface.read_config(raw, where)
  return LanguageModel(
    config=config,
    params=loaded.params,
    apply=decoder.functional(config),
    tokenizer=tokenizer,
    bos=_token(raw, 'bos_token_id', config, where),
    name=name,
    eos=_token(raw, 'eos_token_id', config, where),
  )


def _token(
  raw: dict[str, Any], field: str, config: decoder.DecoderConfig, where: str
) -> int | None:
  value = raw.get(field)
  if value is None or (type(value) is int and 0 <= value < config.vocab_size):
    return value
  raise ValueError(f'{where}: {field} must be a token, got {value!r:.60}')
