"""Where a decoder's function allows factors to move between weights."""

from mq_jax import equalization
from mq_jax.models.decoder._config import DecoderConfig


def channel_pairs(
  config: DecoderConfig,
) -> dict[str, tuple[equalization.ChannelPair, ...]]:
  """Where a factor may move from one weight to the next, by kind.

  Returns:
    At most two pairs a layer for each kind, biases included with the weights
    whose outputs they join:
    'norm': the gain of a norm, and the rows of the kernels it feeds.
    'hidden': columns of up_proj and rows of down_proj; exact because
      act(gate) * up is linear in up, and relu keeps positive factors. None
      for a plain MLP with another activation. Experts share their factors.
    'value': columns of v_proj and rows of o_proj; attention averages values
      of one channel. Query heads that share a value head share its factors.
    'key': columns of k_proj and of q_proj, whose products are the scores;
      with a norm after them, the gains of the two norms. The two channels
      that a rotary position mixes share a factor. None where only a part of
      each head is rotated.
  """
  c = config
  kinds: dict[str, list] = {'norm': [], 'hidden': [], 'value': [], 'key': []}
  for i in range(c.num_hidden_layers):
    for kind, pair in _of_block(c, ('layers', i)):
      kinds[kind].append(pair)
  return {kind: tuple(pairs) for kind, pairs in kinds.items()}


def _of_block(c: DecoderConfig, block: tuple[str | int, ...]):
  pair = equalization.ChannelPair
  attention, mlp = (*block, 'self_attn'), (*block, 'mlp')
  if c.num_experts:
    mlp = (*mlp, 'experts')
  stacked = int(c.num_experts > 0)  # experts have an axis before [k, n]
  kernel = lambda *path: (*path, 'kernel')
  q, k, v, o = (kernel(*attention, f'{n}_proj') for n in 'qkvo')
  gate, up, down = (kernel(*mlp, f'{n}_proj') for n in ('gate', 'up', 'down'))

  def outputs(path, axis, bias):
    """A kernel along its outputs, with its bias if it has one."""
    uses = ((path, axis),)
    return (*uses, ((*path[:-1], 'bias'), 0)) if bias else uses

  def gains(name):
    return outputs((*block, name, 'scale'), 0, c.norm == 'layer')

  entered = ((up, stacked),)
  if c.gated:
    entered = ((gate, stacked), *entered)
  if c.num_experts:
    entered = (*entered, (kernel(*block, 'mlp', 'router'), 0))
  yield (
    'norm',
    pair(c.hidden_size, gains('input_layernorm'), ((q, 0), (k, 0), (v, 0))),
  )
  yield 'norm', pair(c.hidden_size, gains('post_attention_layernorm'), entered)
  if c.gated or c.activation == 'relu':
    bias = c.mlp_bias and not c.num_experts
    yield (
      'hidden',
      pair(
        c.intermediate_size,
        outputs(up, 1 + stacked, bias),
        ((down, stacked),),
      ),
    )
  # block: o_proj's rows are [kv head, query head of it, d], v_proj's
  # columns [kv head, d]; rotary splits d into [half, d / 2].
  n_values = c.num_key_value_heads * c.head_dim
  yield (
    'value',
    pair(n_values, outputs(v, 1, c.qkv_bias), ((o, 0),), c.head_dim),
  )
  rotated = c.positions == 'rotary'
  if rotated and c.rotary_dim not in (None, c.head_dim):
    return
  shared = 2 if rotated else 1
  if c.qk_norm:
    norm = lambda n: ((*attention, f'{n}_norm', 'scale'), 0)
    yield (
      'key',
      pair(
        c.head_dim // shared, (norm('k'),), (norm('q'),), c.head_dim // shared
      ),
    )
    return
  yield (
    'key',
    pair(
      n_values // shared,
      outputs(k, 1, c.qkv_bias),
      outputs(q, 1, c.qkv_bias),
      c.head_dim // shared,
    ),
  )
