"""Named checks, run one after the other, and what they have in common."""

import difflib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


class Report(NamedTuple):
  """What a suite did.

  Attributes:
    thing: What was checked.
    passed: Names of the checks that passed.
    skipped: Reasons by name of the checks that were left out.
  """

  thing: str
  passed: tuple[str, ...]
  skipped: dict[str, str]

  def __str__(self) -> str:
    lines = [f'{self.thing}: {len(self.passed)} checks passed']
    lines += [f'  {name}' for name in self.passed]
    lines += [f'  {name} skipped: {why}' for name, why in self.skipped.items()]
    return '\n'.join(lines)


class Skip(Exception):
  """Raised by a check that does not apply; the message is the reason."""


Checks = Mapping[str, Callable[[], None]]


def run(
  suite: str, thing: str, checks: Checks, skip: Mapping[str, str]
) -> Report:
  """Run checks; the first must pass for the rest to make sense.

  Args:
    suite: Name of the public function, for errors.
    thing: What is checked.
    checks: Functions by name, in order; they raise when they fail.
    skip: Reasons by name of the checks that the caller leaves out.

  Raises:
    ValueError: if `skip` names no check.
    AssertionError: if checks failed: a line for each.
  """
  for name in skip:
    if name not in checks:
      near = difflib.get_close_matches(name, checks, n=3, cutoff=0.4) or checks
      raise ValueError(
        f'{suite}: skip={name!r} is no check; did you mean {", ".join(near)}?'
      )
  passed, skipped, failed, cause = [], {}, [], None
  for name, check in checks.items():
    if name in skip:
      skipped[name] = skip[name]
      continue
    try:
      check()
    except Skip as reason:
      skipped[name] = str(reason)
    except Exception as error:
      failed.append(f'{suite}: {thing}: {name}: {_told(error)}')
      cause = cause or error
      if not passed and not skipped:
        break  # nothing else would run, either
    else:
      passed.append(name)
  if failed:
    raise AssertionError('\n'.join(failed)) from cause
  return Report(thing, tuple(passed), skipped)


def _told(error: Exception) -> str:
  if isinstance(error, AssertionError):
    return str(error) or 'an assert failed'
  first = (str(error).strip() or 'no message').splitlines()[0]
  return f'raised {type(error).__name__}: {first}'


def check(holds: bool, message: str) -> None:
  """Raises AssertionError with a message unless something holds."""
  if not holds:
    raise AssertionError(message)


def same_bits(a: Any, b: Any) -> bool:
  """Whether two trees have equal structure, dtypes and bits."""
  if jax.tree.structure(a) != jax.tree.structure(b):
    return False
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(_array(x).tobytes() == _array(y).tobytes() for x, y in pairs)


def _array(x: Any) -> np.ndarray:
  if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  return np.asarray(x)


def finite(tree: Any) -> bool:
  """Whether all floats of a tree are finite."""
  return all(
    bool(np.isfinite(np.asarray(x, np.float64)).all())
    for x in jax.tree.leaves(tree)
    if jnp.issubdtype(jnp.result_type(x), jnp.floating)
  )


def lowered(f: Callable, *arrays: Any) -> str:
  """The program that `f` becomes, traced anew, not compiled."""
  # A function of its own: `jit` would not trace the same one twice.
  return jax.jit(lambda *x: f(*x)).lower(*arrays).as_text()


def check_size(small: str, large: str, what: str) -> None:
  """Raises AssertionError if a program grew with the size of its input."""
  lines = [len(text.splitlines()) for text in (small, large)]
  # Padding to whole blocks may come and go with a size: a few lines.
  check(
    lines[1] <= 1.1 * lines[0] + 8,
    f'the lowered program has {lines[0]} lines, and {lines[1]} {what}; use '
    'lax.scan, fori_loop or vmap instead of Python loops',
  )


def others(tree: Any) -> Any:
  """The same options with other numbers in their leaves."""

  def other(x):
    if isinstance(x, bool) or not jnp.issubdtype(
      jnp.result_type(x), jnp.number
    ):
      return x
    if isinstance(x, int):
      return x + 1
    if isinstance(x, float):
      return 0.75 * x
    return (x * np.asarray(0.75, x.dtype)).astype(x.dtype)

  return jax.tree.map(other, tree)


def traceable(tree: Any) -> bool:
  """Whether all leaves are numbers, so that `jit` takes them."""
  leaves = jax.tree.leaves(tree)
  kinds = (bool, int, float, np.ndarray, np.generic, jax.Array)
  return all(isinstance(x, kinds) for x in leaves)


def spread(tree: Any) -> Any:
  """Arrays with their first axis over all devices.

  Raises:
    Skip: if there is only one device.
  """
  devices = jax.devices()
  if len(devices) < 2:
    raise Skip(
      'one device; XLA_FLAGS=--xla_force_host_platform_device_count=2 gives '
      'a CPU two'
    )
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((len(devices),), ('data',), axis_types=auto)
  return jax.device_put(tree, NamedSharding(mesh, PartitionSpec('data')))
