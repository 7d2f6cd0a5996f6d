"""Cycle by cycle: a tile of rows which share a few ReCoN units."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

POLICIES = ('round_robin', 'downstream', 'upstream')


class PipelineRun(NamedTuple):
  """What one tile did; i32 scalars (an axis more under `vmap`).

  Attributes:
    cycles: Cycles until the last vector has left the last row.
    requests: Grants that the units gave; vectors times asking lanes.
    delayed: Requests that were not granted in the cycle they arose in.
    waiting_cycles: Cycles that requests waited, summed over requests.
  """

  cycles: jax.Array
  requests: jax.Array
  delayed: jax.Array
  waiting_cycles: jax.Array


class _State(NamedTuple):
  """Registers of the tile; r rows, s lanes."""

  cycle: jax.Array  # i32
  landed: jax.Array  # i32[r, s]: vectors in front of a row
  compute: jax.Array  # u32[r, 1, words]: delay line of the row
  asking: jax.Array  # i32[r, s]: computed, still at the end of the row
  flight: jax.Array  # u32[r, s, words]: delay line through a unit
  computing: jax.Array  # i32[r, 1]: vectors in `compute`
  flying: jax.Array  # i32[r, s]: vectors in `flight`
  left: jax.Array  # i32[s]: vectors that left the last row
  turn: jax.Array  # i32: port with the first claim
  requests: jax.Array  # i32
  delayed: jax.Array  # i32
  waiting: jax.Array  # i32


def _line(shape: tuple[int, ...], length: int) -> jax.Array:
  """Empty delay lines, a bit per cycle, 32 in a word. u32[*shape, words]."""
  return jnp.zeros((*shape, -(-length // 32)), jnp.uint32)


def _last(line: jax.Array, length: int) -> jax.Array:
  """What leaves the lines in this cycle. bool[*shape]."""
  return (line[..., -1] >> jnp.uint32((length - 1) % 32)) & 1 == 1


def _shift(line: jax.Array, entering: jax.Array) -> jax.Array:
  """The lines a cycle on: bit i of the words entered i cycles ago."""
  carried = jnp.concatenate(
    [entering[..., None].astype(jnp.uint32), line[..., :-1] >> 31], axis=-1
  )
  return line << 1 | carried


def _grant(want, units, turn, policy):
  """At most `units` of the wanting ports [p], and whose turn is next."""
  ports = want.shape[0]
  port = jnp.arange(ports)
  # A product with ones, exact below 2^24: faster than a cumsum on a CPU.
  upto = jnp.tril(jnp.ones((ports, ports))) @ want.astype(jnp.float32)
  upto = upto.astype(jnp.int32)
  total = upto[-1]
  if policy == 'downstream':
    rank = total - upto
  elif policy == 'upstream':
    rank = upto - 1
  else:
    before = jnp.sum(want & (port < turn), dtype=jnp.int32)
    rank = upto - 1 - before + jnp.where(port < turn, total, 0)
  granted = want & (rank < units)
  is_last = granted & (rank == jnp.minimum(units, total) - 1)
  last = jnp.max(jnp.where(is_last, port, 0))
  return granted, jnp.where(total > 0, (last + 1) % ports, turn)


def _cycle(state, outlier, m, units, hop, latency, depth, policy):
  """One cycle: arrive, ask, move, accept."""
  rows, lanes = outlier.shape

  # What the delay lines release: into row ends, and in front of next rows.
  fresh = _last(state.compute, hop)  # bool[r, 1]
  asking = state.asking + fresh.astype(jnp.int32)
  arrived = _last(state.flight, latency).astype(jnp.int32)
  source = jnp.full((1, lanes), state.cycle < m).astype(jnp.int32)
  landed = state.landed + jnp.concatenate([source, arrived[:-1]])
  left = state.left + arrived[-1]
  computing = state.computing - fresh.astype(jnp.int32)
  flying = state.flying - arrived

  # A vector moves on only with a credit: a place in front of the next row,
  # kept for it while it flies. Behind the last row there is always room.
  room = jnp.concatenate(
    [landed[1:] + flying[:-1] < depth, jnp.ones((1, lanes), bool)]
  )
  ready = (asking > 0) & room
  granted, turn = _grant(
    (ready & outlier).reshape(-1), units, state.turn, policy
  )
  granted = granted.reshape(rows, lanes)
  plain = (ready & ~outlier).astype(jnp.int32)
  asking = asking - granted.astype(jnp.int32) - plain
  landed = landed + jnp.pad(plain[:-1], ((1, 0), (0, 0)))
  left = left + plain[-1]

  # The lanes of a row share its activation: a row accepts all or none. It
  # has `hop` registers, so it stalls while its end is taken.
  accept = jnp.all(
    (landed > 0) & (computing + asking < hop), axis=1, keepdims=True
  )
  landed = landed - accept.astype(jnp.int32)

  waits = jnp.where(outlier, asking, 0)
  at_once = granted & (asking == 0)
  return _State(
    cycle=state.cycle + 1,
    landed=landed,
    compute=_shift(state.compute, accept),
    asking=asking,
    flight=_shift(state.flight, granted),
    computing=computing + accept.astype(jnp.int32),
    flying=flying + granted.astype(jnp.int32),
    left=left,
    turn=turn,
    requests=state.requests + jnp.sum(granted, dtype=jnp.int32),
    delayed=state.delayed
    + jnp.sum(fresh & outlier & ~at_once, dtype=jnp.int32),
    waiting=state.waiting + jnp.sum(waits, dtype=jnp.int32),
  )


@functools.partial(jax.jit, static_argnums=(3, 4, 6))
def _run(outlier, m, units, hop, latency, depth, policy):
  rows, lanes = outlier.shape
  zero = jnp.int32(0)
  state = _State(
    cycle=zero,
    landed=jnp.zeros((rows, lanes), jnp.int32),
    compute=_line((rows, 1), hop),
    asking=jnp.zeros((rows, lanes), jnp.int32),
    flight=_line((rows, lanes), latency),
    computing=jnp.zeros((rows, 1), jnp.int32),
    flying=jnp.zeros((rows, lanes), jnp.int32),
    left=jnp.zeros((lanes,), jnp.int32),
    turn=zero,
    requests=zero,
    delayed=zero,
    waiting=zero,
  )
  state = jax.lax.while_loop(
    lambda s: jnp.min(s.left) < m,
    lambda s: _cycle(s, outlier, m, units, hop, latency, depth, policy),
    state,
  )
  # A vector that leaves during cycle c (from 0) is out after c cycles: the
  # registers it left were written at the end of cycle c - 1.
  return PipelineRun(
    jnp.maximum(state.cycle - 1, 0),
    state.requests,
    state.delayed,
    state.waiting,
  )


def run_tile(
  outlier_rows: jax.Array,
  m: jax.typing.ArrayLike,
  units: jax.typing.ArrayLike = 1,
  *,
  hop: int = 2,
  latency: int = 8,
  depth: jax.typing.ArrayLike | None = None,
  policy: str = 'round_robin',
) -> PipelineRun:
  """Stream `m` vectors through the rows of one weight-stationary tile.

  The machine, which knows no closed form:

  - Vector i is offered to row 0 in cycle i. A row accepts one vector a cycle
    and computes it in `hop` cycles, one register each; it stalls while its
    end is taken (elastic pipeline, ready/valid handshake).
  - A lane of a row without outliers hands a vector to the next row at once.
    A lane with outliers asks an arbiter at the row's end, in order, one
    vector a cycle; a grant sends the vector through a unit, `latency`
    cycles, one new vector per unit and cycle.
  - In front of every row there are `depth` places per lane, and a vector
    moves only with a place kept for it (credits), so nothing is lost and
    nothing can block for ever: behind the last row there is room.
  - The lanes of a row share the activation of its PEs: the next row starts
    on a vector when all its lanes have arrived.
  - The arbiter grants at most `units` ports (row, lane) a cycle, by default
    in turn. Taking turns keeps the paper's promise that the last of N
    simultaneous requests waits N - 1 cycles (a fixed order would not, once
    newcomers overtake) and costs one pointer. 'downstream' prefers rows near
    the output, thus the oldest vectors: it finishes batches one after the
    other and leaves the units idle at the end. 'upstream' is the reverse.

  `m`, `units`, `depth` and the mask may be traced, and mapped by `vmap`; the
  delays decide shapes and are static.

  Args:
    outlier_rows: Rows which hold outliers: bool[rows], or bool[rows, lanes]
      where the lanes of a packed PE ask one by one.
    m: Vectors, i.e. tokens; a whole number, at least 1.
    units: ReCoN units that the rows share, at least 1.
    hop: Cycles from a row to the next, at least 1; 2 in the RTL.
    latency: Cycles through a unit, its arbiter register included, at least
      1; log2(columns) + 2 for the published network.
    depth: Places in front of a row; by default latency + 1, the fewest with
      which one row sustains a vector a cycle. With fewer, a row with
      outliers takes (latency + 1) / depth cycles a vector.
    policy: Whom the arbiter prefers: 'round_robin', 'downstream' or
      'upstream'.

  Returns:
    The `PipelineRun`. Without outliers its cycles are m - 1 + hop * rows.

  Raises:
    ValueError: for another policy, a mask that is not bool[rows] or
      bool[rows, lanes], or delays, `m`, `units` or `depth` below 1.

  Source:
    MicroScopiQ, arXiv 2411.05282: rows share ReCoN through an arbiter with
    a handshake, N requests in a cycle make the last wait N - 1. Queue
    depths, credits and turns are our choice.

  Examples:
    >>> run = run_tile(jnp.array([False, True, False, False]), 10)
    >>> int(run.cycles), int(run.requests), int(run.delayed)
    (25, 10, 0)
  """
  outlier = jnp.asarray(outlier_rows)
  if outlier.ndim not in (1, 2) or outlier.dtype != bool or not outlier.size:
    raise ValueError(
      'run_tile: outlier_rows must be bool[rows] or bool[rows, lanes], got '
      f'{outlier.dtype}{list(outlier.shape)}; map further axes with vmap'
    )
  if policy not in POLICIES:
    raise ValueError(
      f'run_tile: policy={policy!r} is none of {", ".join(POLICIES)}'
    )
  if depth is None:
    depth = latency + 1
  sizes = {'hop': hop, 'latency': latency, 'm': m, 'units': units}
  for name, value in (*sizes.items(), ('depth', depth)):
    if isinstance(value, int) and value < 1:
      raise ValueError(f'run_tile: {name}={value} must be at least 1')
  if outlier.ndim == 1:
    outlier = outlier[:, None]
  as_int = lambda x: jnp.asarray(x).astype(jnp.int32)
  return _run(
    outlier, as_int(m), as_int(units), hop, latency, as_int(depth), policy
  )
