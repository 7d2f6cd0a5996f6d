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
# # Sweep a number, compile once
#
# Numbers of steps and recipes are leaves of pytrees. Stack them, and `vmap`
# tries all in one compiled program; differentiate, and a number is learned.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import mq_jax as mq

weight = jax.random.t(jax.random.key(0), 5.0, (256, 256))
jax.tree.leaves(mq.steps.RoundToNearest(bits=3, clip=0.8))

# %% [markdown]
# ## 64 settings, one trace
#
# How much of a group's range should the grid span? `clip` times the largest
# weight sets its end. The counter below goes up whenever JAX traces the
# function, which it does before each compilation.

# %%
traces = 0


@jax.jit
def errors(steps, weight):
  """Relative squared error for each of stacked steps."""
  global traces
  traces += 1

  def one(step):
    values, _ = mq.lift(step, size=64, axis=0)(weight)
    return jnp.mean((values - weight) ** 2) / jnp.mean(weight**2)

  return jax.lax.map(one, steps)


clips = jnp.linspace(0.3, 1.0, 16)
bits = jnp.array([2, 3, 4, 5])
grid = jnp.meshgrid(bits, clips, indexing='ij')
steps = mq.steps.RoundToNearest(bits=grid[0].ravel(), clip=grid[1].ravel())
table = errors(steps, weight).reshape(4, 16)
print(f'{table.size} settings, {traces} trace')

# %%
fig, axis = plt.subplots(figsize=(5.5, 3.4), dpi=80)
for b, row, marker in zip(np.asarray(bits), np.asarray(table), 'osD^'):
  axis.semilogy(clips, row, marker + '-', ms=4, label=f'{b} bits')
  best = int(np.argmin(row))
  axis.plot(clips[best], row[best], 'k*', ms=11)
axis.set(xlabel='clip, share of the largest weight')
axis.set(ylabel='squared error, relative')
axis.legend(fontsize=8, title='stars: least')
fig.tight_layout()

# %% [markdown]
# The fewer the bits, the more is worth clipping. Other numbers come for free
# as long as the shapes are the same:

# %%
other = mq.steps.RoundToNearest(
  bits=jnp.full_like(steps.bits, 3), clip=jnp.linspace(0.5, 1.0, 64)
)
fine = errors(other, weight)
best = float(other.clip[jnp.argmin(fine)])
print(f'best clip of 64 at 3 bits: {best:.3f}; still {traces} trace')

# %% [markdown]
# ## The same number by its gradient
#
# With straight-through rounding, the error has a useful slope in `clip`.

# %%
descent_traces = 0


@jax.jit
def slope(clip, weight):
  global descent_traces
  descent_traces += 1

  def loss(clip):
    step = mq.steps.RoundToNearest(3, clip, rounding='straight_through')
    values, _ = mq.lift(step, size=64, axis=0)(weight)
    return jnp.mean((values - weight) ** 2) / jnp.mean(weight**2)

  return jax.value_and_grad(loss)(clip)


clip, path = 1.0, []
for _ in range(30):
  value, gradient = slope(clip, weight)
  path.append((float(clip), float(value)))
  clip = clip - 0.5 * gradient
print(f'clip {path[0][0]:.2f} -> {path[-1][0]:.3f}')
print(f'error {path[0][1]:.4f} -> {path[-1][1]:.4f}, {descent_traces} traces')

# %% [markdown]
# Recipes work alike: `mq.recipes.gptq(bits=3)` and `gptq(bits=4)` share their
# program. What changes the program (a group's size, an order) is static, and
# compiles another one. From the shell, `mq sweep` takes whole studies.
