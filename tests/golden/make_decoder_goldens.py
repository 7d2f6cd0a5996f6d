"""Make the reference logits of all decoder families by transformers.

    python tests/golden/make_decoder_goldens.py

needs torch 2.13.0 and transformers 5.23.0, which the package itself does not.
Writes beside itself decoders.json (config.json of each case, names and shapes
of its tensors, all as transformers saves them) and decoders_golden.npz: tokens,
logits computed in float32, for some cases also with weights rounded to bfloat16
(computed in float32, '-rounded', and in bfloat16, '-half'), and greedy
continuations. Weights are drawn by name, see
tests/drawn.py.
"""

import json
import pathlib
import sys
import tempfile

import numpy as np
import safetensors
import safetensors.torch
import torch
import transformers

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import drawn  # noqa: E402

SIZES = dict(
  vocab_size=37,
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=32,
  pad_token_id=None,
  bos_token_id=0,
  eos_token_id=1,
)
ONE = dict(num_hidden_layers=1)
LONG = [1.0 + 0.5 * i for i in range(4)]


def rope(kind, **options):
  parameters = dict(rope_type=kind, rope_theta=10000.0, **options)
  return dict(rope_parameters=parameters)


GPT2 = dict(
  vocab_size=37,
  n_embd=32,
  n_layer=2,
  n_head=4,
  n_positions=32,
  bos_token_id=0,
  eos_token_id=1,
)
OPT = dict(
  vocab_size=37,
  hidden_size=32,
  ffn_dim=48,
  num_hidden_layers=2,
  num_attention_heads=4,
  max_position_embeddings=32,
  word_embed_proj_dim=32,
  pad_token_id=1,
)
# 16 tokens: windows are shorter, original lengths too, dynamic ones grow.
CASES = {
  'llama-linear': ('Llama', SIZES | ONE | rope('linear', factor=2.0)),
  'llama-dynamic': (
    'Llama',
    SIZES | ONE | rope('dynamic', factor=2.0) | dict(max_position_embeddings=8),
  ),
  'llama-llama3': (
    'Llama',
    SIZES
    | dict(tie_word_embeddings=True)
    | rope(
      'llama3',
      factor=4.0,
      low_freq_factor=1.0,
      high_freq_factor=4.0,
      original_max_position_embeddings=8,
    ),
  ),
  'llama-yarn': (
    'Llama',
    SIZES | ONE | rope('yarn', factor=4.0, original_max_position_embeddings=8),
  ),
  'llama-yarn-options': (
    'Llama',
    SIZES
    | ONE
    | dict(head_dim=16)
    | rope(
      'yarn',
      factor=4.0,
      original_max_position_embeddings=8,
      beta_fast=4.0,
      beta_slow=0.5,
      mscale=0.7,
      mscale_all_dim=1.0,
      truncate=False,
    ),
  ),
  'llama-biases': (
    'Llama',
    SIZES | ONE | dict(attention_bias=True, mlp_bias=True, hidden_act='gelu'),
  ),
  'mistral': ('Mistral', SIZES | dict(sliding_window=5)),
  'mistral-full': ('Mistral', SIZES | ONE | dict(sliding_window=None)),
  'qwen2': (
    'Qwen2',
    SIZES
    | dict(
      tie_word_embeddings=True,
      use_sliding_window=True,
      sliding_window=4,
      max_window_layers=1,
    ),
  ),
  'qwen2-plain': ('Qwen2', SIZES | ONE),
  'qwen3': ('Qwen3', SIZES | dict(head_dim=16, tie_word_embeddings=True)),
  'qwen3-biases': (
    'Qwen3',
    SIZES | ONE | dict(head_dim=16, attention_bias=True),
  ),
  'phi3': ('Phi3', SIZES | dict(sliding_window=6)),
  'phi3-partial': (
    'Phi3',
    SIZES
    | ONE
    | rope('default', partial_rotary_factor=0.5)
    | dict(tie_word_embeddings=True),
  ),
  'phi3-long': (
    'Phi3',
    SIZES
    | ONE
    | dict(original_max_position_embeddings=8)
    | rope('longrope', short_factor=[1.0] * 4, long_factor=LONG),
  ),
  'phi3-short': (
    'Phi3',
    SIZES
    | ONE
    | dict(original_max_position_embeddings=16)
    | rope('longrope', short_factor=LONG, long_factor=[1.0] * 4),
  ),
  'mixtral': ('Mixtral', SIZES | dict(num_local_experts=4)),
  'mixtral-window': (
    'Mixtral',
    SIZES
    | ONE
    | dict(num_local_experts=3, num_experts_per_tok=1, sliding_window=5),
  ),
  'opt': ('OPT', OPT),
  'opt-no-bias': (
    'OPT',
    OPT
    | ONE
    | dict(
      enable_bias=False,
      activation_function='gelu',
      tie_word_embeddings=False,
    ),
  ),
  'gpt2': ('GPT2', GPT2),
  'gpt2-inner': (
    'GPT2',
    GPT2
    | dict(n_layer=1, n_inner=24, activation_function='relu')
    | dict(tie_word_embeddings=False),
  ),
}
HALF = ('llama-llama3', 'qwen3', 'mixtral', 'opt')
CONTINUED = ('mistral', 'qwen3', 'gpt2')


def build(case):
  """A random model of the case as transformers makes it."""
  family, options = CASES[case]
  config = getattr(transformers, f'{family}Config')(**options)
  head = 'LMHeadModel' if family == 'GPT2' else 'ForCausalLM'
  return getattr(transformers, f'{family}{head}')(config)


def read(folder, dtype):
  return transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=dtype, attn_implementation='eager'
  ).eval()


def main():
  torch.manual_seed(0)
  tokens = np.random.default_rng(0).integers(2, 37, (2, 16))
  listing, out = {}, {'tokens': tokens.astype(np.int32)}
  for case in CASES:
    with tempfile.TemporaryDirectory() as scratch:
      folder = pathlib.Path(scratch)
      build(case).save_pretrained(folder)
      path = folder / 'model.safetensors'
      with safetensors.safe_open(path, 'np') as file:
        shapes = {n: file.get_slice(n).get_shape() for n in file.keys()}
      listing[case] = {
        'config': json.loads((folder / 'config.json').read_text()),
        'saved': {name: [shape, 'float32'] for name, shape in shapes.items()},
      }
      weights = {
        name: torch.from_numpy(drawn.tensor(name, tuple(shape)))
        for name, shape in shapes.items()
      }
      safetensors.torch.save_file(weights, path, {'format': 'pt'})
      given = torch.tensor(tokens)
      with torch.no_grad():
        model = read(folder, torch.float32)
        out[case] = model(given).logits.numpy()
        if case in CONTINUED:
          # No token ends a text, or is kept from being chosen.
          model.generation_config.eos_token_id = None
          more = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=16,
            do_sample=False,
          )
          out[f'{case}-greedy'] = more.numpy().astype(np.int32)[:, 16:]
        if case in HALF:
          half = read(folder, torch.bfloat16)
          rounded = read(folder, torch.float32)
          rounded.load_state_dict(half.state_dict())
          out[f'{case}-rounded'] = rounded(given).logits.numpy()
          out[f'{case}-half'] = half(given).logits.float().numpy()
    print(case, np.abs(out[case]).max())
  text = json.dumps(listing, indent=1)
  (HERE / 'decoders.json').write_text(text + '\n')
  np.savez_compressed(HERE / 'decoders_golden.npz', **out)


if __name__ == '__main__':
  main()
