"""Make the reference outputs of encoders, ViTs and ResNets by transformers.

    python tests/golden/make_network_goldens.py

needs torch 2.13.0 and transformers 5.23.0, which the package itself does not.
Writes beside itself networks.json (config of each case, names and shapes of its
tensors as transformers saves them, for some also as it holds them) and
networks_golden.npz (inputs and float32 outputs). Weights are drawn by name, see
tests/drawn.py.
"""

import json
import pathlib
import sys
import tempfile

import numpy as np
import safetensors
import safetensors.numpy
import torch
import transformers

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import drawn  # noqa: E402

TEXT = dict(
  vocab_size=61,
  hidden_size=32,
  num_hidden_layers=2,
  num_attention_heads=4,
  intermediate_size=48,
  max_position_embeddings=24,
)
IMAGE = dict(
  image_size=24,
  patch_size=8,
  hidden_size=32,
  num_hidden_layers=2,
  num_attention_heads=4,
  intermediate_size=48,
  num_labels=5,
)
DISTIL = dict(
  vocab_size=61,
  dim=32,
  n_layers=2,
  n_heads=4,
  hidden_dim=48,
  max_position_embeddings=24,
)
ONE = dict(num_hidden_layers=1)
CASES = {
  'bert-tokens': ('BertForMaskedLM', TEXT),
  'bert-untied': (
    'BertForMaskedLM',
    TEXT | ONE | dict(tie_word_embeddings=False, hidden_act='relu'),
  ),
  'bert-features': ('BertModel', TEXT | ONE | dict(layer_norm_eps=1e-5)),
  'bert-sequence': (
    'BertForSequenceClassification',
    TEXT | ONE | dict(num_labels=3, hidden_act='gelu_new'),
  ),
  'roberta-tokens': (
    'RobertaForMaskedLM',
    TEXT | dict(pad_token_id=1, type_vocab_size=1),
  ),
  'roberta-sequence': (
    'RobertaForSequenceClassification',
    TEXT | ONE | dict(pad_token_id=1, type_vocab_size=1),
  ),
  'distilbert-tokens': ('DistilBertForMaskedLM', DISTIL),
  'distilbert-sequence': (
    'DistilBertForSequenceClassification',
    DISTIL | dict(n_layers=1, num_labels=3, activation='relu'),
  ),
  'distilbert-features': ('DistilBertModel', DISTIL | dict(n_layers=1)),
  'vit': ('ViTForImageClassification', IMAGE),
  'vit-no-bias': (
    'ViTForImageClassification',
    IMAGE | ONE | dict(qkv_bias=False, num_channels=1, hidden_act='gelu_new'),
  ),
  'deit': ('DeiTForImageClassification', IMAGE | ONE),
  'deit-teacher': ('DeiTForImageClassificationWithTeacher', IMAGE | ONE),
  'resnet-basic': (
    'ResNetForImageClassification',
    dict(
      layer_type='basic',
      embedding_size=8,
      hidden_sizes=[8, 12],
      depths=[2, 1],
      downsample_in_first_stage=True,
      num_labels=5,
    ),
  ),
  'resnet-bottleneck': (
    'ResNetForImageClassification',
    dict(embedding_size=8, hidden_sizes=[16, 24], depths=[1, 2], num_labels=5),
  ),
  'resnet-bottleneck-first': (
    'ResNetForImageClassification',
    dict(
      embedding_size=8,
      hidden_sizes=[16, 24],
      depths=[1, 1],
      downsample_in_bottleneck=True,
      num_labels=5,
    ),
  ),
}


def listed(tensors) -> dict:
  return {
    name: (list(array.shape), str(array.dtype).removeprefix('torch.'))
    for name, array in tensors.items()
  }


def make(architecture: str, options: dict) -> tuple[dict, dict]:
  """Config of an architecture, and names with shapes as it is saved."""
  model_class = getattr(transformers, architecture)
  model = model_class(model_class.config_class(**options))
  with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    config = json.loads((pathlib.Path(folder) / 'config.json').read_text())
    saved = safetensors.numpy.load_file(f'{folder}/model.safetensors')
  return config, listed(saved)


def outputs(architecture: str, config: dict, shapes: dict, batch: dict):
  """What transformers computes on a folder with drawn weights.

  And the names that the model itself has for its tensors, with those of the
  file, found by their values.
  """
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    (folder / 'config.json').write_text(json.dumps(config))
    tensors = drawn.tensors(shapes)
    safetensors.numpy.save_file(
      tensors, folder / 'model.safetensors', {'format': 'pt'}
    )
    model = getattr(transformers, architecture).from_pretrained(
      folder, dtype=torch.float32, attn_implementation='eager'
    )
  model.eval()
  with torch.no_grad():
    found = model(**{k: torch.tensor(v) for k, v in batch.items()})
  files = {array.tobytes(): name for name, array in tensors.items()}
  held = {
    name: files[value.numpy().tobytes()]
    for name, value in model.state_dict().items()
    if value.is_floating_point()
  }
  return found[0].numpy(), held


def main() -> None:
  rng = np.random.default_rng(0)
  listing, arrays = {}, {}
  tokens = rng.integers(2, 61, (2, 12))
  mask = np.ones((2, 12), np.int64)
  mask[1, 9:] = 0
  types = np.zeros((2, 12), np.int64)
  types[:, 6:] = 1
  arrays |= {'tokens': tokens, 'mask': mask, 'types': types}
  arrays['pixels'] = rng.standard_normal((2, 24, 24, 3)).astype(np.float32)
  for case, (architecture, options) in CASES.items():
    config, saved = make(architecture, options)
    if 'image_size' in config or 'depths' in config:
      pixels = arrays['pixels'].transpose(0, 3, 1, 2)
      batch = {'pixel_values': pixels[:, : options.get('num_channels', 3)]}
    else:
      padded = np.where(mask == 1, tokens, config['pad_token_id'])
      batch = {'input_ids': padded, 'attention_mask': mask}
      if architecture.startswith('Bert'):
        batch['token_type_ids'] = types
    arrays[case], held = outputs(architecture, config, saved, batch)
    listing[case] = {'config': config, 'saved': saved}
    if case.endswith('-tokens') or case.startswith(('vit', 'deit')):
      listing[case]['held'] = held  # other names, or ties stored twice
    print(case, arrays[case].shape, float(np.abs(arrays[case]).max()))
  (HERE / 'networks.json').write_text(json.dumps(listing) + '\n')
  np.savez_compressed(HERE / 'networks_golden.npz', **arrays)


if __name__ == '__main__':
  main()
