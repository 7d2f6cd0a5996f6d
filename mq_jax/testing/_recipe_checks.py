"""What the checks of a recipe do; their names and meaning: `recipes`."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax import layouts, quantize
from mq_jax.recipes import BlockParts
from mq_jax.testing import _suite
from mq_jax.testing._suite import Skip, check

K, N = 44, 21  # divided by no usual block
_LARGE = 768  # inputs; divided by all, so that no padding comes and goes


def _parts(recipe):
  return recipe.rows, recipe.compensation, recipe.input_scales


class Checks:
  """A method for each check; what several need is computed once."""

  def __init__(self, recipe, finer, variants, worst):
    self.recipe, self.finer_recipe = recipe, finer
    self.variants, self.worst = variants, worst
    rng = np.random.default_rng(0)
    self.weights = 0.05 * rng.standard_t(
      4.0, (max(2, len(jax.devices())), K, N)
    ).astype(np.float32)
    self.weight = self.weights[0]
    inputs = rng.standard_normal((200, K)) * np.linspace(0.2, 3.0, K)
    inputs = inputs + inputs[:, ::-1]
    self.hessian = (inputs.T @ inputs).astype(np.float32)

  @staticmethod
  def label(recipe):
    return recipe.label or type(recipe.rows).__name__

  def quantize(self, weight, recipe=None, hessian=None):
    recipe = recipe or self.recipe
    hessian = self.hessian if hessian is None else hessian
    return quantize.quantize_matrix(weight, recipe, hessian=hessian)

  @functools.cached_property
  def done(self):
    return self.quantize(self.weight)

  @functools.cached_property
  def decode(self):
    """Values of a matrix; compiled once for all of one structure."""
    layout = self.layout
    run = jax.jit(lambda codes: layout.decode(codes, K, N))
    return lambda matrix: np.asarray(run(matrix.codes))

  @property
  def layout(self):
    return self.done.layout

  @functools.cached_property
  def values(self):
    return self.decode(self.done)

  def energy(self, error):
    """Of the layer's output, f64."""
    error = np.asarray(error, np.float64)
    return float(np.sum(error * (self.hessian.astype(np.float64) @ error)))

  def quantizes(self):
    done = self.done
    check(
      done.shape == self.values.shape == (K, N),
      f'a weight of {[K, N]} came back as {[*self.values.shape]}',
    )
    check(
      self.values.dtype == np.float32,
      f'the layout decodes to {self.values.dtype}; float32 is needed',
    )
    check(np.isfinite(self.values).all(), 'values are not finite')
    check(done.status.name == 'ok', f'its status is: {done.status.sentence}')

  def did_something(self):
    check(
      not np.array_equal(self.values, self.weight),
      'the values are the weights: nothing was quantized',
    )
    share = self.energy(self.weight - self.values) / self.energy(self.weight)
    check(
      share <= self.worst,
      f"the error of the layer's output is {share:.3g} of it, more than "
      f'worst={self.worst}',
    )

  def recorded(self):
    error = np.asarray(self.weight, np.float64) - self.values
    weight = np.asarray(self.weight, np.float64)
    true = {
      'weight_mse': (error**2).sum() / (weight**2).sum(),
      'output_error': self.energy(error) / self.energy(weight),
    }
    for name, value in true.items():
      found = float(self.done.record[name])
      check(
        np.isclose(found, value, rtol=1e-3),
        f'{name} is {value:.6g}, and recorded is {found:.6g}',
      )

  def bits_are_bytes(self):
    packed = self.done.pack()
    ebw = 8 * packed.nbytes / (K * N)
    check(
      packed.nbytes == self.done.nbytes,
      f'the layout promises {self.done.nbytes} bytes, pack gives '
      f'{packed.nbytes}',
    )
    check(self.done.ebw == ebw, f'ebw is {self.done.ebw}, packed {ebw}')
    for name, buffer in packed.buffers.items():
      check(
        isinstance(buffer, np.ndarray) and buffer.dtype == np.uint8,
        f'buffer {name!r} is no array of u8',
      )
    check(
      self.done.ebw_paper <= ebw,
      f"the paper's count of {self.done.ebw_paper} bits is more than the "
      f'{ebw} that are stored',
    )

  def unpack(self):
    packed = self.done.pack()
    again = layouts.unpack(packed)
    values = self.decode(again)
    check(
      np.array_equal(values, self.values)
      and np.array_equal(
        np.signbit(values[values != 0]), np.signbit(self.values[values != 0])
      ),
      f'{np.mean(values != self.values):.0%} of the values differ after '
      'pack and unpack',
    )
    repacked = again.pack().buffers
    for name, buffer in packed.buffers.items():
      check(
        np.array_equal(repacked.get(name), buffer),
        f'buffer {name!r} is another when packed again',
      )

  def json(self):
    try:
      data = layouts.to_json(self.layout)
      layouts.from_json({'layout': data['layout']})
    except ValueError as error:
      if 'unknown layout' in str(error):
        raise Skip(f'{error}: no artifact on disk can hold it') from None
    again = layouts.from_json(json.loads(json.dumps(data)))
    check(again == self.layout, f'{self.layout} came back as {again}')

  def damaged(self):
    packed = self.done.pack()
    for name, buffer in packed.buffers.items():
      if not buffer.size:
        continue
      short = {**packed.buffers, name: buffer[:-1]}
      gone = {k: v for k, v in packed.buffers.items() if k != name}
      for what, buffers in (('a byte short', short), ('missing', gone)):
        try:
          layouts.unpack(packed._replace(buffers=buffers))
        except ValueError:
          continue
        raise AssertionError(f'buffer {name!r} is {what}, and it unpacks')

  def deterministic(self):
    again = self.quantize(self.weight)
    check(
      _suite.same_bits(self.done.codes, again.codes),
      'two runs give different codes',
    )
    if not self.in_blocks:
      same = self.lowered(K) == self.lowered(K)
      check(same, 'two traces give two programs')

  @property
  def in_blocks(self):
    return isinstance(self.recipe.rows, BlockParts)

  def lowered(self, k):
    shape = lambda *s: jax.ShapeDtypeStruct(s, 'float32')
    # What the compiled program wraps: of that, jit would keep the trace.
    f = lambda w, h: quantize._codes(w, h, *_parts(self.recipe))
    return _suite.lowered(f, shape(k, N), shape(k, k))

  def compare(self, batch, how):
    codes, record = quantize.quantize_batch(*batch[:1], self.recipe, batch[1])
    codes, record = jax.device_get((codes, record))
    decode = lambda c: self.layout.decode(c, K, N)
    values = np.asarray(jax.jit(jax.vmap(decode))(codes))
    count = len(self.weights)
    check(
      all(x.shape == (count,) for x in record.values()),
      f'records of {count} matrices have shapes '
      f'{sorted({x.shape for x in record.values()})}',
    )
    for i in (0, count - 1):
      alone = self.decode(self.quantize(self.weights[i]))
      # The program may sum in another order: ties aside, all is equal.
      share = np.isclose(values[i], alone, rtol=1e-4, atol=1e-6).mean()
      check(
        share > 0.97,
        f'matrix {i} of {count} {how} has {share:.0%} of its values equal '
        'to those that it has alone',
      )

  @functools.cached_property
  def batch(self):
    hessians = np.broadcast_to(self.hessian, (len(self.weights), K, K))
    return jnp.asarray(self.weights), jnp.asarray(hessians)

  @functools.cached_property
  def spread(self):
    self.compare(_suite.spread(self.batch), 'spread over devices')
    return True

  def vmap(self):
    try:
      self.spread  # noqa: B018  # holds both: one program less to compile
    except (AssertionError, Skip):
      self.compare(self.batch, 'side by side')

  def sharding(self):
    self.spread  # noqa: B018

  def degenerate(self):
    zeros = np.zeros((K, N), np.float32)
    one = zeros.copy()
    one[3, 4] = 7.0
    mixed = zeros + np.where(np.arange(N) % 2 == 0, 5.0, 1e-3)[None]
    for name, weight in {
      'all-zero': zeros,
      'constant': zeros + np.float32(0.3),
      'one-outlier': one,
      'two-scale': mixed.astype(np.float32),
    }.items():
      done = self.quantize(weight)
      values = self.decode(done)
      check(np.isfinite(values).all(), f'an {name} matrix is not finite')
      check(
        done.pack().nbytes == done.nbytes,
        f'an {name} matrix packs to other bytes than promised',
      )
      check(weight.any() or not values.any(), 'zeros are not zeros any more')

  def scaling(self):
    # 2^-3: scales in float16 stay normal.
    values = 8.0 * self.decode(self.quantize(self.weight / 8.0))
    share = np.isclose(values, self.values, rtol=2e-3, atol=1e-4).mean()
    check(
      share > 0.97,
      f'{share:.0%} of the values of an eighth of the weight are an eighth; '
      'skip this check where constants of the recipe have a unit',
    )

  def calibration(self):
    if not self.recipe.calibrated:
      raise Skip('the recipe uses no Hessian')
    blind = self.quantize(self.weight, hessian=np.eye(K, dtype=np.float32))
    best, other = (
      self.energy(self.weight - values)
      for values in (self.values, self.decode(blind))
    )
    check(
      best < other,
      f"the error of the layer's output is {best:.4g} with the true Hessian "
      f'and {other:.4g} with one that says nothing',
    )

  def one_compile(self):
    if self.in_blocks:
      raise Skip('blocks are quantized by the programs of their recipes')
    for other in self.variants:
      check(
        jax.tree.structure(_parts(other))
        == jax.tree.structure(_parts(self.recipe)),
        f'{self.label(other)} differs in more than numbers: what it differs '
        'in is static, not a leaf',
      )
    given = [
      _parts(self.recipe),
      _suite.others(_parts(self.recipe)),
      *map(_parts, self.variants),
    ]
    arrays = jnp.asarray(self.weight), jnp.asarray(self.hessian)
    programs = []
    for parts in given:
      quantize._quantize_batch(*arrays, *parts)
      programs.append(quantize._quantize_batch._cache_size())
    check(
      len(set(programs)) == 1,
      'other numbers in its leaves compile programs of their own',
    )

  def size(self):
    if self.in_blocks:
      raise Skip('blocks are quantized by the programs of their recipes')
    _suite.check_size(
      self.lowered(_LARGE), self.lowered(2 * _LARGE), 'for twice the inputs'
    )

  def finer(self):
    if self.finer_recipe is None:
      raise Skip('no finer recipe was given')
    fine = self.quantize(self.weight, self.finer_recipe).dequantize()
    fine = self.energy(self.weight - fine)
    coarse = self.energy(self.weight - self.values)
    check(
      fine < coarse,
      f"the error of the layer's output is {fine:.4g} with "
      f'{self.label(self.finer_recipe)}, not less than {coarse:.4g}',
    )
