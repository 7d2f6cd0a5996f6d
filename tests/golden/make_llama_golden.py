"""Make the reference logits of Llama from torch and transformers.

    python tests/golden/make_llama_golden.py [folder of babyllama105-hf]

needs torch 2.13.0 and transformers 5.23.0, which the package itself does not.
Writes beside itself: tiny-llama/ and tiny-llama-bf16/ (a random decoder with
grouped queries, its own lm_head and a rotary base of 500000, the second
stored in bfloat16) and llama_golden.npz with tokens and float32 logits.
"""

import pathlib
import sys

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent


def logits(folder, tokens):
  model = transformers.LlamaForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation='eager'
  )
  with torch.no_grad():
    return model(torch.tensor(tokens)).logits.numpy()


def main(babyllama):
  rng = np.random.default_rng(0)
  out = {}
  out['babyllama_tokens'] = rng.integers(3, 78, (2, 24))
  out['babyllama_tokens'][:, 0] = 1
  out['babyllama_logits'] = logits(babyllama, out['babyllama_tokens'])

  config = transformers.LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,  # not hidden_size / heads
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    rope_parameters={'rope_type': 'default', 'rope_theta': 500000.0},
    tie_word_embeddings=False,
    initializer_range=0.2,  # far from linear
  )
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(config)
  with torch.no_grad():
    for name, value in model.named_parameters():
      if 'norm' in name:
        value.uniform_(0.5, 1.5)
  out['tiny_tokens'] = rng.integers(0, 96, (2, 16))
  model.save_pretrained(HERE / 'tiny-llama')
  out['tiny_logits'] = logits(HERE / 'tiny-llama', out['tiny_tokens'])
  model.to(torch.bfloat16).save_pretrained(HERE / 'tiny-llama-bf16')
  out['tiny_bf16_logits'] = logits(HERE / 'tiny-llama-bf16', out['tiny_tokens'])
  np.savez_compressed(HERE / 'llama_golden.npz', **out)


if __name__ == '__main__':
  main(*sys.argv[1:])
