"""Lists of blocks for tiles of queries.

Forward and for dq, the queries of a tile walk the union of the blocks that they selected, in
ascending order, each block with a bit mask of the queries that want it.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.lists import Unions
from pallas_kernels.triton import launch
from pallas_kernels.triton.common import LARGEST_INT

_MASK_BITS = 32
_MOST_ENTRIES = 1024
_CHUNK = tl.constexpr(64)


def largest_tile(num_selected: int) -> int:
    """The most queries that `unions` takes in a tile, if each selects up to `num_selected`."""
    return max(min(_MASK_BITS, _MOST_ENTRIES // num_selected), 1)


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
