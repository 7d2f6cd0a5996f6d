"""A model written with plain weights, and what every export has in common."""

import contextlib
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from mq_jax import plans
from mq_jax.models import huggingface

Progress = Callable[[int, int], None]


def to_huggingface(
  folder: str | os.PathLike,
  model: huggingface.LanguageModel,
  *,
  dtype: Any = jnp.float32,
  max_shard_bytes: int = huggingface.SHARD_BYTES,
  progress: Progress | None = None,
) -> None:
  """Write a model with plain weights.

  Inputs that a matrix quantizes are not quantized by what reads the folder;
  the weights are the same.

  Args:
    folder: New, or an empty folder.
    model: `params` may hold packed matrices.
    dtype: float32 keeps decoded values as they are; bfloat16 and float16
      round them.
    max_shard_bytes: Most bytes of tensors in one file (but at least one).
    progress: Called with the tensors read back and their number.

  Raises:
    FileExistsError: if `folder` holds anything.
    ValueError: for another dtype, or weights that are not finite in it.
    OSError: if it can't be written. Nothing is left in any of these cases.
  """
  with staged(folder) as work:
    huggingface.write_folder(
      work,
      model.config,
      dense(model),
      dtype=dtype,
      tokenizer=model.tokenizer,
      bos=model.bos,
      eos=model.eos,
      max_shard_bytes=max_shard_bytes,
    )
    verify(work, model, dtype, progress)


def verify(
  folder: str | os.PathLike,
  model: huggingface.LanguageModel,
  dtype: Any,
  progress: Progress | None = None,
) -> None:
  """Compare a folder, as our reader has it, with the model it is of.

  Args:
    folder: In Hugging Face's layout.
    model: `params` may hold packed matrices.
    dtype: What the weights are rounded to.
    progress: Called with the tensors compared and their number.

  Raises:
    ValueError: if they differ in a bit of a weight, in the config, or in
      tokens; or the folder can't be read.
  """
  found = huggingface.open_folder(folder)
  config = huggingface.write_config(model.config)
  if huggingface.write_config(found.config) != config:
    raise ValueError(f'{folder}: its config reads back as another')
  text = lambda t: None if t is None else t.to_str()
  for what, read, own in (
    ('bos', found.bos, model.bos),
    ('eos', found.eos, model.eos),
    ('the tokenizer', text(found.tokenizer), text(model.tokenizer)),
  ):
    if read != own:
      raise ValueError(f'{folder}: {what} reads back as another')
  expected = dense(model)
  entries = huggingface.expected_tensors(model.config)
  for done, name in enumerate(entries, 1):
    read = found.arrays[name].astype(jnp.dtype(dtype))
    own = expected(name).astype(jnp.dtype(dtype))
    same = read.shape == own.shape and np.array_equal(_bits(read), _bits(own))
    if not same:
      count = int(np.sum(_bits(read) != _bits(own)))
      raise ValueError(
        f'{folder}: {name}: {count} of {own.size} weights read back as others '
        f'than the model has in {jnp.dtype(dtype).name}'
      )
    if progress is not None:
      progress(done, len(entries))


def _bits(x: np.ndarray) -> np.ndarray:
  """As whole numbers, so that -0 differs from 0."""
  return np.ascontiguousarray(x).view(f'u{x.dtype.itemsize}')


def dense(
  model: huggingface.LanguageModel,
) -> Callable[[str], np.ndarray]:
  """Tensors of a model's checkpoint by name, decoded when asked for."""
  entries = huggingface.expected_tensors(model.config)
  decoded = lambda path: np.asarray(
    plans.decode(huggingface.leaf(model.params, path))
  )
  return lambda name: huggingface.joined(entries[name], decoded)


@contextlib.contextmanager
def staged(folder: str | os.PathLike) -> Iterator[pathlib.Path]:
  """A new folder that gets the name `folder` if all goes well."""
  folder = pathlib.Path(folder).absolute()
  check_target(folder)
  folder.parent.mkdir(parents=True, exist_ok=True)
  work = folder.with_name(f'.{folder.name}.{uuid.uuid4().hex[:8]}.part')
  work.mkdir()
  try:
    yield work
    os.rename(work, folder)  # also onto an empty folder
  except OSError as error:
    named = OSError(error.errno, error.strerror, str(folder))
    raise named if error.strerror else error from error
  finally:
    shutil.rmtree(work, ignore_errors=True)


def check_target(folder: str | os.PathLike) -> None:
  """Raises FileExistsError unless there is nothing, or an empty folder."""
  folder = pathlib.Path(folder)
  if not os.path.lexists(folder):
    return
  if folder.is_symlink() or not folder.is_dir() or any(folder.iterdir()):
    raise FileExistsError(
      f'{folder}: is there already; nothing was written; choose a new folder'
    )
