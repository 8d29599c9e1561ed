"""The lists that kernels of selected blocks walk: of blocks for queries, of queries for blocks.

Forward and for dq, a tile of queries walks the union of its blocks, which each kind of kernel makes
in its own way. For dk and dv, each block meets the queries that selected it, in ascending order, by
the inverted index; a list that is long, as block 0's is when everybody selects it, is cut into
items of equal size, so that no program has more to do than another.
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
    """The queries of each block, cut into items of at most `size` queries.

    Attributes:
      queries: int32 [B * T * K * M], sorted by batch, group and block, ascending within a block;
        those of entries without a block come last.
      items: int32 [B, K, items, 3]: of each item its block, where its queries begin in `queries`,
        and how many they are; 0 beyond the last item.
      first_items: int32 [B, K, blocks + 1]: the first item of each block, then their number.
    """

    queries: jax.Array
    items: jax.Array
    first_items: jax.Array


def _edges(keys, num_keys):
    """Where each of 0, 1, ..., num_keys begins, or would, among the ascending int32 `keys`."""
    at = jnp.arange(keys.size, dtype=jnp.int32)
    begins = jnp.diff(keys, prepend=-1) > 0
    # The others go, each to a place of its own, beyond the end, that is nowhere.
    place = jnp.where(begins, keys, num_keys + 1 + at)
    edges = jnp.full(num_keys + 1, keys.size, jnp.int32)
    edges = edges.at[place].set(at, mode="drop", unique_indices=True)
    return jax.lax.cummin(edges, reverse=True)


def inverted_index(block_indices, *, num_blocks: int, size: int) -> InvertedIndex:
    """The inverted index of `block_indices` [B, T, K, M], by one stable sort."""
    batch, num_queries, groups, num_selected = block_indices.shape
    rows = batch * groups
    blocks = jnp.moveaxis(block_indices, 2, 1).reshape(rows, -1)
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    real = (blocks >= 0) & (blocks < num_blocks)
    keys = jnp.where(real, row * num_blocks + blocks, rows * num_blocks).reshape(-1)
    queries = jnp.arange(num_queries, dtype=jnp.int32).repeat(num_selected)
    queries = jnp.broadcast_to(queries, (rows, queries.size)).reshape(-1)
    keys, queries = jax.lax.sort((keys, queries), num_keys=1, is_stable=True)

    edges = _edges(keys, rows * num_blocks)
    starts = edges[:-1].reshape(rows, num_blocks)
    counts = jnp.diff(edges).reshape(rows, num_blocks)
    ends = jnp.cumsum(-(-counts // size), axis=1, dtype=jnp.int32)
    first_items = jnp.pad(ends, [(0, 0), (1, 0)])

    num_items = num_queries * num_selected // size + num_blocks
    item = jnp.arange(num_items, dtype=jnp.int32)
    block = jax.vmap(lambda ends: search(ends, item, side="right"))(ends)
    block = jnp.minimum(block, num_blocks - 1).astype(jnp.int32)
    take = jax.vmap(jnp.take)
    skipped = (item - take(first_items, block)) * size
    count = jnp.clip(take(counts, block) - skipped, 0, size)
    listed = jnp.stack([block, take(starts, block) + skipped, count], axis=-1)
    shape = (batch, groups)
    return InvertedIndex(
        queries, listed.reshape(*shape, num_items, 3), first_items.reshape(*shape, -1)
    )
