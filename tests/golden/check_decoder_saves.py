"""Check that transformers reads what `huggingface.save` writes.

    python tests/golden/check_decoder_saves.py write FOLDER
    python tests/golden/check_decoder_saves.py read FOLDER

The first needs mq_jax, the second torch 2.13.0 and transformers 5.23.0. Every
case of decoders.json is read, saved again in shards, and its logits by
transformers are compared with those of decoders_golden.npz.
"""

import json
import pathlib
import sys

import numpy as np

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]
LISTING = json.loads((HERE / 'decoders.json').read_text())


def write(out):
  import drawn

  from mq_jax.models import huggingface, tensors

  for case, entry in LISTING.items():
    source = out / f'{case}-drawn'
    source.mkdir(parents=True)
    (source / 'config.json').write_text(json.dumps(entry['config']))
    tensors.write_safetensors(
      source / 'model.safetensors', drawn.tensors(entry['saved'])
    )
    model = huggingface.load(source)
    huggingface.save(out / case, model, max_shard_bytes=20_000)


def read(out):
  import torch
  import transformers

  golden = np.load(HERE / 'decoders_golden.npz')
  tokens = torch.tensor(golden['tokens'], dtype=torch.long)
  worst = 0.0
  for case in LISTING:
    model = transformers.AutoModelForCausalLM.from_pretrained(
      out / case, dtype=torch.float32, attn_implementation='eager'
    )
    with torch.no_grad():
      logits = model.eval()(tokens).logits.numpy()
    error = np.abs(logits - golden[case]).max()
    worst = max(worst, error)
    print(f'{case}: {error:.2e}')
  if worst > 1e-4:
    sys.exit(f'transformers reads other models than were saved: {worst}')


if __name__ == '__main__':
  {'write': write, 'read': read}[sys.argv[1]](pathlib.Path(sys.argv[2]))
