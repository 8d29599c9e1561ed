"""Who selected what: lists of blocks for tiles of queries, lists of queries for blocks.

Forward and for dq, the queries of a tile walk the union of the blocks that they selected, in
ascending order, each block with a bit mask of the queries that want it. For dk and dv, each block
meets the queries that selected it, in ascending order; a list that is long, as block 0's is when
everybody selects it, is cut into items of equal size, so that no program has more to do than
another.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.triton import launch
from pallas_kernels.triton.common import LARGEST_INT

_MASK_BITS = 32
_MOST_ENTRIES = 1024
_CHUNK = tl.constexpr(64)


def largest_tile(num_selected: int) -> int:
    """The most queries that `unions` takes in a tile, if each selects up to `num_selected`."""
    return max(min(_MASK_BITS, _MOST_ENTRIES // num_selected), 1)


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


@triton.jit
def _unions_kernel(
    block_indices, q_positions, blocks, masks, counts, T: tl.constexpr, K: tl.constexpr,
    M: tl.constexpr, QUERIES: tl.constexpr, ENTRIES: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """The list of one tile. Every entry, a block of a query, is compared with every other one."""
    batch, group = tl.program_id(1) // K, tl.program_id(1) % K
    tile = tl.program_id(0)
    size: tl.constexpr = QUERIES * M
    base = (batch * T + tile * QUERIES).to(tl.int64)
    block_indices += (base * K + group) * M
    real = tl.minimum(T - tile * QUERIES, QUERIES) * M

    entry = tl.arange(0, ENTRIES)
    block = tl.load(block_indices + (entry // M) * (K * M) + entry % M, mask=entry < real, other=-1)
    bits = tl.zeros([ENTRIES], tl.int32)
    rank = tl.zeros([ENTRIES], tl.int32)
    repeats = tl.zeros([ENTRIES], tl.int32)
    for start in range(0, ENTRIES, _CHUNK):
        other = start + tl.arange(0, _CHUNK)
        other_block = tl.load(
            block_indices + (other // M) * (K * M) + other % M, mask=other < real, other=-1
        )
        same = (block[:, None] == other_block[None, :]) & (other_block >= 0)[None, :]
        bits += tl.sum(tl.where(same, 1 << (other // M)[None, :], 0), 1)
        repeats += tl.sum((same & (other[None, :] < entry[:, None])).to(tl.int32), 1)
        repeated = tl.sum((same & (entry[:, None] < other[None, :])).to(tl.int32), 0) > 0
        first = (other_block >= 0) & (repeated == 0)
        smaller = first[None, :] & (other_block[None, :] < block[:, None])
        rank += tl.sum(smaller.to(tl.int32), 1)
    first = (block >= 0) & (repeats == 0)
    position = tl.load(q_positions + base + entry // M, mask=entry < real, other=LARGEST_INT)
    whole = first & ((block + 1) * BLOCK_SIZE - 1 <= tl.min(position))

    index = tl.program_id(1) * tl.num_programs(0) + tile
    at = index.to(tl.int64) * size + rank
    tl.store(blocks + at, block, mask=first)
    tl.store(masks + at, bits, mask=first)
    tl.store(counts + index * 2, tl.sum(first.to(tl.int32)))
    tl.store(counts + index * 2 + 1, tl.sum(whole.to(tl.int32)))


def unions(block_indices, q_positions, *, queries: int, block_size: int) -> Unions:
    """The blocks that each tile of neighbouring queries needs.

    Args:
      block_indices: int32 [B, T, K, M], distinct within a row, -1 for none.
      q_positions: int32 [B, T].
      queries: of a tile, at most `largest_tile`.
      block_size: l'.
    """
    batch, num_queries, groups, num_selected = block_indices.shape
    tiles = triton.cdiv(num_queries, queries)
    shape = (batch, groups, tiles)
    listed = jax.ShapeDtypeStruct((*shape, queries * num_selected), jnp.int32)
    entries = max(triton.next_power_of_2(queries * num_selected), _CHUNK.value)
    results = launch.launch(
        _unions_kernel,
        block_indices,
        q_positions,
        out_type=(listed, listed, jax.ShapeDtypeStruct((*shape, 2), jnp.int32)),
        grid=(tiles, batch * groups),
        num_warps=1 if entries == _CHUNK.value else min(entries // 32, 16),
        num_stages=1,
        T=num_queries,
        K=groups,
        M=num_selected,
        QUERIES=queries,
        ENTRIES=entries,
        BLOCK_SIZE=block_size,
    )
    return Unions(*results)


class Items(NamedTuple):
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


def items(block_indices, *, num_blocks: int, size: int) -> Items:
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
    block = jax.vmap(lambda ends: jnp.searchsorted(ends, item, side="right"))(ends)
    block = jnp.minimum(block, num_blocks - 1).astype(jnp.int32)
    take = jax.vmap(jnp.take)
    skipped = (item - take(first_items, block)) * size
    count = jnp.clip(take(counts, block) - skipped, 0, size)
    listed = jnp.stack([block, take(starts, block) + skipped, count], axis=-1)
    shape = (batch, groups)
    return Items(queries, listed.reshape(*shape, num_items, 3), first_items.reshape(*shape, -1))
