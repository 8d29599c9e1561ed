"""interval_attention: each query attends one interval of keys.

Forward and for dq, two warpgroups with a tile of 64 rows each (see rows.py) walk the keys from
their smallest lo to their largest hi, which a third one brings. For dk and dv, a tile of keys walks
the tiles of rows that may see it, which lie together because lo and hi do not decrease. Steps that
every row of the tile sees whole skip the mask. No program adds to what another one wrote.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu import launch, rows, tuning
from pallas_kernels.mosaic_gpu.common import (
    LN2,
    LOG2E,
    OF_COLUMNS,
    OF_ROWS,
    ROWS,
    TILE,
    TILE_ROWS,
    accumulate,
    by_column,
    by_row,
    full,
    product,
    products,
    smem,
)
from pallas_kernels.mosaic_gpu.launch import refusal  # noqa: F401 - see pallas_kernels.KERNELS

COMPUTE = 2  # warpgroups that compute, beside one that copies
COMPUTE_REGISTERS, MEMORY_REGISTERS = 232, 40

#: Programs that keep the chip busy to the end. Fewer tiles of keys than that have their queries
#: split among several programs, whose sums are added in order.
ENOUGH_PROGRAMS = 1024
LARGEST_SPLIT = 32

#: Keys up to which an interval counts as short: its programs begin and end more than they walk.
SHORT = 1024


class _Walk(NamedTuple):
    """The steps of a tile; those that all of it sees whole come first."""

    first: jax.Array
    steps: jax.Array
    head: jax.Array
    whole: jax.Array

    @classmethod
    def make(cls, first, end, whole_first, whole_end, size=1):
        """int32 [..., 4]: [first, end) in steps of a size, and which lie in the whole range."""
        steps = pl.cdiv(jnp.maximum(end - first, 0), size)
        head = jnp.minimum(pl.cdiv(jnp.maximum(whole_first - first, 0), size), steps)
        whole = jnp.maximum(jnp.minimum(whole_end, end) - first, 0) // size - head
        walk = jnp.broadcast_arrays(first, steps, head, jnp.maximum(whole, 0))
        return jnp.stack(walk, axis=-1).astype(jnp.int32)

    @classmethod
    def load(cls, ref, *index):
        return cls(*(ref[*index, i] for i in range(4)))

    def at(self, n, size=1):
        """Where the n-th step begins."""
        rest = n - self.whole
        masked = jnp.where(rest < self.head, rest, n)
        return self.first + jnp.where(rest < 0, self.head + n, masked) * size

    def keys(self, n, size):
        """The keys of the n-th step."""
        return pl.ds(pl.multiple_of(self.at(n, size), TILE_ROWS), size)

    def run(self, step, state):
        """Folds step(n, state, masked) over the steps."""
        state = jax.lax.fori_loop(0, self.whole, functools.partial(step, masked=False), state)
        masked = functools.partial(step, masked=True)
        return jax.lax.fori_loop(self.whole, self.steps, masked, state)


def _query_walks(lo, hi, num_keys, group, tiles, size):
    """Of each pair of tiles of rows, its walk over the keys: int32 [B, pairs, 4].

    lo and hi do not decrease: the first and the last query bound what any and what all rows see.
    """
    queries = rows.queries_per_tile(group) * COMPUTE
    first_query = jnp.arange(tiles // COMPUTE) * queries
    last_query = jnp.minimum(first_query + queries, lo.shape[1]) - 1
    hi = jnp.minimum(hi, num_keys)
    first = jnp.maximum(lo[:, first_query], 0) // TILE_ROWS * TILE_ROWS
    return _Walk.make(first, hi[:, last_query], lo[:, last_query], hi[:, first_query], size)


def _key_walks(lo, hi, num_keys, group, tiles, size, splits):
    """Of each chunk of the queries and tile of keys, its walk over tiles of rows.

    Returns:
      int32 [splits, B, key tiles, 4].
    """
    start = jnp.arange(0, num_keys, size, dtype=jnp.int32)
    end = jnp.minimum(start + size, num_keys)

    def bounds(lo, hi):
        return (
            jnp.searchsorted(hi, start, side="right"),
            jnp.searchsorted(lo, end, side="left"),
            jnp.searchsorted(hi, end, side="left"),
            jnp.searchsorted(lo, start, side="right"),
        )

    queries = rows.queries_per_tile(group)
    first, end, whole_first, whole_end = jax.vmap(bounds)(lo, hi)
    chunk = pl.cdiv(tiles, splits)
    chunks = jnp.arange(0, splits * chunk, chunk)[:, None, None]
    first = jnp.maximum(first // queries, chunks)
    end = jnp.minimum(pl.cdiv(end, queries), chunks + chunk)
    return _Walk.make(first, end, pl.cdiv(whole_first, queries), whole_end // queries)


def _keep_seen(x, lo, hi):
    """[B, S, K, V] with zeros where no query sees: 0 times what such memory may hold is not 0."""

    def seen(lo, hi):
        key = jnp.arange(x.shape[1], dtype=jnp.int32)
        begun, ended = (
            jnp.searchsorted(bound, key, side="right", method="scan_unrolled")
            for bound in (lo, jnp.maximum(lo, hi))
        )
        return begun > ended

    return jnp.where(jax.vmap(seen)(lo, hi)[:, :, None, None], x, 0)


def _padded_keys(x):
    """[B, S, ...], S a multiple of 8, as the copies want it."""
    padding = -x.shape[1] % TILE_ROWS
    return jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) if padding else x


def _program(pairs, num_kv_heads):
    """The batch, key/value head and pair of tiles of a program, the longest walks first."""
    program = jax.lax.axis_index("program")
    rest = jax.lax.div(program, pairs)
    pair = pairs - 1 - jax.lax.rem(program, pairs)
    return jax.lax.div(rest, num_kv_heads), jax.lax.rem(rest, num_kv_heads), pair


def _stream(steps, stages, *streams):
    """The memory warpgroup's loop, which keeps `stages` steps in shared memory.

    Args:
      steps: how many steps there are.
      stages: slots for them.
      *streams: of each, a barrier by slot that says that it is free, and a function of the step and
        its slot that begins to fill it.
    """

    @pl.loop(0, steps)
    def _(n):
        slot = jax.lax.rem(n, stages)
        for free, fill in streams:

            @pl.when(n >= stages)
            def _(free=free):
                plgpu.barrier_wait(free.at[slot])

            fill(n, slot)

    # The interpreter wants every arrival to be waited for.
    @pl.loop(jnp.maximum(steps - stages, 0), steps)
    def _(n):
        for free, _ in streams:
            plgpu.barrier_wait(free.at[jax.lax.rem(n, stages)])


def _seen(key, lo, hi):
    return (key >= lo) & (key < hi)


def _keep(scores, first_key, lo, hi):
    """Scores of rows and keys, -inf where a row does not see a key."""
    shape = scores.shape
    key = first_key + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=TILE)
    return jnp.where(_seen(key, by_row(lo, shape), by_row(hi, shape)), scores, -jnp.inf)


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


def _forward_kernel(q, k, v, walks, lo, hi, out, lse, scratch, *, cut, pairs, c):
    """Two tiles of rows, whose warpgroups take turns on the tensor cores.

    While one makes a softmax, the other one issues the product with its values and, right behind
    it, the next product of queries and keys.
    """
    q_smem, k_smem, v_smem, out_smem, *barriers = scratch
    columns = _columns(q_smem)
    q_there, k_there, v_there, k_free, v_free, turn = barriers
    size, stages, v_head_dim = cut.keys, cut.stages, v.shape[3]
    warpgroup = jax.lax.axis_index("warpgroup")
    batch, kv_head, pair = _program(pairs, k.shape[2])
    walk = _Walk.load(walks, batch, pair)

    def take_turn():
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    @pl.when(warpgroup < COMPUTE)
    def _():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        tile = pair * COMPUTE + warpgroup
        q_rows = tuple(part.at[warpgroup] for part in q_smem)
        for part, where in zip(q_rows, columns, strict=True):
            rows.load(q, part, q_there.at[warpgroup], batch, kv_head, tile, where.start)
        row_lo, row_hi = (
            plgpu.load(x.at[batch, tile], layout=OF_ROWS, optimized=False) for x in (lo, hi)
        )
        plgpu.barrier_wait(q_there.at[warpgroup])

        def wait_for_keys(n):
            @pl.when(n < walk.steps)
            def _():
                plgpu.barrier_wait(k_there.at[jax.lax.rem(n, stages)])

        def step(n, state, masked):
            slot = jax.lax.rem(n, stages)
            keys = tuple(k_smem.at[slot, :, where].transpose((1, 0)) for where in columns)
            scores = product(q_rows, keys, take_turn)
            plgpu.barrier_arrive(k_free.at[slot])
            if masked:
                scores = _keep(scores, walk.at(n, size), row_lo, row_hi)
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
        pl.when(warpgroup == 1)(take_turn)
        none, zero = (full((ROWS,), x, OF_ROWS) for x in (-jnp.inf, 0.0))
        state = walk.run(step, (full((ROWS, v_head_dim), 0.0), none, zero))
        pl.when(warpgroup == 0)(take_turn)

        acc, maximum, total = state
        some = total > 0
        total = jnp.where(some, total, 1.0)
        buffer = (q_smem[0] if out_smem is None else out_smem).at[warpgroup]
        buffer[...] = (acc * by_row(1 / total, acc.shape)).astype(out.dtype)
        plgpu.commit_smem()
        row_lse = jnp.where(some, maximum * LN2 + jnp.log(total), -jnp.inf)
        lse[batch, kv_head, tile, :] = row_lse
        rows.store(out, buffer, batch, kv_head, tile)

    @pl.when(warpgroup == COMPUTE)
    def _():
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

        def fill(ref, buffer, there, n, slot):
            keys = ref.at[batch, walk.keys(n, size), kv_head]
            plgpu.copy_gmem_to_smem(keys, buffer.at[slot], there.at[slot])

        fill_k = functools.partial(fill, k, k_smem, k_there)
        fill_v = functools.partial(fill, v, v_smem, v_there)
        _stream(walk.steps, stages, (k_free, fill_k), (v_free, fill_v))


def _dq_kernel(
    q, k, v, d_out, walks, lo, hi, lse, delta, dq, scratch, *, cut, pairs, scale
):  # fmt: skip
    """dq of two tiles of rows."""
    q_smem, d_out_smem, k_smem, v_smem, rows_there, keys_there, keys_free = scratch
    size, stages, c = cut.keys, cut.stages, scale * LOG2E
    warpgroup = jax.lax.axis_index("warpgroup")
    batch, kv_head, pair = _program(pairs, k.shape[2])
    walk = _Walk.load(walks, batch, pair)

    @pl.when(warpgroup < COMPUTE)
    def _():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
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
                    scores = _keep(scores, walk.at(n, size), row_lo, row_hi)
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

    @pl.when(warpgroup == COMPUTE)
    def _():
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

        def fill(n, slot):
            for ref, buffer in ((k, k_smem), (v, v_smem)):
                keys = ref.at[batch, walk.keys(n, size), kv_head]
                plgpu.copy_gmem_to_smem(keys, buffer.at[slot], keys_there.at[slot])

        _stream(walk.steps, stages, (keys_free, fill))


def _dkv_kernel(
    q, k, v, d_out, walks, intervals, numbers, dk, dv, scratch, *, cut, scale
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
    num_kv_heads, (tiles, parts) = k.shape[2], (walks.shape[2], cut.keys // ROWS)
    program = jax.lax.axis_index("program")
    tile, rest = jax.lax.rem(program, tiles), jax.lax.div(program, tiles)
    split, rest = jax.lax.rem(rest, walks.shape[0]), jax.lax.div(rest, walks.shape[0])
    kv_head, batch = jax.lax.rem(rest, num_kv_heads), jax.lax.div(rest, num_kv_heads)
    walk = _Walk.load(walks, split, batch, tile)

    def keys(part):
        return pl.ds(pl.multiple_of(tile * cut.keys + part * ROWS, ROWS), ROWS)

    def compute(part, with_dk, with_dv):
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        k_tile, v_tile = k_smem.at[part], v_smem.at[part]
        plgpu.barrier_wait(keys_there)

        def step(n, state, masked):
            dk_tile, dv_tile = state
            slot = jax.lax.rem(n, stages)
            q_rows, d_out_rows = q_smem.at[slot], d_out_smem.at[slot]
            plgpu.barrier_wait(rows_there.at[slot])
            row_lo, row_hi, row_lse, row_delta = (
                plgpu.load(x.at[slot, i], layout=OF_COLUMNS)
                for x in (intervals_smem, numbers_smem)
                for i in range(2)
            )

            def probabilities(scores):
                shape = scores.shape
                if masked:
                    key = keys(part).start + plgpu.broadcasted_iota(
                        jnp.int32, shape, 0, layout=TILE
                    )
                    seen = _seen(key, by_column(row_lo, shape), by_column(row_hi, shape))
                    scores = jnp.where(seen, scores, -jnp.inf)
                return jnp.exp2(scores * c - by_column(row_lse, shape))

            operands = k_tile, q_rows.transpose((1, 0))
            if with_dk:
                d_out_columns = d_out_rows.transpose((1, 0))
                p, dp = products(*operands, v_tile, d_out_columns, probabilities)
            else:
                p = probabilities(product(*operands))
            if with_dv:
                dv_tile = accumulate(dv_tile, p.astype(q.dtype), d_out_rows)
            if with_dk:
                ds = p * (dp - by_column(row_delta, p.shape))
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
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
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

        _stream(walk.steps, stages, (rows_free, fill))


def _rows_of_intervals(lo, hi, num_keys, group, tiles):
    """lo and hi of every row; those beyond T are empty."""
    return tuple(rows.from_queries(x, group, tiles, 0) for x in (lo, jnp.minimum(hi, num_keys)))


def _forward(q, k, v, lo, hi, *, scale, longest):
    batch, num_queries, num_heads, head_dim = q.shape
    num_keys, num_kv_heads, v_head_dim = v.shape[1:]
    group = num_heads // num_kv_heads
    cut = _tuning("interval_forward", q, v, longest)
    tiles = rows.num_tiles(num_queries, group, COMPUTE)
    padded_q = rows.split_heads(rows.padded_queries(q, group), num_kv_heads)
    tile = functools.partial(smem, dtype=q.dtype)
    slots = functools.partial(plgpu.Barrier, num_barriers=cut.stages)
    # The output leaves through the memory of the queries, or of a part of them that has its shape.
    widths = (v_head_dim, head_dim - v_head_dim) if v_head_dim < head_dim else (head_dim,)
    q_parts = tuple(tile(COMPUTE, ROWS, width) for width in widths)
    out, lse = launch.launch(
        functools.partial(_forward_kernel, cut=cut, pairs=tiles // COMPUTE, c=scale * LOG2E),
        padded_q,
        _padded_keys(k),
        _padded_keys(_keep_seen(v, lo, hi)),
        _query_walks(lo, hi, num_keys, group, tiles, cut.keys),
        *_rows_of_intervals(lo, hi, num_keys, group, tiles),
        out_type=(
            jax.ShapeDtypeStruct((*padded_q.shape[:4], v_head_dim), q.dtype),
            jax.ShapeDtypeStruct((batch, num_kv_heads, tiles, ROWS), jnp.float32),
        ),
        programs=batch * num_kv_heads * tiles // COMPUTE,
        warpgroups=COMPUTE + 1,
        scratch=(
            q_parts,
            tile(cut.stages, cut.keys, head_dim),
            tile(cut.stages, cut.keys, v_head_dim),
            tile(COMPUTE, ROWS, v_head_dim) if v_head_dim > head_dim else None,
            plgpu.Barrier(num_arrivals=rows.copies(group) * len(q_parts), num_barriers=COMPUTE),
            *(slots(), slots()),
            *(slots(num_arrivals=COMPUTE), slots(num_arrivals=COMPUTE)),
            plgpu.Barrier(num_arrivals=COMPUTE),
        ),
    )
    out = out[:, :num_queries].reshape(*q.shape[:3], v_head_dim)
    return out, rows.to_heads(lse, num_queries, group)


def _query_gradient(q, k, v, d_out, walks, intervals, lse, delta, cut, scale):
    """dq [B, T, K, G, H]; the arguments are as the kernel wants them."""
    batch, _, num_kv_heads, group, head_dim = q.shape
    tiles = lse.shape[2]
    tile = functools.partial(smem, dtype=q.dtype)
    slots = functools.partial(plgpu.Barrier, num_barriers=cut.stages)
    return launch.launch(
        functools.partial(_dq_kernel, cut=cut, pairs=tiles // COMPUTE, scale=scale),
        *(q, k, v, d_out, walks, *intervals, lse, delta),
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


def _key_gradients(q, k, v, d_out, walks, intervals, lse, delta, cut, scale):
    """dk and dv, each [splits, B, S, K, features] with S up to a whole tile."""
    splits, batch, tiles, _ = walks.shape
    num_kv_heads, group = q.shape[2:4]
    dtype = q.dtype if splits == 1 else jnp.float32
    parts, slots = cut.keys // ROWS, functools.partial(plgpu.Barrier, num_barriers=cut.stages)
    tile = functools.partial(smem, dtype=q.dtype)
    return launch.launch(
        functools.partial(_dkv_kernel, cut=cut, scale=scale),
        *(q, k, v, d_out, walks, jnp.stack(intervals, axis=2), jnp.stack([lse, delta], axis=3)),
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


def _backward(q, k, v, lo, hi, out, lse, d_out, d_lse, *, scale, longest):
    batch, num_queries, num_heads, _ = q.shape
    num_keys, num_kv_heads = k.shape[1:3]
    group = num_heads // num_kv_heads
    tiles = rows.num_tiles(num_queries, group, COMPUTE)
    delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1) - d_lse
    # In base 2; +inf on an empty row, so that its probabilities are 0.
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2E)
    lse, delta = (
        rows.from_heads(x, num_kv_heads, tiles, fill) for x, fill in ((lse, jnp.inf), (delta, 0))
    )
    row_arrays = (rows.split_heads(rows.padded_queries(x, group), num_kv_heads) for x in (q, d_out))
    padded_q, d_out = row_arrays
    intervals = _rows_of_intervals(lo, hi, num_keys, group, tiles)
    padded_k, padded_v = _padded_keys(k), _padded_keys(v)

    cut = _tuning("interval_dq", q, v, longest)
    walks = _query_walks(lo, hi, num_keys, group, tiles, cut.keys)
    clean_k = _padded_keys(_keep_seen(k, lo, hi))
    dq = _query_gradient(
        padded_q, clean_k, padded_v, d_out, walks, intervals, lse, delta, cut, scale
    )
    cut = _tuning("interval_dkv", q, v)
    splits = _splits(pl.cdiv(num_keys, cut.keys) * batch * num_kv_heads, tiles)
    walks = _key_walks(lo, hi, num_keys, group, tiles, cut.keys, splits)
    gradients = _key_gradients(
        padded_q, padded_k, padded_v, d_out, walks, intervals, lse, delta, cut, scale
    )
    dk, dv = (sum(x[i, :, :num_keys] for i in range(splits)).astype(k.dtype) for x in gradients)
    return dq[:, :num_queries].reshape(q.shape), dk, dv


def _tuning(kernel, q, v, longest=None):
    if longest is not None and longest <= SHORT:
        kernel = f"{kernel}_short"
    return tuning.lookup(kernel, q.shape[3], v.shape[3])


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(q, k, v, lo, hi, scale, longest):
    forward = functools.partial(_forward, scale=scale, longest=longest)
    return launch.batched(forward)(q, k, v, lo, hi)


def _attention_forward(q, k, v, lo, hi, scale, longest):
    out, lse = _attention(q, k, v, lo, hi, scale, longest)
    return (out, lse), (q, k, v, lo, hi, out, lse)


def _attention_backward(scale, longest, residuals, gradients):
    backward = functools.partial(_backward, scale=scale, longest=longest)
    return *launch.batched(backward)(*residuals, *gradients), None, None


_attention.defvjp(_attention_forward, _attention_backward)


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
    return _attention(q, k, v, lo, hi, scale, longest)
