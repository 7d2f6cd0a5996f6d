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
# # First steps: one matrix
#
# We take one weight matrix of the bundled language model, quantize it by a few
# recipes, and look at what is stored: levels, scales, bytes. Everything here
# works on any matrix of inputs by outputs.

# %%
import matplotlib.pyplot as plt
import numpy as np

import mq_jax as mq
from mq_jax.data import docs
from mq_jax.evaluation.cuts import text_windows
from mq_jax.models import bundled

model = bundled.load('reference-planted')
text = docs.docs_text('valid', 60_000)
tokens = text_windows(model.tokenizer, text, 128, model.bos, limit=8).tokens
print(tokens.shape)

# %% [markdown]
# `sites.find` lists the matmuls of a function. We pick one, and let
# `calibrate` run the model over eight windows of text to learn which inputs of
# it matter: `gram` is $X^T X$ of the activations that meet the weight.

# %%
found = mq.sites.find(model.apply, model.params, tokens)
site = next(s for s in found if s.name == 'layers/2/mlp/up_proj/kernel')
statistics = mq.calibrate(model.apply, model.params, [tokens], sites=[site])
weight = mq.sites.get(model.params, site)
hessian = statistics[site.name].gram
print(f'{len(found)} sites; {site.name}: {weight.shape}, {weight.dtype}')

# %% [markdown]
# ## Quantize it
#
# A recipe is plain data made by a factory; `quantize_matrix` carries it out.
# `ebw` counts every stored bit: scales and zero points too.

# %%
recipes = [
  mq.recipes.rtn(bits=4, group=64),
  mq.recipes.rtn(bits=2, group=64),
  mq.recipes.gptq(bits=2, group=64),
  mq.recipes.microscopiq(bits=2),
  mq.recipes.fineq(compensate=True),
]
done = [mq.quantize_matrix(weight, r, hessian=hessian) for r in recipes]
print(f'{"recipe":30} {"ebw":>6} {"bytes":>7} {"error of output":>16}')
for q in done:
  error = float(q.record['output_error'])
  print(f'{q.recipe:30} {q.ebw:6.3f} {q.pack().nbytes:7} {error:16.4f}')

# %% [markdown]
# The bytes are real: `pack` gives buffers, and `unpack` the same codes.

# %%
packed = done[2].pack()
again = mq.layouts.unpack(packed)
print({name: buffer.nbytes for name, buffer in packed.buffers.items()})
print(8 * packed.nbytes / weight.size, np.array_equal(done[2], again))

# %% [markdown]
# ## Look at the codes
#
# We draw the output with the largest weight: one of those that were scaled up
# when outliers were planted in this model. GPTQ gives every 64 inputs of it
# four levels, which have to reach the largest. MicroScopiQ's blocks run along
# the outputs, where nearly all weights of this one are outliers: they get
# twice the bits, in the places of pruned neighbours (of other outputs).

# %%
column = int(np.argmax(np.abs(np.asarray(weight, np.float32)).max(axis=0)))
x = np.asarray(weight, np.float32)[:, column]
fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), dpi=80, sharey=True)
for axis, q in zip(axes, (done[2], done[3])):
  y = np.asarray(q)[:, column]
  axis.plot(x, '.', color='0.6', ms=5, label='weight')
  axis.plot(y, '_', color='tab:blue', ms=6, label='value of the codes')
  axis.set(title=q.recipe, xlabel=f'input of output {column}')
  axis.legend(loc='upper left', fontsize=8)
axes[0].set_ylabel('weight')
fig.tight_layout()

# %% [markdown]
# A record comes with every result: errors, counts, and a status in words.

# %%
record = {k: round(float(v), 4) for k, v in done[3].record.items()}
print(record)
print(done[3].status.sentence)
