"""selected_attention, forward: out and lse."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu import launch
from pallas_kernels.mosaic_gpu.common import (
    LN2,
    LOG2E,
    OF_ROWS,
    ROWS,
    accumulate,
    by_row,
    full,
    product,
    share_work,
    smem,
)
from pallas_kernels.mosaic_gpu.selected_walk import (
    Walk,
    load_rows,
    store_rows,
)

#: Where running maxima begin. Finite, for differences of maxima never to be NaN.
LOWEST = float(jnp.finfo(jnp.float32).min)


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
    walk = Walk.cut(q, v, positions, block_size, sum(widths))
    rows_smem = [smem(walk.computing, ROWS, width, dtype=q.dtype) for width in widths]

    def selected_forward(q, k, v, positions, blocks, masks, counts, out, lse, scratch):
        rows_smem, lse_smem, rows_loaded, rings = scratch
        warpgroup = jax.lax.axis_index("warpgroup")

        def compute_tile(place, n):
            loaded = rows_loaded.at[warpgroup]
            q_smem, out_smem = (rows_smem[i].at[warpgroup] for i in (0, -1))
            load_rows(walk, q, q_smem, loaded, place)
            position = walk.of_rows(positions.at[place.batch, place.tile])
            plgpu.barrier_wait(loaded)

            def step(keys, state):
                return _step(keys, state, q_smem, scale * LOG2E)

            state = (
                full((ROWS, v_features), 0.0),
                full((ROWS,), LOWEST, OF_ROWS),
                full((ROWS,), 0.0, OF_ROWS),
            )
            n, (acc, largest, total) = walk.consume(
                step, place, (blocks, masks, counts), position, rings, n, state
            )
            empty = total == 0
            total = jnp.where(empty, 1.0, total)
            lse_smem.at[warpgroup][...] = jnp.where(empty, -jnp.inf, largest * LN2 + jnp.log(total))
            out_smem[...] = (acc * by_row(1 / total, acc.shape)).astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup], lse.at[*place, warpgroup])
            store_rows(walk, out_smem, out, place)
            plgpu.wait_smem_to_gmem(0)
            return n

        share_work(
            walk.computing,
            lambda: walk.over_tiles(compute_tile, 0),
            lambda: walk.load((k, v), (blocks, masks, counts), positions, rings, cleared=1),
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
            walk.rings(q.dtype),
        ),
    )


def _step(keys, state, q_smem, c):
    """Online softmax over KEYS more keys."""
    acc, largest, total = state
    keys.wait_keys()
    scores = product(q_smem, keys.keys.transpose((1, 0)))
    keys.release_keys()
    if keys.seen is not None:
        scores = jnp.where(keys.seen, scores, -jnp.inf)
    new = jnp.maximum(largest, jnp.where(keys.chosen, scores.max(axis=1) * c, LOWEST))
    # Of rows that did not choose the block exp2 is 0, at no cost an element.
    offset = jnp.where(keys.chosen, new, jnp.inf)
    p = jnp.exp2(scores * c - by_row(offset, scores.shape))
    shrink = jnp.exp2(largest - new)
    total = total * shrink + p.sum(axis=1)
    acc = acc * by_row(shrink, acc.shape)
    keys.wait_values()
    acc = accumulate(acc, p.astype(keys.values.dtype), keys.values)
    keys.release_values()
    return acc, new, total
