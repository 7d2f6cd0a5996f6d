"""Slow, plain NumPy float64 versions, written from the papers."""

import numpy as np


def gptq_order(weight, hessian, damping, quantize_row):
  """GPTQ as published: the inverse Hessian's Cholesky factor, row updates.

  `quantize_row(j, row) -> values` is called once a row with its current
  values. Returns the quantized weight.
  """
  W = np.array(weight, np.float64)
  H = np.array(hessian, np.float64)
  H = H + damping * np.mean(np.diag(H)) * np.eye(len(H))
  inverse = np.linalg.inv(H)
  U = np.linalg.cholesky(inverse).T  # upper, U^T U = H^-1
  Q = np.zeros_like(W)
  for j in range(len(W)):
    Q[j] = quantize_row(j, W[j].copy())
    error = (W[j] - Q[j]) / U[j, j]
    W[j + 1 :] -= np.outer(U[j, j + 1 :], error)
  return Q


def shared_exponent(x, cost, largest):
  """Power of two of least weighted error among five; see the digest, S3."""
  peak = np.max(np.abs(x), initial=0.0)
  if peak == 0:
    return -127
  floor = int(np.floor(np.log2(peak / largest)))
  best = None
  for shift in (0, 1, -1, -2, -3):
    scale = 2.0 ** (floor + shift)
    q = np.clip(np.round(x / scale), -largest, largest)
    error = np.sum(cost * (q * scale - x) ** 2)
    if best is None or error < best[0]:
      best = (error, floor + shift)
  return best[1]


def outliers(weight, exponent, bits):
  """(1 + m / 2^bits) 2^exponent with the sign of the weight."""
  steps = 2**bits
  m = np.clip(
    np.round((np.abs(weight) / 2.0**exponent - 1) * steps), 0, steps - 1
  )
  return np.where(weight < 0, -1, 1) * (1 + m / steps) * 2.0**exponent


def microscopiq_block(w, bits, sigma, micro, prune=True):
  """One macro-block (no padding): values, outliers, pruned slots."""
  w = np.array(w, np.float64)
  is_out = np.abs(w - w.mean()) > sigma * w.std()
  pruned = np.zeros(len(w), bool)
  for start in range(0, len(w), micro):
    part = slice(start, start + micro)
    if not prune:
      continue
    found = np.flatnonzero(is_out[part])
    order = found[np.argsort(-np.abs(w[part][found]), kind='stable')]
    keep = np.zeros(micro, bool)
    keep[order[: micro // 2]] = True
    is_out[part] = keep
    cost = np.where(keep, np.inf, w[part] ** 2)
    pruned[start + np.argsort(cost, kind='stable')[: keep.sum()]] = True
  inlier = ~is_out & ~pruned
  largest = 2 ** (bits - 1) - 1
  isf = shared_exponent(np.where(inlier, w, 0), inlier * 1.0, largest)
  values = np.where(
    inlier, np.clip(np.round(w / 2.0**isf), -largest, largest) * 2.0**isf, 0
  )
  for start in range(0, len(w), micro):
    part = slice(start, start + micro)
    mask = is_out[part]
    if not mask.any():
      continue
    x = w[part][mask]
    top = int(np.floor(np.log2(np.abs(x).max())))
    best = None
    for exponent in (top, top - 1, top + 1):
      q = outliers(x, exponent, bits)
      error = np.sum((q - x) ** 2)
      if best is None or error < best[0]:
        best = (error, q)
    values[start + np.flatnonzero(mask)] = best[1]
  return values, is_out, pruned


def fineq_group(x, cost, scale, patterns, share):
  """Pattern of least error of one group, by trying all; code and levels."""
  best = None
  for code, levels in enumerate(patterns):
    limit = np.tile(levels, share)
    q = np.clip(np.round(np.asarray(x, np.float64) / scale), -limit, limit)
    error = np.sum(cost * (x - q * scale) ** 2)
    if best is None or error < best[0]:
      best = (error, code, q)
  return best
