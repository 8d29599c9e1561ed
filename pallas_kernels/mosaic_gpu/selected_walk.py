"""How tiles of queries walk the blocks that they selected: forward, and backward for dq.

A tile is the queries of two or three warpgroups, ROWS rows each. The memory warpgroup copies each
block of the tile's union once into a ring in shared memory; a warpgroup passes over the blocks that
none of its own queries selected. Where neighbours agree, a block is so loaded for more queries than
one warpgroup has rows for, and where they do not, nobody multiplies more than his own blocks. A
warpgroup multiplies as one; what its warps do for themselves, only those do that have a query that
selected the block.

A program takes many tiles, one after another. The memory warpgroup does not stop between them.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu import launch, warps
from pallas_kernels.mosaic_gpu.common import OF_ROWS, ROWS, TILE, by_row, divide, smem

KEYS = 64  # keys of a step

#: Shared memory that barriers and small arrays may take, bytes.
SMALL = 4096
MOST_STAGES = 8


class Place(NamedTuple):
    """A tile of queries."""

    batch: jax.Array
    group: jax.Array
    tile: jax.Array


class Ring(NamedTuple):
    """Stages of keys and values in shared memory.

    Attributes:
      keys: [stages, KEYS, H].
      values: [stages, KEYS, V].
      loaded: a barrier of each stage, for the two copies that fill it.
      released: a barrier of each stage, for the warpgroups that are done with it.
      raw: a barrier for a copy that others may not see yet.
    """

    keys: Any
    values: Any
    loaded: Any
    released: Any
    raw: Any


class Step(NamedTuple):
    """KEYS keys of a block, for a warpgroup.

    Attributes:
      keys, values: [KEYS, H], [KEYS, V] in shared memory.
      chosen: bool [ROWS], of which rows the query selected the block.
      concerned: bool, whether this warp has rows of such queries; interpreted, whether the
        warpgroup has.
      seen: None if every row has passed the keys; else bool [ROWS, KEYS], of chosen rows.
    """

    keys: Any
    values: Any
    chosen: jax.Array
    concerned: jax.Array
    seen: jax.Array | None

    def if_concerned(self, run, dtype, x, *state):
        """run(x, *state), each warp for itself: where it is not, zeros like x and the state.

        Args:
          run: from x and the state to an array like x, of `dtype`, and the state.
          dtype: of that array.
          x: an array.
          *state: more of them.
        """

        def nothing(x, *state):
            return jnp.zeros_like(x).astype(dtype), *state

        return jax.lax.cond(self.concerned, run, nothing, x, *state)


class Numbers(NamedTuple):
    """What a computing warpgroup knows of a tile before its walk.

    Attributes:
      steps: how many there are, and how many of them all rows have passed, which come first.
      masks: of the first two steps.
      position: int32 [ROWS], of the query of each row.
    """

    steps: tuple[jax.Array, jax.Array]
    masks: tuple[jax.Array, jax.Array]
    position: jax.Array


class TileWalk(NamedTuple):
    """The walk of all tiles.

    Attributes:
      batch, groups, tiles: how many there are.
      computing: warpgroups that multiply; one more copies.
      heads: of a query, a power of two and at least 8: real ones, then padding.
      block_size: l'.
      features: H and V.
      stages: of the ring of keys and values.
      programs: that share the tiles.
    """

    batch: int
    groups: int
    tiles: int
    computing: int
    heads: int
    block_size: int
    features: tuple[int, int]
    stages: int
    programs: int

    @classmethod
    def cut(cls, q, v, positions, block_size, row_features):
        """The walk for q [B, T, K, heads, H] and v [B, S, K, V].

        Args:
          q, v: arrays or their shapes.
          positions: [B, tiles, computing, ROWS], or its shape.
          block_size: l'.
          row_features: of all that the kernel has in shared memory of each row.
        """
        batch, _, groups, heads, features = q.shape
        features = features, v.shape[3]
        tiles, computing = positions.shape[1:3]
        programs = min(batch * groups * tiles, launch.num_cores())
        return cls(
            *(batch, groups, tiles, computing, heads, block_size, features),
            *(_stages(sum(features), 2 * computing * ROWS * row_features), programs),
        )

    @property
    def queries(self) -> int:
        """Queries of a warpgroup."""
        return ROWS // self.heads

    @property
    def parts(self) -> int:
        """Steps of a block."""
        return self.block_size // KEYS

    def of_rows(self, ref):
        """What ref [computing, ROWS] in global memory has for the rows of this warpgroup."""
        own = ref.at[jax.lax.axis_index("warpgroup")]
        return plgpu.load(own, layout=OF_ROWS, optimized=False)

    def ring(self, dtype):
        """The scratch that `load` fills and `consume` empties."""
        return Ring(
            *(smem(self.stages, KEYS, features, dtype=dtype) for features in self.features),
            plgpu.Barrier(num_arrivals=2, num_barriers=self.stages),
            plgpu.Barrier(num_arrivals=self.computing, num_barriers=self.stages),
            plgpu.Barrier(),
        )

    def next_slot(self, slot):
        """The stage after another one."""
        return jnp.where(slot == self.stages - 1, 0, slot + 1)

    def over_tiles(self, body, carry):
        """carry = body(place, carry) for each tile of this program."""
        program = jax.lax.axis_index("program")
        total = self.batch * self.groups * self.tiles
        count = jax.lax.div(total - program + self.programs - 1, self.programs)

        def tile(i, carry):
            # Those of one group are neighbours: its keys and values stay in the L2 cache.
            rest, tile = divide(program + i * self.programs, self.tiles)
            return body(Place(*divide(rest, self.groups), tile), carry)

        return jax.lax.fori_loop(0, count, tile, carry)

    def load(self, k, v, lists, positions, ring, cleared):
        """The memory warpgroup: copies the blocks of all tiles of this program.

        Of what is `cleared`, which is multiplied by probabilities, keys that no query who selected
        them has reached become zeros.

        Args:
          k, v: keys and values.
          lists: blocks, masks, counts.
          positions: int32 [B, tiles, computing, ROWS], of the query of each row.
          ring: what it fills.
          cleared: 0 for the keys, 1 for the values.
        """
        blocks, masks, counts = lists

        def largest_position(place, mask):
            query = 31 - jax.lax.clz(mask)  # the last one of those who selected the block
            warpgroup, query = divide(query, self.queries)
            return positions[place.batch, place.tile, warpgroup, query * self.heads]

        def step(i, carry, place, whole):
            n, slot = carry
            entry, part = divide(i, self.parts)
            start = pl.multiple_of(blocks[*place, entry] * self.block_size + part * KEYS, KEYS)
            last = None if whole else largest_position(place, masks[*place, entry])

            @pl.when(n >= self.stages)
            def _():
                plgpu.barrier_wait(ring.released.at[slot])

            loaded = ring.loaded.at[slot]
            for i, (ref, stages) in enumerate(((k, ring.keys), (v, ring.values))):
                source = ref.at[place.batch, pl.ds(start, KEYS), place.group]
                stage = stages.at[slot]
                if i == cleared and last is not None:
                    load_reached(source, stage, loaded, ring.raw, last - start)
                else:
                    plgpu.copy_gmem_to_smem(source, stage, loaded)
            return n + 1, self.next_slot(slot)

        start = jnp.int32(0), jnp.int32(0)

        def of_tile(place, carry):
            return _over_steps(partial(step, place=place), self._steps(counts, place), carry)

        n, _ = self.over_tiles(of_tile, start)

        # Nobody leaves before all is read.
        @pl.loop(0, jnp.minimum(n, self.stages))
        def _(slot):
            plgpu.barrier_wait(ring.released.at[slot])

    def numbers(self, place, lists, positions):
        """`Numbers` of a tile, to be read before this warpgroup waits for its rows."""
        _, masks, counts = lists
        position = self.of_rows(positions.at[place.batch, place.tile])
        first_two = tuple(self._mask(masks, place, i) for i in (0, 1))
        return Numbers(self._steps(counts, place), first_two, position)

    def consume(self, body, place, numbers, lists, ring, slot, state):
        """A computing warpgroup: state = body(step, state) for each step that is its own.

        Args:
          body: takes a `Step` and the state.
          place: the tile.
          numbers: of the tile.
          lists: blocks, masks, counts.
          ring: what `load` fills.
          slot: its first stage.
          state: a tree of arrays in registers.

        Returns:
          The stage after the last one of this tile, and the state.
        """
        blocks, masks, _ = lists
        first_bit = jax.lax.axis_index("warpgroup") * self.queries
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=OF_ROWS)
        bit = jax.lax.shift_left(jnp.int32(1), first_bit + row // self.heads)
        own = jax.lax.shift_left(jnp.int32((1 << self.queries) - 1), first_bit)
        of_warp = warps.bits(first_bit, self.heads)

        def step(i, carry, whole):
            slot, mask, next_mask, state = carry
            later_mask = self._mask(masks, place, i + 2)  # early, for nobody to wait for memory

            def walk(state):
                chosen, concerned = (bit & mask) != 0, (of_warp & mask) != 0
                seen = None
                if not whole:
                    entry, part = divide(i, self.parts)
                    start = blocks[*place, entry] * self.block_size + part * KEYS
                    key = start + plgpu.broadcasted_iota(jnp.int32, (ROWS, KEYS), 1, layout=TILE)
                    seen = key <= by_row(jnp.where(chosen, numbers.position, -1), key.shape)
                keys, values = ring.keys.at[slot], ring.values.at[slot]
                return body(Step(keys, values, chosen, concerned, seen), state)

            plgpu.barrier_wait(ring.loaded.at[slot])
            state = jax.lax.cond((mask & own) != 0, walk, lambda x: x, state)
            plgpu.barrier_arrive(ring.released.at[slot])
            return self.next_slot(slot), next_mask, later_mask, state

        carry = slot, *numbers.masks, state
        slot, _, _, state = _over_steps(step, numbers.steps, carry)
        return slot, state

    def _steps(self, counts, place):
        return tuple(counts[*place, i] * self.parts for i in (0, 1))

    def _mask(self, masks, place, i):
        """The queries that selected the block of the i-th step; beyond the last one, anything."""
        return masks[*place, jnp.minimum(divide(i, self.parts)[0], masks.shape[3] - 1)]


def _over_steps(step, steps, carry):
    """carry = step(i, carry, whole) for all steps of a tile; `whole` ones come first."""
    steps, whole_steps = steps
    for begin, end, whole in ((0, whole_steps, True), (whole_steps, steps, False)):
        carry = jax.lax.fori_loop(begin, end, partial(step, whole=whole), carry)
    return carry


def load_reached(source, stage, loaded, raw, last):
    """Copies KEYS keys to `stage`, with zeros for those after key `last` of them.

    What such keys hold, a NaN say, times a probability of 0 would not be 0.
    """

    @pl.when(last >= KEYS - 1)
    def _():
        plgpu.copy_gmem_to_smem(source, stage, loaded)

    @pl.when(last < KEYS - 1)
    def _():
        plgpu.copy_gmem_to_smem(source, stage, raw)
        plgpu.barrier_wait(raw)
        for i in range(0, stage.shape[1], KEYS):
            part = stage.at[:, pl.ds(i, KEYS)]
            x = plgpu.load(part, layout=TILE)
            key = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=TILE)
            part[...] = jnp.where(key <= last, x, jnp.zeros_like(x))
        plgpu.commit_smem()
        plgpu.barrier_arrive(loaded)


def load_rows(walk, ref, stage, loaded, place):
    """Begins to copy this warpgroup's rows of ref [B, T, K, heads, features] to `stage`.

    One copy, and one arrival at `loaded`, is one query. What has no query repeats the last one.
    """
    for i, query in _queries(walk, place):
        query = jnp.minimum(query, ref.shape[1] - 1)
        rows = stage.at[pl.ds(i * walk.heads, walk.heads)]
        plgpu.copy_gmem_to_smem(ref.at[place.batch, query, place.group], rows, loaded)


def store_rows(walk, stage, ref, place):
    """Begins to copy this warpgroup's rows from `stage`, committed, to ref; see `load_rows`."""
    for i, query in _queries(walk, place):

        @pl.when(query < ref.shape[1])
        def _(i=i, query=query):
            rows = stage.at[pl.ds(i * walk.heads, walk.heads)]
            target = ref.at[place.batch, query, place.group]
            plgpu.copy_smem_to_gmem(rows, target, commit_group=False)

    plgpu.commit_smem_to_gmem_group()  # one for all: each takes its time


def _queries(walk, place):
    first = (place.tile * walk.computing + jax.lax.axis_index("warpgroup")) * walk.queries
    return [(i, first + i) for i in range(walk.queries)]


def _stages(features, fixed):
    """How many stages of keys and values, with so many features, fit beside `fixed` bytes."""
    room = launch.SHARED_MEMORY - SMALL - fixed
    return min(room // (2 * KEYS * features), MOST_STAGES)
