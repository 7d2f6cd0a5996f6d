"""The solver against GPTQ as published, in float64, and against itself."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from mq_jax import compensation, recipes
from mq_jax.compensation import Compensation, Status


def problem(k=48, n=20, seed=0):
  rng = np.random.default_rng(seed)
  weight = rng.normal(size=(k, n)).astype(np.float32)
  mixing = rng.normal(size=(k, k)) + np.eye(k)
  inputs = rng.normal(size=(4 * k, k)) @ mixing
  return jnp.asarray(weight), jnp.asarray((inputs.T @ inputs) / k, jnp.float32)


def values(recipe, weight, hessian):
  rows = recipe.rows
  whole, fitted, codes, status = jax.jit(compensation.solve)(
    weight, hessian, rows, recipe.compensation
  )
  codes = rows.collect(whole, fitted, codes)
  return rows.layout().decode(codes, *weight.shape), Status(int(status))


def output_error(weight, value, hessian):
  error = np.asarray(weight - value, np.float64)
  return np.trace(error.T @ np.asarray(hessian, np.float64) @ error)


# One block, and more than one.
@pytest.mark.parametrize('k', [48, pytest.param(150, marks=pytest.mark.slow)])
def test_row_by_row_equals_gptq_as_published(k):
  weight, hessian = problem(k=k)
  recipe = recipes.microscopiq(bits=4, block=8, sigma=2.0)
  found, status = values(recipe, weight, hessian)

  def row(_, w):
    blocks = np.pad(w, (0, -len(w) % 8)).reshape(-1, 8)
    # The last block is short; the oracle knows no padding.
    done = [oracles.microscopiq_block(b, 4, 2.0, 8)[0] for b in blocks[:-1]]
    short = blocks[-1][: len(w) - 8 * len(done)]
    if len(short) == 8:
      done.append(oracles.microscopiq_block(short, 4, 2.0, 8)[0])
    return np.concatenate(done)

  weight = weight[:, :16]
  found = found[:, :16]
  expected = oracles.gptq_order(weight, hessian, 0.01, row)
  assert status is Status.ok
  # Float32 against float64: a target near a tie may round the other way, and
  # everything after it differs; the share of equal values says enough.
  equal = np.isclose(found, expected, rtol=1e-5, atol=1e-6).mean()
  assert equal > (0.99 if k == 48 else 0.9)
  ours, theirs = (output_error(weight, x, hessian) for x in (found, expected))
  assert abs(ours / theirs - 1) < 0.02


def test_grouped_integers_equal_gptq_as_published():
  weight, hessian = problem(k=64, n=10)
  group = 16
  recipe = recipes.gptq(bits=3, group=group, symmetric=True)
  found, _ = values(recipe, weight, hessian)
  # The oracle fits its scale when a group begins, on its current weights.
  H = np.asarray(hessian, np.float64)
  H = H + 0.01 * np.mean(np.diag(H)) * np.eye(64)
  U = np.linalg.cholesky(np.linalg.inv(H)).T
  W = np.array(weight, np.float64)
  Q = np.zeros_like(W)
  for j in range(64):
    if j % group == 0:
      scale = np.abs(W[j : j + group]).max(0) / 3
      scale = scale.astype(np.float16).astype(np.float64)
    Q[j] = np.clip(np.round(W[j] / scale), -3, 3) * scale
    error = (W[j] - Q[j]) / U[j, j]
    W[j + 1 :] -= np.outer(U[j, j + 1 :], error)
  assert np.isclose(found, Q, rtol=1e-3, atol=1e-5).mean() > 0.97
  ours, theirs = (output_error(weight, x, hessian) for x in (found, Q))
  assert abs(ours / theirs - 1) < 0.02


# Values of plain gptq and microscopiq are compared above; here: by -m slow.
ALL = (
  pytest.param(recipes.gptq(bits=3, group=16), marks=pytest.mark.slow),
  recipes.gptq(bits=3, group=16, order='activation'),
  pytest.param(recipes.microscopiq(bits=2, block=8), marks=pytest.mark.slow),
  pytest.param(
    recipes.microscopiq(bits=2, block=16, axis='in'),
    marks=pytest.mark.slow,
  ),
  recipes.fineq(compensate=True),
)


@pytest.mark.parametrize('recipe', ALL, ids=lambda r: r.label)
def test_compensation_lowers_the_output_error(recipe):
  weight, hessian = problem(k=50, n=24)  # 50: no group divides it
  plain = recipes.Recipe(rows=recipe.rows)
  with_it, status = values(recipe, weight, hessian)
  without, _ = values(plain, weight, hessian)
  assert status is Status.ok
  assert output_error(weight, with_it, hessian) < 0.9 * output_error(
    weight, without, hessian
  )


@pytest.mark.parametrize('recipe', ALL[2:], ids=lambda r: r.label)
def test_a_diagonal_hessian_has_nothing_to_compensate(recipe):
  weight, _ = problem(k=48, n=16)
  hessian = jnp.diag(jnp.linspace(1.0, 2.0, 48))
  with_it, _ = values(recipe, weight, hessian)
  without, _ = values(recipes.Recipe(rows=recipe.rows), weight, hessian)
  np.testing.assert_array_equal(with_it, without)


def test_feedback_is_that_of_the_inverse_factor():
  _, hessian = problem(k=30)
  H = np.asarray(hessian, np.float64)
  U = np.linalg.cholesky(np.linalg.inv(H)).T
  feedback, saliency, failed = compensation.factorize(hessian)
  assert not failed
  np.testing.assert_allclose(saliency, 1 / np.diag(U) ** 2, rtol=1e-2)
  # GPTQ's update of all later rows, written out, is the strict upper part of
  # the inverse of U with its columns scaled to a unit diagonal.
  R = np.linalg.inv(U)
  np.testing.assert_allclose(
    feedback, np.triu(R / np.diag(R), 1), rtol=0.02, atol=1e-3
  )


def test_best_of_two_rows_is_found_by_brute_force():
  """With one output and two inputs the greedy order is checked by hand."""
  hessian = jnp.array([[1.0, 0.9], [0.9, 1.0]])
  weight = jnp.array([[0.4], [0.4]])
  rows = recipes.rtn(bits=2, group=1, symmetric=True).rows

  class Unit:  # integer grid of step 1
    group = 1
    prepare = lambda self, w, s: ()
    fit = lambda self, r, s, whole: ()

    def apply(self, row, saliency, whole, fitted, index):
      return jnp.round(row), {'level': jnp.round(row)}

  del rows
  _, _, codes, _ = compensation.solve(
    weight, hessian, Unit(), Compensation(damping=0.0)
  )
  # First row 0; its error 0.4 * 0.9 joins the second: round(0.76) = 1.
  np.testing.assert_array_equal(codes['level'], [[0.0], [1.0]])


def test_failure_is_a_status_and_rounds_plainly():
  weight, hessian = problem(k=16, n=8)
  indefinite = hessian - 1e3 * jnp.eye(16)
  recipe = recipes.microscopiq(bits=2, block=8)
  found, status = values(recipe, weight, indefinite)
  assert status is Status.factorization_failed
  assert 'not positive definite' in status.sentence
  without, _ = values(recipes.Recipe(rows=recipe.rows), weight, hessian)
  np.testing.assert_array_equal(found, without)
  _, status = values(recipe, weight, None)
  assert status is Status.no_hessian


def test_inputs_never_active_are_harmless():
  weight, hessian = problem(k=24, n=8)
  dead = jnp.arange(24) % 5 == 0
  keep = (~dead)[:, None] & (~dead)[None]
  recipe = recipes.gptq(bits=4, group=24)
  found, status = values(recipe, weight, jnp.where(keep, hessian, 0.0))
  assert status is Status.ok
  assert bool(jnp.all(jnp.isfinite(found)))
  found, status = values(recipe, weight, jnp.zeros((24, 24)))
  assert status is Status.ok
  without, _ = values(recipes.Recipe(rows=recipe.rows), weight, None)
  np.testing.assert_array_equal(found, without)


def test_lowered_program_does_not_grow_with_k():
  def size(k):
    rows = recipes.microscopiq(bits=2, block=8).rows
    args = jnp.zeros((k, 16)), jnp.zeros((k, k))
    solve = lambda w, h: compensation.solve(w, h, rows, Compensation())
    return len(jax.jit(solve).lower(*args).as_text())

  # Numbers in the text may have more digits, nothing more.
  assert abs(size(2048) / size(256) - 1) < 0.01


def test_wrong_shapes_and_orders_are_refused():
  weight, hessian = problem(k=16, n=8)
  rows = recipes.rtn(group=4).rows
  with pytest.raises(ValueError, match=r'needs \(16, 16\)'):
    compensation.solve(weight, hessian[:8, :8], rows, Compensation())
  with pytest.raises(ValueError, match="order='random'"):
    compensation.solve(weight, hessian, rows, Compensation(order='random'))
