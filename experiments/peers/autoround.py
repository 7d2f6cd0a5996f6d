"""Quantize a model by AutoRound, as a peer to compare ours with.

    pip install --target LIB --no-deps auto-round==0.16.0 accelerate datasets \\
        py-cpuinfo threadpoolctl multiprocess dill pyarrow pandas xxhash \\
        python-dateutil six pytz tzdata requests httpx httpcore urllib3 \\
        certifi charset_normalizer
    PYTHONPATH=LIB python experiments/peers/autoround.py --model DIR \\
        --text FILE --out DIR --bits 3 --group 128 [--no-asymmetric] [--amp]
        [--iterations 200] [--windows 24] [--length 128] [--seed 0]

with OMP_NUM_THREADS=1 where cores are shared (two threads that wait for each
other took eight times as long), and a python that has torch 2.13.0 and
transformers 5.23.0, which the package itself does not need. Calibrates on the
first windows of the text, each begun by the model's bos, and quantizes the
linear layers of the blocks by AutoRound's defaults (learning rate 1 /
iterations, tuned ranges, batches of 8), but in float32 and not compiled.
AutoRound's own default (--amp) first rounds the whole model to bfloat16.

Writes the folder again with dequantized weights in float32, what was not
quantized as it was (with --amp, too), and beside them peer.json.
"""

import argparse
import json
import pathlib
import shutil
import time

import auto_round
import numpy as np
import safetensors.torch
import tokenizers
import torch
import transformers

BATCH = 8
SCALE_BITS = 16
_COPIED = ('tokenizer.json', 'tokenizer_config.json', 'generation_config.json')


def windows(
  folder: pathlib.Path, text: str, count: int, length: int
) -> torch.Tensor:
  """The first windows of a text, each begun by the bos. i64[count, length]."""
  config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
  tokenizer = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  ids = tokenizer.encode(text, add_special_tokens=False).ids
  need = count * (length - 1)
  if len(ids) < need:
    raise ValueError(f'text of {len(ids)} tokens; {need} are needed')
  body = torch.tensor(ids[:need]).reshape(count, length - 1)
  bos = torch.full((count, 1), config['bos_token_id'])
  return torch.cat([bos, body], dim=1)


def quantize(
  folder: pathlib.Path, tokens: torch.Tensor, options: argparse.Namespace
) -> tuple[torch.nn.Module, dict[str, float]]:
  """A model quantized by AutoRound, and the seconds, of the CPU too."""
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32
  )
  begin = time.perf_counter(), time.process_time()
  rounder = auto_round.AutoRound(
    model,
    transformers.AutoTokenizer.from_pretrained(folder),  # it asks for one
    bits=options.bits,
    group_size=options.group,
    sym=not options.asymmetric,
    dataset=[{'input_ids': batch} for batch in tokens.split(BATCH)],
    iters=options.iterations,
    nsamples=len(tokens),
    seqlen=tokens.shape[1],
    batch_size=BATCH,
    seed=options.seed,
    device_map='cpu',
    amp=options.amp,
    enable_torch_compile=False,
    low_cpu_mem_usage=False,
  )
  model, _ = rounder.quantize()
  end = time.perf_counter(), time.process_time()
  names = 'seconds', 'cpu_seconds'
  return model, {n: round(b - a, 2) for n, a, b in zip(names, begin, end)}


def dequantized(
  layer: torch.nn.Linear, bits: int, group: int, asymmetric: bool
) -> tuple[torch.Tensor, int]:
  """Weight f32[n, k] from levels and scales that fit the bits, and its groups.

  Raises:
    ValueError: if the layer's weight is none that such levels stand for.
  """
  weight = layer.weight.data.float()
  scale, zero = layer.scale, layer.zp
  shape = (weight.shape[0], -(-weight.shape[1] // group))
  if scale.dtype != torch.float16 or scale.shape != shape:
    raise ValueError(f'scales {scale.dtype}{list(scale.shape)}')
  wide = scale.float().repeat_interleave(group, 1)[:, : weight.shape[1]]
  if asymmetric:
    zero = zero.float()
    low, high = torch.zeros_like(zero), torch.full_like(zero, 2**bits - 1)
    if not ((zero == zero.round()) & (zero >= low) & (zero <= high)).all():
      raise ValueError(f'zero points beyond {bits} bits')
  else:
    zero = torch.full(shape, 2.0 ** (bits - 1))
  zero = zero.repeat_interleave(group, 1)[:, : weight.shape[1]]
  level = (weight / wide).round() + zero
  if not ((level >= 0) & (level < 2**bits)).all():
    raise ValueError(f'levels beyond {bits} bits')
  found = wide * (level - zero)
  # A model in bfloat16 (--amp) has its weights rounded to that.
  if not torch.equal(found.to(layer.weight.dtype), layer.weight.data):
    raise ValueError('weights are not levels times scales')
  for piece in found.split(group, dim=1):
    if max(len(np.unique(row)) for row in piece.numpy()) > 2**bits:
      raise ValueError(f'a group of more than {2**bits} values')
  return found, scale.numel()


def main(argv: list[str] | None = None) -> dict:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--model', type=pathlib.Path, required=True)
  parser.add_argument('--text', type=pathlib.Path, required=True)
  parser.add_argument('--out', type=pathlib.Path, required=True)
  parser.add_argument('--bits', type=int, required=True)
  parser.add_argument('--group', type=int, required=True)
  parser.add_argument(
    '--asymmetric', action=argparse.BooleanOptionalAction, default=True
  )
  parser.add_argument('--iterations', type=int, default=200)
  parser.add_argument('--windows', type=int, default=24)
  parser.add_argument('--length', type=int, default=128)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument(
    '--amp', action='store_true', help='in bfloat16, as by default there'
  )
  options = parser.parse_args(argv)
  text = options.text.read_text(encoding='utf-8')
  tokens = windows(options.model, text, options.windows, options.length)
  model, seconds = quantize(options.model, tokens, options)

  tensors = {}
  for file in sorted(options.model.glob('*.safetensors')):
    tensors |= safetensors.torch.load_file(file)
  tensors = {name: value.float() for name, value in tensors.items()}
  stored = weights = layers = 0
  for name, layer in model.named_modules():
    if not isinstance(layer, torch.nn.Linear) or name == 'lm_head':
      continue
    value, groups = dequantized(
      layer, options.bits, options.group, options.asymmetric
    )
    tensors[f'{name}.weight'].copy_(value)  # KeyError if named otherwise
    each = SCALE_BITS + (options.bits if options.asymmetric else 0)
    stored += options.bits * value.numel() + each * groups
    weights += value.numel()
    layers += 1

  options.out.mkdir(parents=True, exist_ok=True)
  config = json.loads((options.model / 'config.json').read_text())
  config['torch_dtype'] = 'float32'
  (options.out / 'config.json').write_text(json.dumps(config, indent=2) + '\n')
  for name in _COPIED:
    if (options.model / name).exists():
      shutil.copyfile(options.model / name, options.out / name)
  file = options.out / 'model.safetensors'
  safetensors.torch.save_file(tensors, file, metadata={'format': 'pt'})
  row = {
    'bits': options.bits,
    'group': options.group,
    'asymmetric': options.asymmetric,
    'iterations': options.iterations,
    **seconds,
    'true_bits': stored / weights,
    'seed': options.seed,
    'amp': options.amp,
    'layers': layers,
    'version': auto_round.__version__,
  }
  (options.out / 'peer.json').write_text(json.dumps(row, indent=2) + '\n')
  print(json.dumps(row))
  return row


if __name__ == '__main__':
  main()
