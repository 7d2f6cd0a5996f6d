"""Checks that every step must pass."""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mq_jax.clusters import Cluster, Step, new_cluster
from mq_jax.testing import _suite
from mq_jax.testing._suite import Report, Skip, check

_CLUSTERS = 8


def check_step(
  step: Step,
  *,
  size: int = 12,
  finer: Step | None = None,
  variants: Sequence[Step] = (),
  smooth: bool = False,
  key: jax.Array | None = None,
  skip: Mapping[str, str] | None = None,
) -> Report:
  """Run the suite on a step, `Cluster -> Cluster`.

  The checks, by name:
    runs: under `jit`, on one cluster; fields keep shapes and dtypes, and the
      key is handed on as it came.
    did_something: some field of the cluster is not what it was.
    vmap: clusters side by side give what they give one by one.
    sharding: so do clusters spread over all devices (skipped with one).
    deterministic: the same bits twice, and the same program traced twice.
    degenerate: all-zero, constant, huge, tiny and mixed clusters stay finite.
    gradient: so does the gradient of the floats with respect to the weights;
      with `smooth` it agrees with finite differences.
    padding: of weights with saliency 0 none becomes an outlier or a value.
    one_compile: other numbers in the leaves, and `variants`, compile nothing.
    size: a cluster twice as long takes no longer program.
    finer: the error of `finer` is smaller.

  Args:
    step: The step. To check one that needs others before it, check a `chain`.
    size: Weights in a cluster.
    finer: The same step with more bits.
    variants: Steps that differ in numbers only, and must share the program.
    smooth: Whether the step claims a gradient that finite differences have;
      not so for steps that round, whatever they put in the gradient's place.
    key: For steps that draw numbers.
    skip: Reasons by name of checks to leave out.

  Returns:
    The checks that passed, and those skipped.

  Raises:
    AssertionError: naming every check that failed, and what was found.
    ValueError: if `skip` names no check.

  Examples:
    >>> from mq_jax import steps
    >>> report = check_step(steps.RoundToNearest(3))
    >>> report.skipped['finer']
    'no finer step was given'
  """
  suite = _Steps(step, size, finer, tuple(variants), smooth, key)
  names = (
    *('runs', 'did_something', 'vmap', 'sharding', 'deterministic'),
    *('degenerate', 'gradient', 'padding', 'one_compile', 'size', 'finer'),
  )
  checks = {name: getattr(suite, name) for name in names}
  return _suite.run('check_step', _name(step), checks, skip or {})


def _name(step) -> str:
  # Arrays among the leaves would fill the line.
  text = getattr(step, '__name__', None) or repr(step)
  text = ' '.join(text.split())
  return text if len(text) < 100 else f'{text[:97]}...'


def _plain(cluster):
  """NumPy arrays; the key, which is no array for NumPy, left out."""
  return jax.device_get(cluster._replace(key=None))


class _Steps:
  """A method for each check; what several need is computed once."""

  def __init__(self, step, size, finer, variants, smooth, key):
    self.step, self.n, self.finer_step = step, size, finer
    self.variants, self.smooth, self.key = variants, smooth, key
    rng = np.random.default_rng(0)
    devices = len(jax.devices())
    shape = (devices * -(-_CLUSTERS // devices), size)
    # Tails as weights have them.
    self.weight = (2.0 * rng.standard_t(3.0, shape)).astype(np.float32)
    self.ones = np.ones(shape, np.float32)
    self.argument = _suite.traceable(step)

  def run(self, step, weight, saliency):
    return step(new_cluster(weight, saliency, self.key))

  @functools.cached_property
  def one(self):
    """The step on one cluster, compiled: (step, weight, saliency)."""
    if self.argument:
      return jax.jit(self.run)
    inner = jax.jit(lambda w, s: self.run(self.step, w, s))
    return lambda step, w, s: inner(w, s)

  @functools.cached_property
  def many(self):
    inner = jax.jit(jax.vmap(lambda w, s: self.run(self.step, w, s)))
    return lambda weight, saliency: inner(weight, saliency)

  @functools.cached_property
  def loop(self):
    """What the step makes of every cluster, one by one."""
    done = [
      _plain(self.one(self.step, w, s)) for w, s in zip(self.weight, self.ones)
    ]
    return jax.tree.map(lambda *x: np.stack(x), *done)

  def floats(self, weight, saliency):
    """A number to take the gradient of: all floats, in fixed proportions."""
    done = self.run(self.step, weight, saliency)
    share = jnp.cos(jnp.arange(self.n, dtype=jnp.float32))
    return jnp.sum(share * (done.value + done.weight)), done

  def runs(self):
    done = self.one(self.step, self.weight[0], self.ones[0])
    check(
      isinstance(done, Cluster),
      f'it returns a {type(done).__name__}; a step returns a Cluster',
    )
    given = new_cluster(jnp.asarray(self.weight[0]), key=self.key)
    for field in Cluster._fields[:5]:
      new, old = getattr(done, field), getattr(given, field)
      new = jnp.asarray(new)
      check(
        (new.shape, new.dtype) == (old.shape, old.dtype),
        f'{field} came as {old.dtype}{list(old.shape)} and is '
        f'{new.dtype}{list(new.shape)}',
      )
    check(
      isinstance(done.code, dict),
      f'code is a {type(done.code).__name__}; a dict of arrays is needed',
    )
    check(
      _suite.same_bits(done.key, self.key),
      'the key is not the one that came; derive new ones, and hand it on',
    )

  def did_something(self):
    given = jax.vmap(new_cluster)(jnp.asarray(self.weight))
    check(
      not _suite.same_bits(_plain(given), self.loop),
      f'all fields of {len(self.weight)} random clusters are as they were',
    )

  def compare(self, done, how):
    a, _ = jax.tree_util.tree_flatten_with_path(_plain(done))
    b, _ = jax.tree_util.tree_flatten_with_path(self.loop)
    for (path, x), (_, y) in zip(a, b, strict=True):
      same = (x.shape, x.dtype) == (y.shape, y.dtype)
      share = np.isclose(x, y, rtol=1e-5, atol=1e-6).mean() if same else 0.0
      check(
        share == 1.0,
        f'{jax.tree_util.keystr(path)} of clusters {how} equals that of the '
        f'same clusters one by one in {share:.0%} of its numbers',
      )

  @functools.cached_property
  def spread(self):
    done = self.many(*_suite.spread((self.weight, self.ones)))
    self.compare(done, 'spread over devices')
    return done

  def vmap(self):
    try:
      self.spread  # noqa: B018  # holds both: one program less to compile
    except (AssertionError, Skip):
      self.compare(self.many(self.weight, self.ones), 'side by side')

  def sharding(self):
    self.spread  # noqa: B018

  def deterministic(self):
    first, again = (
      self.one(self.step, self.weight[0], self.ones[0]) for _ in range(2)
    )
    check(_suite.same_bits(first, again), 'two runs give different bits')
    check(self.lowered() == self.lowered(), 'two traces give two programs')

  def lowered(self, size=None):
    shape = jax.ShapeDtypeStruct((size or self.n,), 'float32')
    return _suite.lowered(lambda w, s: self.run(self.step, w, s), shape, shape)

  @functools.cached_property
  def hard(self):
    """Gradients and results on clusters that break things, by name."""
    n = self.n
    names = ('all zero', 'constant', 'one tiny', 'huge', 'mixed')
    bad = np.zeros((len(self.weight), n), np.float32)
    bad[1] = 3.0
    bad[2, 1] = 1e-30
    bad[3] = 1e30
    bad[4] = np.where(np.arange(n) % 2 == 0, 1e4, 1e-4)
    gradient, done = self.slope(bad, self.ones)
    each = lambda i: jax.tree.map(lambda x: x[i], (gradient, done))
    return {name: each(i) for i, name in enumerate(names)}

  @functools.cached_property
  def slope(self):
    f = jax.jit(jax.vmap(jax.grad(self.floats, has_aux=True)))

    def run(weight, saliency):
      gradient, done = f(weight, saliency)
      return np.asarray(gradient), _plain(done)

    return run

  def degenerate(self):
    for name, (_, done) in self.hard.items():
      check(_suite.finite(done), f'an {name} cluster is not finite any more')

  def gradient(self):
    for name, (gradient, _) in self.hard.items():
      check(
        _suite.finite(gradient), f'at an {name} cluster it is {gradient[:4]}'
      )
    gradient, _ = self.slope(self.weight, self.ones)
    check(_suite.finite(gradient), 'it is not finite on random clusters')
    if not self.smooth:
      return
    way = np.sin(1.0 + np.arange(self.n, dtype=np.float32))
    value = jax.jit(jax.vmap(lambda w, s: self.floats(w, s)[0]))
    up, down = (
      np.asarray(value(self.weight + h * way, self.ones), np.float64)
      for h in (1e-2, -1e-2)
    )
    found, measured = gradient @ way, (up - down) / 2e-2
    close = np.isclose(found, measured, rtol=0.03, atol=0.03)
    worst = int(np.argmax(np.abs(found - measured)))
    # A kink may lie between the two points of a few clusters.
    check(
      close.mean() >= 0.75,
      f'along one direction it is {found[worst]:.4g}, and finite differences '
      f'say {measured[worst]:.4g}',
    )

  def padding(self):
    saliency = self.ones.copy()
    half = np.arange(self.n) >= self.n // 2
    saliency[:, half] = 0.0
    saliency[0] = 0.0
    weight = np.where(saliency > 0, self.weight, 0.0).astype(np.float32)
    _, done = self.slope(weight, saliency)
    check(_suite.finite(done), 'a padded cluster is not finite any more')
    empty = saliency == 0
    check(not done.outlier[empty].any(), 'padding became an outlier')
    check(not done.value[empty].any(), 'padding got a value that is not 0')

  def one_compile(self):
    if not self.argument:
      raise Skip('a plain function has no leaves')
    if not jax.tree.leaves(self.step) and not self.variants:
      raise Skip('the step has no leaves')
    given = self.weight[0], self.ones[0]
    self.one(self.step, *given)
    before = self.one._cache_size()
    for other in (_suite.others(self.step), *self.variants):
      self.one(other, *given)
      check(
        self.one._cache_size() == before,
        f'{_name(other)} compiled a program of its own; numbers must be '
        'leaves, and the program must not depend on them',
      )

  def size(self):
    _suite.check_size(
      self.lowered(), self.lowered(2 * self.n), 'for a cluster of 2 n'
    )

  def finer(self):
    if self.finer_step is None:
      raise Skip('no finer step was given')
    done = [
      self.one(self.finer_step, w, s) for w, s in zip(self.weight, self.ones)
    ]
    error = lambda value: float(np.mean((np.asarray(value) - self.weight) ** 2))
    coarse, fine = error(self.loop.value), error([x.value for x in done])
    check(
      fine < coarse,
      f'the mean squared error of {_name(self.finer_step)} is {fine:.4g}, not '
      f'less than {coarse:.4g}',
    )
