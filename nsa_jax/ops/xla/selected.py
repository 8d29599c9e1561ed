"""selected_attention: each query attends the key blocks that it selected.

The loop runs over key blocks. A block meets, tile by tile, the queries that selected it (the
inverted index), so that neighbouring queries share one load, products have many rows whatever the
number of heads a group, and nothing larger than the inputs is stored. A query selects a block at
most once: the rows that one tile writes are distinct, and need no atomics.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nsa_jax.ops.xla.common import (
    accumulation_dtype,
    finish_softmax,
    gated,
    group_heads,
    join_axis,
    keep_seen,
    softmax_delta,
    softmax_gradients,
    split_axis,
    start_softmax,
    ungroup_heads,
    update_softmax,
)
from nsa_jax.typing import Array, Float, Int


def selected_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    block_indices: Int[Array, "B T K M"],
    q_positions: Int[Array, "B T"],
    block_size: int,
    scale: float,
    gate: Float[Array, "B T N"] | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Attention of each query over the tokens of its blocks up to its own position.

    Differentiable in q, k, v and the gate, through both results.

    Args:
      q: queries.
      k: keys; K divides N, and the G = N // K heads of a group share their blocks.
      v: values.
      block_indices: int32, distinct within a row; -1 stands for no block.
      q_positions: int32, the position of each query among the keys.
      block_size: l', tokens a block; the last block may be shorter.
      scale: multiplies the scores.
      gate: None, or [B, T, N] in float32 (float64 for float64 inputs): multiplies the outputs.

    Returns:
      The outputs in the dtype of q, or of the gate, exactly 0 on an empty row, and the natural
      logarithm of the softmax's denominator in float32, -inf on an empty row.
    """
    out, lse = _attention(q, k, v, block_indices, q_positions, block_size, scale)
    return gated(out, gate), lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(q, k, v, block_indices, q_positions, block_size, scale):
    return _forward(q, k, v, block_indices, q_positions, block_size, scale)[0]


class _InvertedIndex(NamedTuple):
    """For each block the queries that selected it, in ascending order."""

    queries: Int[Array, "B K TM"]  # sorted by block; queries without a block at the end
    starts: Int[Array, "blocks B K"]
    counts: Int[Array, "blocks B K"]

    @classmethod
    def build(cls, block_indices, num_blocks):
        batch, num_queries, groups, num_selected = block_indices.shape
        blocks = jnp.moveaxis(block_indices, 2, 1).reshape(batch, groups, -1)
        blocks = jnp.where(blocks < 0, num_blocks, blocks).astype(jnp.int32)
        queries = jnp.arange(num_queries, dtype=jnp.int32).repeat(num_selected)
        blocks, queries = jax.lax.sort(
            (blocks, jnp.broadcast_to(queries, blocks.shape)), num_keys=1, is_stable=True
        )
        edges = jnp.arange(num_blocks + 1, dtype=jnp.int32)
        find = jax.vmap(jax.vmap(lambda row: jnp.searchsorted(row, edges).astype(jnp.int32)))
        starts = jnp.moveaxis(find(blocks), 2, 0)
        return cls(queries, starts[:-1], starts[1:] - starts[:-1])

    def tile(self, start, count, index, size, num_queries):
        """The queries [B, K, size] of one tile of a block; beyond its count, rows out of range."""
        slot = index * size + jnp.arange(size, dtype=jnp.int32)
        at = jnp.minimum(start[..., None] + slot, self.queries.shape[-1] - 1)
        queries = jnp.take_along_axis(self.queries, at, axis=2)
        # Out-of-range rows are distinct as well, as unique_indices promises of them all.
        return jnp.where(slot < count[..., None], queries, num_queries + slot)


def _rows(x, queries):
    """Rows [B, K, t, ...] of x [B, K, T, ...]; 0 for queries out of range."""
    take = jax.vmap(jax.vmap(lambda x, i: x.at[i].get(mode="fill", fill_value=0)))
    return take(x, queries)


def _update_rows(x, queries, rows):
    put = jax.vmap(jax.vmap(lambda x, i, rows: x.at[i].set(rows, mode="drop", unique_indices=True)))
    return put(x, queries, rows)


def _block_mask(q_positions, queries, count, index, block, block_size, num_keys):
    """Who sees which key of the block: [B, K, t, s]."""
    size = queries.shape[-1]
    valid = index * size + jnp.arange(size) < count[..., None]
    position = jnp.where(valid, _rows(q_positions, queries), -1)
    key = block * block_size + jnp.arange(block_size, dtype=jnp.int32)
    return (key <= position[..., None]) & (key < num_keys)


def _tile_size(block_indices, block_size):
    """Half the queries that the average block has: full tiles for most, few steps for each."""
    _, num_queries, _, num_selected = block_indices.shape
    return max(min(num_selected * block_size // 2, num_queries), 1)


def _num_tiles(count, size):
    return -(-jnp.max(count) // size)


def _setup(k, v, block_indices, q_positions, block_size):
    keys = split_axis(jnp.moveaxis(k, 2, 1), 2, block_size)  # [blocks, B, K, s, H]
    values = split_axis(jnp.moveaxis(v, 2, 1), 2, block_size)
    index = _InvertedIndex.build(block_indices, keys.shape[0])
    q_positions = jnp.broadcast_to(
        q_positions[:, None], (*k.shape[:1], k.shape[2], q_positions.shape[1])
    )
    blocks = (jnp.arange(keys.shape[0]), keys, values, index.starts, index.counts)
    return index, q_positions, blocks


def _forward(q, k, v, block_indices, q_positions, block_size, scale):
    num_queries, num_keys = q.shape[1], k.shape[1]
    size = _tile_size(block_indices, block_size)
    index, positions, blocks = _setup(k, v, block_indices, q_positions, block_size)
    q_rows = group_heads(q, k.shape[2])

    def key_block(carry, xs):
        block, k, v, start, count = xs

        def step(tile, carry):
            queries = index.tile(start, count, tile, size, num_queries)
            mask = _block_mask(positions, queries, count, tile, block, block_size, num_keys)
            k_seen, v_seen = (keep_seen(x, mask.any(axis=2)) for x in (k, v))
            rows = tuple(_rows(x, queries) for x in carry)
            mask = mask[:, :, :, None, :]
            new = update_softmax(rows, _rows(q_rows, queries), k_seen, v_seen, mask, scale)
            return tuple(_update_rows(x, queries, rows) for x, rows in zip(carry, new, strict=True))

        return jax.lax.fori_loop(0, _num_tiles(count, size), step, carry), None

    carry, _ = jax.lax.scan(key_block, start_softmax(q_rows, v.shape[-1]), blocks)
    out, lse = map(ungroup_heads, finish_softmax(carry, q.dtype))
    return (out, lse), (q, k, v, block_indices, q_positions, out, lse)


def _backward(block_size, scale, residuals, gradients):
    q, k, v, block_indices, q_positions, out, lse = residuals
    d_out, d_lse = gradients
    dtype = accumulation_dtype(q)
    num_queries, num_keys, num_kv_heads = q.shape[1], k.shape[1], k.shape[2]
    size = _tile_size(block_indices, block_size)
    index, positions, blocks = _setup(k, v, block_indices, q_positions, block_size)
    delta = softmax_delta(out, d_out, d_lse)
    rows = [group_heads(x, num_kv_heads) for x in (q, d_out, lse, delta)]

    def key_block(dq, xs):
        block, k, v, start, count = xs

        def step(tile, carry):
            dq, dk, dv = carry
            queries = index.tile(start, count, tile, size, num_queries)
            mask = _block_mask(positions, queries, count, tile, block, block_size, num_keys)
            k_seen, v_seen = (keep_seen(x, mask.any(axis=2)) for x in (k, v))
            at_queries = [_rows(x, queries) for x in rows]
            mask = mask[:, :, :, None, :]
            dq_tile, dk_tile, dv_tile = softmax_gradients(at_queries, k_seen, v_seen, mask, scale)
            dq = _update_rows(dq, queries, _rows(dq, queries) + dq_tile)
            return dq, dk + dk_tile, dv + dv_tile

        carry = dq, jnp.zeros_like(k, dtype), jnp.zeros_like(v, dtype)
        dq, dk, dv = jax.lax.fori_loop(0, _num_tiles(count, size), step, carry)
        return dq, (dk.astype(k.dtype), dv.astype(v.dtype))

    dq, (dk, dv) = jax.lax.scan(key_block, jnp.zeros_like(rows[0], dtype), blocks)
    dq = ungroup_heads(dq.astype(q.dtype))
    dk, dv = (jnp.moveaxis(join_axis(x, 2, num_keys), 1, 2) for x in (dk, dv))
    return dq, dk, dv, None, None


_attention.defvjp(_forward, _backward)
