"""One configurable decoder for the language models that people use.

`DecoderConfig` chooses among the parts of Llama, Mistral, Qwen, Phi-3, OPT,
GPT-2 and Mixtral. `functional` is the whole as a pure function, `parts` the
same cut at its blocks, `cached` the same with an attention that keeps keys
and values.
"""

from mq_jax.models.decoder._config import DecoderConfig
from mq_jax.models.decoder._functions import (
  Parts,
  cached,
  functional,
  init_params,
  joined,
  parts,
)
from mq_jax.models.decoder._network import Attend, Decoder, attend_all
from mq_jax.models.decoder._pairs import channel_pairs

__all__ = [
  'Attend',
  'Decoder',
  'DecoderConfig',
  'Parts',
  'attend_all',
  'cached',
  'channel_pairs',
  'functional',
  'init_params',
  'joined',
  'parts',
]
