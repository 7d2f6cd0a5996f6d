"""Figures of transformers on BabyLlama that evaluation is held against.

    /path/to/python/with/torch tests/golden/make_evaluation_golden.py DATA

DATA holds babyllama105-hf and tinystories-sample. Writes evaluation.json: the
perplexity of the field (GPTQ's way), that of Hugging Face's guide at some
strides, and log likelihoods of choices, all in float32 on a CPU.
"""

import json
import pathlib
import sys

import torch
import transformers

CONTEXT = 64
QUESTIONS = [
  ('Once upon a time, there was a little', ['girl named Lily', 'Zx qv']),
  ('The cat sat on the ', ['mat.', 'xylophone.', 'mat']),
  ('', ['Once', 'qqqq']),
]


def negative_log_likelihoods(model, ids):
  """Of each token but the first. f32[t - 1]."""
  with torch.no_grad():
    logits = model(ids[None]).logits[0, :-1]
  return torch.nn.functional.cross_entropy(logits, ids[1:], reduction='none')


def main(data: pathlib.Path) -> None:
  folder = data / 'babyllama105-hf'
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32
  ).eval()
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_file=str(folder / 'tokenizer.json')
  )
  path = data / 'tinystories-sample/tinystories_dev.txt'
  lines = path.read_text('utf-8').splitlines(keepends=True)[:40]
  text = '\n\n'.join(x if x.strip() else '' for x in lines)
  ids = torch.tensor(tokenizer(text)['input_ids'])
  found = {'lines': len(lines), 'tokens': len(ids), 'context': CONTEXT}
  count = len(ids) // CONTEXT
  windows = ids[: count * CONTEXT].reshape(count, CONTEXT)
  means = [negative_log_likelihoods(model, w).mean() for w in windows]
  found['field'] = torch.stack(means).mean().exp().item()
  for stride in (16, 48, 64):
    total, number, each, seen = 0.0, 0, [], 0
    for begin in range(0, len(ids), stride):
      end = min(begin + CONTEXT, len(ids))
      window = ids[begin:end]
      labels = window.clone()
      labels[: len(window) - (end - seen)] = -100
      with torch.no_grad():
        loss = model(window[None], labels=labels[None]).loss.item()
      valid = int((labels != -100).sum())
      # As the guide weighs windows, and then each token alike.
      total, number = total + loss * (valid - 1), number + valid - 1
      counted = int((labels[1:] != -100).sum())
      each.append((loss, counted))
      seen = end
      if end == len(ids):
        break
    tokens = sum(n for _, n in each)
    found[f'stride {stride}'] = {
      'guide': float(torch.tensor(total / number).exp()),
      'alike': float(torch.tensor(sum(x * n for x, n in each) / tokens).exp()),
      'tokens': tokens,
    }
  found['questions'] = []
  for context, choices in QUESTIONS:
    likelihoods = []
    for choice in choices:
      stem = context.rstrip()
      encode = lambda x: tokenizer(x, add_special_tokens=False)['input_ids']
      whole = encode(context + ' ' + choice)
      before = len(encode(stem)) if stem else 0
      if not before:
        whole, before = [1, *whole], 1
      nll = negative_log_likelihoods(model, torch.tensor(whole))
      likelihoods.append(-nll[before - 1 :].sum().item())
    found['questions'].append(
      {'query': context, 'choices': choices, 'log_likelihoods': likelihoods}
    )
  target = pathlib.Path(__file__).parent / 'evaluation.json'
  target.write_text(json.dumps(found, indent=1) + '\n')


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]))
