"""interval_attention, backward: dq by tiles of rows, dk and dv by tiles of keys."""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu import launch, rows, walks
from pallas_kernels.mosaic_gpu.common import (
    LOG2E,
    OF_COLUMNS,
    OF_ROWS,
    REGISTERS,
    ROWS,
    TILE,
    accumulate,
    by_column,
    by_row,
    full,
    padded_keys,
    product,
    products,
    share_work,
    smem,
)
from pallas_kernels.mosaic_gpu.walks import COMPUTE, Walk

#: Programs that keep the chip busy to the end. Fewer tiles of keys than that have their queries
#: split among several programs, whose sums are added in order.
ENOUGH_PROGRAMS = 1024
LARGEST_SPLIT = 32


def _interval_dq(
    q, k, v, d_out, table, lo, hi, lse, delta, dq, scratch, *, cut, pairs, scale
):  # fmt: skip
    """dq of two tiles of rows."""
    q_smem, d_out_smem, k_smem, v_smem, rows_there, keys_there, keys_free = scratch
    size, stages, c = cut.keys, cut.stages, scale * LOG2E
    warpgroup = jax.lax.axis_index("warpgroup")
    batch, kv_head, pair = walks.place(jax.lax.axis_index("program"), pairs, k.shape[2])
    walk = Walk.load(table, batch, pair)

    def compute():
        tile = pair * COMPUTE + warpgroup
        there, q_rows, d_out_rows = (x.at[warpgroup] for x in (rows_there, q_smem, d_out_smem))
        rows.load(q, q_rows, there, batch, kv_head, tile)
        rows.load(d_out, d_out_rows, there, batch, kv_head, tile)
        row_lo, row_hi, row_lse, row_delta = (
            plgpu.load(x, layout=OF_ROWS, optimized=False)
            for x in (*(x.at[batch, tile] for x in (lo, hi)),
                      *(x.at[batch, kv_head, tile] for x in (lse, delta)))
        )  # fmt: skip
        plgpu.barrier_wait(there)

        def step(n, acc, masked):
            slot = jax.lax.rem(n, stages)
            keys, values = k_smem.at[slot], v_smem.at[slot]
            plgpu.barrier_wait(keys_there.at[slot])

            def probabilities(scores):
                if masked:
                    scores = walks.keep(scores, walk.at(n, size), row_lo, row_hi)
                return jnp.exp2(scores * c - by_row(row_lse, scores.shape))

            p, dp = products(
                *(q_rows, keys.transpose((1, 0))),
                *(d_out_rows, values.transpose((1, 0))),
                probabilities,
            )
            ds = p * (dp - by_row(row_delta, p.shape))
            if masked:
                ds = jnp.where(p > 0, ds, 0.0)  # of a value that nobody sees it may be NaN
            acc = accumulate(acc, ds.astype(q.dtype), keys)
            plgpu.barrier_arrive(keys_free.at[slot])
            return acc

        acc = walk.run(step, full((ROWS, q.shape[4]), 0.0))
        q_rows[...] = (acc * scale).astype(dq.dtype)
        plgpu.commit_smem()
        rows.store(dq, q_rows, batch, kv_head, tile)

    def copy():
        def fill(n, slot):
            for ref, buffer in ((k, k_smem), (v, v_smem)):
                keys = ref.at[batch, walk.keys(n, size), kv_head]
                plgpu.copy_gmem_to_smem(keys, buffer.at[slot], keys_there.at[slot])

        walks.stream(walk.steps, stages, (keys_free, fill))
        walks.drain(walk.steps, stages, keys_free)

    share_work(COMPUTE, compute, copy)


def _interval_dkv(
    q, k, v, d_out, table, intervals, numbers, dk, dv, scratch, *, cut, scale
):  # fmt: skip
    """dk and dv of a tile of keys from one chunk of the queries.

    Tiles of keys come fastest, so that programs that run together read the same queries. Scores are
    transposed: probabilities are register operands of the products that they enter. With 128 keys a
    tile, each warpgroup has dk and dv of 64; else one has dk and the other one dv, which together
    are too many registers.
    """
    k_smem, v_smem, q_smem, d_out_smem, intervals_smem, numbers_smem, *barriers = scratch
    keys_there, rows_there, rows_free = barriers
    stages, c = cut.stages, scale * LOG2E
    warpgroup = jax.lax.axis_index("warpgroup")
    num_kv_heads, (tiles, parts) = k.shape[2], (table.shape[2], cut.keys // ROWS)
    program = jax.lax.axis_index("program")
    tile, rest = jax.lax.rem(program, tiles), jax.lax.div(program, tiles)
    split, rest = jax.lax.rem(rest, table.shape[0]), jax.lax.div(rest, table.shape[0])
    kv_head, batch = jax.lax.rem(rest, num_kv_heads), jax.lax.div(rest, num_kv_heads)
    walk = Walk.load(table, split, batch, tile)

    def keys(part):
        return pl.ds(pl.multiple_of(tile * cut.keys + part * ROWS, ROWS), ROWS)

    def compute(part, with_dk, with_dv):
        plgpu.set_max_registers(REGISTERS[COMPUTE][0], action="increase")
        k_tile, v_tile = k_smem.at[part], v_smem.at[part]
        plgpu.barrier_wait(keys_there)

        def step(n, state, masked):
            dk_tile, dv_tile = state
            slot = jax.lax.rem(n, stages)
            q_rows, d_out_rows = q_smem.at[slot], d_out_smem.at[slot]
            plgpu.barrier_wait(rows_there.at[slot])

            def of_rows(numbers, i):  # read late: in this layout, 16 registers of each thread
                return plgpu.load(numbers.at[slot, i], layout=OF_COLUMNS)

            def probabilities(scores):
                shape = scores.shape
                if masked:
                    row_lo, row_hi = (of_rows(intervals_smem, i) for i in range(2))
                    key = keys(part).start + plgpu.broadcasted_iota(
                        jnp.int32, shape, 0, layout=TILE
                    )
                    seen = walks.seen(key, by_column(row_lo, shape), by_column(row_hi, shape))
                    scores = jnp.where(seen, scores, -jnp.inf)
                return jnp.exp2(scores * c - by_column(of_rows(numbers_smem, 0), shape))

            operands = k_tile, q_rows.transpose((1, 0))
            if with_dk:
                d_out_columns = d_out_rows.transpose((1, 0))
                p, dp = products(*operands, v_tile, d_out_columns, probabilities)
            else:
                p = probabilities(product(*operands))
            if with_dv:
                dv_tile = accumulate(dv_tile, p.astype(q.dtype), d_out_rows)
            if with_dk:
                ds = p * (dp - by_column(of_rows(numbers_smem, 1), p.shape))
                if masked:
                    ds = jnp.where(p > 0, ds, 0.0)  # of a value that nobody sees it may be NaN
                dk_tile = accumulate(dk_tile, ds.astype(q.dtype), q_rows)
            plgpu.commit_smem()  # before copies overwrite the numbers that were read
            plgpu.barrier_arrive(rows_free.at[slot])
            return dk_tile, dv_tile

        zeros = (full((ROWS, x.shape[3]), 0.0) if some else None
                 for x, some in ((k, with_dk), (v, with_dv)))  # fmt: skip
        dk_tile, dv_tile = walk.run(step, tuple(zeros))
        if with_dk:
            dk[split, batch, keys(part), kv_head, :] = (dk_tile * scale).astype(dk.dtype)
        if with_dv:
            dv[split, batch, keys(part), kv_head, :] = dv_tile.astype(dv.dtype)

    if parts == COMPUTE:
        pl.when(warpgroup < COMPUTE)(lambda: compute(warpgroup, True, True))
    else:
        pl.when(warpgroup == 0)(lambda: compute(0, True, False))
        pl.when(warpgroup == 1)(lambda: compute(0, False, True))

    @pl.when(warpgroup == COMPUTE)
    def _():
        plgpu.set_max_registers(REGISTERS[COMPUTE][1], action="decrease")
        for part in range(parts):
            for ref, buffer in ((k, k_smem), (v, v_smem)):
                source = ref.at[batch, keys(part), kv_head]
                plgpu.copy_gmem_to_smem(source, buffer.at[part], keys_there)

        def fill(n, slot):
            there, at = rows_there.at[slot], walk.at(n)
            rows.load(q, q_smem.at[slot], there, batch, kv_head, at)
            rows.load(d_out, d_out_smem.at[slot], there, batch, kv_head, at)
            plgpu.copy_gmem_to_smem(intervals.at[batch, at], intervals_smem.at[slot], there)
            plgpu.copy_gmem_to_smem(numbers.at[batch, kv_head, at], numbers_smem.at[slot], there)

        walks.stream(walk.steps, stages, (rows_free, fill))
        walks.drain(walk.steps, stages, rows_free)


def _query_gradient(q, k, v, d_out, table, intervals, lse, delta, cut, scale):
    """dq [B, T, K, G, H]; the arguments are as the kernel wants them."""
    batch, _, num_kv_heads, group, head_dim = q.shape
    tiles = lse.shape[2]
    tile = functools.partial(smem, dtype=q.dtype)
    slots = functools.partial(plgpu.Barrier, num_barriers=cut.stages)
    return launch.launch(
        functools.partial(_interval_dq, cut=cut, pairs=tiles // COMPUTE, scale=scale),
        *(q, k, v, d_out, table, *intervals, lse, delta),
        out_type=(jax.ShapeDtypeStruct(q.shape, q.dtype),),
        programs=batch * num_kv_heads * tiles // COMPUTE,
        warpgroups=COMPUTE + 1,
        scratch=(
            tile(COMPUTE, ROWS, head_dim),
            tile(COMPUTE, ROWS, v.shape[3]),
            tile(cut.stages, cut.keys, head_dim),
            tile(cut.stages, cut.keys, v.shape[3]),
            plgpu.Barrier(num_arrivals=2 * rows.copies(group), num_barriers=COMPUTE),
            slots(num_arrivals=2),
            slots(num_arrivals=COMPUTE),
        ),
    )[0]


def _splits(programs, tiles):
    """How many chunks the tiles of rows are split into, so that there are enough programs."""
    return max(min(ENOUGH_PROGRAMS // programs, LARGEST_SPLIT, tiles), 1)


def _key_gradients(q, k, v, d_out, table, intervals, lse, delta, cut, scale):
    """dk and dv, each [splits, B, S, K, features] with S up to a whole tile."""
    splits, batch, tiles, _ = table.shape
    num_kv_heads, group = q.shape[2:4]
    dtype = q.dtype if splits == 1 else jnp.float32
    parts, slots = cut.keys // ROWS, functools.partial(plgpu.Barrier, num_barriers=cut.stages)
    tile = functools.partial(smem, dtype=q.dtype)
    return launch.launch(
        functools.partial(_interval_dkv, cut=cut, scale=scale),
        *(q, k, v, d_out, table, jnp.stack(intervals, axis=2), jnp.stack([lse, delta], axis=3)),
        out_type=tuple(
            jax.ShapeDtypeStruct((splits, batch, tiles * cut.keys, *x.shape[2:]), dtype)
            for x in (k, v)
        ),
        programs=tiles * splits * batch * num_kv_heads,
        warpgroups=COMPUTE + 1,
        scratch=(
            tile(parts, ROWS, k.shape[3]),
            tile(parts, ROWS, v.shape[3]),
            tile(cut.stages, ROWS, k.shape[3]),
            tile(cut.stages, ROWS, v.shape[3]),
            plgpu.SMEM((cut.stages, 2, ROWS), jnp.int32),
            plgpu.SMEM((cut.stages, 2, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=2 * parts),
            slots(num_arrivals=2 * rows.copies(group) + 2),
            slots(num_arrivals=COMPUTE),
        ),
    )


def backward(q, k, v, lo, hi, out, lse, d_out, d_lse, *, scale, longest):
    """dq, dk and dv of `interval_attention`."""
    batch, num_queries, num_heads, _ = q.shape
    num_keys, num_kv_heads = k.shape[1:3]
    group = num_heads // num_kv_heads
    tiles = rows.num_tiles(num_queries, group, COMPUTE)
    lse, delta = rows.lse2_and_delta(lse, out, d_out, d_lse)
    lse, delta = (
        rows.from_heads(x, num_kv_heads, tiles, fill) for x, fill in ((lse, jnp.inf), (delta, 0))
    )
    row_arrays = (rows.split_heads(rows.padded_queries(x, group), num_kv_heads) for x in (q, d_out))
    padded_q, d_out = row_arrays
    intervals = walks.intervals_of_rows(lo, hi, num_keys, group, tiles)
    padded_k, padded_v = padded_keys(k), padded_keys(v)

    cut = walks.lookup("interval_dq", q, v, longest)
    table = walks.over_keys(lo, hi, num_keys, group, tiles, cut.keys)
    clean_k = padded_keys(walks.keep_seen(k, lo, hi))
    dq = _query_gradient(
        padded_q, clean_k, padded_v, d_out, table, intervals, lse, delta, cut, scale
    )
    cut = walks.lookup("interval_dkv", q, v)
    splits = _splits(pl.cdiv(num_keys, cut.keys) * batch * num_kv_heads, tiles)
    table = walks.over_rows(lo, hi, num_keys, group, tiles, cut.keys, splits)
    gradients = _key_gradients(
        padded_q, padded_k, padded_v, d_out, table, intervals, lse, delta, cut, scale
    )
    dk, dv = (sum(x[i, :, :num_keys] for i in range(splits)).astype(k.dtype) for x in gradients)
    return dq[:, :num_queries].reshape(q.shape), dk, dv
