"""The trials of a sweep: each claimed by one process, and finished once.

The storage is the only truth. A setting is an index; it may have several
trials, since those of processes that died are failed and enqueued again, but
only one that is finished. Claims are made one process at a time, and begin by
putting right whatever a killed process left behind, so it does not matter
where it was killed.
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.trial import TrialState

from mq_jax.lab import runs
from mq_jax.lab.sweeping import space as space_lib
from mq_jax.lab.sweeping import spec
from mq_jax.lab.sweeping.storage import Storage

# Of NSGA-II; Optuna's 50 would be all of a sweep of the usual size.
_POPULATION = 16

_OPEN = (TrialState.WAITING, TrialState.RUNNING)


@dataclasses.dataclass(frozen=True)
class Claim:
  """A trial that this process is to do.

  Attributes:
    index: Of its setting.
    setting: Values by name.
    trial: Optuna's.
  """

  index: int
  setting: space_lib.Setting
  trial: optuna.Trial


class Ledger:
  """Trials of a sweep in a storage."""

  def __init__(
    self,
    sweep: spec.Sweep,
    storage: Storage,
    name: str,
    conditions: Mapping[str, Any],
  ):
    """Begin a sweep, or continue it.

    Args:
      sweep: The sweep.
      storage: Where it is, or will be.
      name: Of its study there.
      conditions: What results depend on, by name.

    Raises:
      RunError: if another study is there, or it was begun under other
        conditions and is not finished.
    """
    self._sweep, self._storage = sweep, storage
    begun = {'sweep': sweep.digest, 'conditions': dict(conditions)}
    with storage.exclusive():
      names = optuna.get_all_study_names(storage.optuna)
      other = next((n for n in names if storage.single and n != name), None)
      if other is not None:
        raise runs.RunError(
          f'{storage.shown}: holds another sweep, {other}; this one is {name}'
        )
      self._study = optuna.create_study(
        storage=storage.optuna,
        study_name=name,
        directions=['minimize'] * len(sweep.objectives),
        load_if_exists=True,
      )
      attrs = self._study.user_attrs
      if 'begun' not in attrs and not self._trials():
        self._study.set_user_attr('begun', begun)
        self._study.set_user_attr('space', sweep.as_dict())
        attrs = {'begun': begun}
    self._check(name, attrs.get('begun'), begun)

  def _check(self, name: str, there: Any, begun: Mapping[str, Any]) -> None:
    where = f'{self._storage.shown}: study {name}'
    if not isinstance(there, Mapping) or there['sweep'] != begun['sweep']:
      raise runs.RunError(f'{where}: is there, but not of this sweep')
    if self.unfinished():
      old, new = there['conditions'], begun['conditions']
      names = [k for k in new if old.get(k) != new[k]]
      if names:
        changes = '; '.join(f'{k}: {old.get(k)}, now {new[k]}' for k in names)
        raise runs.RunError(
          f'{where}: was begun with other conditions ({changes}); trials would '
          'not compare; choose another folder with --out'
        )

  def _trials(self) -> list[optuna.trial.FrozenTrial]:
    return self._study.get_trials(deepcopy=False)

  def finished(self) -> dict[int, optuna.trial.FrozenTrial]:
    """Finished trials by index, those that failed by themselves too."""
    return {
      t.user_attrs['index']: t
      for t in self._trials()
      if t.state == TrialState.COMPLETE or 'error' in t.user_attrs
      if t.state not in _OPEN
    }

  def unfinished(self) -> int:
    """Settings that have no result yet."""
    return max(0, self._sweep.trials - len(self.finished()))

  def claim(self, most: int, workers: int = 1) -> list[Claim]:
    """Take trials: none if all are finished, or being done by others.

    Args:
      most: Trials at a time.
      workers: That share what is left.
    """
    sweep, study = self._sweep, self._study
    with self._storage.exclusive():
      trials = self._put_right()
      waiting = sum(t.state == TrialState.WAITING for t in trials)
      indices = {
        t.user_attrs['index'] for t in trials if 'index' in t.user_attrs
      }
      new = 0
      if sweep.design is None:
        study.sampler = self._sampler(len(trials))
        new = max(0, sweep.trials - len(indices))
      share = -(-(waiting + new) // workers)
      claims = []
      for _ in range(min(most, share)):
        trial = study.ask(sweep.space.distributions())
        index = trial.user_attrs.get('index')
        if index is None:
          index = next(i for i in range(len(indices) + 1) if i not in indices)
          indices.add(index)
        if sweep.design is not None:
          setting = sweep.design[index]
        else:
          setting = sweep.space.from_params(trial.params)
        trial.set_user_attr('setting', setting)
        trial.set_user_attr('owner', self._storage.owner)
        # Last: a trial with an index can be done again from its parameters.
        trial.set_user_attr('index', index)
        claims.append(Claim(index, setting, trial))
    return claims

  def _put_right(self) -> list[optuna.trial.FrozenTrial]:
    """Fail trials of the dead, and enqueue what nobody has."""
    storage, sweep = self._storage, self._sweep
    for trial in self._trials():
      if trial.state == TrialState.RUNNING:
        owner = trial.user_attrs.get('owner')
        if owner is None or not storage.alive(owner):
          try:
            self._study.tell(trial.number, state=TrialState.FAIL)
          except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
            pass  # it was finished after all, before its process ended
    held: set[int] = set()
    lost: dict[int, dict[str, Any]] = {}
    if sweep.design is not None:
      lost = {i: sweep.space.params(s) for i, s in enumerate(sweep.design)}
    for trial in self._trials():
      index = trial.user_attrs.get('index')
      if index is None:
        continue
      ended = trial.state not in _OPEN and trial.state != TrialState.COMPLETE
      if ended and 'error' not in trial.user_attrs:
        lost.setdefault(index, trial.params)
      else:
        held.add(index)
    for index, params in lost.items():
      if index not in held:
        self._study.enqueue_trial(params, user_attrs={'index': index})
    return self._trials()

  def _sampler(self, seed: int) -> optuna.samplers.BaseSampler:
    """The adaptive sampler; its seed counts trials, so no two ask alike."""
    seed = (self._sweep.seed * 1_000_003 + seed) % (1 << 32)
    with warnings.catch_warnings():
      warnings.simplefilter('ignore', optuna.exceptions.ExperimentalWarning)
      if self._sweep.sampler == 'nsga2':
        return optuna.samplers.NSGAIISampler(
          seed=seed, population_size=_POPULATION
        )
      # A liar keeps those asked together, or by others, apart.
      return optuna.samplers.TPESampler(
        seed=seed, multivariate=True, constant_liar=True
      )

  def finish(self, claim: Claim, records: Sequence[Mapping[str, Any]]) -> bool:
    """Store a trial's results; False if the trial is no longer ours.

    A trial with a row that failed has failed; its records say why.
    """
    values = values_of(records, self._sweep.objectives)
    attrs: dict[str, Any] = {'records': list(records)}
    if values is None:
      failed = [r['status'] for r in records if runs.failed(r)]
      attrs['error'] = (failed or ['failed: an objective is missing'])[0]
    state = TrialState.FAIL if values is None else TrialState.COMPLETE
    try:
      for name, value in attrs.items():
        claim.trial.set_user_attr(name, value)
      self._study.tell(claim.trial, values, state)
    except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
      return False
    return True

  def note(self, served: Mapping[str, Any]) -> None:
    """Keep how many settings the programs of this process served."""
    self._study.set_user_attr(f'served {self._storage.owner}', dict(served))

  def served(self) -> list[dict[str, Any]]:
    """What processes noted."""
    attrs = self._study.user_attrs
    return [v for k, v in attrs.items() if k.startswith('served ')]

  def records(self) -> list[dict[str, Any]]:
    """Records of finished trials by index, each with trial and setting."""
    finished = sorted(self.finished().items())
    return [r for index, trial in finished for r in records_of(index, trial)]


def records_of(
  index: int, trial: optuna.trial.FrozenTrial
) -> list[dict[str, Any]]:
  """Records of a finished trial, each with trial and setting."""
  head = {'trial': index, 'setting': trial.user_attrs['setting']}
  return [{**head, **record} for record in trial.user_attrs['records']]


def values_of(
  records: Sequence[Mapping[str, Any]], objectives: Sequence[str]
) -> list[float] | None:
  """Objectives of a trial: means over its rows; None if one failed."""
  if any(
    runs.failed(r) or r.get(o) is None for r in records for o in objectives
  ):
    return None
  return [sum(r[o] for r in records) / len(records) for o in objectives]
