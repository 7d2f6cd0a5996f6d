"""What candidates and choices take: bits, bytes, and costs of hardware."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mq_jax import allocation, hardware, plans
from mq_jax.allocation import candidates as candidates_lib
from mq_jax.lab.allocating import setup


def _on_hardware(bench, rows, matrices) -> dict[str, np.ndarray]:
  """Costs f64[rows] of packed matrices, one for each of some sites."""
  design = bench.ask.design
  bits = setup.width(bench)
  work = bench.workload
  pick = lambda x: np.asarray(x)[rows]
  cost = hardware.cost(
    design.accelerator,
    hardware.workload.gemm(
      *(pick(getattr(work, field)) for field in ('m', 'k', 'n', 'count')),
      names=[work.names[i] for i in rows],
    ),
    hardware.stack([hardware.of_matrix(x, bits) for x in matrices]),
  )
  return {
    'cycles': cost.total_cycles,
    'compute_cycles': cost.compute_cycles,
    'time_s': 1e-9 * cost.total_cycles / design.clock_ghz,
    'energy_pj': cost.energy_pj.total,
    'dram_bytes': cost.dram_bytes,
  }


def costs_of(
  bench: setup.Bench, made: candidates_lib.Made
) -> dict[str, np.ndarray]:
  """Everything that can be budgeted, measured on the packed candidates.

  Returns:
    By quantity, f64[l, c]; zero where a site may not have the candidate.

  Raises:
    ValueError: for what the accelerator refuses.
  """
  found = {'ebw': made.bits / _weights(made).sum(), 'bytes': made.bits / 8}
  if bench.ask.design is None:
    return found
  for j, packed in enumerate(made.packed):
    rows = np.flatnonzero(bench.allowed[:, j])
    matrices = plans.matrices(packed)
    # On an accelerator whole sites choose: there are no blocks.
    mine = [matrices[bench.sites[i].name] for i in rows]
    for name, column in _on_hardware(bench, rows, mine).items():
      table = found.setdefault(name, np.zeros(bench.allowed.shape))
      table[rows, j] = column
  return found


def achieved(
  bench: setup.Bench,
  made: candidates_lib.Made,
  choice: np.ndarray,
  packed: Any,
) -> dict[str, Any]:
  """What packed parameters take: totals, and by all that chose.

  Args:
    bench: The bench.
    made: The candidates.
    choice: i64[l].
    packed: The choice carried out, on which totals are measured.

  Returns:
    'total' by quantity, and 'rows' with arrays f64[l] by quantity.
  """
  size = plans.size(packed)
  total = {'ebw': float(size.ebw), 'bytes': size.bits / 8}
  bits = made.bits[np.arange(len(choice)), choice]
  rows = {'ebw': bits / _weights(made), 'bytes': bits / 8}
  if bench.ask.design is not None:
    matrices = plans.matrices(packed)
    mine = [matrices[site.name] for site in bench.sites]
    rows |= _on_hardware(bench, np.arange(len(mine)), mine)
    total |= {n: float(np.sum(x)) for n, x in rows.items() if n not in total}
  return {'total': total, 'rows': rows}


def _weights(made: candidates_lib.Made) -> np.ndarray:
  """Weights of each site or block. f64[l]."""
  candidates = made.candidates
  side = -2 if candidates.axis == 'rows' else -1
  return np.array(
    [
      np.prod(site.matrix_shape)
      * (span.stop - span.start)
      / site.matrix_shape[side]
      for site in candidates.sites
      for span in candidates.spans(site)
    ]
  )


def make_problem(
  bench: setup.Bench,
  made: candidates_lib.Made,
  costs: Mapping[str, np.ndarray],
  sensitivity: np.ndarray | None = None,
) -> allocation.Problem:
  """The problem, of the budgeted quantities, without budgets.

  Args:
    bench: The bench.
    made: The candidates.
    costs: From `costs_of`.
    sensitivity: f64[l, c]; zeros if left out, to check budgets with.
  """
  table = np.zeros(bench.allowed.shape) if sensitivity is None else sensitivity
  return allocation.make_problem(
    np.where(bench.allowed, table, np.inf),
    {b.quantity: costs[b.quantity] for b in bench.ask.budgets},
    {},
    sites=made.candidates.names,
    candidates=made.candidates.labels,
    ties=ties(bench, made),
  )


def ties(bench: setup.Bench, made: candidates_lib.Made) -> list[list[str]]:
  """Ties of all that chooses; blocks of tied sites all choose alike."""
  blocks = made.candidates.blocks
  names = np.reshape(made.candidates.names, (-1, blocks))
  own = {s.name: row for s, row in zip(bench.sites, names, strict=True)}
  return [
    [str(name) for site in group for name in own[site]] for group in bench.ties
  ]
