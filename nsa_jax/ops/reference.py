"""The oracle: Native Sparse Attention written straight from the equations of arXiv 2502.11089.

Every step is dense, in float32 (float64 where the inputs are), and reads like the equation that it
names. It builds [T, S] masks and [T, C] scores for the whole sequence, is never optimised, and
imports nothing of this package, so that whatever agrees with it does so for a reason.

Positions and blocks count from 0. Two facts follow from the paper's 1-based notation:

- compressed block i holds the tokens i*d to i*d + l - 1, and a query at position t may see it when
  it is complete: i*d + l - 1 <= t (equation 7);
- equation 9 adds, to selection block j, every compressed block with its token overlap over d.
  For l, d, l' = 32, 16, 64 those are the blocks 4j-1 to 4j+3 with the weights 1, 2, 2, 2, 1.
"""

import jax.numpy as jnp

_HIGHEST = "highest"


def _working_dtype(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def _positions(q, q_positions, document_starts):
    """Query positions and document starts as int32 [B, T]; 0.. and one document by default."""
    shape = q.shape[:2]
    if q_positions is None:
        q_positions = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    if document_starts is None:
        document_starts = jnp.zeros(shape, jnp.int32)
    return q_positions, document_starts


def _scores(q, k, scale):
    """Scaled products of each query head with the keys of its group: [B, T, N, S]."""
    dtype = _working_dtype(q)
    heads_per_group = q.shape[2] // k.shape[2]
    k = jnp.repeat(k.astype(dtype), heads_per_group, axis=2)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return jnp.einsum("btnh,bsnh->btns", q.astype(dtype), k, precision=_HIGHEST) * scale


def _softmax(scores, mask):
    """Softmax over the last axis where `mask` is true; rows without any give 0, and lse -inf."""
    # The inner `where` keeps the forbidden branch of the outer one finite in the gradient too.
    peak = jnp.max(jnp.where(mask, scores, -jnp.inf), axis=-1, keepdims=True, initial=-jnp.inf)
    peak = jnp.where(jnp.isfinite(peak), peak, 0.0)
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, scores - peak, 0.0)), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    lse = jnp.where(some, jnp.log(total) + peak, -jnp.inf)
    return weights / total, lse[..., 0]


def _masked_attention(q, k, v, mask, scale):
    """Equations 1 and 2 with a mask [B, T, 1 or N, S]: the outputs [B, T, N, V] and the lse."""
    probabilities, lse = _softmax(_scores(q, k, scale), mask)
    heads_per_group = q.shape[2] // k.shape[2]
    v = jnp.repeat(v.astype(probabilities.dtype), heads_per_group, axis=2)
    out = jnp.einsum("btns,bsnv->btnv", probabilities, v, precision=_HIGHEST)
    return out.astype(q.dtype), lse


def _visible_compressed(num_blocks, l, d, q_positions, document_starts):  # noqa: E741
    """Which compressed blocks each query may see: complete, and wholly of its document."""
    start = d * jnp.arange(num_blocks)
    end = start + l - 1
    t = q_positions[:, :, None]
    return (end <= t) & (start >= document_starts[:, :, None])  # [B, T, C]


def compressed_attention(
    q,
    k,
    v,
    *,
    compress_block_size,
    compress_stride,
    scale=None,
    q_positions=None,
    document_starts=None,
):
    """Attention over compressed keys and values [B, C, K, .] (equations 5 and 7)."""
    q_positions, document_starts = _positions(q, q_positions, document_starts)
    visible = _visible_compressed(
        k.shape[1], compress_block_size, compress_stride, q_positions, document_starts
    )
    return _masked_attention(q, k, v, visible[:, :, None, :], scale)


def overlap_weights(
    num_compressed, num_select, *, compress_block_size, compress_stride, select_block_size
):
    """Equation 9 as a matrix [C, number of selection blocks]: shared tokens over d."""
    compressed_start = compress_stride * jnp.arange(num_compressed)[:, None]
    select_start = select_block_size * jnp.arange(num_select)[None, :]
    first = jnp.maximum(compressed_start, select_start)
    end = jnp.minimum(compressed_start + compress_block_size, select_start + select_block_size)
    return jnp.maximum(end - first, 0) / compress_stride


def importance(
    q,
    k_compressed,
    *,
    num_select,
    compress_block_size,
    compress_stride,
    select_block_size,
    scale=None,
    q_positions=None,
    document_starts=None,
):
    """Equations 8 to 10: how important each block is to each group, [B, T, K, blocks]."""
    q_positions, document_starts = _positions(q, q_positions, document_starts)
    num_compressed = k_compressed.shape[1]
    visible = _visible_compressed(
        num_compressed, compress_block_size, compress_stride, q_positions, document_starts
    )
    p_cmp, _ = _softmax(_scores(q, k_compressed, scale), visible[:, :, None, :])  # (8)
    weights = overlap_weights(
        num_compressed,
        num_select,
        compress_block_size=compress_block_size,
        compress_stride=compress_stride,
        select_block_size=select_block_size,
    )
    p_slc = jnp.einsum("btnc,cj->btnj", p_cmp, weights.astype(p_cmp.dtype), precision=_HIGHEST)
    batch, queries, heads, _ = p_slc.shape
    groups = k_compressed.shape[2]
    return p_slc.reshape(batch, queries, groups, heads // groups, num_select).sum(axis=3)  # (10)


def select_blocks(
    q,
    k_compressed,
    *,
    compress_block_size,
    compress_stride,
    select_block_size,
    num_selected_blocks,
    num_initial_blocks,
    num_local_blocks,
    scale=None,
    q_positions=None,
    document_starts=None,
):
    """Equation 11: the blocks of rank up to n, as int32 [B, T, K, n], ascending, then -1.

    Candidates are the blocks of the query's document that begin at or before the query. The first
    `num_initial_blocks` and the last `num_local_blocks` of them rank before all others; equal
    scores rank by position.
    """
    q_positions, document_starts = _positions(q, q_positions, document_starts)
    # C compressed blocks stand for fewer than C*d + l tokens.
    tokens = k_compressed.shape[1] * compress_stride + compress_block_size
    num_select = -(-tokens // select_block_size)
    score = importance(
        q,
        k_compressed,
        num_select=num_select,
        compress_block_size=compress_block_size,
        compress_stride=compress_stride,
        select_block_size=select_block_size,
        scale=scale,
        q_positions=q_positions,
        document_starts=document_starts,
    )
    block = jnp.arange(num_select)
    own = (q_positions // select_block_size)[:, :, None, None]
    first = (document_starts // select_block_size)[:, :, None, None]
    candidate = (block <= own) & (block >= first)
    forced = (block < first + num_initial_blocks) | (block > own - num_local_blocks)
    score = jnp.where(candidate, jnp.where(forced, jnp.inf, score), -jnp.inf)

    # rank(j) = how many blocks come before j: a higher score, or an equal one further left.
    mine, other = score[..., :, None], score[..., None, :]
    before = (other > mine) | ((other == mine) & (block[None, :] < block[:, None]))
    chosen = (before.sum(axis=-1) < num_selected_blocks) & candidate

    # Write the chosen blocks in ascending order: the one with r chosen blocks before it to slot r.
    slot = jnp.cumsum(chosen, axis=-1) - 1
    written = chosen[..., None] & (slot[..., None] == jnp.arange(num_selected_blocks))
    indices = jnp.where(written, block[:, None], -1).max(axis=-2)
    return indices.astype(jnp.int32)


def selected_attention(q, k, v, block_indices, *, select_block_size, scale=None, q_positions=None):
    """Attention over the tokens of the chosen blocks up to the query itself (equation 12)."""
    q_positions, _ = _positions(q, q_positions, None)
    token = jnp.arange(k.shape[1])
    chosen = (block_indices[..., None] == token // select_block_size).any(axis=3)  # [B, T, K, S]
    mask = chosen & (token <= q_positions[:, :, None, None])
    mask = jnp.repeat(mask, q.shape[2] // k.shape[2], axis=2)
    return _masked_attention(q, k, v, mask, scale)


def sliding_window_attention(
    q, k, v, *, window_size, scale=None, q_positions=None, document_starts=None
):
    """Attention over the last w tokens of the document, the query's own included."""
    q_positions, document_starts = _positions(q, q_positions, document_starts)
    token = jnp.arange(k.shape[1])
    t = q_positions[:, :, None]
    mask = (token <= t) & (token > t - window_size) & (token >= document_starts[:, :, None])
    return _masked_attention(q, k, v, mask[:, :, None, :], scale)


def native_sparse_attention(
    q,
    compressed,
    selected,
    window,
    gates,
    *,
    compress_block_size,
    compress_stride,
    select_block_size,
    num_selected_blocks,
    num_initial_blocks,
    num_local_blocks,
    window_size,
    scale=None,
    q_compressed=None,
    q_positions=None,
    document_starts=None,
):
    """Equation 5: the gated sum of the three branches, [B, T, N, V], and the chosen blocks."""
    q_compressed = q if q_compressed is None else q_compressed
    where = {"q_positions": q_positions, "document_starts": document_starts}
    blocks = {"compress_block_size": compress_block_size, "compress_stride": compress_stride}
    block_indices = select_blocks(
        q_compressed,
        compressed[0],
        select_block_size=select_block_size,
        num_selected_blocks=num_selected_blocks,
        num_initial_blocks=num_initial_blocks,
        num_local_blocks=num_local_blocks,
        scale=scale,
        **blocks,
        **where,
    )
    dtype = _working_dtype(q)
    outputs = (
        compressed_attention(q_compressed, *compressed, scale=scale, **blocks, **where),
        selected_attention(
            q,
            *selected,
            block_indices,
            select_block_size=select_block_size,
            scale=scale,
            q_positions=q_positions,
        ),
        sliding_window_attention(q, *window, window_size=window_size, scale=scale, **where),
    )
    out = sum(gates[..., c, None].astype(dtype) * outputs[c][0].astype(dtype) for c in range(3))
    return out.astype(q.dtype), block_indices
