"""A process of `sweep_ledger_test`: does trials of a sweep that is no work."""

import pathlib
import sys
import time
import types

from mq_jax.lab.sweeping import ledger, space, storage


def sweep(sampler, trials, objectives=('x2',)):
  """What a ledger needs of a `spec.Sweep`: a space of two numbers."""
  given = {'x': ('linear', -1.0, 1.0), 'y': [0, 1, 2]}
  made = space.make_space(given, sampler)
  design = None
  if sampler in space.DESIGNS:
    design = made.design(sampler, trials, 0)
  return types.SimpleNamespace(
    space=made,
    sampler=sampler,
    objectives=objectives,
    trials=trials,
    seed=0,
    design=design,
    digest='0123abcd',
    as_dict=lambda: {},
  )


def record(setting):
  x, y = setting['x'], setting['y']
  return {'x2': x * x, 'far': (x - 1) ** 2 + y, 'status': 'ok'}


def work(folder, url, sampler, trials, seconds):
  store = storage.open_storage(url, pathlib.Path(folder))
  book = ledger.Ledger(sweep(sampler, trials), store, 'test', {})
  while book.unfinished():
    claims = book.claim(3)
    if not claims:
      time.sleep(0.02)
    for claim in claims:
      time.sleep(seconds)
      if book.finish(claim, [record(claim.setting)]):
        print(claim.index, flush=True)
  store.close()


if __name__ == '__main__':
  folder, url, sampler, trials, seconds = sys.argv[1:]
  work(folder, url or None, sampler, int(trials), float(seconds))
