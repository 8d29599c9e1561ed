"""sparse_step and dense_step: attention of one new token a row over what a cache holds.

A step reads all compressed entries, the blocks that it selects and the window, and nothing else:
its cost does not grow with the tokens of the selected branch.
"""

import jax
import jax.numpy as jnp

from nsa_jax.ops import compression, selection
from nsa_jax.ops.xla.common import accumulation_dtype, dot, masked_exp
from nsa_jax.typing import Array, Bool, Float, Int, KeyValue


def sparse_step(
    q: Float[Array, "B N H"],
    q_compressed: Float[Array, "B N H"],
    compressed: KeyValue,
    selected: KeyValue,
    window: KeyValue,
    gates: Float[Array, "B N 3"],
    positions: Int[Array, " B"],
    *,
    compress_block_size: int,
    compress_stride: int,
    select_block_size: int,
    num_selected_blocks: int,
    num_initial_blocks: int,
    num_local_blocks: int,
    scale: float,
) -> tuple[Float[Array, "B N V"], Int[Array, "B K M"]]:
    """The gated sum of the three branches for one query a row. Not differentiable.

    The query's own token is in the cache already. What lies behind it counts for nothing, but must
    be finite, as the zeros of a new cache are: masking it would cost a pass over the cache.

    Args:
      q: queries.
      q_compressed: queries of the compressed branch.
      compressed: keys [B, C, K, H] and values [B, C, K, V]; entry i is compressed block i.
      selected: keys [B, S, K, H] and values [B, S, K, V]; entry p is the token at position p.
      window: keys [B, w, K, H] and values [B, w, K, V]; entry p % w is the token at position p, of
        the last w up to the query.
      gates: of the branches, in the order compressed, selected, window.
      positions: int32, of the queries.
      compress_block_size: l.
      compress_stride: d.
      select_block_size: l'.
      num_selected_blocks: n.
      num_initial_blocks: forced first blocks.
      num_local_blocks: forced last blocks up to the query's own.
      scale: multiplies the scores.

    Returns:
      The outputs in q's dtype, and int32 [B, K, n]: the selected blocks in ascending order, then -1
      where there is no further block.
    """
    starts = jnp.zeros_like(positions)
    complete = compression.complete_blocks(
        positions + 1, block_size=compress_block_size, stride=compress_stride
    )
    groups = compressed[0].shape[2]
    q, q_compressed = (x.reshape(x.shape[0], groups, -1, x.shape[2]) for x in (q, q_compressed))
    out_compressed, p = _attend(q_compressed, *compressed, _first(complete, compressed), scale)
    num_blocks = selection.num_select_blocks(
        compressed[0].shape[1],
        compress_block_size=compress_block_size,
        compress_stride=compress_stride,
        select_block_size=select_block_size,
    )
    scores = selection.importance(
        p.sum(axis=2),  # equation 10
        num_blocks=num_blocks,
        compress_block_size=compress_block_size,
        compress_stride=compress_stride,
        select_block_size=select_block_size,
    )
    candidate, forced = selection.candidates_and_forced(
        num_blocks,
        positions,
        starts,
        select_block_size=select_block_size,
        num_initial_blocks=num_initial_blocks,
        num_local_blocks=num_local_blocks,
    )
    blocks = selection.top_blocks(scores, candidate[:, None], forced[:, None], num_selected_blocks)

    tokens, seen = _tokens_of(blocks, positions, select_block_size)
    rows = (_rows(x, tokens) for x in selected)
    out_selected, _ = _attend(q, *rows, seen, scale)
    out_window, _ = _attend(q, *window, _first(positions + 1, window), scale)

    outputs = (out_compressed, out_selected, out_window)
    gates = jnp.moveaxis(gates.astype(accumulation_dtype(q)), -1, 0)
    gates = gates.reshape(3, *q.shape[:3], 1)
    out = sum(gate * out for gate, out in zip(gates, outputs, strict=True))
    return out.reshape(out.shape[0], -1, out.shape[3]).astype(q.dtype), blocks


def dense_step(
    q: Float[Array, "B N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    positions: Int[Array, " B"],
    *,
    scale: float,
) -> Float[Array, "B N V"]:
    """Attention of one query a row over the tokens up to its own: the baseline of `sparse_step`.

    Args:
      q: queries.
      k: keys; entry p is the token at position p.
      v: values.
      positions: int32, of the queries.
      scale: multiplies the scores.

    Returns:
      The outputs in q's dtype.
    """
    grouped = q.reshape(q.shape[0], k.shape[2], -1, q.shape[2])
    out, _ = _attend(grouped, k, v, _first(positions + 1, (k, v)), scale)
    return out.reshape(*q.shape[:2], -1).astype(q.dtype)


def _first(count, key_value) -> Bool[Array, "B 1 1 S"]:
    """Who sees the first `count` entries of a cache."""
    return (jnp.arange(key_value[0].shape[1]) < count[:, None])[:, None, None]


def _tokens_of(blocks, positions, block_size):
    """The tokens [B, n * l', K] of blocks [B, K, n], and which are seen: [B, K, 1, n * l']."""
    tokens = blocks[..., None] * block_size + jnp.arange(block_size, dtype=jnp.int32)
    seen = (blocks[..., None] >= 0) & (tokens <= positions[:, None, None, None])
    tokens = jnp.where(seen, tokens, 0)
    flat = (*blocks.shape[:2], -1)
    return jnp.moveaxis(tokens.reshape(flat), 1, 2), seen.reshape(flat)[:, :, None]


def _rows(x: Float[Array, "B S K H"], tokens: Int[Array, "B t K"]) -> Float[Array, "B t K H"]:
    """The tokens that each group chose, and no others, from memory."""
    take = jax.vmap(lambda x, i: x.at[i].get(mode="clip"), in_axes=(1, 1), out_axes=1)
    return jax.vmap(take)(x, tokens)


def _attend(q: Float[Array, "B K G H"], k, v, seen: Bool[Array, "B K 1 S"], scale: float):
    """Outputs [B, K, G, V], 0 on an empty row, and probabilities [B, K, G, S], both unrounded."""
    scores = dot("bkgh,bskh->bkgs", q, k) * scale
    maximum = jnp.max(jnp.where(seen, scores, -jnp.inf), axis=-1, keepdims=True, initial=-jnp.inf)
    p = masked_exp(scores, seen, maximum)
    total = p.sum(axis=-1, keepdims=True)
    total = jnp.where(total > 0, total, 1.0)
    return dot("bkgs,bskv->bkgv", p.astype(v.dtype), v) / total, p / total
