"""interval_attention: each query attends one interval of keys.

Forward and for dq, two warpgroups with a tile of 64 rows each (see rows.py) walk the keys from
their smallest lo to their largest hi, which a third one brings. For dk and dv, a tile of keys walks
the tiles of rows that may see it, which lie together because lo and hi do not decrease. Steps that
every row of the tile sees whole skip the mask. No program adds to what another one wrote.
"""

import functools
import itertools
import math

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
    TILE,
    Turns,
    accumulate,
    by_row,
    full,
    padded_keys,
    product,
    products_and_sum,
    share_work,
    smem,
)
from pallas_kernels.mosaic_gpu.interval_backward import backward
from pallas_kernels.mosaic_gpu.walks import COMPUTE

#: Bytes of shared memory for barriers and what Pallas itself takes.
RESERVED = 3072


def _softmax(scores, maximum, total, c, masked):
    """The running softmax after a step of scores.

    Returns:
      The probabilities, the factor by which what came before decays, the new maximum and total.
    """
    highest = jnp.maximum(maximum, scores.max(axis=1) * c)
    # Of a row that has seen nothing yet; -inf - -inf would be NaN.
    offset = jnp.where(highest == -jnp.inf, 0.0, highest) if masked else highest
    decay = jnp.exp2(maximum - offset)
    p = jnp.exp2(scores * c - by_row(offset, scores.shape))
    return p, decay, highest, total * decay + p.sum(axis=1)


def _columns(parts):
    """Which features the parts of an array in shared memory have."""
    ends = itertools.accumulate(part.shape[-1] for part in parts)
    return tuple(
        pl.ds(end - part.shape[-1], part.shape[-1]) for part, end in zip(parts, ends, strict=True)
    )


def _interval_forward(q, k, v, table, lo, hi, *rest, cut, c):
    """Two tiles of rows at a time, whose warpgroups take turns on the tensor cores.

    In its turn, a warpgroup issues the product of queries and keys of a step and, right behind it,
    the product with the values of the step before. Then it gives the turn away, and makes the
    softmax of the one while the other goes on. Each program has several pairs of tiles, so that the
    keys and queries of the next one come while the results of this one leave.

    Both warpgroups have as many turns in a walk as it has steps: the first step takes none, since
    nothing is behind its product, and the last product with values has one of its own.

    `rest` begins with two other outputs and the gates of all three for `gated_sum`. They come into
    memory that the walk needs no longer, or not at all: the first one in place of the output.
    """
    *onto, out, lse, scratch = rest
    q_smem, k_smem, v_smem, out_smem, other_smem, *barriers = scratch
    q_there, k_there, v_there, q_free, k_free, v_free, turn, onto_there = barriers
    columns, v_head_dim = _columns(q_smem), v.shape[3]
    size, stages, q_stages = cut.keys, cut.stages, cut.row_stages
    warpgroup, work = jax.lax.axis_index("warpgroup"), walks.Work(table, k.shape[2])
    turns = Turns(turn)

    def release_queries(r):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the output leaves through their memory
        plgpu.barrier_arrive(q_free.at[jax.lax.rem(r, q_stages)])

    def numbers(r):
        batch, _, pair = work.place(r)
        tile = pair * COMPUTE + warpgroup
        return work.walk(r), *(
            plgpu.load(x.at[batch, tile], layout=OF_ROWS, optimized=False) for x in (lo, hi)
        )

    def compute(r, state):
        before, walk, row_lo, row_hi = state
        batch, kv_head, pair = work.place(r)
        first_key, others = walk.masked_first(size)
        tile, q_slot = pair * COMPUTE + warpgroup, jax.lax.rem(r, q_stages)
        q_rows = tuple(part.at[q_slot, warpgroup] for part in q_smem)
        buffer = q_rows[0] if out_smem is None else out_smem.at[warpgroup]
        plgpu.barrier_wait(q_there.at[q_slot])

        def load_other(i, place):
            rows.load(onto[i], place, onto_there.at[warpgroup], batch, kv_head, tile)

        def added_to_others(result):
            mine, *gates = (
                plgpu.load(onto[2].at[i, batch, kv_head, tile], layout=OF_ROWS, optimized=False)
                for i in (2, 0, 1)
            )
            result *= by_row(mine, result.shape)
            plgpu.barrier_wait(onto_there.at[warpgroup])
            for gate, place in zip(gates, (buffer, other_smem.at[warpgroup]), strict=True):
                other = plgpu.load(place, layout=TILE, optimized=False).astype(jnp.float32)
                result += other * by_row(gate, result.shape)
            return result

        def slot(n):
            return jax.lax.rem(before + n, stages)

        def queries_and_keys(n, size=size):
            plgpu.barrier_wait(k_there.at[slot(n)])
            mine = pl.ds(0, size)
            keys = tuple(k_smem.at[slot(n), mine, where].transpose((1, 0)) for where in columns)
            return q_rows, keys

        def values(n, p):
            return v_smem.at[slot(n), pl.ds(0, p.shape[1])]

        def probabilities(n, first_key, scores, maximum, total):
            plgpu.barrier_arrive(k_free.at[slot(n)])
            if first_key is not None:
                scores = walks.keep(scores, first_key, row_lo, row_hi)
            softmax = _softmax(scores, maximum, total, c, first_key is not None)
            # In registers before the wait, or the compiler might make them after the products.
            softmax = jax.lax.optimization_barrier(softmax)
            plgpu.barrier_wait(v_there.at[slot(n)])
            return softmax

        def step(n, state, first_key, size=size):
            acc, p, *softmax = state
            operands = queries_and_keys(n, size)
            turns.take()
            (p, decay, *softmax), acc = products_and_sum(
                *([operands], acc, p, values(n - 1, p)),
                between=lambda scores: probabilities(n, first_key, scores, *softmax),
                meanwhile=turns.give,
            )
            plgpu.barrier_arrive(v_free.at[slot(n - 1)])
            # Not sooner may other probabilities be in the registers that the product has read.
            acc, p = jax.lax.optimization_barrier((acc, p))
            return acc * by_row(decay, acc.shape), p.astype(q.dtype), *softmax

        def later_step(n, state, masked):
            return step(n + 1, state, others.at(n, size) if masked else None)

        def release_last_queries():
            if q_stages > 1:
                pl.when(r > 0)(lambda: release_queries(r - 1))
            if onto:
                load_other(1, other_smem.at[warpgroup])

        none, zero = (full((ROWS,), x, OF_ROWS) for x in (-jnp.inf, 0.0))
        scores = product(*queries_and_keys(0), release_last_queries)
        p, _, *softmax = probabilities(0, first_key, scores, none, zero)
        state = full((ROWS, v_head_dim), 0.0), p.astype(q.dtype), *softmax
        acc, p, *softmax = others.run(later_step, state)
        steps = walk.steps
        if cut.tail:
            tail_key = walk.first + steps * size
            acc, p, *softmax = step(steps, (acc, p, *softmax), tail_key, cut.tail)
            steps += 1
        if onto:
            plgpu.commit_smem()  # every warp is done with the queries
            load_other(0, buffer)
        # Before they are needed: numbers out of global memory take longer than a product.
        next_numbers = numbers(work.following(r))
        turns.take()
        acc = accumulate(acc, p, values(steps - 1, p))
        turns.give()
        plgpu.barrier_arrive(v_free.at[slot(steps - 1)])

        maximum, denominator = softmax
        some = denominator > 0
        denominator = jnp.where(some, denominator, 1.0)
        result = acc * by_row(1 / denominator, acc.shape)
        if onto:
            result = added_to_others(result)
        buffer[...] = result.astype(out.dtype)
        plgpu.commit_smem()
        row_lse = jnp.where(some, maximum * LN2 + jnp.log(denominator), -jnp.inf)
        lse[batch, kv_head, tile, :] = row_lse
        rows.store(out, buffer, batch, kv_head, tile)
        if q_stages == 1:  # the next queries wait for it
            release_queries(r)
        return before + steps, *next_numbers

    def fill_q(r, slot):
        batch, kv_head, pair = work.place(r)
        for i in range(COMPUTE):
            for part, features in zip(q_smem, columns, strict=True):
                where = part.at[slot, i], q_there.at[slot]
                rows.load(q, *where, batch, kv_head, pair * COMPUTE + i, features.start)

    def copy(r, state):
        before, walk = state
        batch, kv_head, _ = work.place(r)

        def fill(ref, buffer, there, n, slot):
            def begin(first, size):
                source = walks.keys(ref, batch, first, size, kv_head)
                plgpu.copy_gmem_to_smem(source, buffer.at[slot, pl.ds(0, size)], there.at[slot])

            first = walk.at_masked_first(n, size)
            pl.when(n < walk.steps)(lambda: begin(first, size))
            if cut.tail:
                pl.when(n == walk.steps)(lambda: begin(walk.first + n * size, cut.tail))

        steps = walk.steps + (cut.tail > 0)
        fill_k = functools.partial(fill, k, k_smem, k_there)
        fill_v = functools.partial(fill, v, v_smem, v_there)
        of_keys = (k_free, fill_k), (v_free, fill_v)
        # With all stages full it would only wait. Where there is room for two rounds of queries,
        # those of the last one are left by then, and the next round can begin with its keys.
        begun = jnp.minimum(steps, stages) if q_stages > 1 else steps
        walks.stream(begun, stages, *of_keys, before=before)
        walks.stream(jnp.minimum(r + 2, work.rounds), q_stages, (q_free, fill_q), begin=r + 1)
        next_walk = work.walk(work.following(r))
        walks.stream(steps, stages, *of_keys, begin=begun, before=before)
        return before + steps, next_walk

    def compute_all():
        turns.begin()
        jax.lax.fori_loop(0, work.rounds, compute, (jnp.int32(0), *numbers(0)))
        if q_stages > 1:
            release_queries(work.rounds - 1)
        turns.end()

    def copy_all():
        walks.stream(1, q_stages, (q_free, fill_q))
        steps, _ = jax.lax.fori_loop(0, work.rounds, copy, (jnp.int32(0), work.walk(0)))
        walks.drain(steps, stages, k_free, v_free)
        walks.drain(work.rounds, q_stages, q_free)

    share_work(COMPUTE, compute_all, copy_all)


def _memory(cut, q, v, onto):
    """Shared memory for parts of the queries, keys, values, outputs and another one's outputs."""
    head_dim, v_head_dim = q.shape[3], v.shape[3]
    tile = functools.partial(smem, dtype=q.dtype)
    # The output leaves through the memory of the queries, or of a part of them that has its shape.
    widths = (v_head_dim, head_dim - v_head_dim) if v_head_dim < head_dim else (head_dim,)
    return (
        tuple(tile(cut.row_stages, COMPUTE, ROWS, width) for width in widths),
        tile(cut.stages, cut.keys, head_dim),
        tile(cut.stages, cut.keys, v_head_dim),
        tile(COMPUTE, ROWS, v_head_dim) if v_head_dim > head_dim else None,
        tile(COMPUTE, ROWS, v_head_dim) if onto else None,
    )


def _forward(q, k, v, lo, hi, *onto, scale, longest):
    batch, num_queries, num_heads, _ = q.shape
    num_keys, num_kv_heads, v_head_dim = v.shape[1:]
    group = num_heads // num_kv_heads
    cut = walks.lookup("interval_forward", q, v, longest)
    tiles = rows.num_tiles(num_queries, group, COMPUTE)
    padded_q = rows.split_heads(rows.padded_queries(q, group), num_kv_heads)
    memory = _memory(cut, q, v, onto)
    slots = functools.partial(plgpu.Barrier, num_barriers=cut.stages)
    copies = rows.copies(group) * len(memory[0]) * COMPUTE
    out, lse = launch.launch(
        functools.partial(_interval_forward, cut=cut, c=scale * LOG2E),
        padded_q,
        padded_keys(k),
        padded_keys(walks.keep_seen(v, lo, hi)),
        walks.over_keys(lo, hi, num_keys, group, tiles, cut),
        *walks.intervals_of_rows(lo, hi, num_keys, group, tiles),
        *onto,
        out_type=(
            jax.ShapeDtypeStruct((*padded_q.shape[:4], v_head_dim), q.dtype),
            jax.ShapeDtypeStruct((batch, num_kv_heads, tiles, ROWS), jnp.float32),
        ),
        programs=min(batch * num_kv_heads * tiles // COMPUTE, launch.num_cores()),
        warpgroups=COMPUTE + 1,
        scratch=(
            *memory,
            plgpu.Barrier(num_arrivals=copies, num_barriers=cut.row_stages),
            *(slots(), slots()),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=cut.row_stages),
            *(slots(num_arrivals=COMPUTE), slots(num_arrivals=COMPUTE)),
            plgpu.Barrier(num_barriers=COMPUTE),
            plgpu.Barrier(num_barriers=COMPUTE, num_arrivals=2 * rows.copies(group)),
        ),
    )
    out = out[:, :num_queries].reshape(*q.shape[:3], v_head_dim)
    return out, rows.to_heads(lse, num_queries, group)


def interval_attention(q, k, v, lo, hi, scale, longest=None, gate=None):
    """Attention of query t over the keys j with lo[b, t] <= j < hi[b, t].

    Differentiable in q, k, v and the gate, through both results. FlashAttention-3's forward (arXiv
    2407.08608); backward, one kernel for dq and one for dk and dv, without atomics. What keys hold
    that no query sees changes nothing.

    Args:
      q: queries [B, T, N, H], bfloat16 or float16.
      k: keys [B, S, K, H]; K divides N.
      v: values [B, S, K, V].
      lo: int32 [B, T], not decreasing along t.
      hi: int32 [B, T], not decreasing along t; a row with hi <= lo is empty.
      scale: a Python number that multiplies the scores.
      longest: a bound on hi - lo, if one is known; short intervals are tuned apart.
      gate: None, or float32 [B, T, N], at least 0: multiplies out; see `calls.differentiable`.

    Returns:
      out [B, T, N, V] in the dtype of q, or of the gate, exactly 0 on an empty row, and lse
      [B, T, N] float32, the natural logarithm of the softmax's denominator, -inf on an empty row.
    """
    if k.shape[1] == 0:  # nothing to point a copy at
        return launch.nothing_attended(q, v, gate)
    q, scale = launch.positive_scale(q, scale)
    passes = (functools.partial(run, scale=scale, longest=longest) for run in (_forward, backward))
    return launch.differentiable(*passes)(gate, q, k, v, lo, hi)


def gated_sum(q, k, v, lo, hi, others, gates, scale, longest=None):
    """The outputs of `interval_attention` and of two other attentions, gated and summed.

    One pass over the other outputs where apart there are two, and one more over those of this
    attention. Forward alone: not differentiable.

    Args:
      q, k, v, lo, hi: as of `interval_attention`; S is not 0.
      others: two outputs [B, T, N, V] in the dtype of q.
      gates: float32 [B, T, N, 3], of the others and then of this attention.
      scale, longest: as of `interval_attention`.

    Returns:
      gates[..., 0] * others[0] + gates[..., 1] * others[1] + gates[..., 2] * out, summed in
      float32, [B, T, N, V] in the dtype of q.
    """
    num_kv_heads, group = k.shape[2], q.shape[2] // k.shape[2]
    tiles = rows.num_tiles(q.shape[1], group, COMPUTE)
    q, scale = launch.positive_scale(q, scale)

    def run(q, k, v, lo, hi, first, second, gates):
        first, second = (
            rows.split_heads(rows.padded_queries(x, group), num_kv_heads) for x in (first, second)
        )
        gates = [rows.from_heads(gates[..., i], num_kv_heads, tiles, 0) for i in range(3)]
        onto = first, second, jnp.stack(gates)
        return _forward(q, k, v, lo, hi, *onto, scale=scale, longest=longest)

    return launch.batched(run)(q, k, v, lo, hi, *others, gates)[0]


def refusal(operation: str, *args, **kwargs) -> str | None:
    """Why Mosaic GPU cannot run such a call here, or None; see `pallas_kernels.KERNELS`."""
    reason = launch.refusal(operation, *args, **kwargs)
    if reason or not args or operation != "gated_sum":
        return reason
    q, k, v = args[:3]
    if k.shape[1] == 0:
        return "mosaic_gpu's gated_sum takes one key or more."
    cut = walks.lookup("interval_forward", q, v, kwargs.get("longest"))
    numbers = sum(math.prod(x.shape) for x in jax.tree.leaves(_memory(cut, q, v, onto=True)))
    if numbers * q.dtype.itemsize + RESERVED > launch.SHARED_MEMORY:
        return (
            f"mosaic_gpu's gated_sum has no room for heads of {q.shape[3]} features and values of "
            f"{v.shape[3]}."
        )
    return None
