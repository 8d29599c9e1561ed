"""Scores of selected blocks in shared memory, and the best of them for each query.

The n-th largest score of a query is sought by bisection over the bits of a float32, for which it is
enough to count: first the best few of each lane, which nearly always have it among them, and only
if a lane may have more, or scores are equal, all of them. Then the chosen blocks become the bits of
words, and each place of the result looks for its bit.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu.common import ROWS, TILE, TILE_ROWS, by_column, full, padded
from pallas_kernels.mosaic_gpu.words import nth_bit, shifted_right

LANES = 32
PASS = 1024  # scores that a pass over them takes at a time
ROUNDS = 4  # of bisection between two looks at whether every query is done
TOPS = 5  # scores of each lane that are counted first
INFINITY = 0x7F800000  # the bits of float32's infinity
FOUR_TIMES = 2 << 23  # what multiplies a float32 by 4, added to its bits

#: Scores [blocks, queries] with a query's blocks in the lanes of one warp, two queries a warp: a
#: sum over blocks stays within the warp.
BY_QUERY = plgpu.Layout.TILED(
    plgpu.Tiling(((LANES, TILE_ROWS), (2,))), warp_dims=(-2,), lane_dims=(-3,), vector_dim=-1
)
OF_QUERIES = BY_QUERY.reduce(0)


def rows_a_pass(queries, number):
    """How many of so many blocks of a tile's queries a pass takes at a time."""
    passes = pl.cdiv(number, max(PASS // queries, LANES))
    return padded(pl.cdiv(number, passes), LANES)


def row_index(shape, layout):
    """The row of each element."""
    return plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)


def _by_query(x, shape):
    return plgpu.layout_cast(by_column(x, shape), BY_QUERY)


def _zeros(shape, layout):
    return plgpu.layout_cast(jnp.zeros(shape, jnp.int32), layout)


def load(ref, layout):
    """What lies in memory, in registers of a layout."""
    return plgpu.load(ref, layout=layout, optimized=False)


def _to_float(bits):
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _inserted(tops, x):
    """The largest of each element, of `tops` in descending order and x."""
    result = []
    for top in tops:
        result.append(jnp.maximum(top, x))
        x = jnp.minimum(top, x)
    return tuple(result)


class Scores:
    """The scores of a tile in shared memory, [blocks, queries], those of steps `begin` to `end`.

    All of them are read in passes, of `rows` blocks each, as far as there are blocks.
    """

    def __init__(self, ref, number, begin, end):
        self.ref = ref
        self.number = number
        self.rows = rows_a_pass(ref.shape[1], number)
        end = jnp.minimum(end * ROWS, number)
        self.passes = jax.lax.div(begin * ROWS, self.rows), pl.cdiv(end, self.rows)

    def begin(self, block):
        """No key has given anything yet to this block, which is that of the first step."""
        self.ref.at[pl.ds(block, ROWS)][...] = full((ROWS, self.ref.shape[1]), 0.0)

    def add(self, block, own, following):
        """Adds what the keys of 64 blocks from `block` on give to those, and to the next ones."""
        self.ref.at[pl.ds(block + 1, ROWS)][...] = following
        self.ref.at[pl.ds(block, ROWS)][...] = own + load(self.ref.at[pl.ds(block, ROWS)], TILE)

    def at(self, step):
        """The blocks of a pass, and their scores."""
        base = pl.multiple_of(step * self.rows, self.rows)
        scores = load(self.ref.at[pl.ds(base, self.rows)], BY_QUERY)
        return base + row_index(scores.shape, BY_QUERY), scores

    def rank(self, first, own, *, initial, local):
        """Makes forced blocks infinite, and -1 what is no candidate.

        Returns:
          The TOPS best scores among the blocks of each lane, the best one first: [LANES, queries]
          each.
        """

        def step(i, tops):
            block, scores = self.at(i)
            first_, own_ = (_by_query(x, scores.shape) for x in (first, own))
            forced = (block < first_ + initial) | (block > own_ - local)
            candidate = (block >= first_) & (block <= own_) & (block < self.number)
            scores = jnp.where(candidate, jnp.where(forced, jnp.inf, scores), -1.0)
            base = pl.multiple_of(i * self.rows, self.rows)
            self.ref.at[pl.ds(base, self.rows)][...] = scores
            for row in range(0, self.rows, LANES):
                tops = _inserted(tops, scores[row : row + LANES])
            return tops

        lowest = full((LANES, self.ref.shape[1]), -1.0, BY_QUERY)
        return jax.lax.fori_loop(*self.passes, step, (lowest,) * TOPS)

    def count(self, chosen):
        """How many blocks of each query are chosen, by a function of blocks and scores."""

        def step(i, total):
            return total + jnp.where(chosen(*self.at(i)), 1, 0)

        total = _zeros((self.rows, self.ref.shape[1]), BY_QUERY)
        return jax.lax.fori_loop(*self.passes, step, total).sum(axis=0)


def _any(condition, flags):
    """Whether a condition of each query holds for any, as one bool.

    Args:
      condition: bool [queries].
      flags: shared memory for one number of each query.
    """
    flags[...] = jnp.where(condition, 1, 0)
    return functools.reduce(jnp.bitwise_or, [flags[i] for i in range(flags.shape[0])]) > 0


def _bisect(count, wanted, low, high, at_low, flags, guesses=()):
    """Narrows [low, high), integers of each query, to where the count falls below `wanted`.

    Args:
      count: from integers of each query to counts, which do not grow with them.
      wanted: a Python number. The count at high is less; at low it is less only if nothing can be
        more, and then low stays.
      low: int32 [queries].
      high: int32 [queries].
      at_low: the count at low.
      flags: shared memory for one number of each query.
      guesses: integers of each query to begin with.

    Returns:
      low and the count there, which is exactly as wanted, or low + 1 is where the count is less.
    """

    def narrow(state, middle):
        low, high, at_low = state
        at_middle = count(middle)
        enough = at_middle >= wanted
        low, high = jnp.where(enough, middle, low), jnp.where(enough, high, middle)
        return low, high, jnp.where(enough, at_middle, at_low)

    def halve(_, state):
        low, high, _ = state
        return narrow(state, low + shifted_right(high - low, 1))

    def is_busy(low, high, at_low):
        return _any((at_low > wanted) & (high - low > 1), flags)

    def rounds(state):
        state = jax.lax.fori_loop(0, ROUNDS, halve, state[1:])
        return is_busy(*state), *state

    state = low, high, at_low
    for guess in guesses:
        low, high, _ = state
        state = narrow(state, jnp.maximum(jnp.minimum(guess, high - 1), low))
    state = jax.lax.while_loop(lambda state: state[0], rounds, (is_busy(*state), *state))
    return state[1], state[3]


def best(scores, tops, number, candidates, mean, flags):
    """Which blocks are the `number` best.

    Args:
      scores: `Scores` after `rank`.
      tops: what it returned.
      number: how many blocks to choose.
      candidates: how many there are to choose from, int32 [queries].
      mean: about what the mean of the scores is, float32 [queries].
      flags: shared memory for one number of each query.

    Returns:
      A function of blocks and scores.
    """
    queries = scores.ref.shape[1]
    zero = _zeros((queries,), OF_QUERIES)
    beyond = zero + (INFINITY + 1)
    end = zero + scores.passes[1] * scores.rows

    def reached(x, bits):
        return x >= _by_query(_to_float(bits), x.shape)

    def of_tops(bits):
        return sum(jnp.where(reached(top, bits), 1, 0) for top in tops).sum(axis=0)

    def of_all(bits):
        return scores.count(lambda _, x: reached(x, bits))

    def without(threshold, excluded):
        """Of blocks at the threshold, without those from block `end - excluded` on."""

        def chosen(block, x):
            least = _by_query(_to_float(threshold), x.shape)
            return (x > least) | ((x == least) & (block < _by_query(end - excluded, x.shape)))

        return chosen

    mean = jax.lax.bitcast_convert_type(mean, jnp.int32)
    guesses = mean, mean + FOUR_TIMES
    low, at_low = _bisect(of_tops, number, zero, beyond, candidates, flags, guesses)
    # A lane of which the last one is counted may have more of them.
    hidden = jnp.where(reached(tops[-1], low), 1, 0).sum(axis=0) > 0
    doubtful = (candidates > number) & (hidden | (at_low > number))

    def settle():
        threshold, at_threshold = _bisect(
            of_all, number, low, beyond, of_all(low), flags, (low + 1,)
        )
        excluded, _ = _bisect(
            lambda excluded: scores.count(without(threshold, excluded)),
            *(number, zero, end + 1, at_threshold, flags),
        )
        return threshold, excluded

    return without(*jax.lax.cond(_any(doubtful, flags), settle, lambda: (low, zero)))


def places(scores, chosen, number):
    """The chosen blocks of each query in ascending order, then -1: [places, queries]."""
    queries = scores.ref.shape[1]
    shape = padded(number, LANES), queries
    place, zero = row_index(shape, BY_QUERY), _zeros(shape, BY_QUERY)
    lane = row_index((LANES, queries), BY_QUERY)
    bit = jax.lax.shift_left(jnp.full_like(lane, 1), lane)

    def step(i, state):
        before, word, nth, origin = state
        taken = jnp.where(chosen(*scores.at(i)), 1, 0)
        for row in range(0, scores.rows, LANES):
            part = taken[row : row + LANES]
            after = before + part.sum(axis=0)
            here = place - _by_query(before, shape)
            mine = (here >= 0) & (place < _by_query(after, shape))
            word = jnp.where(mine, _by_query((part * bit).sum(axis=0), shape), word)
            nth = jnp.where(mine, here, nth)
            origin = jnp.where(mine, zero + (i * scores.rows + row), origin)
            before = after
        return before, word, nth, origin

    state = _zeros((queries,), OF_QUERIES), zero, zero, zero - 1
    _, word, nth, origin = jax.lax.fori_loop(*scores.passes, step, state)
    return jnp.where(origin < 0, -1, origin + nth_bit(word, nth))
