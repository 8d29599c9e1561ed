"""selected_attention, backward: dk and dv by blocks of keys.

An item, which is a block and some of the queries that selected it, gathers the rows of those
queries, ROWS a step. One warpgroup makes the probabilities of a step and dv, another one gets them
from it and makes dk: every product is made once, and neither holds more than one gradient in
registers, whatever the head sizes. The items of a block are added in order by a kernel of their
own: no atomics anywhere.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu import launch, walks
from pallas_kernels.mosaic_gpu.common import (
    FLOAT_TRANSFORMS,
    LOG2E,
    OF_COLUMNS,
    REGISTERS,
    ROWS,
    TILE,
    Turns,
    accumulate,
    by_column,
    divide,
    full,
    in_registers,
    products,
    products_and_sum,
    smem,
)
from pallas_kernels.mosaic_gpu.selected_walk import KEYS, MOST_STAGES, SMALL, load_reached
from pallas_kernels.mosaic_gpu.warps import WARP_ROWS

#: What each warpgroup makes, or does; the first two take turns.
_DV, _DK, _MEMORY = range(3)

#: Warps of a warpgroup.
_WARPS = ROWS // WARP_ROWS


class _Item(NamedTuple):
    """KEYS keys of a block, and some of the queries that selected it.

    Attributes:
      batch, group, index: which item.
      block, part: its block, and which KEYS keys of it.
      first_key: the first of them.
      start, count: where its queries begin in `queries`, and how many they are.
      queries: the list of the queries of all items.
      each: queries of a step.
    """

    batch: jax.Array
    group: jax.Array
    index: jax.Array
    block: jax.Array
    part: jax.Array
    first_key: jax.Array
    start: jax.Array
    count: jax.Array
    queries: Any
    each: int

    @classmethod
    def of_program(cls, queries, items, order, block_size, each):
        """The item of this program: parts of an item come fastest, then items in `order`."""
        _, groups, num_items, _ = items.shape
        rest, part = divide(jax.lax.axis_index("program"), block_size // KEYS)
        rest, place = divide(rest, num_items)
        batch, group = divide(rest, groups)
        index = order[batch, group, place]
        block, start, count = (items[batch, group, index, i] for i in range(3))
        first_key = pl.multiple_of(block * block_size + part * KEYS, KEYS)
        return cls(batch, group, index, block, part, first_key, start, count, queries, each)

    def query(self, i):
        """Query i of the item; the last one for those beyond."""
        return self.queries[self.start + jnp.minimum(i, self.count - 1)]

    @property
    def steps(self):
        """How many times `each` queries, the last one's perhaps fewer."""
        return jax.lax.div(self.count + self.each - 1, self.each)

    @property
    def keys(self):
        """Where the keys are in [B, S, K, ...]."""
        return self.batch, pl.ds(self.first_key, KEYS), self.group

    @property
    def place(self):
        """Where what the item gives to their gradient goes in [B, K, items, block_size, ...]."""
        return self.batch, self.group, self.index, pl.ds(self.part * KEYS, KEYS)


class _Keys(NamedTuple):
    """The keys of an item in shared memory, and barriers: both are there; see `load_reached`."""

    keys: Any
    values: Any
    loaded: Any
    raw: Any


class _Ring(NamedTuple):
    """Stages of ROWS rows of q, d_out, lse2 and delta in shared memory, a step each.

    Attributes:
      q, d_out: [stages, ROWS, features].
      lse2, delta: float32 [stages, ROWS].
      loaded: a barrier of each stage, for the copies that fill it.
      released: a barrier of each stage, for the two warpgroups that are done with it.
    """

    q: Any
    d_out: Any
    lse2: Any
    delta: Any
    loaded: Any
    released: Any

    def slot(self, n):
        """The stage of step n."""
        return jax.lax.rem(n, self.loaded.shape[0])


class _Handed:
    """Probabilities [KEYS, ROWS] on their way from one warpgroup to the other."""

    def __init__(self, p, barriers):
        """Takes shared memory for them and the barriers of `Turns`."""
        self._p, self._turns = p, Turns(barriers)
        self.begin, self.end = self._turns.begin, self._turns.end

    def give(self, p):
        """Waits until those of the step before are taken."""
        self._turns.take()
        self._p[...] = p
        self._turns.give()

    def take(self):
        """Waits for those of the next step."""
        self._turns.take()
        p = plgpu.load(self._p, layout=TILE)
        self._turns.give()
        return p


def stages(features, v_features):
    """How many stages there are; two at least, since a step keeps the rows of the one before."""
    stage = 2 * ROWS * (features + v_features)
    keys, probabilities = 2 * KEYS * (features + v_features), 4 * KEYS * ROWS
    room = launch.SHARED_MEMORY - SMALL - keys - probabilities
    return min(room // stage, MOST_STAGES)


def _gather(item, rows, ring):
    """Copies the rows of the item's queries into the ring, the warps side by side.

    Every warp copies something in every step, for a fourth of the queries or, where a step has
    fewer than four, some of the arrays: one that copied nothing could fall behind by two phases of
    a barrier, which it could not tell from none.

    Args:
      item: an `_Item`.
      rows: q, d_out, lse2 and delta in global memory.
      ring: a `_Ring`.
    """
    each, heads, num_stages = item.each, ROWS // item.each, ring.loaded.shape[0]

    targets = ring.q, ring.d_out, ring.lse2, ring.delta

    def copy(query, slot, i, array):
        """Copies what an array has of query i of a step."""
        at, target = (item.batch, query, item.group), (slot, pl.ds(i * heads, heads))
        # Copies that mind bounds must begin at multiples of 128 bytes in shared memory; the numbers
        # of one query are as few as 32 bytes.
        of_numbers = {"oob_mode": plgpu.OOBFillMode.PROMISE_IN_BOUNDS}
        plgpu.copy_gmem_to_smem(
            *(rows[array].at[at], targets[array].at[target], ring.loaded.at[slot]),
            **(of_numbers if rows[array].ndim == 4 else {}),
        )

    @plgpu.warp_map
    def _(warp):
        def wanted(n):
            """The queries of step n that this warp copies."""
            own = jax.lax.rem(warp, each)
            return [item.query(n * each + i + own) for i in range(0, each, _WARPS)]

        @pl.loop(0, item.steps, init_carry=wanted(jnp.int32(0)))
        def _(n, mine):
            slot = ring.slot(n)
            # Before the wait and the copies, which no compiler moves a read across.
            following = wanted(n + 1)

            @pl.when(n >= num_stages)
            def _():
                plgpu.barrier_wait(ring.released.at[slot])

            for own in range(_WARPS):

                @pl.when(warp == own)
                def _(own=own):
                    for i, array in itertools.product(range(each), range(len(rows))):
                        if (i + array * each) % _WARPS == own:
                            copy(mine[i // _WARPS], slot, i, array)

            return following

        walks.drain(item.steps, num_stages, ring.released)


def _seen(item, n, q_positions):
    """Which keys [KEYS, ROWS] the queries of step n have passed; none beyond the last query."""
    heads = ROWS // item.each
    column = plgpu.broadcasted_iota(jnp.int32, (KEYS, ROWS), 1, layout=TILE)
    key = item.first_key + plgpu.broadcasted_iota(jnp.int32, (KEYS, ROWS), 0, layout=TILE)
    mask = None
    for i in range(item.each):
        index = n * item.each + i
        position = q_positions[item.batch, item.query(index)]
        last = jnp.where(index < item.count, position, -1)
        of_query = (key <= last) & (column // heads == i)
        mask = of_query if mask is None else mask | of_query
    return mask


def _fit(features, width):
    """Whether a thread has registers for keys of `features` beside a gradient of `width`."""
    return features / 4 + width / 2 <= 128


def _gradient(item, ring, own, met, added, loops):
    """The sum over steps of weights(n, own @ met[n]^T) @ added[n].

    The product of a step and, behind it, the sum of the step before are in flight together.

    Args:
      item: an `_Item`.
      ring: a `_Ring`.
      own: [KEYS, features] in shared memory.
      met, added: of the ring, [stages, ROWS, features].
      loops: pairs of what says of a step whether this loop goes on with it, and of the loop's
        `weights`. Step 0 belongs to the first.

    Returns:
      float32 [KEYS, features of added].
    """
    dtype, width = added.dtype, added.shape[2]
    own = in_registers(own) if _fit(own.shape[1], width) else own

    def operands(n):
        slot = ring.slot(n)
        plgpu.barrier_wait(ring.loaded.at[slot])
        return ((own, met.at[slot].transpose((1, 0))),)

    def step(weigh, state):
        n, acc, weights = state
        before = ring.slot(n - 1)
        weights, acc = products_and_sum(
            operands(n), acc, weights, added.at[before], functools.partial(weigh, n)
        )
        plgpu.barrier_arrive(ring.released.at[before])
        # Rounded only now: made while a sum reads those of the step before, the operands of the
        # next one would have the compiler wait for every product at once.
        return n + 1, acc, weights.astype(dtype)

    zero = jnp.int32(0)
    (weights,) = products(operands(zero), functools.partial(loops[0][1], zero))
    state = zero + 1, full((KEYS, width), 0.0), weights.astype(dtype)
    for goes_on, weigh in loops:
        state = jax.lax.while_loop(
            lambda state, goes_on=goes_on: goes_on(state[0]), functools.partial(step, weigh), state
        )
    last = ring.slot(item.steps - 1)
    acc = accumulate(*state[1:], added.at[last])
    plgpu.barrier_arrive(ring.released.at[last])
    return acc


def _dv(item, keys, ring, handed, passed, q_positions, c):
    """What the item gives to dv; hands its probabilities on."""

    def probabilities(n, scores, whole):
        if not whole:
            scores = jnp.where(_seen(item, n, q_positions), scores, -jnp.inf)
        lse2 = plgpu.load(ring.lse2.at[ring.slot(n)], layout=OF_COLUMNS)
        p = jnp.exp2(scores * c - by_column(lse2, scores.shape))
        handed.give(p)
        return p

    masked, whole = (functools.partial(probabilities, whole=x) for x in (False, True))
    # Positions rise with the queries: those that do not see all of the keys come first.
    all_whole, full_steps = passed[item.batch, item.block], jax.lax.div(item.count, item.each)
    loops = (
        (lambda n: (n < full_steps) & (item.query(n * item.each) < all_whole), masked),
        (lambda n: n < full_steps, whole),
        (lambda n: n < item.steps, masked),
    )
    plgpu.barrier_wait(keys.loaded)
    acc = _gradient(item, ring, keys.keys, ring.q, ring.d_out, loops)
    handed.end()
    return acc


def _dk(item, keys, ring, handed):
    """What the item gives to dk, but for the scale, from the probabilities that it is handed."""

    def score_gradient(n, dp):
        delta = plgpu.load(ring.delta.at[ring.slot(n)], layout=OF_COLUMNS)
        return handed.take() * (dp - by_column(delta, dp.shape))

    handed.begin()
    plgpu.barrier_wait(keys.loaded)
    loops = ((lambda n: n < item.steps, score_gradient),)
    return _gradient(item, ring, keys.values, ring.d_out, ring.q, loops)


def dk_dv_of_items(
    q, k, v, d_out, lse2, delta, queries, items, order, passed, q_positions, *, block_size, scale
):
    """What each item gives to dk and dv.

    Args:
      q: [B, T, K, heads, H].
      k: [B, S, K, H], S a multiple of 8.
      v: [B, S, K, V].
      d_out: [B, T, K, heads, V].
      lse2: float32 [B, T, K, heads], in base 2; +inf on empty rows and for heads that are padding.
      delta: float32 like lse2.
      queries, items, order: of `lists.InvertedIndex`.
      passed: int32 [B, blocks], the first query that sees the block whole.
      q_positions: int32 [B, T].
      block_size: l'.
      scale: above 0.

    Returns:
      float32 [B, K, items, block_size, H] and [B, K, items, block_size, V]; nothing is written
      where an item has no queries.
    """
    batch, _, groups, heads, features = q.shape
    v_features, num_items = v.shape[3], items.shape[2]
    num_stages, each = stages(features, v_features), ROWS // heads

    def selected_dk_dv(
        q, k, v, d_out, lse2, delta, queries, items, order, passed, q_positions, dk, dv, scratch
    ):
        keys, ring, *handed = scratch
        handed = _Handed(*handed)
        item = _Item.of_program(queries, items, order, block_size, each)
        warpgroup = jax.lax.axis_index("warpgroup")

        def copy():
            plgpu.copy_gmem_to_smem(k.at[item.keys], keys.keys, keys.loaded)
            last = q_positions[item.batch, item.query(item.count - 1)] - item.first_key
            load_reached(v.at[item.keys], keys.values, keys.loaded, keys.raw, last)
            _gather(item, (q, d_out, lse2, delta), ring)

        def make_dv():
            out = _dv(item, keys, ring, handed, passed, q_positions, scale * LOG2E)
            dv.at[item.place][...] = out

        def make_dk():
            dk.at[item.place][...] = _dk(item, keys, ring, handed) * scale

        many, few = REGISTERS[2]
        for own, work, registers, change in (
            (_MEMORY, copy, few, "decrease"),
            (_DV, make_dv, many, "increase"),
            (_DK, make_dk, many, "increase"),
        ):

            @pl.when((warpgroup == own) & (item.count > 0))
            def _(work=work, registers=registers, change=change):
                plgpu.set_max_registers(registers, action=change)
                work()

    tile = functools.partial(smem, dtype=q.dtype)
    barriers = functools.partial(plgpu.Barrier, num_barriers=num_stages)
    return launch.launch(
        selected_dk_dv,
        *(q, k, v, d_out, lse2, delta, queries, items, order, passed, q_positions),
        out_type=tuple(
            jax.ShapeDtypeStruct((*items.shape[:3], block_size, x.shape[3]), jnp.float32)
            for x in (k, v)
        ),
        programs=batch * groups * num_items * (block_size // KEYS),
        warpgroups=3,
        scratch=(
            _Keys(
                *(tile(KEYS, features), tile(KEYS, v_features)),
                loaded=plgpu.Barrier(num_arrivals=2),
                raw=plgpu.Barrier(),
            ),
            _Ring(
                q=tile(num_stages, ROWS, features),
                d_out=tile(num_stages, ROWS, v_features),
                lse2=plgpu.SMEM((num_stages, ROWS), jnp.float32),
                delta=plgpu.SMEM((num_stages, ROWS), jnp.float32),
                loaded=barriers(num_arrivals=4 * each),
                released=barriers(num_arrivals=2),
            ),
            plgpu.SMEM((KEYS, ROWS), jnp.float32, transforms=FLOAT_TRANSFORMS),
            plgpu.Barrier(num_barriers=2),
        ),
    )


def sum_items(partial, first_items, like):
    """Adds the items of each block in order.

    Args:
      partial: float32 [B, K, items, block_size, features].
      first_items: of `lists.InvertedIndex`.
      like: the shape [B, S, K, features] and dtype of the sums.
    """
    groups, _, block_size, features = partial.shape[1:]
    blocks, parts = first_items.shape[2] - 1, block_size // KEYS

    def selected_sum_items(partial, first_items, out, scratch):
        rest, part = divide(jax.lax.axis_index("program"), parts)
        rest, block = divide(rest, blocks)
        b, g = divide(rest, groups)
        rows = pl.ds(part * KEYS, KEYS)

        def add(item, acc):
            return acc + plgpu.load(partial.at[b, g, item, rows], layout=TILE, optimized=False)

        first, end = first_items[b, g, block], first_items[b, g, block + 1]
        acc = jax.lax.fori_loop(first, end, add, full((KEYS, features), 0.0))
        scratch[...] = acc.astype(like.dtype)
        plgpu.commit_smem()
        start = pl.multiple_of(block * block_size + part * KEYS, KEYS)

        @pl.when(start < like.shape[1])
        def _():
            plgpu.copy_smem_to_gmem(scratch, out.at[b, pl.ds(start, KEYS), g])

        plgpu.wait_smem_to_gmem(0)

    (result,) = launch.launch(
        selected_sum_items,
        *(partial, first_items),
        out_type=(jax.ShapeDtypeStruct(like.shape, like.dtype),),
        programs=partial.shape[0] * groups * blocks * parts,
        warpgroups=1,
        scratch=smem(KEYS, features, dtype=like.dtype),
    )
    return result
