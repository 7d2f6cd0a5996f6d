"""Models for other programs: folders in Hugging Face's layout.

`to_huggingface` writes weights as what they decode to, which any program
reads that reads the architecture. `to_compressed_tensors` keeps integers
packed, for the recipes whose values that format can hold exactly.

A folder is written beside its place, read back by our own reader, compared
with the model bit by bit, and only then given its name.
"""

from mq_jax.exporting.packed import to_compressed_tensors
from mq_jax.exporting.plain import check_target, to_huggingface, verify

__all__ = [
  'check_target',
  'to_compressed_tensors',
  'to_huggingface',
  'verify',
]
