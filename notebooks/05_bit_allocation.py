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
# # Which bits for which layer?
#
# A small network is trained; then bits are searched for its layers under a
# budget of cycles on an accelerator, and the front of loss over cycles is
# read. `mq allocate` does this for language models, with progress and resume.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import mq_jax as mq

alloc, hw = mq.allocation, mq.hardware
SIZES = (16, 64, 64, 32, 8)


def apply(params, x):
  for name in sorted(params)[:-1]:
    x = jax.nn.relu(x @ params[name])
  return x @ params[sorted(params)[-1]]


def draw(key, sizes):
  keys = jax.random.split(key, len(sizes) - 1)
  shapes = list(zip(sizes, sizes[1:]))
  return {
    f'layer{i}': jax.random.normal(k, s) * jnp.sqrt(2.0 / s[0])
    for i, (k, s) in enumerate(zip(keys, shapes))
  }


x = jax.random.normal(jax.random.key(0), (4, 128, 16))
teacher = draw(jax.random.key(1), (16, 32, 8))
target = jnp.argmax(apply(teacher, x), axis=-1)


@jax.jit
def train(params):
  optimizer = optax.adam(3e-3)

  def loss(params):
    return optax.losses.softmax_cross_entropy_with_integer_labels(
      apply(params, x), target
    ).mean()

  def step(carry, _):
    params, state = carry
    value, slope = jax.value_and_grad(loss)(params)
    update, state = optimizer.update(slope, state)
    return (optax.apply_updates(params, update), state), value

  carry, values = jax.lax.scan(
    step, (params, optimizer.init(params)), None, length=300
  )
  return carry[0], values


params, values = train(draw(jax.random.key(2), SIZES))
print(f'training loss {values[0]:.2f} -> {values[-1]:.3f}')

# %% [markdown]
# ## Candidates, costs, losses
#
# Every layer may take 2, 3, 4 or 8 bits. What that costs is measured on the
# packed matrices: stored bits, and the cycles of decoding one token on a small
# array whose DRAM moves 4 bytes a cycle.

# %%
sites = mq.sites.find(apply, params, x[0])
statistics = mq.calibrate(apply, params, list(x), sites=sites)
recipes = [mq.recipes.gptq(bits=b, group=16) for b in (2, 3, 4, 8)]
made = alloc.candidates.make(params, sites, recipes, statistics=statistics)

array = hw.accelerators.systolic(
  'ws',
  rows=8,
  cols=8,
  double_buffered=True,
  memory=hw.accelerators.buffers(8, dram_bytes_per_cycle=4.0),
)
work = hw.workload.from_sites(sites, 'decode')
columns = []
for packed in made.packed:
  found = mq.plans.matrices(packed)
  bits = hw.stack([hw.of_matrix(found[site.name]) for site in sites])
  columns.append(hw.cost(array, work, bits).total_cycles)
cycles = np.stack(columns, axis=1)
print('cycles by layer (rows) and candidate:')
print(cycles.astype(int))

# %% [markdown]
# The loss is the divergence from the unquantized network. How much each layer
# alone adds to it:

# %%
loss = alloc.losses.divergence(apply)
batches = alloc.losses.reference(apply, params, x)
table = alloc.measured.one_site_table(loss, params, made.candidates, batches)
print(np.round(table, 4))

# %% [markdown]
# ## Search
#
# `search.front` mixes candidates in weight space and follows the gradient of
# the real loss, with prices that meet the budgets; it rounds, and descends
# from there. The integer program on the table above knows no interactions.

# %%
least, most = cycles.min(axis=1).sum(), cycles.max(axis=1).sum()
budgets = [{'cycles': least + s * (most - least)} for s in (0.1, 0.25, 0.5)]
problem = alloc.make_problem(
  table,
  {'cycles': cycles},
  {},
  sites=made.candidates.names,
  candidates=made.candidates.labels,
)
found = alloc.search.front(
  loss, params, made.candidates, problem, budgets, batches, steps=20
)


def measure(choices):
  hot = alloc.measured.one_hot(np.asarray(choices), len(recipes))
  return np.asarray(
    alloc.measured.choice_losses(loss, params, made.candidates, hot, batches)
  )


widths = np.array([2, 3, 4, 8])
for budget, choice, value in zip(budgets, found.choices, found.losses):
  used = alloc.evaluate(problem, choice)['cycles']
  asked = budget['cycles']
  print(
    f'cycles {used:6.0f} of {asked:6.0f}, loss {value:.4f}, '
    f'bits {widths[choice].tolist()}'
  )

# %% [markdown]
# ## Read the front
#
# There are only 256 plans, so all of them can be drawn. Uniform plans are
# those that need no search. Here the search and the integer program agree:
# the layers of so small a network hardly interact.

# %%
every = np.stack(np.meshgrid(*[range(4)] * 4), axis=-1).reshape(-1, 4)
spent = np.array([alloc.evaluate(problem, c)['cycles'] for c in every])
losses = measure(every)
by_table = [alloc.integer_program(problem.with_budget(**b)) for b in budgets]
fig, axis = plt.subplots(figsize=(6, 3.8), dpi=80)
axis.semilogy(spent, losses, '.', color='0.75', label='all 256 plans')
uniform = np.tile(np.arange(4)[:, None], 4)
cost_of = lambda c: alloc.evaluate(problem, c)['cycles']
axis.plot(
  [cost_of(c) for c in uniform],
  measure(uniform),
  's',
  color='k',
  label='uniform: 2, 3, 4, 8 bits',
)
axis.plot(
  [cost_of(c) for c in by_table],
  measure(by_table),
  'x',
  ms=9,
  color='tab:orange',
  label='integer program on one-site losses',
)
axis.plot(
  [cost_of(c) for c in found.choices],
  found.losses,
  'o',
  mfc='none',
  ms=10,
  color='tab:blue',
  label='search by gradient',
)
for budget in budgets:
  axis.axvline(budget['cycles'], color='0.85', lw=1, zorder=0)
axis.set(xlabel='cycles a token (lines: budgets)')
axis.set(ylabel='divergence, nats')
axis.legend(fontsize=8)
fig.tight_layout()

# %% [markdown]
# A choice becomes a plan, which is saved as JSON and carried out by
# `compress`:

# %%
plan = alloc.candidates.plan_of(made, recipes, found.choices[1])
packed = mq.compress(params, plan, statistics=statistics)
for name, recipe in plan.to_json().items():
  print(name, recipe)
print(f'{mq.plans.size(packed).ebw:.3f} stored bits a weight')
