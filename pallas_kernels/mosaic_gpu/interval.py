"""interval_attention: each query attends one interval of keys.

Forward and for dq, two warpgroups with a tile of 64 rows each (see rows.py) walk the keys from
their smallest lo to their largest hi, which a third one brings. For dk and dv, a tile of keys walks
the tiles of rows that may see it, which lie together because lo and hi do not decrease. Steps that
every row of the tile sees whole skip the mask. No program adds to what another one wrote.
"""

import functools
import itertools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu import launch, rows, walks
from pallas_kernels.mosaic_gpu.common import (
    LN2,
    LOG2E,
    OF_ROWS,
    ROWS,
    accumulate,
    by_row,
    full,
    padded_keys,
    product,
    share_work,
    smem,
)
from pallas_kernels.mosaic_gpu.interval_backward import backward
from pallas_kernels.mosaic_gpu.launch import refusal  # noqa: F401 - see pallas_kernels.KERNELS
from pallas_kernels.mosaic_gpu.walks import COMPUTE, Walk


def _update(state, scores, c, masked):
    """The running softmax after a step of scores, all but the product with the values.

    Returns:
      The state, whose output has decayed, and the probabilities.
    """
    acc, maximum, total = state
    highest = jnp.maximum(maximum, scores.max(axis=1) * c)
    # Of a row that has seen nothing yet; -inf - -inf would be NaN.
    offset = jnp.where(highest == -jnp.inf, 0.0, highest) if masked else highest
    decay = jnp.exp2(maximum - offset)
    p = jnp.exp2(scores * c - by_row(offset, scores.shape))
    return (acc * by_row(decay, acc.shape), highest, total * decay + p.sum(axis=1)), p


def _columns(parts):
    """Which features the parts of an array in shared memory have."""
    ends = itertools.accumulate(part.shape[-1] for part in parts)
    return tuple(
        pl.ds(end - part.shape[-1], part.shape[-1]) for part, end in zip(parts, ends, strict=True)
    )


def _interval_forward(q, k, v, table, lo, hi, out, lse, scratch, *, cut, pairs, c):
    """Two tiles of rows at a time, whose warpgroups take turns on the tensor cores.

    While one makes a softmax, the other one issues the product with its values and, right behind
    it, the next product of queries and keys. Each program has several pairs of tiles, so that the
    keys and queries of the next one come while the results of this one leave.

    Every walk has a step: the second warpgroup ends its walk with a turn that the first one gives
    in its next walk, for which it must not need queries in a slot that the second one still has.
    """
    q_smem, k_smem, v_smem, out_smem, *barriers = scratch
    q_there, k_there, v_there, q_free, k_free, v_free, turn = barriers
    columns, v_head_dim = _columns(q_smem), v.shape[3]
    size, stages, q_stages = cut.keys, cut.stages, cut.row_stages
    warpgroup = jax.lax.axis_index("warpgroup")
    num_kv_heads, total = k.shape[2], q.shape[0] * k.shape[2] * pairs
    program, programs = jax.lax.axis_index("program"), jax.lax.axis_size("program")

    def work(r):  # turning round balances a list that begins with the longest walks
        return r * programs + jnp.where(r % 2 == 0, program, programs - 1 - program)

    last_round = jnp.int32((total - 1) // programs)
    rounds = last_round + (work(last_round) < total).astype(jnp.int32)

    def take_turn():
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    def compute(r, before):
        batch, kv_head, pair = walks.place(work(r), pairs, num_kv_heads)
        walk = Walk.load(table, batch, pair)
        tile, q_slot = pair * COMPUTE + warpgroup, jax.lax.rem(r, q_stages)
        q_rows = tuple(part.at[q_slot, warpgroup] for part in q_smem)
        row_lo, row_hi = (
            plgpu.load(x.at[batch, tile], layout=OF_ROWS, optimized=False) for x in (lo, hi)
        )
        plgpu.barrier_wait(q_there.at[q_slot])

        def wait_for_keys(n):
            @pl.when(n < walk.steps)
            def _():
                plgpu.barrier_wait(k_there.at[jax.lax.rem(before + n, stages)])

        def step(n, state, masked):
            slot = jax.lax.rem(before + n, stages)
            keys = tuple(k_smem.at[slot, :, where].transpose((1, 0)) for where in columns)
            scores = product(q_rows, keys, take_turn)
            plgpu.barrier_arrive(k_free.at[slot])
            if masked:
                scores = walks.keep(scores, walk.at(n, size), row_lo, row_hi)
            (acc, *state), p = _update(state, scores, c, masked)
            # In registers before the turn is passed on, or the compiler might delay them.
            acc, p, *state = jax.lax.optimization_barrier((acc, p.astype(q.dtype), *state))
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(v_there.at[slot])
            plgpu.barrier_wait(turn)
            acc = accumulate(acc, p, v_smem.at[slot], lambda: wait_for_keys(n + 1))
            plgpu.barrier_arrive(v_free.at[slot])
            return acc, *state

        wait_for_keys(0)
        if q_stages == 1:
            pl.when(warpgroup == 1)(take_turn)
        none, zero = (full((ROWS,), x, OF_ROWS) for x in (-jnp.inf, 0.0))
        state = walk.run(step, (full((ROWS, v_head_dim), 0.0), none, zero))

        acc, maximum, denominator = state
        some = denominator > 0
        denominator = jnp.where(some, denominator, 1.0)
        buffer = q_rows[0] if out_smem is None else out_smem.at[warpgroup]
        buffer[...] = (acc * by_row(1 / denominator, acc.shape)).astype(out.dtype)
        plgpu.commit_smem()
        row_lse = jnp.where(some, maximum * LN2 + jnp.log(denominator), -jnp.inf)
        lse[batch, kv_head, tile, :] = row_lse
        rows.store(out, buffer, batch, kv_head, tile)
        plgpu.barrier_arrive(q_free.at[q_slot])
        if q_stages == 1:
            pl.when(warpgroup == 0)(take_turn)
        return before + walk.steps

    def copy(r, before):
        batch, kv_head, pair = walks.place(work(r), pairs, num_kv_heads)
        walk, q_slot = Walk.load(table, batch, pair), jax.lax.rem(r, q_stages)

        @pl.when(r >= q_stages)
        def _():
            plgpu.barrier_wait(q_free.at[q_slot])

        for i in range(COMPUTE):
            for part, where in zip(q_smem, columns, strict=True):
                buffer, there = part.at[q_slot, i], q_there.at[q_slot]
                rows.load(q, buffer, there, batch, kv_head, pair * COMPUTE + i, where.start)

        def fill(ref, buffer, there, n, slot):
            keys = ref.at[batch, walk.keys(n, size), kv_head]
            plgpu.copy_gmem_to_smem(keys, buffer.at[slot], there.at[slot])

        fill_k = functools.partial(fill, k, k_smem, k_there)
        fill_v = functools.partial(fill, v, v_smem, v_there)
        walks.stream(walk.steps, stages, (k_free, fill_k), (v_free, fill_v), before=before)
        return before + walk.steps

    def compute_all():
        # Turns go on from one pair of tiles to the next, whose queries are there if there is room
        # for both. If not, they come when both warpgroups are done, without waiting for a turn.
        if q_stages > 1:
            pl.when(warpgroup == 1)(take_turn)
        jax.lax.fori_loop(0, rounds, compute, jnp.int32(0))
        if q_stages > 1:
            pl.when(warpgroup == 0)(take_turn)

    def copy_all():
        steps = jax.lax.fori_loop(0, rounds, copy, jnp.int32(0))
        walks.drain(steps, stages, k_free, v_free)
        walks.drain(rounds, q_stages, q_free)

    share_work(COMPUTE, compute_all, copy_all)


def _forward(q, k, v, lo, hi, *, scale, longest):
    batch, num_queries, num_heads, head_dim = q.shape
    num_keys, num_kv_heads, v_head_dim = v.shape[1:]
    group = num_heads // num_kv_heads
    cut = walks.lookup("interval_forward", q, v, longest)
    tiles = rows.num_tiles(num_queries, group, COMPUTE)
    padded_q = rows.split_heads(rows.padded_queries(q, group), num_kv_heads)
    tile = functools.partial(smem, dtype=q.dtype)
    slots = functools.partial(plgpu.Barrier, num_barriers=cut.stages)
    # The output leaves through the memory of the queries, or of a part of them that has its shape.
    widths = (v_head_dim, head_dim - v_head_dim) if v_head_dim < head_dim else (head_dim,)
    q_parts = tuple(tile(cut.row_stages, COMPUTE, ROWS, width) for width in widths)
    copies = rows.copies(group) * len(q_parts) * COMPUTE
    out, lse = launch.launch(
        functools.partial(_interval_forward, cut=cut, pairs=tiles // COMPUTE, c=scale * LOG2E),
        padded_q,
        padded_keys(k),
        padded_keys(walks.keep_seen(v, lo, hi)),
        walks.over_keys(lo, hi, num_keys, group, tiles, cut.keys, least=1),
        *walks.intervals_of_rows(lo, hi, num_keys, group, tiles),
        out_type=(
            jax.ShapeDtypeStruct((*padded_q.shape[:4], v_head_dim), q.dtype),
            jax.ShapeDtypeStruct((batch, num_kv_heads, tiles, ROWS), jnp.float32),
        ),
        programs=min(batch * num_kv_heads * tiles // COMPUTE, launch.num_cores()),
        warpgroups=COMPUTE + 1,
        scratch=(
            q_parts,
            tile(cut.stages, cut.keys, head_dim),
            tile(cut.stages, cut.keys, v_head_dim),
            tile(COMPUTE, ROWS, v_head_dim) if v_head_dim > head_dim else None,
            plgpu.Barrier(num_arrivals=copies, num_barriers=cut.row_stages),
            *(slots(), slots()),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=cut.row_stages),
            *(slots(num_arrivals=COMPUTE), slots(num_arrivals=COMPUTE)),
            plgpu.Barrier(num_arrivals=COMPUTE),
        ),
    )
    out = out[:, :num_queries].reshape(*q.shape[:3], v_head_dim)
    return out, rows.to_heads(lse, num_queries, group)


def interval_attention(q, k, v, lo, hi, scale, longest=None):
    """Attention of query t over the keys j with lo[b, t] <= j < hi[b, t].

    Differentiable in q, k, v, through both results. FlashAttention-3's forward (arXiv 2407.08608);
    backward, one kernel for dq and one for dk and dv, without atomics. What keys hold that no query
    sees changes nothing.

    Args:
      q: queries [B, T, N, H], bfloat16 or float16.
      k: keys [B, S, K, H]; K divides N.
      v: values [B, S, K, V].
      lo: int32 [B, T], not decreasing along t.
      hi: int32 [B, T], not decreasing along t; a row with hi <= lo is empty.
      scale: a Python number that multiplies the scores.
      longest: a bound on hi - lo, if one is known; short intervals are tuned apart.

    Returns:
      out [B, T, N, V] in q's dtype, exactly 0 on an empty row, and lse [B, T, N] float32, the
      natural logarithm of the softmax's denominator, -inf on an empty row.
    """
    if k.shape[1] == 0:  # nothing to point a copy at
        out = jnp.zeros((*q.shape[:3], v.shape[3]), q.dtype)
        return out, jnp.full(q.shape[:3], -jnp.inf, jnp.float32)
    q, scale = launch.positive_scale(q, scale)
    passes = (functools.partial(run, scale=scale, longest=longest) for run in (_forward, backward))
    return launch.differentiable(*passes)(q, k, v, lo, hi)
