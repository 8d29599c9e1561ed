"""selected_attention, forward: out and lse."""

import functools
import operator

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu import launch, warps
from pallas_kernels.mosaic_gpu.common import (
    LN2,
    LOG2E,
    OF_ROWS,
    ROWS,
    accumulate,
    by_row,
    full,
    in_registers,
    product,
    share_work,
    smem,
    tiles_of_columns,
)
from pallas_kernels.mosaic_gpu.selected_walk import (
    TileWalk,
    load_rows,
    store_rows,
)

#: Where what exponents are relative to begins. Finite, for differences never to be NaN.
LOWEST = float(jnp.finfo(jnp.float32).min)

#: Columns of the smallest tile of registers.
FOLDED = 8

#: How far exponents, in base 2, may exceed what they are relative to: 2 ** MARGIN is far from the
#: end of float16, and sums of it from that of float32.
MARGIN = 8

#: The share of what they are relative to by which rounding may let exponents exceed the margin:
#: four roundings of float32, doubled. Of huge scores it is more than the margin.
ROUNDING = 2.0**-21


def forward(q, k, v, lists, positions, *, block_size, scale):
    """Attention of tiles of queries over their blocks.

    Args:
      q: [B, T, K, heads, H].
      k: [B, S, K, H], S a multiple of 8.
      v: [B, S, K, V].
      lists: `lists.Unions`.
      positions: int32 [B, tiles, computing, ROWS], of the query of each row.
      block_size: l'.
      scale: above 0.

    Returns:
      out [B, T, K, heads, V] and lse float32 [B, K, tiles, computing, ROWS].
    """
    features, v_features = k.shape[3], v.shape[3]
    # Outputs leave through the memory of the queries, where their sizes agree.
    widths = (features,) if features == v_features else (features, v_features)
    walk = TileWalk.cut(q, v, positions, block_size, sum(widths))
    rows_smem = [smem(walk.computing, ROWS, width, dtype=q.dtype) for width in widths]

    def selected_forward(q, k, v, positions, blocks, masks, counts, out, lse, scratch):
        rows_smem, lse_smem, rows_loaded, ring = scratch
        warpgroup = jax.lax.axis_index("warpgroup")

        def compute_tile(place, slot):
            loaded = rows_loaded.at[warpgroup]
            q_smem, out_smem = (rows_smem[i].at[warpgroup] for i in (0, -1))
            load_rows(walk, q, q_smem, loaded, place)
            numbers = walk.numbers(place, (blocks, masks, counts), positions)
            plgpu.barrier_wait(loaded)
            q_tile = tiles_of_columns(q_smem)
            # Values of 256 features leave no registers for it, and a third warpgroup not for more.
            if v_features <= 128:
                q_tile = in_registers(q_tile[0]), *q_tile[1:]

            def step(keys, state):
                return _step(keys, state, q_tile, scale * LOG2E)

            state = (
                full((ROWS, v_features), 0.0),
                full((ROWS,), LOWEST, OF_ROWS),
                full((ROWS, FOLDED), 0.0),
            )
            slot, (acc, offset, total) = walk.consume(
                step, place, numbers, (blocks, masks, counts), ring, slot, state
            )
            total = total.sum(axis=1)
            empty = total == 0
            total = jnp.where(empty, 1.0, total)
            lse_smem.at[warpgroup][...] = jnp.where(empty, -jnp.inf, offset * LN2 + jnp.log(total))
            out_smem[...] = (acc * by_row(1 / total, acc.shape)).astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup], lse.at[*place, warpgroup])
            store_rows(walk, out_smem, out, place)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            return slot

        share_work(
            walk.computing,
            lambda: walk.over_tiles(compute_tile, jnp.int32(0)),
            lambda: walk.load(k, v, (blocks, masks, counts), positions, ring, cleared=1),
        )

    return launch.launch(
        selected_forward,
        *(q, k, v, positions, *lists),
        out_type=(
            jax.ShapeDtypeStruct((*q.shape[:4], v_features), q.dtype),
            jax.ShapeDtypeStruct((walk.batch, walk.groups, *positions.shape[1:]), jnp.float32),
        ),
        programs=walk.programs,
        warpgroups=walk.computing + 1,
        scratch=(
            rows_smem,
            plgpu.SMEM((walk.computing, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=walk.queries, num_barriers=walk.computing),
            walk.ring(q.dtype),
        ),
    )


def _folded(x):
    """Sums of every FOLDED-th column: no thread needs what another one has."""
    tiles = [x[:, i : i + FOLDED] for i in range(0, x.shape[1], FOLDED)]
    return functools.reduce(operator.add, tiles)


def _step(keys, state, q_tile, c):
    """Online softmax over KEYS more keys; the queries are parts of TILE_COLUMNS features.

    What the exponents of a row are relative to need not be the largest one so far. It rises only
    when one exceeds it by more than MARGIN, which is rare after the first block: where none of a
    warp does, nothing waits for a maximum over a row, and what has been added up needs no factor.
    """
    scores = product(q_tile, tuple(part.transpose((1, 0)) for part in tiles_of_columns(keys.keys)))

    def softmax(scores, acc, offset, total):
        if keys.seen is not None:
            scores = jnp.where(keys.seen, scores, -jnp.inf)

        margin = MARGIN - jnp.abs(offset) * ROUNDING
        limit = jnp.where(keys.chosen, (offset + margin) * (1 / c), jnp.inf)

        def raised(acc, offset, total):
            largest = scores.max(axis=1)
            # Of a row that need not rise it stays: no bit of it depends on the others of its warp.
            new = jnp.maximum(offset, jnp.where(largest > limit, largest * c, LOWEST))
            shrink = jnp.exp2(offset - new)
            return acc * by_row(shrink, acc.shape), new, total * by_row(shrink, total.shape)

        state = jax.lax.cond(
            warps.any_above(scores, limit), raised, lambda *x: x, acc, offset, total
        )
        acc, offset, total = state
        # Of rows that did not choose the block exp2 is 0, at no cost an element.
        exponents = scores * c - by_row(jnp.where(keys.chosen, offset, jnp.inf), scores.shape)
        p = jnp.exp2(exponents)
        return p.astype(keys.values.dtype), acc, offset, total + _folded(p)

    p, acc, offset, total = keys.if_concerned(softmax, keys.values.dtype, scores, *state)
    return accumulate(acc, p, keys.values), offset, total
