"""selected_attention, backward: dq by tiles of queries, dk and dv by blocks of keys.

For dq a tile walks its union as in the forward pass. For dk and dv an item, which is a block and
some of the queries that selected it, gathers the rows of those queries; one warpgroup makes dv and
another one dk, so that neither holds more than one gradient in registers, whatever the head sizes.
The items of a block are added in order by a kernel of their own: no atomics anywhere.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu import launch
from pallas_kernels.mosaic_gpu.common import (
    FLOAT_TRANSFORMS,
    LOG2E,
    OF_COLUMNS,
    REGISTERS,
    ROWS,
    TILE,
    accumulate,
    by_column,
    by_row,
    divide,
    full,
    in_registers,
    products,
    products_and_sum,
    share_work,
    smem,
)
from pallas_kernels.mosaic_gpu.selected_walk import (
    KEYS,
    MOST_STAGES,
    SMALL,
    TileWalk,
    load_reached,
    load_rows,
    store_rows,
)

#: Whose warpgroup it is, of the kernel for dk and dv.
_DV, _DK, _MEMORY = range(3)

#: Warps of a warpgroup.
WARPS = 4


def dq(q, k, v, d_out, lse2, delta, lists, positions, *, block_size, scale):
    """The gradient of the queries.

    Args:
      q: [B, T, K, heads, H].
      k: [B, S, K, H], S a multiple of 8.
      v: [B, S, K, V].
      d_out: [B, T, K, heads, V].
      lse2: float32 [B, K, tiles, computing, ROWS], in base 2; +inf on empty rows.
      delta: float32 like lse2, the sum of out * d_out less the gradient of lse.
      lists: `lists.Unions`.
      positions: int32 [B, tiles, computing, ROWS], of the query of each row.
      block_size: l'.
      scale: above 0.

    Returns:
      In the shape and dtype of q.
    """
    features, v_features = k.shape[3], v.shape[3]
    walk = TileWalk.cut(q, v, positions, block_size, features + v_features)

    def selected_dq(q, k, v, d_out, lse2, delta, positions, blocks, masks, counts, dq, scratch):
        q_smem, d_out_smem, rows_loaded, ring = scratch
        warpgroup = jax.lax.axis_index("warpgroup")

        def compute_tile(place, slot):
            loaded = rows_loaded.at[warpgroup]
            q_rows, d_out_rows = (x.at[warpgroup] for x in (q_smem, d_out_smem))
            load_rows(walk, q, q_rows, loaded, place)
            load_rows(walk, d_out, d_out_rows, loaded, place)
            position = walk.of_rows(positions.at[place.batch, place.tile])
            row_lse2, row_delta = (walk.of_rows(x.at[*place]) for x in (lse2, delta))
            plgpu.barrier_wait(loaded)

            def step(keys, acc):
                return _dq_step(keys, acc, q_rows, d_out_rows, row_lse2, row_delta, scale * LOG2E)

            slot, acc = walk.consume(
                *(step, place, (blocks, masks, counts), position, ring, slot),
                full((ROWS, features), 0.0),
            )
            q_rows[...] = (acc * scale).astype(q.dtype)
            plgpu.commit_smem()
            store_rows(walk, q_rows, dq, place)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            return slot

        share_work(
            walk.computing,
            lambda: walk.over_tiles(compute_tile, jnp.int32(0)),
            lambda: walk.load(k, v, (blocks, masks, counts), positions, ring, cleared=0),
        )

    (result,) = launch.launch(
        selected_dq,
        *(q, k, v, d_out, lse2, delta, positions, *lists),
        out_type=(jax.ShapeDtypeStruct(q.shape, q.dtype),),
        programs=walk.programs,
        warpgroups=walk.computing + 1,
        scratch=(
            smem(walk.computing, ROWS, features, dtype=q.dtype),
            smem(walk.computing, ROWS, v_features, dtype=q.dtype),
            plgpu.Barrier(num_arrivals=2 * walk.queries, num_barriers=walk.computing),
            walk.ring(q.dtype),
        ),
    )
    return result


def _dq_step(keys, acc, q_rows, d_out_rows, row_lse2, row_delta, c):
    """acc and what KEYS more keys give to dq, but for the scale."""

    def of_scores(scores):
        if keys.seen is not None:
            scores = jnp.where(keys.seen, scores, -jnp.inf)
        # Of rows that did not choose the block exp2 is 0.
        offset = jnp.where(keys.chosen, row_lse2, jnp.inf)
        return (jnp.exp2(scores * c - by_row(offset, scores.shape)),)

    def of_probabilities(p):
        # Of what nobody sees dp may be NaN.
        seen_dp = dp if keys.seen is None else jnp.where(keys.seen, dp, 0.0)
        return ((p * (seen_dp - by_row(row_delta, p.shape))).astype(dtype),)

    dtype = d_out_rows.dtype
    (p,), dp = products(
        ((q_rows, keys.keys.transpose((1, 0))), (d_out_rows, keys.values.transpose((1, 0)))),
        lambda scores: keys.if_concerned(of_scores, jnp.float32, scores),
    )
    (ds,) = keys.if_concerned(of_probabilities, dtype, p)
    return accumulate(acc, ds, keys.keys)


def item_stages(features, v_features):
    """How many steps of an item have their rows in shared memory: at least two, see below."""
    stage = 2 * ROWS * (features + v_features)
    keys, probabilities = 2 * KEYS * (features + v_features), 4 * KEYS * ROWS
    room = launch.SHARED_MEMORY - SMALL - keys - probabilities
    return min(room // stage, MOST_STAGES)


def _fit(features, width):
    """Whether a thread has registers for keys of `features` beside a gradient of `width`."""
    return features / 4 + width / 2 <= 128


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
    parts, each = block_size // KEYS, ROWS // heads
    stages, c = item_stages(features, v_features), scale * LOG2E

    def selected_dk_dv(
        q, k, v, d_out, lse2, delta, queries, items, order, passed, q_positions, dk, dv, scratch
    ):
        k_smem, v_smem, keys_loaded, raw, q_smem, d_out_smem, *columns, ring, handed = scratch
        (lse2_smem, delta_smem), (loaded, released) = columns, ring
        p_smem, p_there, p_free = handed
        warpgroup = jax.lax.axis_index("warpgroup")
        rest, part = divide(jax.lax.axis_index("program"), parts)
        rest, place = divide(rest, num_items)
        b, g = divide(rest, groups)
        item = order[b, g, place]
        block, start, count = (items[b, g, item, i] for i in range(3))
        first_key = pl.multiple_of(block * block_size + part * KEYS, KEYS)
        steps = jax.lax.div(count + each - 1, each)

        def query(slot):
            return queries[start + jnp.minimum(slot, count - 1)]

        @pl.when((warpgroup == _MEMORY) & (count > 0))
        def _():
            plgpu.set_max_registers(REGISTERS[2][1], action="decrease")
            keys = b, pl.ds(first_key, KEYS), g
            plgpu.copy_gmem_to_smem(k.at[keys], k_smem, keys_loaded)
            last = q_positions[b, query(count - 1)] - first_key
            load_reached(v.at[keys], v_smem, keys_loaded, raw, last)

            def copy(query, slot, i):
                """Copies query i of a step."""
                at, there, rows = (b, query, g), loaded.at[slot], pl.ds(i * heads, heads)
                for source, target in ((q, q_smem), (d_out, d_out_smem)):
                    plgpu.copy_gmem_to_smem(source.at[at], target.at[slot, rows], there)
                for source, target in ((lse2, lse2_smem), (delta, delta_smem)):
                    # Copies that mind bounds must begin at multiples of 128 bytes in shared
                    # memory; the numbers of one query are as few as 32 bytes.
                    plgpu.copy_gmem_to_smem(
                        *(source.at[at], target.at[slot, rows], there),
                        oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
                    )

            @plgpu.warp_map
            def _(warp):
                def wanted(n):
                    """The queries of step n that this warp copies."""
                    return [query(n * each + i + warp) for i in range(0, each, WARPS)]

                @pl.loop(0, steps, init_carry=wanted(jnp.int32(0)))
                def _(n, mine):
                    slot = jax.lax.rem(n, stages)
                    # Before the wait and the copies, which no compiler moves a read across.
                    following = wanted(n + 1)

                    @pl.when(n >= stages)
                    def _():
                        plgpu.barrier_wait(released.at[slot])

                    for i in range(each):

                        @pl.when(warp == i % WARPS)
                        def _(i=i):
                            copy(mine[i // WARPS], slot, i)

                    return following

                @pl.loop(0, jnp.minimum(steps, stages))
                def _(slot):
                    plgpu.barrier_wait(released.at[slot])

        def seen(n):
            """Which keys [KEYS, ROWS] the queries of step n have passed; none beyond the last."""
            column = plgpu.broadcasted_iota(jnp.int32, (KEYS, ROWS), 1, layout=TILE)
            key = first_key + plgpu.broadcasted_iota(jnp.int32, (KEYS, ROWS), 0, layout=TILE)
            mask = None
            for i in range(each):
                index = n * each + i
                last = jnp.where(index < count, q_positions[b, query(index)], -1)
                of_query = (key <= last) & (column // heads == i)
                mask = of_query if mask is None else mask | of_query
            return mask

        def probabilities(n, scores, whole):
            """Those of step n, which the other warpgroup gets too."""
            if not whole:
                scores = jnp.where(seen(n), scores, -jnp.inf)
            column_lse2 = plgpu.load(lse2_smem.at[jax.lax.rem(n, stages)], layout=OF_COLUMNS)
            p = jnp.exp2(scores * c - by_column(column_lse2, scores.shape))
            plgpu.barrier_wait(p_free)
            p_smem[...] = p
            plgpu.barrier_arrive(p_there)
            return p

        def score_gradient(n, dp):
            """ds of step n, once the other warpgroup has its probabilities."""
            column_delta = plgpu.load(delta_smem.at[jax.lax.rem(n, stages)], layout=OF_COLUMNS)
            plgpu.barrier_wait(p_there)
            p = plgpu.load(p_smem, layout=TILE)
            plgpu.barrier_arrive(p_free)
            return p * (dp - by_column(column_delta, dp.shape))

        def accumulated(own, met, added, loops):
            """The sum over steps of between(n, own @ met[n]^T) @ added[n].

            The product of a step and, behind it, the sum of the step before are in flight together.

            Args:
              own: [KEYS, features].
              met, added: [stages, ROWS, features] in shared memory.
              loops: pairs of what says of a step whether this loop goes on with it, and of its
                `between`. Step 0 belongs to the first.
            """
            own = in_registers(own) if _fit(own.shape[1], added.shape[2]) else own

            def weigh(n):
                slot = jax.lax.rem(n, stages)
                plgpu.barrier_wait(loaded.at[slot])
                return ((own, met.at[slot].transpose((1, 0))),)

            def step(between, state):
                n, acc, weights = state
                before = jax.lax.rem(n - 1, stages)
                weights, acc = products_and_sum(
                    weigh(n), acc, weights, added.at[before], functools.partial(between, n)
                )
                plgpu.barrier_arrive(released.at[before])
                return n + 1, acc, weights.astype(q.dtype)

            zero = jnp.int32(0)
            (weights,) = products(weigh(zero), functools.partial(loops[0][1], zero))
            state = zero + 1, full((KEYS, added.shape[2]), 0.0), weights.astype(q.dtype)
            for goes_on, between in loops:
                state = jax.lax.while_loop(
                    lambda state, goes_on=goes_on: goes_on(state[0]),
                    functools.partial(step, between),
                    state,
                )
            last = jax.lax.rem(steps - 1, stages)
            acc = accumulate(*state[1:], added.at[last])
            plgpu.barrier_arrive(released.at[last])
            return acc

        @pl.when((warpgroup == _DV) & (count > 0))
        def _():
            plgpu.set_max_registers(REGISTERS[2][0], action="increase")
            masked, whole = (functools.partial(probabilities, whole=x) for x in (False, True))
            # Positions rise with the queries: those that do not see all of the keys come first.
            all_whole, full_steps = passed[b, block], jax.lax.div(count, each)
            loops = (
                (lambda n: (n < full_steps) & (query(n * each) < all_whole), masked),
                (lambda n: n < full_steps, whole),
                (lambda n: n < steps, masked),
            )
            plgpu.barrier_wait(keys_loaded)
            acc = accumulated(k_smem, q_smem, d_out_smem, loops)
            plgpu.barrier_wait(p_free)
            dv.at[b, g, item, pl.ds(part * KEYS, KEYS)][...] = acc

        @pl.when((warpgroup == _DK) & (count > 0))
        def _():
            plgpu.set_max_registers(REGISTERS[2][0], action="increase")
            plgpu.barrier_arrive(p_free)
            plgpu.barrier_wait(keys_loaded)
            loops = ((lambda n: n < steps, score_gradient),)
            acc = accumulated(v_smem, d_out_smem, q_smem, loops)
            dk.at[b, g, item, pl.ds(part * KEYS, KEYS)][...] = acc * scale

    return launch.launch(
        selected_dk_dv,
        *(q, k, v, d_out, lse2, delta, queries, items, order, passed, q_positions),
        out_type=tuple(
            jax.ShapeDtypeStruct((*items.shape[:3], block_size, x.shape[3]), jnp.float32)
            for x in (k, v)
        ),
        programs=batch * groups * num_items * parts,
        warpgroups=3,
        scratch=(
            smem(KEYS, features, dtype=q.dtype),
            smem(KEYS, v_features, dtype=q.dtype),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(),
            smem(stages, ROWS, features, dtype=q.dtype),
            smem(stages, ROWS, v_features, dtype=q.dtype),
            plgpu.SMEM((stages, ROWS), jnp.float32),
            plgpu.SMEM((stages, ROWS), jnp.float32),
            (
                plgpu.Barrier(num_arrivals=4 * each, num_barriers=stages),
                plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            ),
            (
                plgpu.SMEM((KEYS, ROWS), jnp.float32, transforms=FLOAT_TRANSFORMS),
                plgpu.Barrier(),
                plgpu.Barrier(),
            ),
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
