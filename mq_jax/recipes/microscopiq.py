"""MicroScopiQ: outliers at twice the width, paid for by pruning."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from mq_jax import clusters, layouts, steps
from mq_jax._pytrees import pytree_dataclass, static
from mq_jax.compensation import Compensation
from mq_jax.recipes._recipe import Recipe, recipe


@pytree_dataclass
class MicroScopiQRows:
  """Blocks of MX-INT inliers and MX-FP outliers; see `microscopiq`."""

  bits: jax.typing.ArrayLike
  sigma: jax.typing.ArrayLike = 3.0
  block: int = static(128)
  micro_block: int = static(8)
  axis: str = static('out')
  exponent: str = static('mse')
  outlier_exponent: str = static('mse')
  prescale: bool = static(True)
  prune: bool = static(True)
  inlier_clip: jax.typing.ArrayLike = 1.0

  @property
  def group(self) -> int:
    return 1 if self.axis == 'out' else self.block

  def step(self) -> clusters.Chain:
    """What happens to one block, up to the splitting of outliers."""
    inner = steps.RoundOutliers(
      self.bits, rule=self.outlier_exponent, prescale=self.prescale
    )
    chosen = [steps.DetectOutliers(self.sigma)]
    if self.prune:
      chosen.append(
        clusters.within(
          clusters.chain(
            steps.KeepLargestOutliers(self.micro_block // 2),
            steps.PruneForOutliers(),
          ),
          self.micro_block,
        )
      )
    return clusters.chain(
      *chosen,
      steps.Clip(self.inlier_clip),
      steps.RoundInliers(self.bits, rule=self.exponent),
      clusters.within(inner, self.micro_block),
    )

  def prepare(self, weight, saliency):
    del weight, saliency
    return ()

  def fit(self, rows, saliency, whole) -> Any:
    del whole
    if self.axis == 'out':
      return ()
    lifted = clusters.lift(self.step(), self.block, axis=0)
    done = lifted.clusters(rows, saliency[:, None])  # [n, 1, block]
    return {
      'outlier': done.outlier[:, 0],
      'kept': done.kept[:, 0],
      'isf': done.code['isf'][:, 0],
      'osf': done.code['osf'][:, 0],
    }

  def apply(self, row, saliency, whole, fitted, index):
    del whole
    if self.axis == 'out':
      lifted = clusters.lift(self.step(), self.block, axis=0)
      # The cost is the same for the whole row, and cancels in every choice.
      done = lifted.clusters(row)
      code = {'outlier': done.outlier, 'kept': done.kept, **done.code}
      return clusters.join(done.value, row.shape[0]), code
    outlier, kept = fitted['outlier'][:, index], fitted['kept'][:, index]
    isf = fitted['isf'].astype(jnp.int32)
    osf = fitted['osf'][:, index // self.micro_block].astype(jnp.int32)
    value, code = steps.round_inlier(row, isf, self.bits)
    wide, wide_code = steps.round_outlier(row, osf, self.bits)
    zero = lambda x: jnp.zeros((), x.dtype)
    pick = lambda a, b: jnp.where(outlier, a, jnp.where(kept, b, zero(b)))
    code = {
      'sign': pick(wide_code['sign'], code['sign']),
      'magnitude': pick(wide_code['magnitude'], code['magnitude']),
    }
    return pick(wide, value), code

  def layout(self):
    return layouts.MicroScopiQ(
      bits=self.bits,
      block=self.block,
      micro_block=self.micro_block,
      axis=self.axis,
      pruned=self.prune,
      prescale=self.prescale,
    )

  def collect(self, whole, fitted, codes):
    """Split the outliers, once every element is known."""
    del whole
    if self.axis == 'out':
      codes = dict(codes)
      rows = codes['isf'].shape[0]
      codes['osf'] = codes['osf'].reshape(rows, -1)
      for name in ('sign', 'magnitude', 'outlier', 'kept'):
        codes[name] = codes[name].reshape(rows, -1)
    else:
      # [group, n, ...] -> [n, group ...]
      turn = lambda x: jnp.swapaxes(x, 0, 1)
      flat = lambda x: turn(x).reshape(x.shape[1], -1)
      codes = {name: code.T for name, code in codes.items()}
      codes |= {name: flat(fitted[name]) for name in fitted}
    stored = {'isf': codes['isf'], 'osf': codes['osf']}
    if not self.prune:
      element, low = steps.split_unpruned(
        codes['sign'], codes['magnitude'], codes['outlier'], self.bits
      )
      return {
        **stored,
        'element': element,
        'low': low,
        'outlier': codes['outlier'],
      }
    split = steps.SplitOutliers(self.bits)

    def one(sign, magnitude, outlier, kept):
      cluster = clusters.new_cluster(jnp.zeros(sign.shape, jnp.float32))
      cluster = cluster._replace(
        outlier=outlier,
        kept=kept,
        code={'sign': sign, 'magnitude': magnitude},
      )
      return split(cluster).code

    cut = lambda x: x.reshape(x.shape[0], -1, self.micro_block)
    arrays = [
      cut(codes[name]) for name in ('sign', 'magnitude', 'outlier', 'kept')
    ]
    # Masks of pairs by slots are micro_block / 2 times as large as a weight.
    rows, width = codes['sign'].shape
    batch = clusters.batch_of(rows, (1 << 23) // (width * self.micro_block))
    code = jax.lax.map(
      lambda row: jax.vmap(one)(*row), arrays, batch_size=batch
    )
    element = code['element'].reshape(code['element'].shape[0], -1)
    return {
      **stored,
      'element': element,
      'upper': code['upper'],
      'lower': code['lower'],
    }

  def counts(self, weight, codes):
    del weight
    if self.prune:
      found = codes['upper'] != codes['lower']
    else:
      found = codes['outlier'].reshape(*codes['osf'].shape, self.micro_block)
    osf = codes['osf'].astype(jnp.int32)
    low, high = steps.outlier_exponent_range(self.bits)
    if self.prescale:
      isf = codes['isf'].astype(jnp.int32)
      osf = osf + jnp.repeat(isf, self.block // self.micro_block, axis=1)
    at_end = jnp.any(found, axis=-1) & ((osf <= low) | (osf >= high))
    outliers = jnp.sum(found, dtype=jnp.int32)
    return {
      'outliers': outliers,
      'pruned': outliers if self.prune else jnp.int32(0),
      'saturated_exponents': jnp.sum(at_end, dtype=jnp.int32),
    }


@recipe
def microscopiq(
  bits: int = 2,
  sigma: float = 3.0,
  block: int = 128,
  micro_block: int = 8,
  axis: str = 'out',
  exponent: str = 'mse',
  outlier_exponent: str = 'mse',
  prescale: bool = True,
  prune: bool = True,
  compensate: bool = True,
  damping: float = 0.01,
  order: str = 'natural',
  inlier_clip: float = 1.0,
) -> Recipe:
  """Inliers of `bits` bits, outliers of twice that in pruned neighbours.

  Args:
    bits: Width of a slot, 2, 3 or 4. Outliers have {sign, bits - 1 exponent,
      bits mantissa} bits with the exponent shared: e1m2, e2m3, e3m4.
    sigma: Outliers lie further than this from their block's mean, in standard
      deviations; `inf` for none.
    block: Weights under one inlier exponent (macro-block).
    micro_block: Weights that share an outlier exponent and a permutation list,
      a power of two, 2..block; at most half of them can be outliers.
    axis: 'out', blocks along the outputs, as the accelerator needs; or 'in',
      along the inputs, where saliency has a say in what is pruned.
    exponent: Rule of the inlier exponent, see `formats.shared_exponent`.
    outlier_exponent: 'mse' or 'floor', see `steps.RoundOutliers`.
    prescale: Multiply outliers by 2^isf before their exponent is stored, as
      the paper does. An identity, unless the exponent leaves its byte (small
      weights at 4 bits); the record counts `saturated_exponents`.
    prune: Make room for the outliers by pruning; without, their lower halves
      are stored apart (an ablation).
    compensate: Use error compensation when there is a Hessian.
    damping: See `gptq`.
    order: See `gptq`.
    inlier_clip: Inliers are clipped to this share of the largest of their block
      before they are rounded (ours; 1 changes nothing). Blocks along the
      outputs only.

  Raises:
    ValueError: for options that don't fit together.

  Source:
    Ramachandran, Kundu, Krishna, MicroScopiQ, ISCA 2025, arXiv 2411.05282v4.
    Block axis, rounding of exponents and what happens to surplus outliers
    (they become clipped inliers) are our choices.
  """
  if bits not in (2, 3, 4):
    raise ValueError(f'microscopiq: bits={bits!r} is not 2, 3 or 4')
  if axis not in ('out', 'in'):
    raise ValueError(f"microscopiq: axis={axis!r} is not 'out' or 'in'")
  power = isinstance(micro_block, int) and micro_block >= 2
  if not power or not math.log2(micro_block).is_integer():
    raise ValueError(
      f'microscopiq: micro_block={micro_block!r} is not a power of two >= 2'
    )
  if micro_block > 256:
    raise ValueError(
      f'microscopiq: micro_block={micro_block} exceeds 256, the slots that '
      'a byte can name'
    )
  if not isinstance(block, int) or block < 1 or block % micro_block:
    raise ValueError(
      f'microscopiq: block={block!r} is not a multiple of '
      f'micro_block={micro_block}'
    )
  if not sigma > 0:
    raise ValueError(f'microscopiq: sigma={sigma!r} is not positive')
  if not 0 < inlier_clip <= 1:
    raise ValueError(
      f'microscopiq: inlier_clip={inlier_clip!r} is not a share, 0 < .. <= 1'
    )
  if axis == 'in' and inlier_clip != 1:
    raise ValueError(
      f"microscopiq: inlier_clip={inlier_clip!r} needs axis='out'; along the "
      'inputs a block is rounded row by row'
    )
  rows = MicroScopiQRows(
    bits,
    sigma,
    block,
    micro_block,
    axis,
    exponent,
    outlier_exponent,
    prescale,
    prune,
    inlier_clip,
  )
  compensation = Compensation(damping, order=order) if compensate else None
  return Recipe(rows=rows, compensation=compensation)
