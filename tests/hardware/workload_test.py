"""Workloads from sites and tables; precisions measured on matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mq_jax as mq
from mq_jax import hardware as hw

# Parameters without embeddings and heads, from the models' reports.
PARAMETERS = {
  'opt-125m': 85e6,
  'opt-6.7b': 6.44e9,
  'opt-175b': 174e9,
  'llama-2-7b': 6.48e9,
  'llama-2-13b': 12.7e9,
  'llama-2-70b': 68.5e9,
  'llama-3-8b': 6.98e9,
  'llama-3-70b': 68.5e9,
  'mixtral-8x7b': 46.4e9,
  'phi-3-3.8b': 3.62e9,
  'phi-3-14b': 13.6e9,
  'resnet-50': 25.5e6,
  'vit-b-16': 85.5e6,
  'vit-h-14': 630e6,
}


@pytest.mark.parametrize('name', PARAMETERS)
def test_published_shapes_have_the_published_weights(name):
  work = hw.workload.model(name)
  weights = float((work.k * work.n * work.count).sum())
  assert weights == pytest.approx(PARAMETERS[name], rel=0.01)


@pytest.mark.parametrize('name', hw.shapes.MODELS)
def test_names_are_unique(name):
  names = hw.workload.model(name).names
  assert len(set(names)) == len(names)


def test_multiplications_of_image_models():
  macs = lambda name: float(hw.workload.model(name).macs.sum())
  # 4.1 G for 224 x 224 images; ViT-B/16 17.5 G with attention's products.
  assert macs('resnet-50') == pytest.approx(4.1e9, rel=0.01)
  assert macs('vit-b-16') == pytest.approx(16.9e9, rel=0.01)


def test_each_layer_is_the_same_work():
  together = hw.workload.model('llama-2-7b', 'decode', batch=3)
  apart = hw.workload.model('llama-2-7b', 'decode', batch=3, each_layer=True)
  assert apart.k.size == 224 and len(set(apart.names)) == 224
  assert apart.macs.sum() == together.macs.sum()
  assert set(apart.m.tolist()) == {3}


def test_experts_share_the_tokens():
  work = hw.workload.model('mixtral-8x7b', 'prefill', context=4096)
  rows = dict(zip(work.names, work.m.tolist(), strict=True))
  assert rows['q_proj'] == 4096 and rows['up_proj'] == 1024


def test_workload_of_sites():
  def f(params, x):
    y = jnp.tanh(x @ params['up'])
    scores = jnp.einsum('btd,bsd->bts', y, y)
    return jnp.einsum('bts,bsd->btd', scores, y) @ params['down'].T

  params = {'up': jnp.ones((8, 24)), 'down': jnp.ones((8, 24))}
  found = mq.sites.find(f, params, jnp.ones((2, 5, 8)))
  assert any(site.kind == 'attention' for site in found)
  work = hw.workload.from_sites(found, 'prefill', batch=4, context=16)
  assert set(work.names) == {'up', 'down'}
  by_name = dict(zip(work.names, zip(work.m, work.k, work.n), strict=False))
  assert by_name['up'] == (64, 8, 24) and by_name['down'] == (64, 24, 8)
  work = hw.workload.from_sites(found, 'decode', batch=4)
  assert set(work.m.tolist()) == {4}
  work = hw.workload.from_sites(found, 'prefill', context=20, tokens=10)
  assert set(work.m.tolist()) == {20}


def test_unknown_names_and_phases():
  with pytest.raises(ValueError, match='llama-2-7b'):
    hw.workload.model('llama2-7b')
  with pytest.raises(ValueError, match="phase 'train'"):
    hw.workload.model('llama-2-7b', 'train')
  with pytest.raises(ValueError, match='batch = 0'):
    hw.workload.model('llama-2-7b', batch=0)
  with pytest.raises(ValueError, match='images'):
    hw.workload.model('resnet-50', 'decode')
  with pytest.raises(ValueError, match='no site'):
    hw.workload.from_sites([])


def test_precision_of_microscopiq_codes():
  weight = np.array(jax.random.normal(jax.random.key(0), (64, 256)))
  weight[3, 17] = 30.0
  weight[40, 200:203] = -25.0
  q = mq.quantize_matrix(
    jnp.asarray(weight), mq.recipes.microscopiq(bits=2, sigma=6.0)
  )
  bits = hw.of_matrix(q, activation_bits=4)
  assert (bits.weight_bits, bits.activation_bits) == (2, 4)
  assert bits.ebw == q.ebw
  # Two micro-blocks of 64 x 32.
  assert bits.outlier_blocks == 2 / (64 * 32)


def test_precision_of_fineq_codes():
  weight = jax.random.t(jax.random.key(1), 5.0, (96, 64))
  q = mq.quantize_matrix(weight, mq.recipes.fineq())
  bits = hw.of_matrix(q)
  level = np.abs(np.asarray(q.codes['level']))[:96]
  assert bits.weight_bits == 3
  assert bits.two == (level >= 2).sum() / level.size
  assert bits.three == (level == 3).sum() / level.size
  assert bits.mean_magnitude == pytest.approx(level.mean())


def test_precision_of_scaled_and_dense_matrices():
  weight = jax.random.normal(jax.random.key(2), (64, 64))
  q = mq.quantize_matrix(weight, mq.recipes.awq(bits=3), hessian=jnp.eye(64))
  assert hw.of_matrix(q).weight_bits == 3
  q = mq.quantize_matrix(weight, mq.recipes.none())
  assert hw.of_matrix(q).weight_bits == 16
  assert hw.of_recipe(mq.recipes.rtn(bits=4, group=64)).ebw == 4.3125


def test_stacked_precisions_broadcast():
  bits = hw.stack([hw.precision(2, 8, ebw=2.4), hw.precision(4, 8)])
  found = hw.cost(
    hw.accelerators.microscopiq(16, 16),
    hw.workload.gemm(8, np.array([64, 128]), 64),
    bits,
  )
  assert found.total_cycles.shape == (2,)
  assert bits.ebw.tolist() == [2.4, 4]
