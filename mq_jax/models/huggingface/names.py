"""Which tensors a checkpoint has, and which parameters they hold."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mq_jax.models.decoder import DecoderConfig

Path = tuple[str | int, ...]


class Piece(NamedTuple):
  """A parameter, or one of its experts, inside a tensor.

  Attributes:
    path: Of the parameter; inside a block, from there.
    start: Where it begins along the tensor's output axis.
    size: How much of that axis it has.
    expert: Which matrix of a stacked parameter it is.
  """

  path: Path
  start: int
  size: int
  expert: int | None = None


class Entry(NamedTuple):
  """A tensor of a checkpoint.

  Attributes:
    shape: In the checkpoint.
    pieces: The parameters it holds, side by side along its output axis.
    axis: Its output axis.
    transposed: Whether parameters are its transpose: linear weights are
      [out, in] there, [in, out] here; GPT-2 stores them as they are here.
  """

  shape: tuple[int, ...]
  pieces: tuple[Piece, ...]
  axis: int = 0
  transposed: bool = False


Named = Iterator[tuple[str, Entry]]

# Base model's prefix, block, and what is missing from a checkpoint of the base
# model alone; then the names of a block's parts.
_LLAMA = {
  'embed': 'model.embed_tokens',
  'blocks': 'model.layers',
  'final': 'model.norm',
  'before': 'input_layernorm',
  'after': 'post_attention_layernorm',
  'attention': 'self_attn',
  'o': 'o_proj',
}
_OPT = {
  'embed': 'model.decoder.embed_tokens',
  'positions': 'model.decoder.embed_positions',
  'blocks': 'model.decoder.layers',
  'final': 'model.decoder.final_layer_norm',
  'before': 'self_attn_layer_norm',
  'after': 'final_layer_norm',
  'attention': 'self_attn',
  'o': 'out_proj',
  'up': 'fc1',
  'down': 'fc2',
}
_GPT2 = {
  'embed': 'transformer.wte',
  'positions': 'transformer.wpe',
  'blocks': 'transformer.h',
  'final': 'transformer.ln_f',
  'before': 'ln_1',
  'after': 'ln_2',
  'attention': 'attn',
  'o': 'c_proj',
  'qkv': 'c_attn',
  'up': 'mlp.c_fc',
  'down': 'mlp.c_proj',
}


def _spelling(config: DecoderConfig) -> dict[str, str]:
  return {'opt': _OPT, 'gpt2': _GPT2}.get(config.family, _LLAMA)


def _linear(
  config: DecoderConfig,
  name: str,
  k: int,
  outputs: Sequence[tuple[Path, int]],
  bias: bool,
  expert: int | None = None,
) -> Named:
  """A linear map's weight and bias, for one parameter or several in one."""
  n = sum(size for _, size in outputs)
  starts = [sum(s for _, s in outputs[:i]) for i in range(len(outputs))]
  cut = lambda leaf: tuple(
    Piece((*path, leaf), start, size, expert)
    for (path, size), start in zip(outputs, starts)
  )
  if config.family == 'gpt2':
    yield f'{name}.weight', Entry((k, n), cut('kernel'), axis=1)
  else:
    yield f'{name}.weight', Entry((n, k), cut('kernel'), transposed=True)
  if bias:
    yield f'{name}.bias', Entry((n,), cut('bias'))


def _norm(config: DecoderConfig, name: str, path: Path) -> Named:
  d = config.hidden_size
  yield f'{name}.weight', Entry((d,), (Piece((*path, 'scale'), 0, d),))
  if config.norm == 'layer':
    yield f'{name}.bias', Entry((d,), (Piece((*path, 'bias'), 0, d),))


def _attention(c: DecoderConfig) -> Named:
  spelling = _spelling(c)
  at, d = spelling['attention'], c.hidden_size
  queries = c.num_attention_heads * c.head_dim
  values = c.num_key_value_heads * c.head_dim
  three = [
    (('self_attn', f'{name}_proj'), size)
    for name, size in (('q', queries), ('k', values), ('v', values))
  ]
  fused = 'qkv_proj' if c.family == 'phi3' else spelling.get('qkv')
  if fused:
    yield from _linear(c, f'{at}.{fused}', d, three, c.qkv_bias)
  else:
    for (path, size), name in zip(three, 'qkv'):
      yield from _linear(c, f'{at}.{name}_proj', d, [(path, size)], c.qkv_bias)
  yield from _linear(
    c,
    f'{at}.{spelling["o"]}',
    queries,
    [(('self_attn', 'o_proj'), d)],
    c.o_bias,
  )
  if c.qk_norm:
    for name in ('q_norm', 'k_norm'):
      piece = Piece(('self_attn', name, 'scale'), 0, c.head_dim)
      yield f'{at}.{name}.weight', Entry((c.head_dim,), (piece,))


def _mlp(c: DecoderConfig) -> Named:
  d, f = c.hidden_size, c.intermediate_size
  spelling = _spelling(c)
  gate, up, down = (('mlp', f'{n}_proj') for n in ('gate', 'up', 'down'))
  if c.num_experts:
    router = [(('mlp', 'router'), c.num_experts)]
    yield from _linear(c, 'block_sparse_moe.gate', d, router, False)
    for e in range(c.num_experts):
      for name, path, k, n in (
        ('w1', gate, d, f), ('w2', down, f, d), ('w3', up, d, f)
      ):  # fmt: skip
        inner = [(('mlp', 'experts', path[-1]), n)]
        yield from _linear(
          c, f'block_sparse_moe.experts.{e}.{name}', k, inner, False, e
        )
    return
  if c.family == 'phi3':
    both = [(gate, f), (up, f)]
    yield from _linear(c, 'mlp.gate_up_proj', d, both, c.mlp_bias)
  else:
    if c.gated:
      yield from _linear(c, 'mlp.gate_proj', d, [(gate, f)], c.mlp_bias)
    name = spelling.get('up', 'mlp.up_proj')
    yield from _linear(c, name, d, [(up, f)], c.mlp_bias)
  name = spelling.get('down', 'mlp.down_proj')
  yield from _linear(c, name, f, [(down, d)], c.mlp_bias)


def block_tensors(config: DecoderConfig, i: int) -> dict[str, Entry]:
  """Tensors of one block by name, with paths from `params['layers'][i]`."""
  spelling = _spelling(config)
  parts = (
    *_norm(config, spelling['before'], ('input_layernorm',)),
    *_norm(config, spelling['after'], ('post_attention_layernorm',)),
    *_attention(config),
    *_mlp(config),
  )
  return {f'{spelling["blocks"]}.{i}.{name}': entry for name, entry in parts}


def rest_tensors(config: DecoderConfig) -> dict[str, Entry]:
  """Tensors outside the blocks by name, with paths from `params`."""
  c, spelling = config, _spelling(config)

  def table(path, rows):
    piece = Piece((path, 'embedding'), 0, rows)
    return Entry((rows, c.hidden_size), (piece,))

  names = {f'{spelling["embed"]}.weight': table('embed_tokens', c.vocab_size)}
  if c.positions == 'learned':
    rows = c.max_position_embeddings + c.position_offset
    names[f'{spelling["positions"]}.weight'] = table('embed_positions', rows)
  names |= dict(_norm(c, spelling['final'], ('norm',)))
  if not c.tie_word_embeddings:
    piece = Piece(('lm_head', 'kernel'), 0, c.vocab_size)
    shape = (c.vocab_size, c.hidden_size)
    # Unlike its other matmuls, GPT-2's head is [out, in].
    names['lm_head.weight'] = Entry(shape, (piece,), transposed=True)
  return names


def expected_tensors(config: DecoderConfig) -> dict[str, Entry]:
  """Every tensor of a checkpoint by name, with paths from `params`."""
  found = rest_tensors(config)
  for i in range(config.num_hidden_layers):
    for name, entry in block_tensors(config, i).items():
      pieces = tuple(
        piece._replace(path=('layers', i, *piece.path))
        for piece in entry.pieces
      )
      found[name] = entry._replace(pieces=pieces)
  return found


def embedding_name(config: DecoderConfig) -> str:
  """Name of the token embedding, which tied heads are compared with."""
  return f'{_spelling(config)["embed"]}.weight'


def base_prefix(config: DecoderConfig) -> str:
  """What checkpoints of the base model alone leave out of their names."""
  return embedding_name(config).split('.')[0] + '.'
