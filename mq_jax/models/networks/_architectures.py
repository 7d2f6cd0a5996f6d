"""What each architecture's config and tensors look like in a checkpoint.

Options and names as transformers 5.23 has them, and the names of versions
before 5 where they differ.
"""

import re
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from mq_jax.models import dit, encoder, resnet, vit
from mq_jax.models.networks._checkpoints import Options, Rules


class Architecture(NamedTuple):
  """How to read one architecture.

  Attributes:
    module: Of its network: `make`, `functional`, `channel_pairs`.
    config: `(options, architecture) -> config`; refuses what is unsupported.
    rules: `config -> rules` from the checkpoint's names of tensors to ours.
    task: `config -> task`, see `Network.task`.
    ties: `config -> ` (copy, original) by our names: tensors that a checkpoint
      may store twice.
  """

  module: ModuleType
  config: Callable[[Options, str], Any]
  rules: Callable[[Any], Rules]
  task: Callable[[Any], str]
  ties: Callable[[Any], tuple[tuple[str, str], ...]] = lambda config: ()


_TASKS = {
  'Model': 'features',
  'ForMaskedLM': 'tokens',
  'ForSequenceClassification': 'sequence',
}
_ENCODERS = {'Bert': 'bert', 'Roberta': 'roberta', 'DistilBert': 'distilbert'}


# By default gelu; a ResNet's is relu.
_ACTIVATIONS = tuple(encoder.ACTIVATIONS)


def _heads(options: Options, hidden: int, *names: str) -> int:
  name = options.given(*names)
  heads = options.whole(name)
  if hidden % heads:
    raise options.wrong(name, f'a divisor of {hidden}', heads)
  return heads


def _encoder_config(o: Options, architecture: str) -> encoder.EncoderConfig:
  prefix, task = next(
    (p, t) for p in _ENCODERS for t in _TASKS if architecture == p + t
  )
  kind = _ENCODERS[prefix]
  o.one_of('model_type', (kind,))
  o.one_of('position_embedding_type', ('absolute',))
  for name in ('is_decoder', 'add_cross_attention', 'sinusoidal_pos_embds'):
    o.one_of(name, (False, None))
  distil = kind == 'distilbert'
  hidden = o.whole(o.given('hidden_size', 'dim'))
  words = o.whole('vocab_size')
  padding = o.raw.get('pad_token_id', int(kind == 'roberta'))
  if type(padding) is not int or not 0 <= padding < words:
    raise o.wrong('pad_token_id', f'a token below {words}', padding)
  return encoder.EncoderConfig(
    task=_TASKS[task],
    model_type=kind,
    vocab_size=words,
    hidden_size=hidden,
    num_hidden_layers=o.whole(o.given('num_hidden_layers', 'n_layers')),
    num_attention_heads=_heads(o, hidden, 'num_attention_heads', 'n_heads'),
    intermediate_size=o.whole(o.given('intermediate_size', 'hidden_dim')),
    max_position_embeddings=o.whole('max_position_embeddings', 512),
    type_vocab_size=0 if distil else o.whole('type_vocab_size', 2),
    layer_norm_eps=1e-12 if distil else o.positive('layer_norm_eps', 1e-12),
    hidden_act=o.one_of(o.given('hidden_act', 'activation'), _ACTIVATIONS),
    pad_token_id=padding,
    tie_word_embeddings=o.flag('tie_word_embeddings', True),
    num_labels=o.labels() if _TASKS[task] == 'sequence' else 2,
  )


def _encoder_rules(config: encoder.EncoderConfig) -> Rules:
  head = 'cls.predictions|lm_head'
  unused = [
    r'embeddings\.position_ids',
    r'cls\.seq_relationship\..*',  # of BERT's second training task
  ]
  if config.task != 'tokens':
    unused.append(rf'({head}|vocab_.*)\..*')
  if config.task != 'sequence':
    unused.append(r'(bert|roberta)?\.?pooler\..*')
  return (
    # Names of the first TensorFlow checkpoints are still about.
    (r'LayerNorm\.gamma$', 'LayerNorm.weight'),
    (r'LayerNorm\.beta$', 'LayerNorm.bias'),
    (r'^(bert|roberta|distilbert)\.', ''),
    *((f'^{name}$', '') for name in unused),
    (r'^(encoder|transformer)\.layer\.', 'layers.'),
    (r'embeddings\.LayerNorm\.', 'embeddings.norm.'),
    (r'attention\.self\.(query|key|value)\.', r'attention.\1.'),
    (r'attention\.(q)(?:uery|_lin)\.', r'attention.\1_proj.'),
    (r'attention\.(k)(?:ey|_lin)\.', r'attention.\1_proj.'),
    (r'attention\.(v)(?:alue|_lin)\.', r'attention.\1_proj.'),
    (r'attention\.(output\.dense|out_lin)\.', 'attention.o_proj.'),
    (r'(attention\.output\.LayerNorm|sa_layer_norm)\.', 'attention_norm.'),
    (r'(intermediate\.dense|ffn\.lin1)\.', 'mlp.fc1.'),
    (r'(\d)\.(output\.dense|ffn\.lin2)\.', r'\1.mlp.fc2.'),
    (r'(\d)\.(output\.LayerNorm|output_layer_norm)\.', r'\1.mlp_norm.'),
    (r'^(cls\.predictions\.transform|lm_head)\.dense\.', 'head.dense.'),
    (r'^vocab_transform\.', 'head.dense.'),
    (
      r'^(cls\.predictions\.transform\.LayerNorm|lm_head\.layer_norm'
      r'|vocab_layer_norm)\.',
      'head.norm.',
    ),
    (r'^(cls\.predictions|lm_head)\.bias$', 'head.bias'),
    (r'^(cls\.predictions|lm_head)\.decoder\.weight$', 'head.decoder.weight'),
    (r'^(cls\.predictions|lm_head)\.decoder\.bias$', 'head.decoder_bias'),
    (r'^vocab_projector\.bias$', 'head.bias'),
    (r'^vocab_projector\.weight$', 'head.decoder.weight'),
    (r'^pooler\.dense\.', 'pooler.'),
    (r'^(classifier\.dense|pre_classifier)\.', 'pooler.'),
    (r'^classifier\.out_proj\.', 'classifier.'),
  )


def _encoder_ties(config: encoder.EncoderConfig):
  if config.task != 'tokens':
    return ()
  words = 'embeddings.word_embeddings.weight'
  if config.tie_word_embeddings:
    return (('head.decoder.weight', words), ('head.decoder_bias', 'head.bias'))
  return ()


def _vit_config(o: Options, architecture: str) -> vit.VitConfig:
  kind = 'deit' if architecture.startswith('DeiT') else 'vit'
  o.one_of('model_type', (kind,))
  hidden = o.whole('hidden_size')
  image, patch = o.square('image_size', 224), o.square('patch_size', 16)
  if image % patch:
    raise o.wrong('image_size', f'a multiple of patch_size={patch}', image)
  return vit.VitConfig(
    image_size=image,
    patch_size=patch,
    num_channels=o.whole('num_channels', 3),
    hidden_size=hidden,
    num_hidden_layers=o.whole('num_hidden_layers'),
    num_attention_heads=_heads(o, hidden, 'num_attention_heads'),
    intermediate_size=o.whole('intermediate_size'),
    num_labels=o.labels(),
    layer_norm_eps=o.positive('layer_norm_eps', 1e-12),
    hidden_act=o.one_of('hidden_act', _ACTIVATIONS),
    qkv_bias=o.flag('qkv_bias', True),
    distilled=kind == 'deit',
    teacher=architecture.endswith('WithTeacher'),
  )


def _vit_rules(config: vit.VitConfig) -> Rules:
  return (
    (r'^(vit|deit)\.', ''),
    (r'^(encoder\.layer|layers)\.', 'layers.'),
    (r'^embeddings\.mask_token$', ''),  # of masked image modelling
    (r'^pooler\..*', ''),
    (r'^embeddings\.patch_embeddings\.projection\.', 'patch_embed.'),
    (r'^embeddings\.', ''),
    (r'attention\.attention\.(\w)\w*\.', r'attention.\1_proj.'),
    (r'attention\.output\.dense\.', 'attention.o_proj.'),
    (r'layernorm_before\.', 'attention_norm.'),
    (r'layernorm_after\.', 'mlp_norm.'),
    (r'intermediate\.dense\.', 'mlp.fc1.'),
    (r'(\d)\.output\.dense\.', r'\1.mlp.fc2.'),
    (r'^layernorm\.', 'norm.'),
    (r'^cls_classifier\.', 'classifier.'),
  )


def _resnet_config(o: Options, architecture: str) -> resnet.ResNetConfig:
  small = architecture == 'CifarResNet'
  o.one_of('model_type', ('resnet',))
  sizes = o.wholes('hidden_sizes', (256, 512, 1024, 2048))
  depths = o.wholes('depths', (3, 4, 6, 3))
  if len(sizes) != len(depths):
    raise o.wrong('depths', f'as many as hidden_sizes={sizes}', depths)
  kind = o.one_of('layer_type', ('bottleneck', 'basic'))
  if kind == 'bottleneck' and any(n % 4 for n in sizes):
    raise o.wrong('hidden_sizes', 'multiples of 4', sizes)
  return resnet.ResNetConfig(
    num_channels=o.whole('num_channels', 3),
    embedding_size=o.whole('embedding_size', 64),
    hidden_sizes=sizes,
    depths=depths,
    layer_type=kind,
    num_labels=o.labels(),
    hidden_act=o.one_of('hidden_act', ('relu', *_ACTIVATIONS)),
    small=small,
    downsample_in_first_stage=o.flag('downsample_in_first_stage', False),
    downsample_in_bottleneck=o.flag('downsample_in_bottleneck', False),
  )


def _resnet_rules(config: resnet.ResNetConfig) -> Rules:
  unused = (r'^.*num_batches_tracked$', '')
  if config.small:
    stages = [
      (rf'^layer{i + 1}\.', f'stages.{i}.') for i in range(len(config.depths))
    ]
    convs = [
      rule
      for i in (1, 2, 3)
      for rule in (
        (rf'(\d)\.conv{i}\.', rf'\1.convs.{i - 1}.conv.'),
        (rf'(\d)\.bn{i}\.', rf'\1.convs.{i - 1}.norm.'),
      )
    ]
    return (
      unused,
      (r'^module\.', ''),
      *stages,
      *convs,
      (r'^conv1\.', 'stem.conv.'),
      (r'^bn1\.', 'stem.norm.'),
      (r'^(linear|fc)\.', 'classifier.'),
    )
  return (
    unused,
    (r'^resnet\.', ''),
    (r'\.convolution\.', '.conv.'),
    (r'\.normalization\.', '.norm.'),
    (r'^embedder\.embedder\.', 'stem.'),
    (r'^encoder\.stages\.(\d+)\.layers\.', r'stages.\1.'),
    (r'\.layer\.(\d)\.', r'.convs.\1.'),
    (r'^classifier\.1\.', 'classifier.'),
  )


def _dit_config(o: Options, architecture: str) -> dit.DitConfig:
  hidden, attention = o.whole('hidden_size'), o.whole('attention_size')
  image, patch = o.whole('image_size'), o.whole('patch_size')
  if image % patch:
    raise o.wrong('image_size', f'a multiple of patch_size={patch}', image)
  if hidden % 2:
    raise o.wrong('hidden_size', 'even', hidden)
  return dit.DitConfig(
    image_size=image,
    num_channels=o.whole('num_channels'),
    patch_size=patch,
    patch_channels=o.whole('patch_channels'),
    hidden_size=hidden,
    num_hidden_layers=o.whole('num_hidden_layers'),
    num_attention_heads=_heads(o, attention, 'num_attention_heads'),
    attention_size=attention,
    intermediate_size=o.whole('intermediate_size'),
    num_labels=o.labels(),
    num_steps=o.whole('num_steps', 1000),
  )


_IMAGES = lambda config: 'classes'
_ENCODER = Architecture(
  encoder,
  _encoder_config,
  _encoder_rules,
  lambda config: config.task,
  _encoder_ties,
)
_VIT = Architecture(vit, _vit_config, _vit_rules, _IMAGES)
_RESNET = Architecture(resnet, _resnet_config, _resnet_rules, _IMAGES)
_DIT = Architecture(dit, _dit_config, lambda config: (), lambda config: 'noise')

ARCHITECTURES: Mapping[str, Architecture] = {
  **{prefix + task: _ENCODER for prefix in _ENCODERS for task in _TASKS},
  'ViTForImageClassification': _VIT,
  'DeiTForImageClassification': _VIT,
  'DeiTForImageClassificationWithTeacher': _VIT,
  'ResNetForImageClassification': _RESNET,
  'CifarResNet': _RESNET,
  'Dit': _DIT,
}


def inferred(tensors: Mapping[str, np.ndarray]) -> dict[str, Any] | None:
  """The config of a checkpoint without config.json, from its tensors.

  ResNets of the CIFAR type and DiTs are known by their names; sizes are those
  of the tensors. Not in them, and taken as the known checkpoints have it: a
  DiT's heads are each as wide as the model, it has 1000 steps, and its images
  are square.

  Returns:
    A config for `Architecture.config`, or None for other tensors.
  """
  shape = lambda name: tensors[name].shape
  names = {re.sub(r'^module\.', '', name): name for name in tensors}
  if {'conv1.weight', 'bn1.weight', 'linear.weight'} <= names.keys():
    shapes = {n: shape(old) for n, old in names.items()}
    blocks = [
      match.groups()
      for name in names
      if (match := re.fullmatch(r'layer(\d+)\.(\d+)\.bn1\.weight', name))
    ]
    stages = sorted({int(stage) for stage, _ in blocks})
    three = any(re.search(r'\d\.conv3\.', name) for name in names)
    last = f'conv{3 if three else 2}.weight'
    if stages and all(
      len(shapes.get(f'layer{i}.0.{last}', ())) == 4 for i in stages
    ):
      return {
        'architectures': ['CifarResNet'],
        'num_channels': shapes['conv1.weight'][1],
        'embedding_size': shapes['conv1.weight'][0],
        'hidden_sizes': [shapes[f'layer{i}.0.{last}'][0] for i in stages],
        'depths': [sum(int(s) == i for s, _ in blocks) for i in stages],
        'layer_type': 'bottleneck' if three else 'basic',
        'num_labels': shapes['linear.weight'][0],
      }
  wanted = {
    'conv.weight': 4,
    'patch_emb.weight': 2,
    'patch_pos_emb': 3,
    'label_emb.weight': 2,
    'dits.0.wq.weight': 2,
    'dits.0.ff.0.weight': 2,
  }
  if all(n in tensors and len(shape(n)) == r for n, r in wanted.items()):
    conv, hidden = shape('conv.weight'), shape('patch_emb.weight')[0]
    side = round(shape('patch_pos_emb')[1] ** 0.5)
    blocks = {n.split('.')[1] for n in tensors if n.startswith('dits.')}
    attention = shape('dits.0.wq.weight')[0]
    return {
      'architectures': ['Dit'],
      'image_size': side * conv[2],
      'num_channels': conv[1],
      'patch_size': conv[2],
      'patch_channels': conv[0],
      'hidden_size': hidden,
      'num_hidden_layers': len(blocks),
      'num_attention_heads': attention // max(1, hidden),
      'attention_size': attention,
      'intermediate_size': shape('dits.0.ff.0.weight')[0],
      'num_labels': shape('label_emb.weight')[0],
    }
  return None
