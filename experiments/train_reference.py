"""Train the bundled reference model and its tokenizer.

    python -m experiments.train_reference configs/train_reference.gin

Killed at any moment it loses at most `checkpoint_every` steps: run the same
command again. Batches follow from the seed and the step number alone.
"""

import functools
import json
import os
import pathlib
import sys
import time

import gin
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import orbax.checkpoint as ocp
import tokenizers

from mq_jax.data import docs, text
from mq_jax.models import decoder, huggingface

END = '<|endoftext|>'


def train_tokenizer(texts, vocab_size: int) -> tokenizers.Tokenizer:
  """Byte-level BPE; id 0 is the end (and beginning) of a text."""
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.pre_tokenizer = split
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[END],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  return tokenizer


def corpora(wikitext: str | None) -> dict[str, list[str]]:
  """Training and validation texts, documents apart."""
  texts = {
    split: [document.text for document in docs.documents(split)]
    for split in ('train', 'valid')
  }
  if wikitext:
    folder = pathlib.Path(wikitext)
    article = '\n = '  # a heading opens an article; the exact cut matters not
    texts['train'] += [
      article[1:] + part if i else part
      for i, part in enumerate(
        text.read_text(folder / 'train.txt.gz').split(article)
      )
    ]
    texts['wikitext'] = [text.read_text(folder / 'valid.txt')]
  return texts


def encode(tokenizer, texts) -> np.ndarray:
  encoded = tokenizer.encode_batch(texts)
  return np.concatenate([np.array(e.ids + [0], np.int32) for e in encoded])


@gin.configurable
def optimizer(
  steps=gin.REQUIRED,
  learning_rate=0.02,
  adam_learning_rate=0.004,
  weight_decay=0.01,
  warmup_steps=50,
  decay_share=0.25,
):
  """Muon for matrices, Adam for the rest; warm up, hold, decay to zero."""

  def schedule(peak):
    decay = int(steps * decay_share)
    return optax.join_schedules(
      [
        optax.linear_schedule(0.0, peak, warmup_steps),
        optax.linear_schedule(peak, 0.0, decay),
      ],
      [steps - decay],
    )

  def label(path, leaf):
    matrix = leaf.ndim == 2 and 'embed' not in jax.tree_util.keystr(path)
    return 'muon' if matrix else 'adam'

  return optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.partition(
      {
        'muon': optax.contrib.muon(
          schedule(learning_rate), weight_decay=weight_decay
        ),
        'adam': optax.adam(schedule(adam_learning_rate), b2=0.95),
      },
      functools.partial(jax.tree_util.tree_map_with_path, label),
    ),
  )


@gin.configurable
def train(
  out=gin.REQUIRED,
  steps=gin.REQUIRED,
  config=gin.REQUIRED,
  wikitext=None,
  batch=16,
  length=256,
  seed=0,
  log_every=20,
  checkpoint_every=100,
):
  """Train, logging to `out/log.jsonl`; ends with a model folder, `out/hf`."""
  folder = pathlib.Path(out).absolute()
  folder.mkdir(parents=True, exist_ok=True)
  config = decoder.DecoderConfig(**config)
  texts = corpora(wikitext)
  vocabulary = folder / 'tokenizer.json'
  if not vocabulary.exists():
    train_tokenizer(texts['train'], config.vocab_size).save(str(vocabulary))
  tokenizer = tokenizers.Tokenizer.from_file(str(vocabulary))
  cut = lambda name: text.windows(encode(tokenizer, texts[name]), length, bos=0)
  data = {name: cut(name) for name in texts}
  print({name: array.shape for name, array in data.items()}, flush=True)

  apply = decoder.functional(config)
  tx = optimizer(steps=steps)

  def loss(params, tokens):
    logits = apply(params, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, tokens[:, 1:]
    ).mean()

  @functools.partial(jax.jit, donate_argnums=0)
  def update(state, tokens):
    params, opt = state
    value, grads = jax.value_and_grad(loss)(params, tokens)
    updates, opt = tx.update(grads, opt, params)
    return (optax.apply_updates(params, updates), opt), value

  evaluate = jax.jit(loss)
  params = decoder.init_params(config, seed)
  state, start = (params, tx.init(params)), 0
  with ocp.CheckpointManager(
    folder / 'checkpoints', options=ocp.CheckpointManagerOptions(max_to_keep=2)
  ) as manager:
    if manager.latest_step() is not None:
      start = manager.latest_step()
      state = manager.restore(start, args=ocp.args.StandardRestore(state))
    windows, clock, losses = data['train'], time.time(), []
    for step in range(start, steps):
      epoch, offset = divmod(step * batch, len(windows) - batch)
      order = np.random.default_rng([seed, epoch]).permutation(len(windows))
      tokens = jnp.asarray(windows[order[offset : offset + batch]])
      state, value = update(state, tokens)
      losses.append(value)
      done = step + 1
      if done % log_every == 0 or done == steps:
        record = {'step': done, 'tokens': done * batch * length}
        record['loss'] = float(np.mean(losses))
        record['seconds'] = round(time.time() - clock, 1)
        if done % checkpoint_every == 0 or done == steps:
          for name in data.keys() - {'train'}:
            held = data[name][:: max(1, len(data[name]) // 64)][:64]
            record[name] = float(evaluate(state[0], jnp.asarray(held)))
        with open(folder / 'log.jsonl', 'a') as log:
          log.write(json.dumps(record) + '\n')
        print(record, flush=True)
        losses, clock = [], time.time()
      if done % checkpoint_every == 0 or done == steps:
        manager.save(done, args=ocp.args.StandardSave(state))
  model = huggingface.LanguageModel(
    config, state[0], apply, tokenizer, bos=0, name='reference', eos=0
  )
  huggingface.save(folder / 'hf', model, dtype=jnp.bfloat16)
  draw(folder)


def draw(folder: pathlib.Path) -> None:
  """Draw the training curve from the log, as `curve.png`."""
  lines = (folder / 'log.jsonl').read_text().splitlines()
  records = {r['step']: r for r in map(json.loads, lines)}  # last one counts
  figure, axes = plt.subplots(figsize=(6, 4), layout='constrained')
  styles = {'loss': 'train', 'valid': 'docs, valid', 'wikitext': 'WikiText-2'}
  for (key, label), style in zip(styles.items(), ('-', 'o--', 's:')):
    rows = [r for r in records.values() if key in r]
    tokens = [r['tokens'] / 1e6 for r in rows]
    axes.plot(tokens, [r[key] for r in rows], style, label=label, color='k')
  axes.set(xlabel='training tokens, millions', ylabel='loss, nats per token')
  axes.legend()
  figure.savefig(folder / 'curve.png', dpi=120)
  plt.close(figure)


def main(argv):
  wikitext = os.environ.get('MQ_DATA')
  if wikitext:
    gin.bind_parameter('train.wikitext', os.path.join(wikitext, 'wikitext-2'))
  gin.parse_config_files_and_bindings(argv[:1], argv[1:])
  train()


if __name__ == '__main__':
  main(sys.argv[1:])
