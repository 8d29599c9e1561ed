"""selected_attention, backward: dq by tiles of queries, which walk their union as going forward."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu import launch
from pallas_kernels.mosaic_gpu.common import (
    LOG2E,
    ROWS,
    accumulate,
    by_row,
    full,
    products,
    share_work,
    smem,
)
from pallas_kernels.mosaic_gpu.selected_walk import (
    TileWalk,
    load_rows,
    store_rows,
)


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
            numbers = walk.numbers(place, (blocks, masks, counts), positions)
            row_lse2, row_delta = (walk.of_rows(x.at[*place]) for x in (lse2, delta))
            plgpu.barrier_wait(loaded)

            def step(keys, acc):
                return _dq_step(keys, acc, q_rows, d_out_rows, row_lse2, row_delta, scale * LOG2E)

            slot, acc = walk.consume(
                *(step, place, numbers, (blocks, masks, counts), ring, slot),
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
