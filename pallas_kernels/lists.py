"""The lists that kernels of selected blocks walk: of blocks for queries, of queries for blocks.

Forward and for dq, a tile of queries walks the union of its blocks, which each kind of kernel makes
in its own way. For dk and dv, each block meets the queries that selected it, in ascending order, by
the inverted index; a list that is long, as block 0's is when everybody selects it, is cut into
items of limited size, so that no program has much more to do than another. Lists may be cut into
spans of positions as well, so that programs that run together read queries that lie together.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

#: `jnp.searchsorted` without a loop, of which every step would launch kernels of its own.
search = functools.partial(jnp.searchsorted, method="scan_unrolled")


class Unions(NamedTuple):
    """The blocks of each tile of queries.

    Attributes:
      blocks: int32 [B, K, tiles, U], ascending; beyond the tile's count, anything.
      masks: int32 [B, K, tiles, U], bit i set if query i of the tile selected the block.
      counts: int32 [B, K, tiles, 2]: how many blocks, and how many of them, at the beginning, lie
        wholly at or before every query of the tile.
    """

    blocks: jax.Array
    masks: jax.Array
    counts: jax.Array


class InvertedIndex(NamedTuple):
    """The queries of each block, cut into items of at most `size` queries of one span.

    Attributes:
      queries: int32 [B * T * K * M], sorted by batch, group and block, ascending within a block;
        those of entries without a block, or with one that the query has not reached, come last.
      items: int32 [B, K, items, 3]: of each item its block, where its queries begin in `queries`,
        and how many they are; 0 beyond the last item.
      first_items: int32 [B, K, blocks + 1]: the first item of each block, then their number.
      order: int32 [B, K, items]: the items of the first span, those of the second, and so on.
    """

    queries: jax.Array
    items: jax.Array
    first_items: jax.Array
    order: jax.Array


def _edges(keys, num_keys):
    """Where each of 0, 1, ..., num_keys begins, or would, among the ascending int32 `keys`."""
    at = jnp.arange(keys.size, dtype=jnp.int32)
    begins = jnp.diff(keys, prepend=-1) > 0
    # The others go, each to a place of its own, beyond the end, that is nowhere.
    place = jnp.where(begins, keys, num_keys + 1 + at)
    edges = jnp.full(num_keys + 1, keys.size, jnp.int32)
    edges = edges.at[place].set(at, mode="drop", unique_indices=True)
    return jax.lax.cummin(edges, reverse=True)


def inverted_index(
    block_indices,
    q_positions,
    *,
    num_keys: int,
    block_size: int,
    size: int,
    span: int | None = None,
) -> InvertedIndex:
    """The inverted index of the blocks that each query selected and has reached, by stable sorts.

    Args:
      block_indices: int32 [B, T, K, M], -1 for no block.
      q_positions: int32 [B, T], rising along a row and less than num_keys.
      num_keys: S.
      block_size: l'.
      size: the most queries of an item.
      span: how many positions a span has; None for one span.
    """
    batch, num_queries, groups, num_selected = block_indices.shape
    rows, num_blocks = batch * groups, -(-num_keys // block_size)
    span = span or num_keys
    spans = -(-num_keys // span)
    cells = num_blocks * spans  # of each row: the queries of a block and a span

    position = q_positions[:, :, None, None]
    real = (block_indices >= 0) & (block_indices <= position // block_size)
    cell = jnp.where(real, block_indices * spans + position // span, -1)
    cell = jnp.moveaxis(cell, 2, 1).reshape(rows, -1)
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    keys = jnp.where(cell >= 0, row * cells + cell, rows * cells).reshape(-1)
    queries = jnp.arange(num_queries, dtype=jnp.int32).repeat(num_selected)
    queries = jnp.broadcast_to(queries, (rows, queries.size)).reshape(-1)
    # A GPU sorts by radix: half the bits are half the passes. The last number is that of no cell.
    keys = keys.astype(jnp.uint16 if rows * cells < 2**16 else jnp.int32)
    keys, queries = jax.lax.sort((keys, queries), num_keys=1, is_stable=True)

    edges = _edges(keys.astype(jnp.int32), rows * cells)
    starts = edges[:-1].reshape(rows, cells)
    counts = jnp.diff(edges).reshape(rows, cells)
    ends = jnp.cumsum(-(-counts // size), axis=1, dtype=jnp.int32)
    first_items = jnp.pad(ends, [(0, 0), (1, 0)])

    # A span's queries have reached no block beyond its end.
    reached = sum(
        -(-min(end, num_keys) // block_size) for end in range(span, num_keys + span, span)
    )
    entries = num_queries * num_selected
    item = jnp.arange(min(entries // size + reached, entries), dtype=jnp.int32)
    cell = jax.vmap(lambda ends: search(ends, item, side="right"))(ends)
    cell = jnp.minimum(cell, cells - 1).astype(jnp.int32)
    take = jax.vmap(jnp.take)
    skipped = (item - take(first_items, cell)) * size
    count = jnp.clip(take(counts, cell) - skipped, 0, size)
    listed = jnp.stack([cell // spans, take(starts, cell) + skipped, count], axis=-1)
    order = jnp.argsort(jnp.where(count > 0, cell % spans, spans), axis=1, stable=True)
    return InvertedIndex(
        queries,
        listed.reshape(batch, groups, item.size, 3),
        first_items[:, ::spans].reshape(batch, groups, num_blocks + 1),
        order.astype(jnp.int32).reshape(batch, groups, item.size),
    )
