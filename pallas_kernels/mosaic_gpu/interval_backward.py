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
    accumulate_and,
    by_column,
    by_row,
    divide,
    full,
    padded_keys,
    products,
    products_and_sum,
    share_work,
    smem,
)
from pallas_kernels.mosaic_gpu.walks import COMPUTE, Walk

#: Programs that keep the chip busy to the end. Fewer tiles of keys than that have their queries
#: split among several programs, whose sums are added in order.
ENOUGH_PROGRAMS = 1024
LARGEST_SPLIT = 32


def _interval_dq(
    q, k, v, d_out, table, lo, hi, lse, delta, dq, scratch, *, cut, scale
):  # fmt: skip
    """dq of two tiles of rows at a time.

    Each program has several pairs of tiles, so that the keys and, where memory allows, the rows of
    the next one come while the results of this one leave. Where it allows that too, and registers
    suffice, all products of a step are in flight at a time: those of its scores and, behind them,
    that with the gradient of the scores of the step before.
    """
    q_smem, d_out_smem, k_smem, v_smem, rows_there, rows_free, keys_there, keys_free = scratch
    size, stages, row_stages, c = cut.keys, cut.stages, cut.row_stages, scale * LOG2E
    # A step waits for the keys of the next one while it has its own and those of the one before.
    overlapped = stages > 2
    warpgroup, work = jax.lax.axis_index("warpgroup"), walks.Work(table, k.shape[2])

    def numbers(r):
        batch, kv_head, pair = work.place(r)
        tile = pair * COMPUTE + warpgroup
        return work.walk(r), *(
            plgpu.load(x, layout=OF_ROWS, optimized=False)
            for x in (*(x.at[batch, tile] for x in (lo, hi)),
                      *(x.at[batch, kv_head, tile] for x in (lse, delta)))
        )  # fmt: skip

    def release_rows(r):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the result leaves through their memory
        plgpu.barrier_arrive(rows_free.at[jax.lax.rem(r, row_stages)])

    def compute(r, state):
        before, walk, row_lo, row_hi, row_lse, row_delta = state
        batch, kv_head, pair = work.place(r)
        first_key, others = walk.masked_first(size)
        tile, row_slot = pair * COMPUTE + warpgroup, jax.lax.rem(r, row_stages)
        q_rows, d_out_rows = (x.at[row_slot, warpgroup] for x in (q_smem, d_out_smem))
        plgpu.barrier_wait(rows_there.at[row_slot])

        def slot(n):
            return jax.lax.rem(before + n, stages)

        def wait_for_keys(n):
            @pl.when(n < walk.steps)
            def _():
                plgpu.barrier_wait(keys_there.at[slot(n)])

        def operands(n):
            keys, values = (x.at[slot(n)].transpose((1, 0)) for x in (k_smem, v_smem))
            return (q_rows, keys), (d_out_rows, values)

        def probabilities(n, first_key, scores):
            if first_key is not None:
                scores = walks.keep(scores, first_key, row_lo, row_hi)
            p = jnp.exp2(scores * c - by_row(row_lse, scores.shape))
            if overlapped:
                # In registers before the wait, or the compiler might make them after the products.
                p = jax.lax.optimization_barrier(p)
                wait_for_keys(n + 1)
            return p

        def gradient(p, dp, first_key):
            ds = p * (dp - by_row(row_delta, p.shape))
            if first_key is not None:
                ds = jnp.where(p == 0, 0.0, ds)  # of a value that nobody sees it may be NaN
            return ds.astype(q.dtype)

        def add(n, acc, ds):
            acc = accumulate(acc, ds, k_smem.at[slot(n)])
            plgpu.barrier_arrive(keys_free.at[slot(n)])
            return acc

        def score_gradient(n, first_key, meanwhile=lambda: None):
            def between(scores):
                meanwhile()
                return probabilities(n, first_key, scores)

            p, dp = products(operands(n), between)
            return gradient(p, dp, first_key)

        def release_last_rows():
            if row_stages > 1:
                pl.when(r > 0)(lambda: release_rows(r - 1))

        def later_step(n, state, masked):
            first_key = others.at(n, size) if masked else None
            n = n + 1
            if not overlapped:
                wait_for_keys(n)
                return add(n, state, score_gradient(n, first_key))
            between = functools.partial(probabilities, n, first_key)
            p, dp, acc = products_and_sum(operands(n), *state, k_smem.at[slot(n - 1)], between)
            plgpu.barrier_arrive(keys_free.at[slot(n - 1)])
            return acc, gradient(p, dp, first_key)

        wait_for_keys(0)
        acc, ds = full((ROWS, q.shape[4]), 0.0), score_gradient(0, first_key, release_last_rows)
        if overlapped:
            acc, ds = others.run(later_step, (acc, ds))
        else:
            acc = others.run(later_step, add(0, acc, ds))
        # Before they are needed: numbers out of global memory take longer than a product.
        next_numbers = numbers(work.following(r))
        if overlapped:
            acc = add(walk.steps - 1, acc, ds)
        q_rows[...] = (acc * scale).astype(dq.dtype)
        plgpu.commit_smem()
        rows.store(dq, q_rows, batch, kv_head, tile)
        if row_stages == 1:  # the next rows wait for it
            release_rows(r)
        return before + walk.steps, *next_numbers

    def copy(r, before):
        (batch, kv_head, pair), walk = work.place(r), work.walk(r)

        def fill_rows(_, slot):
            for i in range(COMPUTE):
                for ref, buffer in ((q, q_smem), (d_out, d_out_smem)):
                    where = buffer.at[slot, i], rows_there.at[slot]
                    rows.load(ref, *where, batch, kv_head, pair * COMPUTE + i)

        def fill(n, slot):
            first = walk.at_masked_first(n, size)
            for ref, buffer in ((k, k_smem), (v, v_smem)):
                source = walks.keys(ref, batch, first, size, kv_head)
                plgpu.copy_gmem_to_smem(source, buffer.at[slot], keys_there.at[slot])

        walks.stream(1, row_stages, (rows_free, fill_rows), before=r)
        walks.stream(walk.steps, stages, (keys_free, fill), before=before)
        return before + walk.steps

    def compute_all():
        jax.lax.fori_loop(0, work.rounds, compute, (jnp.int32(0), *numbers(0)))
        if row_stages > 1:
            release_rows(work.rounds - 1)

    def copy_all():
        steps = jax.lax.fori_loop(0, work.rounds, copy, jnp.int32(0))
        walks.drain(steps, stages, keys_free)
        walks.drain(work.rounds, row_stages, rows_free)

    share_work(COMPUTE, compute_all, copy_all)


def _interval_dkv(
    q, k, v, d_out, table, own_table, intervals, numbers, dk, dv, scratch, *, cut, scale, short
):  # fmt: skip
    """dk and dv of a tile of keys from one chunk of the queries.

    Key/value heads and then tiles of keys come fastest, and walks are in an order in which tiles of
    a head that run together read the same queries at the same time. Scores are transposed:
    probabilities are register operands of the products that they enter. With 128 keys a tile, each
    warpgroup has dk and dv of 64, and passes over tiles of rows that see none of those; else one
    has dk and the other one dv, which together are too many registers.
    """
    k_smem, v_smem, q_smem, d_out_smem, intervals_smem, numbers_smem, *barriers = scratch
    keys_there, rows_there, rows_free = barriers
    stages, c = cut.stages, scale * LOG2E
    warpgroup = jax.lax.axis_index("warpgroup")
    num_kv_heads, (tiles, parts) = k.shape[2], (table.shape[2], cut.keys // ROWS)
    program = jax.lax.axis_index("program")
    rest, kv_head = divide(program, num_kv_heads)
    rest, tile = divide(rest, tiles)
    batch, split = divide(rest, table.shape[0])
    # Counted within a row of the batch, so that no bit depends on which one it is.
    wave = jax.lax.div(jax.lax.rem(program, tiles * num_kv_heads), launch.num_cores())
    upwards = jax.lax.rem(wave, 2) == 1
    walk = Walk.load(table, split, batch, tile)

    def keys(part):
        return pl.ds(pl.multiple_of(tile * cut.keys + part * ROWS, ROWS), ROWS)

    def wait_for_rows(n):
        @pl.when(n < walk.steps)
        def _():
            plgpu.barrier_wait(rows_there.at[jax.lax.rem(n, stages)])

    def pass_over(n):
        wait_for_rows(n + 1)
        plgpu.barrier_arrive(rows_free.at[jax.lax.rem(n, stages)])

    def compute(part, with_dk, with_dv):
        plgpu.set_max_registers(REGISTERS[COMPUTE][0], action="increase")
        k_tile, v_tile = k_smem.at[part], v_smem.at[part]
        plgpu.barrier_wait(keys_there)
        wait_for_rows(0)

        def step(n, state, masked):
            dk_tile, dv_tile = state
            slot = jax.lax.rem(n, stages)
            q_rows, d_out_rows = q_smem.at[slot], d_out_smem.at[slot]

            def of_rows(ref, i):  # in this layout, 16 registers of each thread
                return plgpu.load(ref.at[slot, i], layout=OF_COLUMNS)

            # Before the products: beside them, which read shared memory too, it comes late.
            row_lse = of_rows(numbers_smem, 0)

            def probabilities(scores):
                shape = scores.shape
                if masked:
                    row_lo, row_hi = (of_rows(intervals_smem, i) for i in range(2))
                    key = keys(part).start + plgpu.broadcasted_iota(
                        jnp.int32, shape, 0, layout=TILE
                    )
                    seen = walks.seen(key, by_column(row_lo, shape), by_column(row_hi, shape))
                    scores = jnp.where(seen, scores, -jnp.inf)
                p = jnp.exp2(scores * c - by_column(row_lse, shape))
                # In registers before the wait, or the compiler might make them after the products.
                p = jax.lax.optimization_barrier(p)
                wait_for_rows(n + 1)
                return p

            def score_gradient(p, dp):
                ds = p * (dp - by_column(of_rows(numbers_smem, 1), p.shape))
                if masked:
                    ds = jnp.where(p == 0, 0.0, ds)  # of a value that nobody sees it may be NaN
                return jax.lax.optimization_barrier(ds)  # before a wait, as above

            of_scores = k_tile, q_rows.transpose((1, 0))
            of_dp = v_tile, d_out_rows.transpose((1, 0))
            p, *dp = products([of_scores, of_dp] if with_dk else [of_scores], probabilities)
            gradient = functools.partial(score_gradient, p, *dp) if with_dk else lambda: None
            if with_dv:
                dv_tile, ds = accumulate_and(dv_tile, p.astype(q.dtype), d_out_rows, gradient)
            else:
                ds = gradient()
            if with_dk:
                # Rounded only now: made while a sum reads registers, the operands of the next one
                # would have the compiler wait for every product at once.
                dv_tile, ds = jax.lax.optimization_barrier((dv_tile, ds))
                dk_tile = accumulate(dk_tile, ds.astype(q.dtype), q_rows)
            plgpu.commit_smem()  # before copies overwrite the numbers that were read
            plgpu.barrier_arrive(rows_free.at[slot])
            return dk_tile, dv_tile

        zeros = (full((ROWS, x.shape[3]), 0.0) if some else None
                 for x, some in ((k, with_dk), (v, with_dv)))  # fmt: skip
        last = own_table.shape[2] - 1  # beyond it are no keys, and what is made is cut off
        own = Walk.load(own_table, split, batch, jnp.minimum(tile * parts + part, last))
        dk_tile, dv_tile = walk.run(step, tuple(zeros), own, pass_over)
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
            there = rows_there.at[slot]
            at = walk.beside_others(n) if short else walk.to_and_fro(n, upwards)
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
    row_slots = functools.partial(plgpu.Barrier, num_barriers=cut.row_stages)
    return launch.launch(
        functools.partial(_interval_dq, cut=cut, scale=scale),
        *(q, k, v, d_out, table, *intervals, lse, delta),
        out_type=(jax.ShapeDtypeStruct(q.shape, q.dtype),),
        programs=min(batch * num_kv_heads * tiles // COMPUTE, launch.num_cores()),
        warpgroups=COMPUTE + 1,
        scratch=(
            tile(cut.row_stages, COMPUTE, ROWS, head_dim),
            tile(cut.row_stages, COMPUTE, ROWS, v.shape[3]),
            tile(cut.stages, cut.keys, head_dim),
            tile(cut.stages, cut.keys, v.shape[3]),
            row_slots(num_arrivals=2 * COMPUTE * rows.copies(group)),
            row_slots(num_arrivals=COMPUTE),
            slots(num_arrivals=2),
            slots(num_arrivals=COMPUTE),
        ),
    )[0]


def _splits(programs, tiles):
    """How many chunks the tiles of rows are split into, so that there are enough programs."""
    return max(min(ENOUGH_PROGRAMS // programs, LARGEST_SPLIT, tiles), 1)


def _key_gradients(q, k, v, d_out, tables, intervals, lse, delta, cut, scale, short):
    """dk and dv, each [splits, B, S, K, features] with S up to a whole tile.

    The tables are walks over rows, of tiles of keys and of ROWS keys.
    """
    splits, batch, tiles, _ = tables[0].shape
    num_kv_heads, group = q.shape[2:4]
    dtype = q.dtype if splits == 1 else jnp.float32
    parts, slots = cut.keys // ROWS, functools.partial(plgpu.Barrier, num_barriers=cut.stages)
    tile = functools.partial(smem, dtype=q.dtype)
    return launch.launch(
        functools.partial(_interval_dkv, cut=cut, scale=scale, short=short),
        *(q, k, v, d_out, *tables, jnp.stack(intervals, axis=2), jnp.stack([lse, delta], axis=3)),
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
    """dq, dk, dv and out . d_out of `interval_attention`; see `calls.differentiable`."""
    batch, num_queries, num_heads, _ = q.shape
    num_keys, num_kv_heads = k.shape[1:3]
    group = num_heads // num_kv_heads
    tiles = rows.num_tiles(num_queries, group, COMPUTE)
    lse2, dots = rows.lse2_and_dots(lse, out, d_out)
    lse, delta = (
        rows.from_heads(x, num_kv_heads, tiles, fill)
        for x, fill in ((lse2, jnp.inf), (dots - d_lse, 0))
    )
    row_arrays = (rows.split_heads(rows.padded_queries(x, group), num_kv_heads) for x in (q, d_out))
    padded_q, d_out = row_arrays
    intervals = walks.intervals_of_rows(lo, hi, num_keys, group, tiles)
    padded_k, padded_v = padded_keys(k), padded_keys(v)

    cut = walks.lookup("interval_dq", q, v, longest)
    table = walks.over_keys(lo, hi, num_keys, group, tiles, cut)
    clean_k = padded_keys(walks.keep_seen(k, lo, hi))
    dq = _query_gradient(
        padded_q, clean_k, padded_v, d_out, table, intervals, lse, delta, cut, scale
    )
    cut = walks.lookup("interval_dkv", q, v)
    splits = _splits(pl.cdiv(num_keys, cut.keys) * batch * num_kv_heads, tiles)
    tables = walks.over_rows(lo, hi, num_keys, group, tiles, cut.keys, splits)
    gradients = _key_gradients(
        *(padded_q, padded_k, padded_v, d_out, tables, intervals, lse, delta, cut, scale),
        short=walks.are_short(longest),
    )
    dk, dv = (sum(x[i, :, :num_keys] for i in range(splits)).astype(k.dtype) for x in gradients)
    return dq[:, :num_queries].reshape(q.shape), dk, dv, dots
