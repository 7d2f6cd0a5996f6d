import jax
import jax.numpy as jnp
import numpy as np
import pytest
from allocation.problems import draw, loss
from hypothesis import given, settings
from hypothesis import strategies as st

from mq_jax import allocation


def _problem(seed=0, sites=32, quantities=1):
  """Sites of unequal weight, loss falling by 4 with each bit."""
  rng = np.random.default_rng(seed)
  bits = np.array([2, 3, 4, 5, 6])
  size = rng.uniform(1, 4, (sites, 1))
  spread = rng.lognormal(0, 1.5, (sites, 1))
  cost = {
    'bits': size * bits,
    'cycles': size * np.maximum(bits, 4) * rng.lognormal(0, 0.1, (sites, 5)),
  }
  cost = dict(list(cost.items())[:quantities])
  budget = {k: v.min(axis=1).sum() * 1.6 for k, v in cost.items()}
  return allocation.make_problem(size * spread * 0.25**bits, cost, budget)


def _best(problem):
  return loss(problem, allocation.integer_program(problem))


def _policy(problem, fitness=None, seed=0, **options):
  # The same number of steps for all: programs are compiled by shape.
  return allocation.policy_gradient(
    problem, fitness, key=jax.random.key(seed), **({'steps': 400} | options)
  )


# evolve


@pytest.mark.parametrize('quantities', [1, 2])
def test_evolution_comes_near_the_optimum(quantities):
  problem = _problem(quantities=quantities)
  best = _best(problem)
  chance = np.median(
    [loss(problem, x) for x in allocation.random_choices(problem, 200, seed=0)]
  )
  for seed in range(2):
    got = loss(problem, allocation.evolve(problem, seed=seed))
    assert best <= got * (1 + 1e-9)
    assert got <= 1.15 * best < 0.2 * chance


@settings(max_examples=30)
@given(
  seed=st.integers(0, 2**32 - 1),
  sites=st.integers(1, 10),
  candidates=st.integers(1, 5),
  quantities=st.integers(1, 3),
  whole=st.booleans(),
)
def test_evolution_keeps_budgets(seed, sites, candidates, quantities, whole):
  rng = np.random.default_rng(seed)
  problem = draw(rng, sites, candidates, quantities, whole=whole)
  seen = []

  def fitness(choices):
    seen.extend(choices)
    return rng.random(len(choices))

  try:
    choice = allocation.evolve(
      problem, fitness, seed=rng, population=4, generations=3
    )
  except allocation.InfeasibleError:
    assert not seen
    return
  assert choice.dtype == np.int64
  assert all(allocation.feasible(problem, x) for x in [choice, *seen])


def test_evolution_minimizes_what_it_is_given():
  problem = _problem(sites=6)
  target = allocation.random_choice(problem, seed=5)
  sizes, seen, told = [], [], []

  def fitness(choices):
    sizes.append(len(choices))
    seen.extend(map(bytes, choices))
    return np.abs(choices - target).sum(axis=1)

  choice = allocation.evolve(
    problem,
    fitness,
    seed=0,
    population=16,
    generations=60,
    on_generation=lambda *x: told.append(x),
  )
  # Leftover budget is spent, so the target itself may never be looked at.
  assert np.abs(choice - target).sum() <= 3
  assert set(sizes) == {16}  # one program, if fitness is jitted
  values = [value for _, _, value in told]
  assert [n for n, _, _ in told] == list(range(61))
  assert (np.diff(values) <= 0).all()
  assert values[-1] == np.abs(choice - target).sum()


def test_evolution_asks_once_for_a_choice():
  problem = _problem(sites=3)
  seen = []

  def fitness(choices):
    assert len(choices) == 1
    seen.append(choices[0].tobytes())
    return np.zeros(1)

  allocation.evolve(
    problem, fitness, seed=0, population=8, generations=20, batch=1
  )
  assert len(seen) == len(set(seen)) > 8


def test_evolution_repeats_stops_and_starts():
  problem = _problem(sites=12)
  one, two, three = (
    allocation.evolve(problem, seed=s, population=8, generations=2).tolist()
    for s in (0, 0, 1)
  )
  assert one == two != three
  count = []
  allocation.evolve(
    problem, seed=0, on_generation=lambda n, *_: count.append(n) or n == 3
  )
  assert count == [0, 1, 2, 3]
  best = allocation.integer_program(problem)
  kept = allocation.evolve(
    problem, seed=0, generations=0, initial=best[None], population=2
  )
  assert loss(problem, kept) == pytest.approx(_best(problem))


def test_evolution_refuses():
  problem = _problem(sites=4)
  with pytest.raises(ValueError, match='NaN for 1'):
    allocation.evolve(
      problem, lambda x: np.r_[np.nan, np.zeros(len(x) - 1)], seed=0
    )
  with pytest.raises(ValueError, match='shape'):
    allocation.evolve(problem, lambda x: np.zeros(3), seed=0)
  with pytest.raises(ValueError, match='too small'):
    allocation.evolve(problem, seed=0, population=1)
  with pytest.raises(ValueError, match=r'shape \(4,\)'):
    allocation.evolve(problem, seed=0, initial=np.zeros(4, int))
  with pytest.raises(ValueError, match='breaks a tie'):
    allocation.evolve(problem, seed=0, initial=np.full((1, 4), 9))
  # Failures are no error, as long as something works.
  allocation.evolve(
    problem,
    lambda x: np.where(x[:, 0] > 2, np.inf, 1.0),
    seed=0,
    generations=2,
  )


# policy gradient


def test_policy_comes_near_the_optimum():
  problem = _problem()
  best = _best(problem)
  for seed in range(2):
    choice = _policy(problem, seed=seed, steps=2000)
    assert allocation.feasible(problem, choice)
    assert loss(problem, choice) <= 1.15 * best


@pytest.mark.slow
def test_policy_on_the_noisy_bandit_of_the_notes():
  # Eight decisions of three, reward with noise 0.05, one budget.
  rng = np.random.default_rng(0)
  table = np.sort(rng.random((8, 3)))[:, ::-1]
  problem = allocation.make_problem(
    table, {'bits': np.tile([2.0, 4.0, 8.0], (8, 1))}, {'bits': 36}
  )
  noise = np.random.default_rng(1)

  def fitness(choices):
    exact = np.array([loss(problem, x) for x in choices])
    return exact + 0.05 * noise.standard_normal(len(choices))

  choice = _policy(problem, fitness)
  spread = np.std(
    [loss(problem, x) for x in allocation.random_choices(problem, 99, seed=0)]
  )
  assert allocation.feasible(problem, choice)
  # The best that was seen under noise: within some of its deviations.
  assert loss(problem, choice) <= _best(problem) + max(0.2, 0.3 * spread)


@pytest.mark.parametrize('one_sided', [False, True])
def test_policy_with_ties_missing_candidates_and_two_budgets(one_sided):
  problem = draw(np.random.default_rng(3), 9, 4, 2, room=0.5)
  assert len(np.unique(problem.groups)) == 8 and not problem.allowed.all()
  choice = _policy(problem, one_sided=one_sided)
  assert choice.dtype == np.int64
  assert allocation.feasible(problem, choice)
  assert loss(problem, choice) <= 1.3 * _best(problem)


@pytest.mark.slow
def test_policy_calls_a_traced_fitness_in_one_program():
  problem = _problem(sites=8)
  table = jnp.asarray(problem.sensitivity, jnp.float32)
  calls = []

  def fitness(choices):
    calls.append(choices.shape)
    assert choices.dtype == jnp.int32
    return table[jnp.arange(8), choices].sum(axis=-1)

  choice = _policy(problem, fitness, traced=True)
  assert set(calls) == {(16, 8)}
  assert len(calls) < 6  # traced, not called 200 times
  same = _policy(problem)
  assert loss(problem, choice) == pytest.approx(loss(problem, same), rel=0.1)
  host = _policy(problem, lambda x: fitness(jnp.asarray(x, 'i4')))
  assert allocation.feasible(problem, host)


def test_policy_refuses_and_survives():
  problem = _problem(sites=8)
  with pytest.raises(ValueError, match='NaN'):
    _policy(problem, lambda x: np.full(len(x), np.nan))
  with pytest.raises(ValueError, match='NaN'):
    _policy(
      problem,
      lambda x: jnp.where(x[:, 0] > 1, jnp.nan, 1.0),
      traced=True,
    )
  with pytest.raises(ValueError, match='shape'):
    _policy(problem, lambda x: np.zeros((len(x), 1)))
  with pytest.raises(ValueError, match='finite for no'):
    _policy(problem, lambda x: np.full(len(x), np.inf))
  choice = _policy(
    problem,
    lambda x: np.where(x[:, 0] > 2, np.inf, 1.0 + x[:, 1]),
  )
  assert choice[0] <= 2
