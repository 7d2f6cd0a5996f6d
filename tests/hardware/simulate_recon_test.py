"""ReCoN against a count of links by brute force, for all lists there are."""

import collections
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mq_jax.hardware.simulate import recon

execute = jax.jit(recon.execute)


def all_lists(b, count):
  """Every list of `count` pairs, uppers in order. int[lists, 2, count]."""
  found = []
  for upper in itertools.combinations(range(b), count):
    rest = [slot for slot in range(b) if slot not in upper]
    for lower in itertools.permutations(rest, count):
      found.append((upper, lower))
  return np.array(found, int)


def every_list(b):
  """Lists of any count, unused pairs last. int[lists, 2, b / 2]."""
  counts = [all_lists(b, count) for count in range(b // 2 + 1)]
  pad = lambda x: np.pad(x, ((0, 0), (0, 0), (0, b // 2 - x.shape[2])))
  return np.concatenate([pad(x) for x in counts])


def walk(start, end, depth):
  """Links (stage, row, crosses) of a packet, from the first it crosses to the
  last: it may not be seen before or after."""
  links, row = [], start
  for stage in range(depth):
    crosses = (start ^ end) >> stage & 1
    links.append((stage, row, crosses))
    row ^= crosses << stage
  assert row == end
  crossing = [i for i, link in enumerate(links) if link[2]]
  return links[crossing[0] : crossing[-1] + 1]


def fits(pairs, depth, capacity):
  """Whether all packets and the sums of all rows fit at once."""
  load = collections.Counter(
    link for upper, lower in pairs for link in walk(lower, upper, depth)
  )
  return all(n + (not link[2]) <= capacity for link, n in load.items())


def fits_in_waves(pairs, depth, waves):
  """Whether some split in waves of one packet a link works.

  Uppers and their sums go with their pair; other sums in any wave in which
  no visitor has their link.
  """
  if waves == 1:
    return fits(pairs, depth, 1)
  for choice in itertools.product(range(waves), repeat=len(pairs)):
    links = []
    for (upper, lower), wave in zip(pairs, choice):
      path = walk(lower, upper, depth)
      links += [(wave, *link) for link in path]
      links += [(wave, t, lower, 0) for t in range(path[0][0])]
      links += [(wave, t, upper, 0) for t in range(depth)]
    if len(set(links)) < len(links):
      continue
    straight = collections.defaultdict(set)
    for (upper, lower), wave in zip(pairs, choice):
      for _, row, crosses in walk(lower, upper, depth):
        if not crosses:
          straight[row].add(wave)
    uppers = {upper for upper, _ in pairs}
    if all(
      len(used) < waves or row in uppers for row, used in straight.items()
    ):
      return True
  return False


def send(found, res, acc, hidden, merge_shift, half):
  """All waves of routed lists. Arrays [lists, n, m] -> [lists, n, m]."""
  total = np.zeros_like(acc)
  zero = lambda wave, x, at: np.where((at == wave)[..., None], x, 0)
  for wave in range(found.moves.shape[-3]):
    leaves = execute(
      jnp.asarray(found.commands[..., wave, :, :]),
      jnp.asarray(zero(wave, res, found.res_wave)),
      jnp.asarray(zero(wave, acc, found.sum_wave)),
      jnp.asarray(hidden),
      jnp.asarray(merge_shift),
      half=half,
    )
    leaves = np.asarray(leaves)
    assert not leaves[found.sum_wave != wave].any()
    total += leaves
  return total


def merged(upper, lower, res, acc, hidden, merge_shift, half):
  """What should leave: plain numpy, one list after the other."""
  want = acc + res
  for i in range(len(upper)):
    for u, l in zip(upper[i], lower[i]):
      if u == l:
        continue
      value = (res[i, u] << half) + res[i, l] + (hidden[i, u] << 2 * half)
      by = merge_shift[i, u]
      want[i, u] = acc[i, u] + (value << by if by >= 0 else value >> -by)
      want[i, l] = acc[i, l]
  return want


def draw(rng, lists, n, m=3):
  values = rng.integers(-(2**15), 2**15, (3, lists, n, m)).astype(np.int32)
  shift = rng.integers(-3, 6, (lists, n)).astype(np.int32)
  return (*values, shift)


@pytest.mark.parametrize(
  'b, count, share, best',
  [
    (4, 1, 1, 1),
    (4, 2, 1, 1),
    # MicroScopiQ digest, 5.4: 85.7, 72.4, 59.0, 46.7 % and, paired best, 85.7,
    # 98.1, 100, 100 %.
    (8, 1, 48 / 56, 48 / 56),
    (8, 2, 608 / 840, 0.98095),
    (8, 3, 1984 / 3360, 1),
    (8, 4, 784 / 1680, 1),
  ],
)
def test_routable_share_of_all_lists(b, count, share, best):
  lists = all_lists(b, count)
  depth = recon.stages(b) - 1
  found = recon.route(lists[:, 0], lists[:, 1], b)
  one = found.passes == 1
  pairs = [list(zip(*both)) for both in lists.tolist()]
  np.testing.assert_array_equal(one, [fits(x, depth, 1) for x in pairs])
  assert one.mean() == pytest.approx(share, abs=1e-12)

  slots = collections.defaultdict(bool)
  for x, ok in zip(lists.tolist(), one):
    slots[tuple(x[0]), tuple(sorted(x[1]))] |= bool(ok)
  assert np.mean(list(slots.values())) == pytest.approx(best, abs=1e-5)

  # Two values on a link are always enough, by count and by our routes.
  assert all(fits(x, depth, 2) for x in pairs)
  wide = recon.route(lists[:, 0], lists[:, 1], b, link_values=2)
  assert (wide.passes == 1).all()
  # Two passes are, then, with one value; and no list takes more than it must.
  assert found.passes.max() <= 2
  for x, waves in zip(pairs, found.waves):
    assert fits_in_waves(x, depth, int(waves))


def test_lists_without_pairs():
  nothing = np.zeros((3, 0), int)
  found = recon.route(nothing, nothing, 8)
  assert found.passes.tolist() == [1, 1, 1]
  assert found.moves.shape == (3, 1, 4, 8) and not found.moves.any()


def test_single_pairs_fail_at_101_only():
  lists = all_lists(8, 1)
  found = recon.route(lists[:, 0], lists[:, 1], 8)
  differ = lists[:, 0, 0] ^ lists[:, 1, 0]
  np.testing.assert_array_equal(found.passes == 2, differ == 0b101)


@pytest.mark.parametrize('b', [2, 4, 8])
@pytest.mark.parametrize('half', [1, 2])
def test_network_merges_every_list(b, half):
  rng = np.random.default_rng(b + half)
  lists = every_list(b)
  upper, lower = lists[:, 0], lists[:, 1]
  found = recon.route(upper, lower, b)
  given = draw(rng, len(lists), b, m=1)
  np.testing.assert_array_equal(
    send(found, *given, half), merged(upper, lower, *given, half)
  )


def test_all_commands_of_3_bits_are_used():
  lists = every_list(8)
  commands = recon.route(lists[:, 0], lists[:, 1], 8).commands
  assert commands.dtype == np.uint8
  assert commands.shape == (5937, 2, 4, 8)  # 32 switches
  assert set(np.unique(commands)) == set(recon.Command)


@pytest.mark.parametrize('n, routable', [(4, 24), (8, 23040)])
def test_plain_permutations(n, routable):
  """As many as an independent search found; and they arrive."""
  targets = np.array(list(itertools.permutations(range(n))))
  depth = n.bit_length() - 1
  sources = np.broadcast_to(np.arange(n), targets.shape)
  row, straight_in = sources.copy(), np.ones(targets.shape, bool)
  ok = np.ones(len(targets), bool)
  moves = np.zeros((len(targets), depth + 1, n), np.uint8)
  lists = np.arange(len(targets))[:, None]
  for stage in range(depth + 1):
    crosses = ((row ^ targets) >> stage & 1) > 0
    if stage == depth:
      assert not crosses.any()
    links = np.sort(2 * row + crosses, axis=1)
    ok &= (links[:, 1:] != links[:, :-1]).all(axis=1)
    # 0: straight stays straight and a visitor crosses; 1: the reverse.
    moves[lists, stage, row] = straight_in == crosses
    straight_in = ~crosses
    row = row ^ (crosses << stage)
  assert ok.sum() == routable

  moves, targets = moves[ok], targets[ok]
  rng = np.random.default_rng(0)
  sent = rng.integers(-99, 99, (*targets.shape, 1)).astype(np.int32)
  zero = np.zeros_like(sent)
  left = execute(
    recon.encode(jnp.asarray(moves)),
    jnp.asarray(sent),
    *map(jnp.asarray, (zero, zero, zero[..., 0])),
    half=1,
  )
  want = np.zeros_like(sent)
  np.put_along_axis(want, targets[..., None], sent, axis=1)
  np.testing.assert_array_equal(left, want)


def random_lists(rng, lists, n, count):
  """Lists with `count` pairs used and one unused, any order of slots."""
  slots = np.argsort(rng.random((lists, n)), axis=1)
  unused = np.zeros((lists, 1), int)
  upper = np.concatenate([slots[:, :count], unused], axis=1)
  lower = np.concatenate([slots[:, count : 2 * count], unused], axis=1)
  return upper, lower


@hypothesis.given(seed=st.integers(0, 2**32 - 1), count=st.integers(0, 8))
@hypothesis.settings(max_examples=20)
def test_wider_networks_route_any_pairs(seed, count):
  rng = np.random.default_rng(seed)
  upper, lower = random_lists(rng, 16, 16, count)
  found = recon.route(upper, lower, 16)
  given = draw(rng, 16, 16)
  np.testing.assert_array_equal(
    send(found, *given, 2), merged(upper, lower, *given, 2)
  )


def test_micro_blocks_side_by_side():
  rng = np.random.default_rng(0)
  upper, lower = random_lists(rng, 4 * 8, 8, 4)
  narrow = recon.route(upper, lower, 8)
  split = lambda x: x.reshape(4, 8, *x.shape[1:])
  moves = recon.widen(jnp.asarray(split(narrow.moves)), 64)
  found = recon.Route(
    np.asarray(moves),
    narrow.sum_wave.reshape(4, 64),
    narrow.res_wave.reshape(4, 64),
    split(narrow.waves).max(axis=1),
    split(narrow.passes).max(axis=1),
  )
  assert found.commands.shape == (4, 2, 7, 64)
  offset = 8 * np.arange(8)[:, None]
  flat = lambda x: (split(x) + offset).reshape(4, -1)
  given = draw(rng, 4, 64)
  want = merged(flat(upper), flat(lower), *given, 1)
  np.testing.assert_array_equal(send(found, *given, 1), want)
  # Routed as one list they take the same commands.
  whole = recon.route(flat(upper), flat(lower), 64)
  np.testing.assert_array_equal(whole.commands, found.commands)
  np.testing.assert_array_equal(whole.passes, found.passes)


def test_walkthrough_gives_56():
  """Weight 1.10b = 1.5, iAct 32, iAcc 8: halves 01 and 00."""
  for upper, lower in ((0, 3), (3, 0), (2, 7), (6, 3)):
    found = recon.route(np.array([[upper]]), np.array([[lower]]), 8)
    res, acc, hidden = np.zeros((3, 1, 8, 1), np.int32)
    res[0, upper], acc[0, upper], hidden[0, upper] = 1 * 32, 4 * 8, 32
    acc[0, lower] = 4 * 5
    out = send(found, res, acc, hidden, np.zeros((1, 8), np.int32), 1)
    assert out[0, upper, 0] / 4 == 56
    assert out[0, lower, 0] / 4 == 5


def test_hidden_bit_has_the_sign_and_fractions_stay():
  found = recon.route(np.array([[1]]), np.array([[0]]), 2)
  # -1.01b times 3: the magnitude's upper bit is 0, its lower bit 1.
  value = lambda *x: np.array(x, np.int32).reshape(1, 2, 1)
  out = send(
    found,
    value(-3, 0),
    value(0, 0),
    value(-3, -3),
    np.zeros((1, 2), np.int32),
    1,
  )
  assert out[0, 1, 0] / 4 == -1.25 * 3


@pytest.mark.parametrize(
  'upper, lower, n, options, message',
  [
    ([0], [1], 6, {}, '6 columns; a power of two'),
    ([0], [8], 8, {}, 'slots 0..8; 8 columns have 0..7'),
    ([-1], [1], 8, {}, 'slots -1..1'),
    ([0, 0], [1, 2], 8, {}, 'uses slot 0 twice'),
    ([0, 1], [1, 2], 8, {}, 'uses slot 1 twice'),
    ([0], [1, 2], 8, {}, 'one shape'),
    ([0], [1], 8, {'link_values': 3}, 'link_values=3 is not 1 or 2'),
  ],
)
def test_refuses(upper, lower, n, options, message):
  with pytest.raises(ValueError, match=message):
    recon.route(np.array(upper), np.array(lower), n, **options)


def test_widen_refuses_blocks_that_do_not_fill():
  moves = jnp.zeros((3, 1, 4, 8), jnp.uint8)
  with pytest.raises(ValueError, match='3 micro-blocks of 8 do not fill 32'):
    recon.widen(moves, 32)
