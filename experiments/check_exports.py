"""Do transformers and compressed-tensors read what `mq export` writes?

    mq export ART --to hf HF --dtype float16
    mq export ART --to compressed-tensors CT
    python -m experiments.check_exports logits CT LOGITS.npz
    /python/with/torch experiments/check_exports.py compare HF CT LOGITS.npz

`logits` writes tokens and what our own reader makes of a folder. `compare`
(torch, transformers and the compressed-tensors package; nothing of ours)
checks that the package unpacks CT to the weights in HF, written in the same
dtype, bit for bit; that transformers loads both; and that both give our
logits. Exits with 1 where they do not.
"""

import argparse
import json
import pathlib
import sys

import numpy as np


def logits(folder: str, target: str) -> None:
  import jax

  from mq_jax.models import huggingface

  model = huggingface.load(folder)
  rng = np.random.default_rng(0)
  length = min(model.config.max_position_embeddings, 48)
  tokens = rng.integers(0, model.config.vocab_size, (2, length), np.int32)
  found = jax.jit(model.apply)(model.params, tokens)
  np.savez(target, tokens=tokens, logits=np.asarray(found))


def tensors(folder: pathlib.Path) -> dict:
  from safetensors.torch import load_file

  found = {}
  for path in sorted(folder.glob('*.safetensors')):
    found |= load_file(path)
  return found


def unpacked(folder: pathlib.Path) -> dict:
  """The weights of a folder as the compressed-tensors package unpacks them."""
  import torch
  from compressed_tensors.compressors import BaseCompressor
  from compressed_tensors.quantization import QuantizationConfig

  raw = json.loads((folder / 'config.json').read_text())
  config = QuantizationConfig.model_validate(raw['quantization_config'])
  compressor = BaseCompressor.get_value_from_registry(config.format)
  found = tensors(folder)
  marker = '.weight_packed'
  for module in [n.removesuffix(marker) for n in found if n.endswith(marker)]:
    groups = [
      g
      for g in config.config_groups.values()
      if g.targets == ['Linear'] or module in g.targets
    ]
    (scheme,) = groups
    parts = {
      name.rpartition('.')[2]: found.pop(name)
      for name in list(found)
      if name.startswith(f'{module}.weight_')
    }
    weight = compressor.decompress(parts, scheme)['weight']
    found[f'{module}.weight'] = weight.to(torch.float32)
  return found


def compare(plain: pathlib.Path, packed: pathlib.Path, given: str) -> int:
  import torch
  import transformers

  own, other = tensors(plain), unpacked(packed)
  differ = [
    name
    for name in own.keys() | other.keys()
    if name not in own
    or name not in other
    or not torch.equal(own[name].float(), other[name].float())
  ]
  print(f'{len(own)} tensors, {len(differ)} differ: {differ[:3]}')
  wrong = bool(differ)
  known = np.load(given)
  tokens = torch.tensor(known['tokens'].astype(np.int64))
  unpack = transformers.CompressedTensorsConfig(dequantize=True)
  # Left packed, transformers 5.23 with compressed-tensors 0.20 takes no zero
  # points, not even the package's own: it expects them not packed.
  ways = [(plain, {}), (packed, {'quantization_config': unpack}), (packed, {})]
  for folder, options in ways:
    how = 'unpacked at once' if options else 'as it is'
    try:
      model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, **options
      ).eval()
    except RuntimeError as error:
      asymmetric = any('zero_point' in name for name in tensors(folder))
      print(f'{folder}, {how}: {error}')
      wrong |= not asymmetric
      continue
    with torch.no_grad():
      logits = model(tokens).logits.float().numpy()
    worst = np.abs(logits - known['logits']).max()
    print(
      f'{folder}, {how}: {type(model).__name__}, logits within {worst:.2g} of '
      f'ours (of size {np.abs(known["logits"]).max():.2g})'
    )
    wrong |= not worst < 1e-3
  return int(wrong)


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  commands = parser.add_subparsers(dest='command', required=True)
  one = commands.add_parser('logits')
  one.add_argument('folder')
  one.add_argument('target')
  two = commands.add_parser('compare')
  two.add_argument('plain', type=pathlib.Path)
  two.add_argument('packed', type=pathlib.Path)
  two.add_argument('logits')
  options = parser.parse_args(argv)
  if options.command == 'logits':
    logits(options.folder, options.target)
    return 0
  return compare(options.plain, options.packed, options.logits)


if __name__ == '__main__':
  sys.exit(main())
