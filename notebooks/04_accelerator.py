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
# # The accelerator: where cycles go
#
# `mq.hardware.cost` prices matmuls on an accelerator. Accelerators, workloads
# and precisions are pytrees of numbers: they broadcast, and the relaxed form
# has gradients in bits and in the sizes of the array.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

import mq_jax as mq

hw = mq.hardware
names = ('q_proj', 'o_proj', 'up_proj', 'down_proj')
k = np.array([4096, 4096, 4096, 11008])
n = np.array([4096, 4096, 11008, 4096])
work = {
  'prefill, 1024 tokens': hw.workload.gemm(1024, k, n, names=names),
  'decode, 1 token': hw.workload.gemm(1, k, n, names=names),
}
array = hw.accelerators.systolic(
  'ws',
  rows=64,
  cols=64,
  double_buffered=True,
  memory=hw.accelerators.buffers(64, dram_bytes_per_cycle=16.0),
)

# %% [markdown]
# ## Where they go
#
# Cycles of a layer's matmuls in a 7 B model on a 64 x 64 array, with 8 bits for
# activations. `stall` is the time that the multipliers wait, here for a DRAM
# of 16 bytes a cycle.

# %%
fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), dpi=80)
widths = (16, 8, 4, 2)
for axis, (title, matmuls) in zip(axes, work.items()):
  bottom = np.zeros(len(widths))
  totals = [
    hw.cost(array, matmuls, hw.precision(b, 8, output_bits=16)).sum()
    for b in widths
  ]
  for part, color in (('compute_cycles', '0.4'), ('stall_cycles', '0.85')):
    high = np.array([float(getattr(t, part)) for t in totals]) / 1e6
    label = part.split('_')[0]
    axis.bar(
      [str(b) for b in widths],
      high,
      0.6,
      bottom,
      color=color,
      ec='k',
      lw=0.5,
      label=label,
    )
    bottom += high
  axis.set(title=title, xlabel='bits a weight', ylabel='million cycles')
axes[1].legend(fontsize=8)
fig.tight_layout()

# %% [markdown]
# Prefill reads its activations again for every 64 outputs, and waits for them:
# fewer bits of the weights hardly make it faster. Decoding reads every weight
# for one token; there bits are time and energy.

# %%
print(f'{"":22} {"bits":>4} {"cycles":>10} {"mJ":>7} {"DRAM share":>11}')
for title, matmuls in work.items():
  for b in (8, 4, 2):
    total = hw.cost(array, matmuls, hw.precision(b, 8, output_bits=16)).sum()
    energy = float(total.energy_pj.total)
    share = float(total.energy_pj.dram) / energy
    cycles = int(total.total_cycles)
    print(f'{title:22} {b:4} {cycles:10} {energy * 1e-9:7.3f} {share:11.0%}')

# %% [markdown]
# ## Gradients
#
# `relaxed_cost` is the same formulas with soft tiles and soft maxima. Its
# gradient says what one more row, or one more byte a cycle, would bring. In
# units that compare: by how many per cent cycles change when a number grows
# by one per cent.


# %%
def log_cycles(array, matmuls, bits):
  precision = hw.precision(bits, 8.0, output_bits=16.0)
  return jax.numpy.log(
    hw.relaxed_cost(array, matmuls, precision).sum().total_cycles
  )


floats = jax.tree.map(float, array)
print(f'{"per cent of cycles by":24}' + ''.join(f'{t:>24}' for t in work))
slopes = [
  jax.grad(log_cycles, argnums=(0, 2))(floats, matmuls, 4.0)
  for matmuls in work.values()
]
numbers = {
  'rows': lambda a: a.rows,
  'columns': lambda a: a.columns,
  'DRAM bandwidth': lambda a: a.memory.dram_bytes_per_cycle,
}
for name, get in numbers.items():
  each = [float(get(by_array) * get(floats)) for by_array, _ in slopes]
  print(f'{name:24}' + ''.join(f'{x:24.3f}' for x in each))
each = [float(by_bits * 4.0) for _, by_bits in slopes]
print(f'{"bits a weight":24}' + ''.join(f'{x:24.3f}' for x in each))

# %% [markdown]
# ## Many designs at once
#
# Fields broadcast, sites against designs: 40 arrays in one call.

# %%
rows = np.array([16, 32, 64, 128, 256])
bandwidth = np.geomspace(16, 2048, 8)
grid = np.meshgrid(rows, bandwidth, indexing='ij')
memory = hw.accelerators.buffers(
  128, dram_bytes_per_cycle=grid[1].reshape(-1, 1)
)
designs = hw.accelerators.systolic(
  'ws',
  rows=grid[0].reshape(-1, 1),
  cols=grid[0].reshape(-1, 1),
  double_buffered=True,
  memory=memory,
)
bits = hw.precision(4, 8, output_bits=16)
fig, axis = plt.subplots(figsize=(5.5, 3.4), dpi=80)
total = hw.cost(designs, work['prefill, 1024 tokens'], bits).sum()
lines = np.reshape(total.total_cycles, grid[0].shape)
for size, line, marker in zip(rows, lines, 'osD^v'):
  label = f'{size} x {size}'
  axis.loglog(bandwidth, line / 1e6, f'{marker}-', ms=4, label=label)
axis.set(xlabel='DRAM bandwidth, bytes a cycle', ylabel='million cycles')
axis.set_title('prefill, 4-bit weights')
axis.legend(fontsize=8, loc='center left', bbox_to_anchor=(1.0, 0.5))
fig.tight_layout()
