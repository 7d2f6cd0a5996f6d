"""Published errors on synthetic weights: fineq.md 2.3, microscopiq.md 2.3, 7.

The digests' numbers are of other random draws; they have three digits at
most. Over seeds ours scatter by 1 % of the error at 48 x 4104 weights.
"""

import pytest

import mq_jax as mq
from experiments import synthetic_table


def test_fineq_with_its_default_rule_has_the_published_error():
  # Half of the digest's 48 outputs: the Gaussian error scatters by 0.3 %.
  weight = synthetic_table.weights('gaussian', 4104, 24)
  found = mq.quantize_matrix(weight, mq.recipes.fineq())
  assert float(found.record['weight_mse']) == pytest.approx(0.126, rel=0.03)


def test_threshold_of_outliers_trades_bits_for_error_as_published():
  rows = synthetic_table.sigma_rows(k=64, n=2048)
  for row in rows:
    assert row.ours == pytest.approx(row.digest, abs=0.02), row
  errors = [row.ours for row in rows if row.quantity == 'error']
  assert errors == sorted(errors)


@pytest.mark.slow
def test_fineq_table():
  rows = synthetic_table.fineq_rows()
  assert len(rows) == 3 * len(synthetic_table.FINEQ)
  for row in rows:
    # With absmax the largest of 4104 heavy-tailed draws decides: 6 seeds of
    # ours gave 0.445..0.497 for t5 and 0.283..0.311 for Laplace weights.
    heavy = 'absmax' in row.variant and row.weights != 'gaussian'
    assert row.ours == pytest.approx(row.digest, rel=0.1 if heavy else 0.03), (
      row
    )


@pytest.mark.slow
def test_exponent_table():
  rows = synthetic_table.exponent_rows(k=64, n=2048)
  for row in rows:
    assert row.ours == pytest.approx(row.digest, abs=0.02, rel=0.05), row


def test_error_depends_on_where_weights_lie_between_powers_of_two():
  """Why `SPREAD` matters: half an octave changes the error by a tenth."""
  recipe = mq.recipes.microscopiq(sigma=100.0, compensate=False)
  errors = []
  for spread in (1.0, 2.0**0.5, 2.0):
    weight = synthetic_table.weights('gaussian', 64, 2048, spread=spread)
    errors.append(
      float(mq.quantize_matrix(weight, recipe).record['weight_mse'])
    )
  assert errors[0] == pytest.approx(errors[2], rel=1e-5)
  assert abs(errors[1] - errors[0]) > 0.03 * errors[0]


def test_markdown_has_a_line_for_each_row():
  row = synthetic_table.Row('a', 'b', 'error', 't5', 0.2, 0.21)
  table = synthetic_table.markdown([row])
  assert table.splitlines()[-1].endswith('| 0.2100 | +0.0100 (+5.0%) |')
