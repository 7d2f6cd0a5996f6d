"""Prepare what configs/studies/equal_bits_stories.gin needs.

    python -m experiments.stories [--data ../shared/data] [--out runs/stories]

A second trained model, of another family of text: BabyLlama-105, 0.94 M
parameters, character by character on TinyStories. Writes it with outlier
channels planted, and the sample of stories as two texts: the odd ones to
calibrate on, the even ones to evaluate on.
"""

import argparse
import os
import pathlib

from mq_jax.models import bundled, huggingface

_END = '<|endoftext|>'


def split(text: str) -> tuple[str, str]:
  """Odd and even stories of a sample, each as one text.

  Examples:
    >>> split('One.<|endoftext|>Two.<|endoftext|>Three.<|endoftext|>')
    ('One.\\nThree.\\n', 'Two.\\n')
  """
  stories = [story.strip() + '\n' for story in text.split(_END)]
  stories = [story for story in stories if story.strip()]
  return ''.join(stories[::2]), ''.join(stories[1::2])


def main(argv: list[str] | None = None) -> pathlib.Path:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  default = os.environ.get('MQ_DATA', '../shared/data')
  parser.add_argument('--data', default=default)
  parser.add_argument('--out', default='runs/stories')
  options = parser.parse_args(argv)
  data, out = pathlib.Path(options.data), pathlib.Path(options.out)
  out.mkdir(parents=True, exist_ok=True)
  sample = data / 'tinystories-sample' / 'tinystories_dev.txt'
  calibration, test = split(sample.read_text(encoding='utf-8'))
  (out / 'calibration.txt').write_text(calibration, encoding='utf-8')
  (out / 'test.txt').write_text(test, encoding='utf-8')
  model = huggingface.load(data / 'babyllama105-hf', name='babyllama105')
  huggingface.save(out / 'babyllama105', model)
  huggingface.save(out / 'babyllama105-planted', bundled.plant(model))
  print(f'{out}: two models, two texts')
  return out


if __name__ == '__main__':
  main()
