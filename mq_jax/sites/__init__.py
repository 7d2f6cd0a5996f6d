"""Finding, naming, tapping and rewriting the matmuls of any JAX function.

A function is traced to its jaxpr, whose matmuls are named by the parameter
that feeds them. No library is patched: plain JAX, Flax NNX, Flax Linen and
whatever else traces are alike, through jit, remat, scan, while, cond, vmap,
custom_jvp and custom_vjp.
"""

from mq_jax.sites._site import Site, get, leaf_names, put
from mq_jax.sites._transforms import find, rewrite, tap

__all__ = ['Site', 'find', 'get', 'leaf_names', 'put', 'rewrite', 'tap']
