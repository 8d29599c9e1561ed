"""How tiles of queries walk the blocks that they selected: forward, and backward for dq.

A tile is the queries of two or three warpgroups, ROWS rows each. The memory warpgroup copies each
block of the tile's union once into a ring in shared memory; a warpgroup passes over the blocks that
none of its own queries selected. Where neighbours agree, a block is so loaded for more queries than
one warpgroup has rows for, and where they do not, nobody multiplies more than his own blocks.

A program takes many tiles, one after another. The memory warpgroup does not stop between them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu import launch
from pallas_kernels.mosaic_gpu.common import OF_ROWS, ROWS, TILE, by_row, smem

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
    """Stages of one operand in shared memory."""

    stages: Any  # [stages, KEYS, features]
    loaded: Any  # a barrier each
    released: Any


class Step(NamedTuple):
    """KEYS keys of a block, for a warpgroup. What is waited for is released, each once.

    Attributes:
      keys, values: [KEYS, H], [KEYS, V] in shared memory.
      chosen: bool [ROWS], of which rows the query selected the block.
      seen: None if every row has passed the keys; else bool [ROWS, KEYS], of chosen rows.
    """

    keys: Any
    values: Any
    wait_keys: Callable
    wait_values: Callable
    release_keys: Callable
    release_values: Callable
    chosen: jax.Array
    seen: jax.Array | None


class Walk(NamedTuple):
    """The walk of all tiles.

    Attributes:
      batch, groups, tiles: how many there are.
      computing: warpgroups that multiply; one more copies.
      heads: of a query, a power of two and at least 8: real ones, then padding.
      block_size: l'.
      features: H and V.
      stages: of the rings of keys and of values.
      programs: that share the tiles.
    """

    batch: int
    groups: int
    tiles: int
    computing: int
    heads: int
    block_size: int
    features: tuple[int, int]
    stages: tuple[int, int]
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
            *(_stages(*features, 2 * computing * ROWS * row_features), programs),
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

    def rings(self, dtype):
        """The scratch that `load` fills and `consume` empties."""
        rings = [
            Ring(
                smem(stages, KEYS, features, dtype=dtype),
                plgpu.Barrier(num_barriers=stages),
                plgpu.Barrier(num_arrivals=self.computing, num_barriers=stages),
            )
            for stages, features in zip(self.stages, self.features, strict=True)
        ]
        return *rings, plgpu.Barrier()

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

    def load(self, operands, lists, positions, rings, cleared):
        """The memory warpgroup: copies the blocks of all tiles of this program.

        Of operand `cleared`, which is multiplied by probabilities, keys that no query who selected
        them has reached become zeros.

        Args:
          operands: keys and values.
          lists: blocks, masks, counts.
          positions: int32 [B, tiles, computing, ROWS], of the query of each row.
          rings: what it fills.
          cleared: 0 for the keys, 1 for the values.
        """
        blocks, masks, counts = lists
        *rings, raw = rings

        def copy(i, n, place, start, last):
            slot = jax.lax.rem(n, self.stages[i])
            stage, loaded = rings[i].stages.at[slot], rings[i].loaded.at[slot]
            source = operands[i].at[place.batch, pl.ds(start, KEYS), place.group]

            @pl.when(n >= self.stages[i])
            def _():
                plgpu.barrier_wait(rings[i].released.at[slot])

            if i == cleared and last is not None:
                load_reached(source, stage, loaded, raw, last - start)
            else:
                plgpu.copy_gmem_to_smem(source, stage, loaded)

        def largest_position(place, mask):
            query = 31 - jax.lax.clz(mask)  # the last one of those who selected the block
            warpgroup, query = divide(query, self.queries)
            return positions[place.batch, place.tile, warpgroup, query * self.heads]

        def step(i, n, place, whole):
            entry, part = divide(i, self.parts)
            start = pl.multiple_of(blocks[*place, entry] * self.block_size + part * KEYS, KEYS)
            last = None if whole else largest_position(place, masks[*place, entry])
            for operand in range(2):
                copy(operand, n, place, start, last)
            return n + 1

        n = self.over_tiles(partial(self._over_steps, step, counts), 0)
        for ring, stages in zip(rings, self.stages, strict=True):
            # Nobody leaves before all is read.
            @pl.loop(0, jnp.minimum(n, stages))
            def _(slot, ring=ring):
                plgpu.barrier_wait(ring.released.at[slot])

    def consume(self, body, place, lists, position, rings, n, state):
        """A computing warpgroup: state = body(step, state) for each step that is its own.

        Args:
          body: takes a `Step` and the state.
          place: the tile.
          lists: blocks, masks, counts.
          position: int32 [ROWS], of the query of each row.
          rings: what `load` fills.
          n: how many steps this program has walked before.
          state: a tree of arrays in registers.

        Returns:
          n and the state after this tile.
        """
        blocks, masks, counts = lists
        first_bit = jax.lax.axis_index("warpgroup") * self.queries
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=OF_ROWS)
        bit = jax.lax.shift_left(jnp.int32(1), first_bit + row // self.heads)
        own = jax.lax.shift_left(jnp.int32((1 << self.queries) - 1), first_bit)

        def step(i, carry, place, whole):
            n, mask, state = carry
            entry, part = divide(i, self.parts)
            # Of the next step, for it not to wait for memory; beyond the last one anything will do.
            next_entry = jnp.minimum(divide(i + 1, self.parts)[0], masks.shape[3] - 1)
            next_mask = masks[*place, next_entry]
            chosen = (bit & mask) != 0
            seen = None
            if not whole:
                start = blocks[*place, entry] * self.block_size + part * KEYS
                key = start + plgpu.broadcasted_iota(jnp.int32, (ROWS, KEYS), 1, layout=TILE)
                seen = key <= by_row(jnp.where(chosen, position, -1), (ROWS, KEYS))
            slots = [jax.lax.rem(n, stages) for stages in self.stages]
            in_use = list(zip(rings[:2], slots, strict=True))
            waits = [partial(plgpu.barrier_wait, ring.loaded.at[i]) for ring, i in in_use]
            releases = [partial(plgpu.barrier_arrive, ring.released.at[i]) for ring, i in in_use]

            def walk(state):
                stages = [ring.stages.at[slot] for ring, slot in in_use]
                return body(Step(*stages, *waits, *releases, chosen, seen), state)

            def pass_over(state):
                for wait, release in zip(waits, releases, strict=True):
                    wait()
                    release()
                return state

            state = jax.lax.cond((mask & own) != 0, walk, pass_over, state)
            return n + 1, next_mask, state

        carry = n, masks[*place, 0], state
        n, _, state = self._over_steps(step, counts, place, carry)
        return n, state

    def _over_steps(self, step, counts, place, carry):
        """carry = step(i, carry, place, whole) for all steps of a tile; `whole` ones come first."""
        steps, whole_steps = (counts[*place, i] * self.parts for i in (0, 1))
        for begin, end, whole in ((0, whole_steps, True), (whole_steps, steps, False)):
            carry = jax.lax.fori_loop(begin, end, partial(step, place=place, whole=whole), carry)
        return carry


def divide(x, by):
    """The quotient and the remainder of int32 x."""
    return jax.lax.div(x, by), jax.lax.rem(x, by)


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
            plgpu.copy_smem_to_gmem(rows, ref.at[place.batch, query, place.group])


def _queries(walk, place):
    first = (place.tile * walk.computing + jax.lax.axis_index("warpgroup")) * walk.queries
    return [(i, first + i) for i in range(walk.queries)]


def _stages(head_dim, v_head_dim, fixed):
    """How many stages of keys and of values fit beside `fixed` bytes.

    Values have the one that may be left: they are held until the end of a step, keys only until
    their first product.
    """
    room = launch.SHARED_MEMORY - SMALL - fixed
    keys, values = (2 * KEYS * x for x in (head_dim, v_head_dim))
    both = min(room // (keys + values), MOST_STAGES)
    return both, both + (room - both * (keys + values) >= values)
