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
# # A step of your own
#
# A step is a pure function of one cluster of weights, `Cluster -> Cluster`.
# `lift` maps it over a matrix, and `mq_jax.testing` says whether it keeps what
# the library relies on. We write one that rounds to powers of two.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

import mq_jax as mq
from mq_jax import testing


@mq.steps.step
class PowersOfTwo:
  """Round to +-top * 2^-i, i < 2^(bits - 1) - 1, or zero."""

  bits: jax.typing.ArrayLike = 3  # a leaf: may be traced

  def __call__(self, cluster):
    weight = cluster.weight
    top = jnp.max(jnp.abs(weight))
    exponent = jnp.round(jnp.log2(jnp.abs(weight) / top))
    least = 2.0 - jnp.exp2(jnp.asarray(self.bits, jnp.float32) - 1)
    value = jnp.sign(weight) * top * jnp.exp2(exponent)
    value = jnp.where(exponent < least, 0.0, value)
    return cluster._replace(value=value, code={'top': top})


weight = jnp.array([0.9, -0.5, 0.2, -0.1, 0.01])
print(PowersOfTwo(bits=3)(mq.new_cluster(weight)).value)

# %% [markdown]
# ## Put it through the suite
#
# It looks right. The suite tries what a model will bring sooner or later.

# %%
try:
  testing.check_step(PowersOfTwo(3), finer=PowersOfTwo(4))
except AssertionError as error:
  print(error)

# %% [markdown]
# An all-zero cluster divides zero by zero. So we keep the division away from
# zero, and gradients out of it: where a weight lies on the grid does not change
# when the grid is scaled.


# %%
@mq.steps.step
class PowersOfTwoSafely(PowersOfTwo):
  """The same, also where all weights are zero."""

  def __call__(self, cluster):
    weight = jnp.where(cluster.real, cluster.weight, 0.0)
    top = jax.lax.stop_gradient(jnp.max(jnp.abs(weight)))
    unit = jnp.abs(weight) / jnp.where(top > 0, top, 1.0)
    exponent = jnp.round(jnp.log2(jnp.maximum(unit, 1e-30)))
    exponent = jax.lax.stop_gradient(exponent)
    least = 2.0 - jnp.exp2(jnp.asarray(self.bits, jnp.float32) - 1)
    value = jnp.sign(weight) * top * jnp.exp2(exponent)
    value = jnp.where(exponent < least, 0.0, value)
    return cluster._replace(value=value, code={'top': top})


report = testing.check_step(PowersOfTwoSafely(3), finer=PowersOfTwoSafely(4))
print(', '.join(report.passed))
print(list(report.skipped))

# %% [markdown]
# `check_recipe` and `check_solver` do the same for recipes and for solvers of
# the allocation problem. In a test file each is one line.
#
# ## Lift it
#
# Clusters of 32 neighbours along the inputs. A chain of steps is a step too.

# %%
weight = jax.random.t(jax.random.key(0), 4.0, (128, 64))
values, codes = mq.lift(PowersOfTwoSafely(3), size=32, axis=0)(weight)
print(values.shape, {name: code.shape for name, code in codes.items()})

# %% [markdown]
# The number of bits is a leaf, so one compiled program serves all of them. On
# heavy tails powers of two do better than even steps at 3 and 4 bits. Beyond,
# the gaps between large powers are all of the error, and more bits only come
# nearer to zero.

# %%
bits = jnp.arange(2, 7)


def errors(step, weight):
  """Mean squared error for each number of bits."""

  def one(b, weight):
    values, _ = mq.lift(step(b), size=32, axis=0)(weight)
    return jnp.mean((values - weight) ** 2) / jnp.mean(weight**2)

  return jax.jit(jax.vmap(one, in_axes=(0, None)))(bits, weight)


fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), dpi=80, sharey=True)
samples = {
  'Gaussian weights': jax.random.normal(jax.random.key(1), (128, 64)),
  'heavy tails (Student, 2 degrees)': jax.random.t(
    jax.random.key(1), 2.0, (128, 64)
  ),
}
for axis, (title, sample) in zip(axes, samples.items()):
  even = errors(mq.steps.RoundToNearest, sample)
  power = errors(PowersOfTwoSafely, sample)
  axis.semilogy(bits, even, 'o-', label='RoundToNearest')
  axis.semilogy(bits, power, 's--', label='PowersOfTwoSafely')
  axis.set(title=title, xlabel='bits a weight', xticks=bits)
  axis.legend(fontsize=8)
axes[0].set_ylabel('squared error, relative')
fig.tight_layout()
