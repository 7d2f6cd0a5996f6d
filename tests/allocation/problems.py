"""Random allocation problems, and the plain answer to them."""

import itertools

import numpy as np

from mq_jax import allocation
from mq_jax.testing import random_problem as draw

__all__ = ['RELEASED', 'draw', 'hawq_v3', 'loss', 'ranking']


def ranking(problem):
  """All choices that keep everything, best first: (sensitivity, choice)."""
  rows = np.arange(len(problem.sites))
  found = []
  for choice in itertools.product(
    range(len(problem.candidates)), repeat=len(rows)
  ):
    choice = np.array(choice)
    loss = problem.sensitivity[rows, choice].sum()
    tied = all(
      choice[i] == choice[j]
      for i in rows
      for j in rows
      if problem.groups[i] == problem.groups[j]
    )
    kept = all(
      table[rows, choice].sum() <= budget * (1 + 1e-12)
      for table, budget in zip(problem.cost, problem.budget)
    )
    if np.isfinite(loss) and tied and kept:
      found.append((loss, tuple(choice.tolist())))
  return sorted(found)


def loss(problem, choice):
  return allocation.evaluate(problem, choice)['sensitivity']


# HAWQ-V3, ResNet18 without first and last layer: the released notebook.
GAIN = np.array([
  0.46081, 0.12512, 0.10944, 0.03221,
  0.10475, 0.06299, 0.04716, 0.07317, 0.01816,
  0.05693, 0.04533, 0.00633, 0.03049, 0.01653,
  0.02957, 0.02836, 0.01422, 0.02923, 0.01265,
])  # fmt: skip
PARAMETERS = np.array(
  [36864] * 4
  + [73728, 147456, 8192, 147456, 147456]
  + [294912, 589824, 32768, 589824, 589824]
  + [1179648, 2359296, 131072, 2359296, 2359296]
)
MACS = np.array(
  [115.605504] * 4
  + [57.802752, 115.605504, 6.422528, 115.605504, 115.605504] * 3
)
MS_INT4 = np.array([
  0.2109, 0.2109, 0.2110, 0.2109,
  0.1364, 0.1917, 0.0253, 0.1915, 0.1914,
  0.1140, 0.2056, 0.0192, 0.2057, 0.2057,
  0.1319, 0.2229, 0.0179, 0.2230, 0.2229,
])  # fmt: skip
MS_INT8 = np.array([
  0.3619, 0.3621, 0.3114, 0.3045,
  0.1918, 0.3895, 0.0334, 0.3890, 0.3893,
  0.1913, 0.3431, 0.0280, 0.3431, 0.3431,
  0.2112, 0.3738, 0.0290, 0.3740, 0.3741,
])  # fmt: skip
RELEASED = {
  ('bytes', 0.25): '8888888888888844444',
  ('bytes', 0.5): '8888888888888884844',
  ('bytes', 0.75): '8888888888888488884',
  ('bops', 0.25): '8884848444444444444',
  ('bops', 0.5): '8884888848884444444',
  ('bops', 0.75): '8888888848888484884',
  ('latency_ms', 0.25): '8884848444444444444',
  ('latency_ms', 0.5): '8888848848884484844',
  ('latency_ms', 0.75): '8888888848888484884',
}


def hawq_v3(quantity, ratio):
  """The problem behind one of the released bit files, and its bits."""
  cost = {
    'bytes': np.stack([0.5 * PARAMETERS, 1.0 * PARAMETERS], axis=1),
    'bops': np.stack([16 * MACS, 64 * MACS], axis=1),
    'latency_ms': np.stack([MS_INT4, MS_INT8], axis=1),
  }
  low, high = cost[quantity].sum(axis=0)
  problem = allocation.make_problem(
    np.stack([GAIN, 0 * GAIN], axis=1),
    cost,
    {quantity: low + ratio * (high - low)},
    candidates=['4', '8'],
    ties=[(4, 6), (9, 11), (14, 16)],
  )
  return problem, RELEASED[quantity, ratio]
