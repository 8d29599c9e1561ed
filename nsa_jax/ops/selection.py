"""Which blocks a query selects, once the compressed probabilities are known (equations 9 to 11)."""

import jax
import jax.numpy as jnp

from nsa_jax.typing import Array, Bool, Float, Int


def num_select_blocks(
    num_compressed: int, *, compress_block_size: int, compress_stride: int, select_block_size: int
) -> int:
    """Selection blocks that may hold a token, when C compressed blocks are complete.

    C blocks are complete up to C*d + l - 1 tokens; the last, incomplete blocks among them have no
    score but may be forced or be a query's own.
    """
    tokens = num_compressed * compress_stride + compress_block_size - 1
    return max(-(-tokens // select_block_size), 1)


def importance(
    p: Float[Array, "*rows C"],
    *,
    num_blocks: int,
    compress_block_size: int,
    compress_stride: int,
    select_block_size: int,
) -> Float[Array, "*rows blocks"]:
    """Equation 9: from compressed blocks onto selection blocks, weighted by token overlap over d.

    The double sum of the equation is two sums of neighbours: over the l/d compressed blocks that
    cover a stride of d tokens, then over the l'/d strides of a selection block.

    Args:
      p: probabilities of the compressed blocks, [..., C].
      num_blocks: how many selection blocks to return; together they cover every compressed block.
      compress_block_size: l.
      compress_stride: d.
      select_block_size: l'.

    Returns:
      The importance of each selection block, [..., num_blocks].
    """
    covering = compress_block_size // compress_stride
    per_block = select_block_size // compress_stride
    num_strides = num_blocks * per_block
    lead = [(0, 0)] * (p.ndim - 1)
    padded = jnp.pad(p, [*lead, (covering - 1, num_strides - p.shape[-1])])
    strides = sum(padded[..., c : c + num_strides] for c in range(covering))
    return strides.reshape(*p.shape[:-1], num_blocks, per_block).sum(axis=-1)


def candidates_and_forced(
    num_blocks: int,
    q_positions: Int[Array, "*rows"],
    document_starts: Int[Array, "*rows"],
    *,
    select_block_size: int,
    num_initial_blocks: int,
    num_local_blocks: int,
) -> tuple[Bool[Array, "*rows blocks"], Bool[Array, "*rows blocks"]]:
    """Blocks that a query may select, and those among them that it must (section 4.1).

    Candidates begin in the query's document and not after the query. Forced are the first
    `num_initial_blocks` and the last `num_local_blocks` of them, the query's own block included.
    """
    block = jnp.arange(num_blocks, dtype=jnp.int32)
    own = (q_positions // select_block_size)[..., None]
    first = (document_starts // select_block_size)[..., None]
    candidate = (block <= own) & (block >= first)
    forced = (block < first + num_initial_blocks) | (block > own - num_local_blocks)
    return candidate, candidate & forced


def top_blocks(
    scores: Float[Array, "*rows blocks"],
    candidate: Bool[Array, "*rows blocks"],
    forced: Bool[Array, "*rows blocks"],
    num_selected_blocks: int,
) -> Int[Array, "*rows M"]:
    """Equation 11: the forced blocks and the best others, n in all; ties go to the lower block.

    Returns:
      int32 [..., n], the chosen blocks in ascending order, then -1 where there is no further
      candidate.
    """
    num_blocks = scores.shape[-1]
    scores = jnp.where(forced, jnp.inf, scores)
    scores = jnp.where(candidate, scores, -jnp.inf)
    # lax.top_k puts the lower of two equal elements first.
    best, blocks = jax.lax.top_k(scores, min(num_selected_blocks, num_blocks))
    blocks = jnp.sort(jnp.where(best > -jnp.inf, blocks, num_blocks).astype(jnp.int32), axis=-1)
    blocks = jnp.where(blocks < num_blocks, blocks, -1)
    missing = num_selected_blocks - blocks.shape[-1]
    return jnp.pad(blocks, [(0, 0)] * (blocks.ndim - 1) + [(0, missing)], constant_values=-1)
