"""Attention of new tokens over a cache: a chunk of a prompt, or one step.

At every position the result is that of the same attention over the whole sequence at once. The rows
of a batch may stand at different positions, and each counts as many tokens of a chunk as it has.
"""

from collections.abc import Callable

import jax.numpy as jnp

from nsa_jax.config import NSAConfig
from nsa_jax.ops import branches, cache, dense, dispatch
from nsa_jax.ops.cache import DenseCache, SparseCache
from nsa_jax.typing import Array, Float, Int, KeyValue

Compress = Callable[[Array, Array, Int[Array, "B L"]], tuple[Array, Array]]


def sparse_attention_cached(
    q: Float[Array, "B T N H"],
    recent: KeyValue,
    selected: KeyValue,
    window: KeyValue,
    gates: Float[Array, "B T N 3"],
    past: SparseCache,
    counts: Int[Array, " B"] | None = None,
    *,
    compress: Compress,
    config: NSAConfig,
    q_compressed: Float[Array, "B T N H"] | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "B T N V"], Int[Array, "B T K M"], SparseCache]:
    """Puts T tokens a row into the cache and attends from each of them.

    Of one token, one `sparse_step`: its cost is that of C compressed entries, n * l' selected
    tokens and w of the window, whatever the length. Of more, the operations of
    `nsa_jax.ops.branches`, which training runs as well.

    Args:
      q: queries, rotated.
      recent: the tokens' keys [B, T, K, H] and values [B, T, K, V] for the compressed branch, as
        `compress` wants them.
      selected: for the selected branch; keys rotated.
      window: for the window branch; keys rotated.
      gates: of the branches, in the order compressed, selected, window.
      past: the cache of the tokens before.
      counts: int32, how many tokens of each row count, the first ones; T by default. What is
        returned for the others means nothing, but is finite.
      compress: from tokens [B, L, K, ...] and their positions int32 [B, L] to the keys and values
        of the complete blocks among them.
      config: the geometry.
      q_compressed: queries of the compressed branch where they differ.
      implementation: see `nsa_jax.ops.dispatch`.

    Returns:
      The outputs, the selected blocks, and the new cache. A token that the cache has no room for is
      not kept, and its output is NaN.

    Raises:
      ValueError: if the chunk does not fit into the cache, or shapes do not fit each other.
      UnsupportedError: if the implementation asked for by name cannot run this call.
    """
    dispatch.check_name(implementation)
    num_tokens, q_compressed = q.shape[1], q if q_compressed is None else q_compressed
    counts = cache.check_chunk(q, past, counts)
    counts, lost = cache.kept_and_lost(past, counts, num_tokens)
    q_positions = _positions(past, num_tokens)
    tokens, positions = cache.completing(past, recent, config)
    entries = compress(*tokens, positions)
    now = cache.append_sparse(past, recent, entries, selected, window, counts, config)
    if num_tokens == 1 and implementation != "reference":
        out, blocks = dispatch.run(
            "sparse_step",
            implementation,
            *(q[:, 0], q_compressed[:, 0]),
            *(now.compressed, now.selected, now.window, gates[:, 0], q_positions[:, 0]),
            scale=q.shape[-1] ** -0.5,
            **branches.selection_sizes(config),
        )
        out, blocks = out[:, None], blocks[:, None]
    else:
        # From the second layer of a model on, a token without a place is NaN: nobody may read it.
        window = KeyValue(*(jnp.where(lost[..., None, None], 0, x) for x in window))
        window = cache.follow(past.window, window, past.length)
        out, blocks = _chunk(
            *(q, q_compressed, now, window, gates, q_positions, past.length),
            config=config,
            implementation=implementation,
        )
    return jnp.where(lost[..., None, None], jnp.nan, out), blocks, now


def _positions(past: SparseCache | DenseCache, num_tokens: int) -> Int[Array, "B T"]:
    """Of a chunk's queries. Those that do not count or have no place stay within the cache.

    Kernels that never meet a query behind the last key need not guard against one.
    """
    index = jnp.arange(num_tokens, dtype=jnp.int32)
    return jnp.minimum(past.length[:, None] + index, past.capacity - 1)


def _chunk(q, q_compressed, now, window, gates, q_positions, length, *, config, implementation):
    """The three branches over the cache, the window's keys being the last w and the chunk's."""
    where = {"config": config, "implementation": implementation}
    at = {"q_positions": q_positions}
    gates = jnp.moveaxis(gates, -1, 0)
    out_compressed, lse = branches.compressed_attention(
        q_compressed, *now.compressed, gate=gates[0], **at, **where
    )
    blocks = branches.select_blocks(q_compressed, now.compressed[0], lse, **at, **where)
    out_selected, _ = branches.selected_attention(
        q, *now.selected, blocks, gate=gates[1], **at, **where
    )
    index = config.window_size + jnp.arange(q.shape[1], dtype=jnp.int32)
    first = jnp.maximum(config.window_size - length, 0)[:, None]  # where there are tokens
    out_window, _ = branches.sliding_window_attention(
        *(q, *window),
        q_positions=jnp.broadcast_to(index, q_positions.shape),
        document_starts=jnp.broadcast_to(first, q_positions.shape),
        gate=gates[2],
        **where,
    )
    out = out_compressed + out_selected + out_window
    return out.astype(q.dtype), blocks


def dense_attention_cached(
    q: Float[Array, "B T N H"],
    new: KeyValue,
    past: DenseCache,
    counts: Int[Array, " B"] | None = None,
    *,
    implementation: str = "auto",
) -> tuple[Float[Array, "B T N V"], DenseCache]:
    """As `sparse_attention_cached`, for full causal attention; see `nsa_jax.ops.dense`.

    Of one token, one `dense_step`, unless cuDNN is asked for by name.
    """
    counts = cache.check_chunk(q, past, counts)
    counts, lost = cache.kept_and_lost(past, counts, q.shape[1])
    now = cache.append_dense(past, new, counts)
    q_positions = _positions(past, q.shape[1])
    if q.shape[1] == 1 and implementation != "cudnn":
        features = max(x.shape[-1] for x in (q, *now.tokens))
        dense.resolve(implementation, q.dtype, features)  # raises for what cannot run
        step = (q[:, 0], *now.tokens, q_positions[:, 0])
        out = dispatch.run("dense_step", implementation, *step, scale=q.shape[-1] ** -0.5)[:, None]
    else:
        at = {"q_positions": q_positions, "implementation": implementation}
        out = dense.dense_attention(q, *now.tokens, **at)
    return jnp.where(lost[..., None, None], jnp.nan, out), now


def tokens_loaded(
    block_indices: Int[Array, "*rows M"], positions: Int[Array, "*rows"], config: NSAConfig
) -> Int[Array, "*rows"]:
    """How many cached tokens one step reads for a group: compressed entries count as tokens.

    Args:
      block_indices: the blocks that the step selected, -1 for none.
      positions: of the queries.
      config: the geometry.
    """
    length = positions + 1
    selected = (block_indices >= 0).sum(axis=-1) * config.select_block_size
    complete = cache.complete_blocks(length, config)
    return complete + selected + jnp.minimum(length, config.window_size)
