"""Networks that are no language models: their data, statistics, quality."""

import functools
import hashlib
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax import plans
from mq_jax.data import images as images_lib
from mq_jax.data import text as text_lib
from mq_jax.evaluation import diffusion, fidelity, predictions
from mq_jax.evaluation import images as classes
from mq_jax.models import networks

# A window of text is the network's context, but no longer than this.
LONGEST = 512
_MASKED = 0.15  # of the tokens, as BERT was trained
_SPECIAL = {
  'begin': ('[CLS]', '<s>'),
  'end': ('[SEP]', '</s>'),
  'mask': ('[MASK]', '<mask>'),
}
# Seeds of steps and noise: calibration must not see what is evaluated on.
_CALIBRATION_DRAWS = 1


class Data(NamedTuple):
  """What a network is calibrated or evaluated on, and what identifies it.

  Attributes:
    source: Path of the file.
    sha256: Of the file.
    images: Of a file of images.
    text: Of any other.
  """

  source: str
  sha256: str
  images: images_lib.Images | None
  text: str | None


def read_data(path: str | os.PathLike) -> Data:
  """A file of images (.npz, or MNIST's IDX) or a text in UTF-8.

  Raises:
    FileNotFoundError, ValueError: from the readers.
  """
  path = pathlib.Path(path)
  images = text = None
  if path.suffix == '.npz' or '-idx' in path.name:
    images = images_lib.read_images(path)
  else:
    text = text_lib.read_text(path)
  digest = hashlib.sha256(path.read_bytes()).hexdigest()
  return Data(str(path), digest, images, text)


def first(data: Data, count: int | None) -> Data:
  """The first `count` images of a file, or all that there are."""
  return _cut(data, slice(count))


def last(data: Data, count: int) -> Data:
  """The last `count` images of a file."""
  return _cut(data, slice(max(0, len(data.images.pixels) - count), None))


def _cut(data: Data, span: slice) -> Data:
  pixels, labels = data.images
  labels = None if labels is None else labels[span]
  return data._replace(images=images_lib.Images(pixels[span], labels))


def calibration_batches(
  net: networks.Network, data: Data, count: int, batch: int, seed: int
) -> list[tuple[np.ndarray, ...]]:
  """Batches for `net.apply` of images or windows drawn by the seed.

  A noise predictor gets each image at one random step, with other draws than
  evaluation has. Whole batches only: one shape is one compilation.

  Raises:
    ValueError: if the data are not of the network's kind.
  """
  if net.task in ('classes', 'noise'):
    images, labels = _images(net, data, labelled=net.task == 'noise')
  else:
    images, labels = _windows(net, data), None
  order = np.random.default_rng(seed).permutation(len(images))
  chosen = np.sort(order[:count])
  batch = min(batch, len(chosen))
  spans = [
    chosen[i : i + batch] for i in range(0, len(chosen) - batch + 1, batch)
  ]
  if net.task not in ('classes', 'noise'):
    return [(images[span],) for span in spans]
  mean, std = net.pixels
  if net.task == 'classes':
    return [
      (np.asarray(classes.normalized(jnp.asarray(images[s]), mean, std)),)
      for s in spans
    ]
  shares = jnp.asarray(_shares(net), jnp.float32)
  draw = jax.jit(diffusion.inputs, static_argnums=(4, 5))
  batches = []
  for span in spans:
    x, steps, _ = draw(
      (seed << 8) + _CALIBRATION_DRAWS,
      span.astype(np.int32),
      images[span],
      shares,
      mean,
      std,
    )
    batches.append((np.asarray(x), np.asarray(steps), labels[span]))
  return batches


def scores(
  net: networks.Network,
  params: Any,
  data: Data,
  *,
  batch: int = 64,
  limit: int | None = None,
  reference: Any = None,
  seed: int = 0,
) -> dict[str, Any]:
  """How well `params`, packed or plain, do what the network is for.

  Args:
    net: Its function and its task count, not its parameters.
    params: What is judged; packed matrices are decoded first.
    data: Images for classifiers and noise predictors, text for encoders.
    batch: Images or windows at a time.
    limit: Use the first `limit` of them only.
    reference: Parameters to compare the output with, usually the unquantized.
    seed: Of steps and noise, or of masked tokens.

  Returns:
    Of a classifier `top1`, `top1_error`, `top5`, `nll`, `nll_error`, `images`.
    Of a noise predictor `mse`, `mse_error`, `mae`, `against`, `images`,
    `by_step`. Of a masked language model `top1` and `nll` of the masked tokens
    and their number `tokens`. With a reference, of all but noise predictors,
    `cosine`, `relative_mse` and `sqnr_db` of the output.

  Raises:
    ValueError: if the data are not of the network's kind, or results are not
      finite, or an encoder has neither words to predict nor a reference.
  """
  if limit is not None and data.images is not None:
    data = first(data, limit)
  apply, params = plans.runnable(net.apply, params)
  if reference is not None:
    reference = plans.runnable(net.apply, reference)
  if net.task == 'noise':
    images, labels = _images(net, data, labelled=True)
    found = diffusion.evaluate(
      apply,
      params,
      images,
      labels,
      mean=net.pixels.mean,
      std=net.pixels.std,
      reference=reference,
      shares=_shares(net),
      seed=seed << 8,
      batch=batch,
    )._asdict()
    _check_finite(net, found['mse'])
    return found
  found = {}
  if net.task == 'classes':
    images, labels = _images(net, data, labelled=True)
    found = classes.evaluate(
      apply,
      params,
      images,
      labels,
      mean=net.pixels.mean,
      std=net.pixels.std,
      batch=batch,
    )._asdict()
    _check_finite(net, found['nll'])
  elif net.task == 'tokens':
    found = _masked(
      net, apply, params, _windows(net, data)[:limit], batch, seed
    )
  if reference is not None:
    compared = fidelity.compare(
      apply, params, *reference, _plain_batches(net, data, batch, limit)
    )[fidelity.OUTPUT]
    _check_finite(net, compared.cosine)
    found |= compared._asdict()
    # JSON holds no infinity: nothing differs.
    found['sqnr_db'] = _or_none(compared.sqnr_db)
    found['relative_mse'] = _or_none(compared.relative_mse)
  if not found:
    raise ValueError(
      f'{net.name}: an encoder for {net.task} has no quality of its own on a '
      'text; compare it with the original (--against)'
    )
  return found


def _or_none(value: float) -> float | None:
  return value if math.isfinite(value) else None


def _check_finite(net: networks.Network, value: float) -> None:
  if not math.isfinite(value):
    raise ValueError(
      f'{net.name}: results are {value}: the network predicts nothing any more'
    )


def _plain_batches(
  net: networks.Network, data: Data, batch: int, limit: int | None
) -> Iterator[tuple[np.ndarray, ...]]:
  """Everything there is, for `net.apply`; the last batch may be shorter."""
  images = net.task == 'classes'
  source = _images(net, data)[0] if images else _windows(net, data)
  source = source[:limit]
  for start in range(0, len(source), batch):
    part = source[start : start + batch]
    if images:
      part = classes.normalized(jnp.asarray(part), *net.pixels)
    yield (part,)


def _shares(net: networks.Network) -> np.ndarray:
  return diffusion.signal_shares(net.config.num_steps)


def _images(
  net: networks.Network, data: Data, labelled: bool = False
) -> images_lib.Images:
  if data.images is None:
    raise ValueError(
      f'{data.source}: is a text; {net.name} reads images (.npz with x and y, '
      'or MNIST files)'
    )
  channels = data.images.pixels.shape[-1]
  if channels != net.config.num_channels:
    raise ValueError(
      f'{data.source}: images of {channels} channels; {net.name} needs '
      f'{net.config.num_channels}'
    )
  labels = data.images.labels
  if labelled and labels is None:
    raise ValueError(f'{data.source}: has no labels, which {net.name} needs')
  if labels is not None and labels.max() >= net.config.num_labels:
    raise ValueError(
      f'{data.source}: has label {labels.max()}; {net.name} knows '
      f'{net.config.num_labels} classes from 0'
    )
  return data.images


def _special(net: networks.Network, kind: str) -> int | None:
  found = (net.tokenizer.token_to_id(word) for word in _SPECIAL[kind])
  return next((token for token in found if token is not None), None)


def _windows(net: networks.Network, data: Data) -> np.ndarray:
  """A text as whole windows of tokens i32[w, t], each begun and ended."""
  if data.text is None:
    raise ValueError(f'{data.source}: holds images; {net.name} reads text')
  if net.tokenizer is None:
    raise ValueError(f'{net.name}: has no tokenizer.json, so it reads no text')
  begin, end = _special(net, 'begin'), _special(net, 'end')
  # RoBERTa counts positions from that of padding.
  c = net.config
  room = c.max_position_embeddings
  if c.model_type == 'roberta':
    room -= c.pad_token_id + 1
  length = min(room, LONGEST) - (begin is not None) - (end is not None)
  tokens = net.tokenizer.encode(data.text, add_special_tokens=False).ids
  count = len(tokens) // length
  if count < 1:
    raise ValueError(
      f'{data.source}: {len(tokens)} tokens are fewer than one window of '
      f'{length}'
    )
  body = np.asarray(tokens[: count * length], np.int32).reshape(count, length)
  column = lambda token: np.full((count, int(token is not None)), token or 0)
  parts = [column(begin), body, column(end)]
  return np.concatenate([p.astype(np.int32) for p in parts], axis=1)


def _masked(
  net: networks.Network,
  apply: Any,
  params: Any,
  windows: np.ndarray,
  batch: int,
  seed: int,
) -> dict[str, Any]:
  """Likelihood of masked tokens: 15 % of each window, all by the mask.

  Training replaces a tenth of them by other words and leaves a tenth; here
  every one is hidden. Which ones depends on seed and window alone.
  """
  mask = _special(net, 'mask')
  if mask is None:
    raise ValueError(f'{net.name}: its tokenizer has no [MASK] or <mask>')
  ends = _special(net, 'begin') is not None, _special(net, 'end') is not None
  inner = np.arange(ends[0], windows.shape[1] - ends[1])
  count = max(1, round(_MASKED * len(inner)))
  places = np.stack(
    [
      np.sort(np.random.default_rng([seed, i]).permutation(inner)[:count])
      for i in range(len(windows))
    ]
  ).astype(np.int32)
  wanted = np.take_along_axis(windows, places, axis=1)
  asked = windows.copy()
  np.put_along_axis(asked, places, mask, axis=1)
  nlls, hits = [], []
  for _, real, chunk in classes.batches(batch, asked, places, wanted):
    nll, hit = _masked_scores(apply, params, *chunk)
    nlls.append(np.asarray(nll, np.float64)[:real])
    hits.append(np.asarray(hit)[:real])
  nll = float(np.concatenate(nlls).mean())
  _check_finite(net, nll)
  return {
    'nll': nll,
    'top1': float(np.concatenate(hits).mean()),
    'tokens': int(wanted.size),
  }


@functools.partial(jax.jit, static_argnums=0)
def _masked_scores(apply, params, asked, places, wanted):
  """NLL and hit of each masked token, [b, masked]."""
  scores = apply(params, asked)
  scores = jnp.take_along_axis(scores, places[..., None], axis=1)
  return predictions.nll_per_token(scores, wanted), scores.argmax(-1) == wanted
