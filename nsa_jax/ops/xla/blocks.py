"""select_blocks: the best blocks of each query, from compressed probabilities made anew.

Queries run in chunks whose scores against all compressed keys fit a fixed budget, so that memory
grows with T and not with its square.
"""

import jax
import jax.numpy as jnp

from nsa_jax.ops import compression, selection
from nsa_jax.ops.xla.common import dot, group_heads, join_axis, masked_exp, split_axis
from nsa_jax.typing import Array, Float, Int

SCORES_BUDGET = 2**23  # elements of the largest temporary: 32 MiB of float32


def select_blocks(
    q: Float[Array, "B T N H"],
    k_compressed: Float[Array, "B C K H"],
    lse: Float[Array, "B T N"],
    q_positions: Int[Array, "B T"],
    document_starts: Int[Array, "B T"],
    *,
    compress_block_size: int,
    compress_stride: int,
    select_block_size: int,
    num_selected_blocks: int,
    num_initial_blocks: int,
    num_local_blocks: int,
    scale: float,
) -> Int[Array, "B T K M"]:
    """Chooses n blocks for each query and group (equations 8 to 11). Not differentiable.

    Args:
      q: queries, as in the compressed branch.
      k_compressed: compressed keys.
      lse: the natural logarithm of the compressed branch's denominators; -inf on an empty row.
      q_positions: int32.
      document_starts: int32, the first position of each query's document, a multiple of l'.
      compress_block_size: l.
      compress_stride: d.
      select_block_size: l'.
      num_selected_blocks: n.
      num_initial_blocks: forced first blocks of the document.
      num_local_blocks: forced last blocks up to the query's own.
      scale: multiplies the scores.

    Returns:
      int32 [B, T, K, n]: ascending block indices, then -1 where there is no further candidate.
    """
    batch, num_queries, heads, _ = q.shape
    num_compressed = k_compressed.shape[1]
    num_blocks = selection.num_select_blocks(
        num_compressed,
        compress_block_size=compress_block_size,
        compress_stride=compress_stride,
        select_block_size=select_block_size,
    )
    k_compressed = jnp.moveaxis(k_compressed, 2, 1)
    groups = k_compressed.shape[1]
    size = SCORES_BUDGET // max(batch * heads * num_compressed, 1)
    size = max(min(size, num_queries), 1)

    def chunk(xs):
        q, lse, q_positions, document_starts = xs
        lo, hi = compression.visible_blocks(
            q_positions, document_starts, block_size=compress_block_size, stride=compress_stride
        )
        index = jnp.arange(num_compressed, dtype=jnp.int32)
        visible = (index >= lo[..., None]) & (index < hi[..., None])
        scores = dot("bktgh,bkch->bktgc", q, k_compressed) * scale
        p = masked_exp(scores, visible[:, None, :, None, :], lse[..., None])
        scores = selection.importance(
            p.sum(axis=3),  # equation 10; the sums of equations 9 and 10 commute
            num_blocks=num_blocks,
            compress_block_size=compress_block_size,
            compress_stride=compress_stride,
            select_block_size=select_block_size,
        )
        candidate, forced = selection.candidates_and_forced(
            num_blocks,
            q_positions,
            document_starts,
            select_block_size=select_block_size,
            num_initial_blocks=num_initial_blocks,
            num_local_blocks=num_local_blocks,
        )
        return selection.top_blocks(
            scores, candidate[:, None], forced[:, None], num_selected_blocks
        )

    tiles = (
        split_axis(group_heads(q, groups), 2, size),
        split_axis(group_heads(lse, groups), 2, size),
        split_axis(q_positions, 1, size),
        split_axis(document_starts, 1, size),
    )
    return jnp.moveaxis(join_axis(jax.lax.map(chunk, tiles), 2, num_queries), 1, 2)
