# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Any Flax model, through its sites
#
# `mq_jax` does not know about layers. It looks at the matmuls of a function
# `f(params, batch)`, finds the parameter that feeds each, and puts a packed
# matrix in its place. So Linen, NNX and plain functions work alike.

# %%
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

import mq_jax as mq

batch = jax.random.normal(jax.random.key(0), (64, 12, 12, 3))

# %% [markdown]
# ## NNX
#
# A convolution, an attention layer and a head. `nnx.split` gives the
# parameters; the function merges them again.


# %%
class Small(nnx.Module):
  def __init__(self, rngs):
    self.conv = nnx.Conv(3, 32, (3, 3), strides=(2, 2), rngs=rngs)
    self.attention = nnx.MultiHeadAttention(
      4, in_features=32, decode=False, rngs=rngs
    )
    self.norm = nnx.LayerNorm(32, rngs=rngs)
    self.head = nnx.Linear(32, 10, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.conv(x))
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    x = x + self.attention(self.norm(x))
    return self.head(x.mean(axis=1))


graph, params = nnx.split(Small(nnx.Rngs(0)))


def f(params, batch):
  return nnx.merge(graph, params)(batch)


sites = mq.sites.find(f, params, batch)
print(f'{"site":24} {"kind":10} {"tokens":>7} {"k":>4} {"n":>4}')
for site in sites:
  print(f'{site.name:24} {site.kind:10} {site.m:7} {site.k:4} {site.n:4}')

# %% [markdown]
# Products of two activations are listed, and left alone. A plan gives recipes
# to sites by patterns on their names; a pattern that matches nothing is an
# error. `calibrate` gathers what the recipes want to know about inputs.

# %%
statistics = mq.calibrate(f, params, [batch], sites=sites)
plan = mq.plans.plan(
  sites,
  [
    ('attention/*', mq.recipes.gptq(bits=3, group=16)),
    ('conv/*', mq.recipes.rtn(bits=8, group=27)),
    ('head/*', mq.recipes.gptq(bits=4, group=16)),
  ],
)
packed = mq.compress(params, plan, statistics=statistics)
for record in mq.plans.records(packed):
  error = record['output_error']
  print(
    f'{record["site"]:24} {record["recipe"]:24} '
    f'ebw {record["ebw"]:.3f}  output error {error:.4f}'
  )

# %% [markdown]
# The packed parameters are a pytree that goes through `jit`; `dequantize`
# inside of it is part of the program.


# %%
def relative(a, b):
  return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


run = jax.jit(lambda packed, batch: f(mq.dequantize(packed), batch))
error = relative(run(packed, batch), f(params, batch))
print(f'relative change of the logits: {error:.3f}')

# %% [markdown]
# ## Linen
#
# The same lines, with `module.apply` for a function.


# %%
class Mlp(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = x.reshape(x.shape[0], -1)
    return nn.Dense(10)(nn.gelu(nn.Dense(64)(x)))


module = Mlp()
variables = module.init(jax.random.key(1), batch)
run = jax.jit(lambda packed, batch: module.apply(mq.dequantize(packed), batch))
sites = mq.sites.find(module.apply, variables, batch)
statistics = mq.calibrate(module.apply, variables, [batch], sites=sites)
print('recipe'.ljust(34), '  ebw', ' change of the logits')
for recipe in (
  mq.recipes.gptq(bits=3, group=64),
  mq.recipes.microscopiq(bits=2),
  mq.recipes.microscopiq(bits=4),
):
  plan = mq.plans.uniform(sites, recipe)
  packed = mq.compress(variables, plan, statistics=statistics)
  logits = run(packed, batch)
  error = relative(logits, module.apply(variables, batch))
  print(f'{recipe.label:34} {mq.plans.size(packed).ebw:.3f}  {error:.3f}')

# %% [markdown]
# From here: `mq.hardware.workload.from_sites` prices these matmuls on an
# accelerator, and `mq.allocation` chooses the recipe of each.
