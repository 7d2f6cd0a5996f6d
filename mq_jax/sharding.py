"""A model on many devices: a mesh divides batches one way, weights the other.

All else stays as it is: calibration, search and evaluation compile what they
are given, and XLA moves data where `on_mesh` says that they are divided.
Every process of a distributed run does the same; the first of them writes.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ('data', 'model')

Model = TypeVar('Model')


def open_mesh(text: str | None) -> Mesh | None:
  """The mesh of a text such as `data=4,model=2`; None of None."""
  return None if text is None else make_mesh(**read_mesh(text))


def make_mesh(data: int = 1, model: int = 1) -> Mesh:
  """A mesh of devices, `data` times `model`.

  Args:
    data: Devices that share a batch.
    model: Devices that share a weight.

  Raises:
    ValueError: if there are fewer devices, or processes with none of them.
  """
  for name, size in (('data', data), ('model', model)):
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
      raise ValueError(f'mesh: {name} needs a whole number >= 1, got {size!r}')
  devices = jax.devices()
  if data * model > len(devices):
    raise ValueError(
      f'mesh: data={data} times model={model} needs {data * model} devices; '
      f'there are {len(devices)} ({devices[0].platform})'
    )
  if jax.process_count() > 1 and data * model != len(devices):
    raise ValueError(
      f'mesh: {jax.process_count()} processes have {len(devices)} devices; '
      f'data={data} times model={model} must use all of them'
    )
  grid = np.array(devices[: data * model]).reshape(data, model)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 2)


def read_mesh(text: str) -> dict[str, int]:
  """Sizes from `data=4,model=2`, in any order; what is not said is 1.

  Raises:
    ValueError: for a text of another form.
  """
  sizes: dict[str, int] = {}
  for part in text.split(','):
    name, _, size = (x.strip() for x in part.partition('='))
    if name not in AXES or name in sizes or not size.isdecimal():
      raise ValueError(f'mesh {text!r}: needs the form data=4,model=2')
    sizes[name] = int(size)
  return sizes


def weight_sharding(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
  """Over the model axis along the last dimension that it divides, if any.

  Vectors stay whole: they are small.
  """
  size = mesh.shape['model']
  for axis in reversed(range(len(shape))):
    if len(shape) > 1 and size > 1 and shape[axis] % size == 0:
      spec = [None] * len(shape)
      spec[axis] = 'model'
      return NamedSharding(mesh, PartitionSpec(*spec))
  return NamedSharding(mesh, PartitionSpec())


def on_mesh(model: Model, mesh: Mesh) -> Model:
  """A model that computes on a mesh.

  Args:
    model: Its `params` are a tree of plain arrays, its `apply` takes them and
      inputs [b, ...]. A dataclass.
    mesh: From `make_mesh`.

  Returns:
    The same model. Its weights lie over the model axis; whatever parameters
    and inputs `apply` is given are divided on the way in, inputs only if the
    batch can be divided.
  """
  return dataclasses.replace(
    model, params=place(model.params, mesh), apply=divided(model.apply, mesh)
  )


def place(params: Any, mesh: Mesh) -> Any:
  """Parameters as they lie on a mesh: weights over the model axis."""
  return jax.tree.map(lambda x: _put(x, weight_sharding(x.shape, mesh)), params)


@functools.cache
def divided(apply: Callable[..., Any], mesh: Mesh) -> Callable:
  """`apply` on a mesh; the same object again, so nothing compiles again."""
  rows = NamedSharding(mesh, PartitionSpec('data'))
  constrain = jax.lax.with_sharding_constraint

  def on_devices(params, *inputs):
    if all(x.shape[0] % mesh.shape['data'] == 0 for x in inputs):
      inputs = [constrain(x, rows) for x in inputs]
    divided = jax.tree.map(
      lambda x: constrain(x, weight_sharding(x.shape, mesh)), params
    )
    return apply(divided, *inputs)

  return on_devices


def _put(x: Any, sharding: NamedSharding) -> jax.Array:
  """An array that every process has, divided; each takes its own part."""
  host = to_host(x)
  return jax.make_array_from_callback(
    host.shape, sharding, lambda index: host[index]
  )


def whole(tree: Any) -> Any:
  """Arrays of a mesh with a full copy on each of its devices; others as is.

  Quantization works on whole matrices, on each process alike.
  """

  def one(x):
    sharding = getattr(x, 'sharding', None)
    if not isinstance(sharding, NamedSharding) or x.is_fully_replicated:
      return x
    return _gather(sharding.mesh)(x)

  return jax.tree.map(one, tree)


@functools.cache
def _gather(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
  """Compiled once for each mesh and shape."""
  full = NamedSharding(mesh, PartitionSpec())
  return jax.jit(lambda x: x, out_shardings=full)


def to_host(x: Any) -> np.ndarray:
  """All of an array, on each process."""
  if isinstance(x, jax.Array) and not (
    x.is_fully_addressable or x.is_fully_replicated
  ):
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
  return np.asarray(x)


def is_first() -> bool:
  """Whether this process is the one that writes."""
  return jax.process_index() == 0


def agreed(number: int) -> int:
  """A number of the first process, of 31 bits, on all of them."""
  if jax.process_count() == 1:
    return number
  found = multihost_utils.broadcast_one_to_all(np.array(number, np.int32))
  return int(found)
