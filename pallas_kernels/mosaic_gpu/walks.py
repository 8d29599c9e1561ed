"""Which keys a tile of rows of interval_attention walks, and which tiles of rows a tile of keys.

Walks are made outside of the kernels, from lo and hi, which do not decrease: the first and the last
query of a tile bound what any and what all of its rows see.
"""

import functools
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.lists import search
from pallas_kernels.mosaic_gpu import rows, tuning
from pallas_kernels.mosaic_gpu.common import ROWS, TILE, TILE_ROWS, by_row

COMPUTE = 2  # warpgroups that compute, beside one that copies

#: Keys up to which an interval counts as short: its programs begin and end more than they walk.
SHORT = 1024


class Walk(NamedTuple):
    """The steps of a tile; those that all of it sees whole come first."""

    first: jax.Array
    steps: jax.Array
    head: jax.Array
    whole: jax.Array

    @classmethod
    def make(cls, first, end, whole_first, whole_end, size=1, least=0, tail=0):
        """int32 [..., 4]: [first, end) in steps of a size, and which lie in the whole range.

        There are `least` steps or more, and the last `tail` of the range need not be in one.
        """
        steps = jnp.maximum(pl.cdiv(jnp.maximum(end - tail - first, 0), size), least)
        head = jnp.minimum(pl.cdiv(jnp.maximum(whole_first - first, 0), size), steps)
        whole = jnp.maximum(jnp.minimum(whole_end, end) - first, 0) // size
        whole = jnp.minimum(whole, steps) - head
        walk = jnp.broadcast_arrays(first, steps, head, jnp.maximum(whole, 0))
        return jnp.stack(walk, axis=-1).astype(jnp.int32)

    @classmethod
    def load(cls, ref, *index):
        """The walk at an index of what `make` made, in global memory."""
        return cls(*(ref[*index, i] for i in range(4)))

    def at(self, n, size=1):
        """Where the n-th step begins."""
        rest = n - self.whole
        masked = jnp.where(rest < self.head, rest, n)
        return self.first + jnp.where(rest < 0, self.head + n, masked) * size

    def beside_others(self, n):
        """Where the n-th step is, if walks of about one length run together, each a bit farther on.

        Where the position modulo the number of whole steps is n: what several of them have in
        common they reach at the same time, and not each one long after the other.
        """
        first, whole = self.first + self.head, jnp.maximum(self.whole, 1)
        begin = whole - jax.lax.rem(first, whole)
        return jnp.where(n < self.whole, first + jax.lax.rem(begin + n, whole), self.at(n))

    def to_and_fro(self, n, upwards):
        """Where the n-th step is, if walks of falling length with a common end run in waves.

        Those of the first wave begin together and go down from the end, side by side; the shortest
        leaves off first. The next wave's go up and are side by side again: each begins as much
        later as it begins higher. So they come to the end together, and the third wave is as the
        first one was.
        """
        turned = jnp.where(upwards, n, self.whole - 1 - n)
        return self.at(jnp.where(n < self.whole, turned, n))

    def masked_first(self, size):
        """Where a step begins that wants a mask if any does, and a walk over the others."""
        head, last = self.head > 0, self.steps - 1
        masked = self.first + jnp.where(head, 0, last) * size
        first = self.first + jnp.where(head, size, 0)
        left = jnp.maximum(self.head - 1, 0)
        return masked, Walk(first, last, left, jnp.minimum(self.whole, last - left))

    def at_masked_first(self, n, size):
        """Where the n-th step begins, the one of `masked_first` before the others."""
        masked, others = self.masked_first(size)
        return jnp.where(n == 0, masked, others.at(n - 1, size))

    def masked_of(self, part):
        """[begin, end) of the masked steps that `part`, the walk of some of the same keys, has too.

        Who sees all keys sees the part's: it has all whole steps, and lacks the first or the last
        of the masked ones.
        """
        begin = self.whole + part.first - self.first
        end = part.first + part.steps - self.first
        begin = jnp.clip(begin, self.whole, self.steps)
        return begin, jnp.clip(end, begin, self.steps)

    def run(self, step, state, part=None, pass_over=None):
        """Folds step(n, state, masked) over the steps, or over those that `part` has too.

        Args:
          step: a function of the step, the state and whether it wants a mask.
          state: what it begins with.
          part: None, or a walk as `masked_of` takes it.
          pass_over: a function of a step that the part lacks, called in its turn.
        """
        begin, end = (self.whole, self.steps) if part is None else self.masked_of(part)
        whole, masked = (functools.partial(step, masked=x) for x in (False, True))
        state = jax.lax.fori_loop(0, self.whole, whole, state)
        if part is not None:
            pl.loop(self.whole, begin)(pass_over)
        state = jax.lax.fori_loop(begin, end, masked, state)
        if part is not None:
            pl.loop(end, self.steps)(pass_over)
        return state


def over_keys(lo, hi, num_keys, group, tiles, cut):
    """Of each pair of tiles of rows, its walk over the keys: int32 [B, pairs, 4].

    lo and hi do not decrease: the first and the last query bound what any and what all rows see.
    A walk has at least one step, if need be over keys that no row sees, and leaves its end to the
    tail.
    """
    queries = rows.queries_per_tile(group) * COMPUTE
    first_query = jnp.arange(tiles // COMPUTE) * queries
    last_query = jnp.minimum(first_query + queries, lo.shape[1]) - 1
    hi = jnp.minimum(hi, num_keys)
    first = jnp.clip(lo[:, first_query], 0, num_keys - 1) // TILE_ROWS * TILE_ROWS
    whole = lo[:, last_query], hi[:, first_query]
    return Walk.make(first, hi[:, last_query], *whole, cut.keys, least=1, tail=cut.tail)


def over_rows(lo, hi, num_keys, group, tiles, size, splits):
    """The walks over tiles of rows of each chunk of the queries and tile of `size` keys.

    Returns:
      int32 [splits, B, tiles of keys, 4], and the same for every ROWS keys, of which a tile has one
      or more.
    """
    start = jnp.arange(0, num_keys, ROWS, dtype=jnp.int32)
    end = jnp.minimum(start + ROWS, num_keys)

    def bounds(lo, hi):
        return (
            search(hi, start, side="right"),
            search(lo, end, side="left"),
            search(hi, end, side="left"),
            search(lo, start, side="right"),
        )

    queries, chunk = rows.queries_per_tile(group), pl.cdiv(tiles, splits)
    chunks = jnp.arange(0, splits * chunk, chunk)[:, None, None]

    def make(first, end, whole_first, whole_end):
        first = jnp.maximum(first // queries, chunks)
        end = jnp.minimum(pl.cdiv(end, queries), chunks + chunk)
        return Walk.make(first, end, pl.cdiv(whole_first, queries), whole_end // queries)

    first, end, whole_first, whole_end = jax.vmap(bounds)(lo, hi)
    # Who sees something of a tile lies between who sees its beginning and who sees its end.
    begins = jnp.arange(0, start.size, size // ROWS)
    ends = jnp.minimum(begins + size // ROWS, start.size) - 1
    of_tiles = make(first[:, begins], end[:, ends], whole_first[:, ends], whole_end[:, begins])
    return of_tiles, make(first, end, whole_first, whole_end)


def keep_seen(x, lo, hi):
    """[B, S, K, V] with zeros where no query sees: 0 times what such memory may hold is not 0."""

    def seen(lo, hi):
        key = jnp.arange(x.shape[1], dtype=jnp.int32)
        # Of the queries that begin at it or before, the last one sees it if any does.
        begun = search(lo, key, side="right")
        return jnp.concatenate([jnp.zeros(1, hi.dtype), hi])[begun] > key

    return jnp.where(jax.vmap(seen)(lo, hi)[:, :, None, None], x, 0)


class Work:
    """The pairs of tiles of rows that a program has, one after another.

    Attributes:
      rounds: how many.
    """

    def __init__(self, table, num_kv_heads):
        """Takes what `over_keys` made, in global memory."""
        self._table, self._num_kv_heads = table, num_kv_heads
        self._program = jax.lax.axis_index("program")
        self._programs = jax.lax.axis_size("program")
        total = table.shape[0] * table.shape[1] * num_kv_heads
        last_round = jnp.int32((total - 1) // self._programs)
        self.rounds = last_round + (self._index(last_round) < total).astype(jnp.int32)

    def _index(self, r):  # to and fro balances a list that begins with the longest walks
        mine = jnp.where(r % 2 == 0, self._program, self._programs - 1 - self._program)
        return r * self._programs + mine

    def following(self, r):
        """The round after the r-th one, or that one if it is the last: what to read ahead for."""
        return jnp.minimum(r + 1, self.rounds - 1)

    def place(self, r):
        """The batch, key/value head and pair of tiles of the r-th round."""
        pairs = self._table.shape[1]
        rest = jax.lax.div(self._index(r), pairs)
        pair = pairs - 1 - jax.lax.rem(self._index(r), pairs)
        return jax.lax.div(rest, self._num_kv_heads), jax.lax.rem(rest, self._num_kv_heads), pair

    def walk(self, r):
        """The walk of the r-th round."""
        batch, _, pair = self.place(r)
        return Walk.load(self._table, batch, pair)


def keys(ref, batch, first, size, kv_head):
    """The keys of a step: a part of [B, S, K, H] in global memory."""
    return ref.at[batch, pl.ds(pl.multiple_of(first, TILE_ROWS), size), kv_head]


def stream(steps, stages, *streams, begin=0, before=0):
    """The memory warpgroup's loop, which keeps `stages` steps in shared memory.

    Args:
      steps: how many steps there are.
      stages: slots for them.
      *streams: of each, a barrier by slot that says that it is free, and a function of the step and
        its slot that begins to fill it.
      begin: the first step to copy.
      before: how many steps there were before step 0.
    """

    @pl.loop(begin, steps)
    def _(n):
        slot = jax.lax.rem(before + n, stages)
        for free, fill in streams:

            @pl.when(before + n >= stages)
            def _(free=free):
                plgpu.barrier_wait(free.at[slot])

            fill(n, slot)


def drain(steps, stages, *barriers):
    """Waits until the last slots are free too: the interpreter wants no arrival to be missed."""

    @pl.loop(jnp.maximum(steps - stages, 0), steps)
    def _(n):
        for free in barriers:
            plgpu.barrier_wait(free.at[jax.lax.rem(n, stages)])


def seen(key, lo, hi):
    """Whether a row that attends [lo, hi) sees a key."""
    return (key >= lo) & (key < hi)


def keep(scores, first_key, lo, hi):
    """Scores of rows and keys, -inf where a row does not see a key."""
    shape = scores.shape
    key = first_key + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=TILE)
    return jnp.where(seen(key, by_row(lo, shape), by_row(hi, shape)), scores, -jnp.inf)


def intervals_of_rows(lo, hi, num_keys, group, tiles):
    """lo and hi of every row; those beyond T are empty."""
    return tuple(rows.from_queries(x, group, tiles, 0) for x in (lo, jnp.minimum(hi, num_keys)))


def are_short(longest):
    """Whether intervals of at most `longest` keys count as short; None is no bound."""
    return longest is not None and longest <= SHORT


def lookup(kernel, q, v, longest=None):
    """The tuning of a kernel, or of its kind for intervals that are at most `longest`."""
    if are_short(longest):
        kernel = f"{kernel}_short"
    return tuning.lookup(kernel, q.shape[3], v.shape[3])
