"""What a decoder is made of."""

import dataclasses

from mq_jax.models.decoder import rotary

NORMS = ('rms', 'layer')
POSITIONS = ('rotary', 'learned')
ACTIVATIONS = ('silu', 'gelu', 'gelu_tanh', 'relu')
DTYPES = ('float32', 'bfloat16', 'float16')


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Sizes and options of a decoder; the defaults are Llama's.

  Attributes:
    vocab_size: Tokens.
    hidden_size: Channels between blocks.
    intermediate_size: Channels inside an MLP, or inside each expert.
    num_hidden_layers: Blocks.
    num_attention_heads: Query heads.
    num_key_value_heads: Key and value heads, a divisor of the query heads.
    head_dim: Channels of a head.
    max_position_embeddings: Length of text it is made for.
    norm_eps: Added to a variance before its root.
    rope_theta: Base of the rotary wavelengths.
    tie_word_embeddings: Whether the embedding serves as the head.
    family: Model type of Hugging Face whose checkpoint layout it has; of no
      consequence for the function.
    norm: 'rms', or 'layer' with mean and bias.
    positions: 'rotary', or 'learned': a table added to the embedding.
    position_offset: First row of the table in use.
    rope_scaling: How rotary wavelengths are stretched.
    rotary_dim: Channels of a head that are rotated; None for all.
    sliding_window: Tokens that attention looks back at, itself included;
      None for all.
    window_layers: Blocks which have the window; None for all.
    qk_norm: Whether queries and keys of each head pass an RMSNorm.
    qkv_bias: Whether queries, keys and values have biases.
    o_bias: Whether the output of attention has one.
    mlp_bias: Whether the MLP's matmuls have.
    activation: 'silu', 'gelu', 'gelu_tanh' or 'relu'.
    gated: down(act(gate(x)) * up(x)) if true, down(act(up(x))) if not.
    num_experts: Experts in place of each MLP; 0 for one MLP.
    experts_per_token: Experts that a token is sent to.
    dtype: What the network computes in; parameters are cast to it.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  max_position_embeddings: int
  norm_eps: float = 1e-5
  rope_theta: float = 10000.0
  tie_word_embeddings: bool = True
  family: str = 'llama'
  norm: str = 'rms'
  positions: str = 'rotary'
  position_offset: int = 0
  rope_scaling: rotary.Scaling | None = None
  rotary_dim: int | None = None
  sliding_window: int | None = None
  window_layers: tuple[int, ...] | None = None
  qk_norm: bool = False
  qkv_bias: bool = False
  o_bias: bool = False
  mlp_bias: bool = False
  activation: str = 'silu'
  gated: bool = True
  num_experts: int = 0
  experts_per_token: int = 0
  dtype: str = 'float32'

  def __post_init__(self):
    for name, choices in (
      ('norm', NORMS),
      ('positions', POSITIONS),
      ('activation', ACTIVATIONS),
      ('dtype', DTYPES),
    ):
      value = getattr(self, name)
      if value not in choices:
        raise ValueError(f'{name}={value!r} is not one of {", ".join(choices)}')
    if self.num_attention_heads % self.num_key_value_heads:
      raise ValueError(
        f'num_attention_heads={self.num_attention_heads} is not a multiple of '
        f'num_key_value_heads={self.num_key_value_heads}'
      )
    turned = self.head_dim if self.rotary_dim is None else self.rotary_dim
    if self.positions == 'rotary' and (turned % 2 or turned > self.head_dim):
      raise ValueError(
        f'rotary positions pair channels: {turned} of head_dim='
        f'{self.head_dim} cannot turn'
      )
    if self.num_experts and not (
      0 < self.experts_per_token <= self.num_experts
    ):
      raise ValueError(
        f'experts_per_token={self.experts_per_token} is not among the '
        f'{self.num_experts} experts'
      )

  def window(self, layer: int) -> int | None:
    """Tokens that attention of a block looks back at; None for all."""
    if self.window_layers is None or layer in self.window_layers:
      return self.sliding_window
    return None
