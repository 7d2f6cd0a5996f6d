"""Activation quantization: what is done to the inputs of matmuls.

A recipe says how a site's weight is quantized, its `activations` what happens
to the site's inputs: an equivalent transform (smoothing, rotation) whose other
half is in the weight, and a quantizer. `mq_jax.compress` carries both out;
`quantize_inputs` makes a model see its inputs so, by `sites.rewrite`:

  recipe = mq.recipes.make(
    'microscopiq', bits=4, activations={'format': 'mx_int', 'bits': 4,
                                        'smooth': 0.7})
  packed = mq.compress(params, plan, statistics=statistics)
  g, given = mq.plans.runnable(f, packed)
  g(given, batch)
"""

from mq_jax.activations._choosing import (
  Folded,
  Prepared,
  choose,
  fold,
  prepare,
)
from mq_jax.activations._inputs import (
  Inputs,
  features_of,
  quantize_inputs,
  sample_rows,
)
from mq_jax.activations._matrices import as_seen, attach, of_matrix
from mq_jax.activations._options import (
  Activations,
  from_json,
  make,
  quantizer_from_json,
  quantizer_to_json,
)
from mq_jax.activations._quantizers import (
  MXInt,
  QuantizedActivation,
  Tensor,
  Token,
)

__all__ = [
  'Activations',
  'Folded',
  'Inputs',
  'MXInt',
  'Prepared',
  'QuantizedActivation',
  'Tensor',
  'Token',
  'as_seen',
  'attach',
  'choose',
  'features_of',
  'fold',
  'from_json',
  'make',
  'of_matrix',
  'prepare',
  'quantize_inputs',
  'quantizer_from_json',
  'quantizer_to_json',
  'sample_rows',
]
