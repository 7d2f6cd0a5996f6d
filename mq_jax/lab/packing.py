"""An artifact written a block at a time, in a folder that survives a kill.

    stream.json               the fingerprint: all that the result depends on
    packed.bin                matrices of the blocks done
    blocks.jsonl              a line a block: its entries in the manifest
    rest-N.safetensors        what block N keeps unquantized
    carried-N.safetensors     activations that enter block N, the next one,
                              and, to learn from, the original model's

A block is done once its line is written. At the end the folder becomes an
artifact (`mq_jax.artifacts`); of these files stream.json stays.
"""

import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mq_jax import artifacts, learn, plans, streaming
from mq_jax.lab import files, listing, progress
from mq_jax.models import tensors
from mq_jax.plans import Plan
from mq_jax.streaming import Blocks

_BLOCKS = 'blocks.jsonl'


class Packed(NamedTuple):
  """What `pack` did.

  Attributes:
    manifest: Of the artifact.
    records: One record a site, see `plans.records`.
    seconds: Spent on each part of the work, by all processes that had a part
      in it: read, calibrate, solve, carry, write.
  """

  manifest: dict
  records: list[dict]
  seconds: dict[str, float]


def check(path: pathlib.Path, setup: Mapping[str, Any]) -> bool:
  """Refuse a folder that is not this one's; nothing is written.

  Returns:
    Whether it was begun there.

  Raises:
    ValueError: if the folder holds anything else, a finished artifact, or one
      that was begun with another setup, with what differs.
  """
  if artifacts.is_artifact(path):
    artifacts.check_target(path)
  marker = path / listing.STREAM
  if not marker.is_file():
    files.check_new(path, 'an artifact', ())
    return False
  try:
    there = json.loads(marker.read_text('utf-8'))
  except ValueError as error:
    raise files.RunError(f'{marker}: not JSON: {error}') from None
  files.check_same(path, there, setup)
  return True


def pack(
  path: pathlib.Path,
  blocks: Blocks,
  plan: Plan,
  batches: Sequence[np.ndarray],
  *,
  setup: Mapping[str, Any],
  inputs: str,
  coverage: plans.Coverage,
  model: Mapping[str, Any],
  tokenizer: str | None,
  display: progress.Display,
) -> Packed:
  """Quantize a model into a folder, or what is missing of it.

  Args:
    path: The folder.
    blocks: The model.
    plan: Recipes of its blocks' sites.
    batches: Tokens to calibrate on. i32[b, t] each.
    setup: Plain data on which the result depends.
    inputs: As for `streaming.quantize`.
    coverage: As for `streaming.quantize`.
    model: Config for the manifest, as for `artifacts.save`.
    tokenizer: Text of a tokenizer.json.
    display: Where progress is shown.

  Raises:
    ValueError: as `check` and `streaming.quantize`, or if another process is
      at the folder.
    OSError: naming the file that could not be written.
  """
  setup = json.loads(json.dumps(setup))  # as it is read back
  check(path, setup)
  path.mkdir(parents=True, exist_ok=True)
  with files.locked(path):
    if not check(path, setup):
      _check_weights(blocks, display)
      files.write_whole(path / listing.STREAM, json.dumps(setup, indent=1))
    files.drop_torn(path / _BLOCKS)
    lines = files.read_lines(path / _BLOCKS)
    before = len(lines)
    display.say(f'{path}: {before} of {blocks.count} blocks are there')
    with display.rows(before, blocks.count, 'blocks'):
      if before < blocks.count:
        streams = _carried(path, before, blocks, batches, display)
        options = {'inputs': inputs, 'coverage': coverage}
        _blocks(path, blocks, plan, lines, streams, options, display)
      manifest = _finish(path, blocks, lines, model, tokenizer)
  return Packed(
    manifest,
    [record for line in lines for record in line['records']],
    _total([line['seconds'] for line in lines]),
  )


def _check_weights(blocks: Blocks, display: progress.Display) -> None:
  """Read every block once: better to hear of bad weights now than at night."""
  with display.rows(0, blocks.count, 'checking weights'):
    for i in range(blocks.count):
      blocks.read(i)
      display.row_done()


# What enters a block in the model that is quantized, and in the original.
_STREAMS = ('carried', 'original')


def _carried(path, index, blocks, batches, display) -> tuple[list, list]:
  """Activations that enter a block: kept, or of the embedding."""
  if not index:
    display.steps('embedding')
    return streaming.begin(blocks, batches), []
  if not batches:
    return [], []
  found = tensors.read_safetensors(_carried_file(path, index))
  streams = {name: [] for name in _STREAMS}
  for i in range(len(batches)):
    for name, arrays in streams.items():
      if f'{name}-{i}' in found:
        arrays.append(found[f'{name}-{i}'])
  return tuple(streams.values())


def _carried_file(path: pathlib.Path, index: int) -> pathlib.Path:
  return path / f'carried-{index}.safetensors'


def _rest_file(path: pathlib.Path, index: int) -> pathlib.Path:
  return path / f'rest-{index}.safetensors'


def _blocks(path, blocks, plan, lines, streams, options, display) -> None:
  """Do the blocks that are missing; adds their lines."""
  learning, refine = learn.options_of(plan), None
  if learning is not None:
    refine = learn.refiner(learning, {}, _stages(display, 'learning'))
  steps = streaming.quantize(
    blocks,
    learn.without(plan),
    streams[0],
    start=len(lines),
    refine=refine,
    originals=streams[1],
    progress=_stages(display, 'calibrating, solving'),
    **options,
  )
  for step in steps:
    start = time.perf_counter()
    line = _write(path, step, lines, last=step.index + 1 == blocks.count)
    line['seconds'] = {**step.seconds, 'write': time.perf_counter() - start}
    files.append(path / _BLOCKS, [line])
    _carried_file(path, step.index).unlink(missing_ok=True)
    lines.append(line)
    display.row_done()
    display.say(_said(line, blocks.count))


def _stages(display: progress.Display, what: str) -> Callable[[int, int], None]:
  """Moves the lower bar; a stage ends where its steps are all done."""
  bar = None

  def step(done: int, total: int) -> None:
    nonlocal bar
    bar = display.steps(what) if bar is None else bar
    bar(done, total)
    if done == total:
      bar = None

  return step


def _write(path, step, lines, last: bool) -> dict[str, Any]:
  """A block's files, all before the line that says so."""
  matrices, rest = artifacts.split(step.params, ('layers', step.index))
  entries = artifacts.append(path, matrices, _end(lines))
  tensors.write_safetensors(
    _rest_file(path, step.index),
    {json.dumps(where): array for where, array in rest.items()},
  )
  if not last and step.carried:
    tensors.write_safetensors(
      _carried_file(path, step.index + 1),
      {
        f'{name}-{i}': x
        for name, arrays in zip(_STREAMS, (step.carried, step.originals))
        for i, x in enumerate(arrays)
      },
    )
  records = plans.records({'layers': {step.index: step.params}})
  return {'block': step.index, 'entries': entries, 'records': records}


def _end(lines: Sequence[Mapping[str, Any]]) -> int:
  """Bytes that the blocks so far have packed."""
  return sum(entry['nbytes'] for line in lines for entry in line['entries'])


def _finish(path, blocks, lines, model, tokenizer) -> dict:
  """Make the folder an artifact, and take away what it no longer needs."""
  rest: dict = {}
  for i in range(blocks.count):
    for name, array in tensors.read_safetensors(_rest_file(path, i)).items():
      rest[tuple(json.loads(name))] = array
  rest |= artifacts.split(blocks.rest())[1]
  manifest = artifacts.finish(
    path,
    [entry for line in lines for entry in line['entries']],
    rest,
    model=model,
    tokenizer=tokenizer,
  )
  for pattern in ('carried-*.safetensors', 'rest-*.safetensors', _BLOCKS):
    for file in path.glob(pattern):
      file.unlink()
  return manifest


def _total(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
  total: dict[str, float] = {}
  for part in parts:
    for name, seconds in part.items():
      total[name] = total.get(name, 0.0) + seconds
  return total


def _said(line: Mapping[str, Any], count: int) -> str:
  """A finished block in one line of log."""
  times = ', '.join(f'{k} {s:.1f} s' for k, s in line['seconds'].items())
  bits = sum(8 * e['nbytes'] for e in line['entries'])
  size = sum(int(np.prod(e['shape'])) for e in line['entries'])
  ebw = f'ebw {bits / size:.3f}, ' if size else ''
  return f'block {line["block"] + 1} of {count}: {ebw}{times}'
