"""Shapes of published models: enough to price them without their weights.

From the models' public configurations, recalled; heads, embeddings and the
products of attention are left out, as weight quantizers leave them.
"""

from typing import NamedTuple


class Matmul(NamedTuple):
  """Equal matmuls of a model.

  Attributes:
    name: Of the parameter.
    k: Inputs.
    n: Outputs.
    count: Number of such matrices in the model.
    rows: Rows for a token or, in models of images, for an image.
    share: Share of the tokens that a matrix sees: experts a token / experts.
  """

  name: str
  k: int
  n: int
  count: int
  rows: int = 1
  share: float = 1.0


class Model(NamedTuple):
  matmuls: tuple[Matmul, ...]
  images: bool = False


def _llama(layers, d, kv, ff, experts=0, active=2) -> Model:
  n, share = (layers, 1.0)
  if experts:
    n, share = layers * experts, active / experts
  return Model(
    (
      Matmul('q_proj', d, d, layers),
      Matmul('k_proj', d, kv, layers),
      Matmul('v_proj', d, kv, layers),
      Matmul('o_proj', d, d, layers),
      Matmul('gate_proj', d, ff, n, 1, share),
      Matmul('up_proj', d, ff, n, 1, share),
      Matmul('down_proj', ff, d, n, 1, share),
    )
  )


def _opt(layers, d) -> Model:
  return Model(
    (
      *(Matmul(f'{x}_proj', d, d, layers) for x in ('q', 'k', 'v', 'out')),
      Matmul('fc1', d, 4 * d, layers),
      Matmul('fc2', 4 * d, d, layers),
    )
  )


def _vit(layers, d, patches, patch) -> Model:
  tokens = patches + 1
  return Model(
    (
      Matmul('patches', 3 * patch * patch, d, 1, patches),
      Matmul('qkv', d, 3 * d, layers, tokens),
      Matmul('proj', d, d, layers, tokens),
      Matmul('fc1', d, 4 * d, layers, tokens),
      Matmul('fc2', 4 * d, d, layers, tokens),
    ),
    images=True,
  )


def _resnet50() -> Model:
  """Convolutions as matmuls of their patches, images of 224 x 224."""
  convs = {('conv1', 147, 64, 112 * 112): 1}

  def add(name, k, n, side):
    key = (name, k, n, side * side)
    convs[key] = convs.get(key, 0) + 1

  inputs, side = 64, 56
  stages = ((64, 3, 56), (128, 4, 28), (256, 6, 14), (512, 3, 7))
  for stage, (width, blocks, outside) in enumerate(stages, 1):
    for block in range(blocks):
      # The stride sits in the 3 x 3 convolution (v1.5).
      part = f'layer{stage}/' + ('rest' if block else 'first')
      add(f'{part}/conv1', inputs, width, side)
      add(f'{part}/conv2', 9 * width, width, outside)
      add(f'{part}/conv3', width, 4 * width, outside)
      if block == 0:
        add(f'{part}/downsample', inputs, 4 * width, outside)
      inputs, side = 4 * width, outside
  matmuls = [Matmul(a, k, n, c, rows) for (a, k, n, rows), c in convs.items()]
  return Model((*matmuls, Matmul('fc', 2048, 1000, 1)), images=True)


MODELS = {
  'opt-125m': _opt(12, 768),
  'opt-1.3b': _opt(24, 2048),
  'opt-6.7b': _opt(32, 4096),
  'opt-13b': _opt(40, 5120),
  'opt-30b': _opt(48, 7168),
  'opt-66b': _opt(64, 9216),
  'opt-175b': _opt(96, 12288),
  'llama-2-7b': _llama(32, 4096, 4096, 11008),
  'llama-2-13b': _llama(40, 5120, 5120, 13824),
  'llama-2-70b': _llama(80, 8192, 1024, 28672),
  'llama-3-8b': _llama(32, 4096, 1024, 14336),
  'llama-3-70b': _llama(80, 8192, 1024, 28672),
  'mixtral-8x7b': _llama(32, 4096, 1024, 14336, experts=8),
  'phi-3-3.8b': _llama(32, 3072, 3072, 8192),
  'phi-3-14b': _llama(40, 5120, 1280, 17920),
  'resnet-50': _resnet50(),
  'vit-b-16': _vit(12, 768, 196, 16),
  'vit-h-14': _vit(32, 1280, 256, 14),
}
