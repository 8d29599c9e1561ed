"""Lists of blocks for tiles of queries.

Forward and for dq, the queries of a tile walk the union of the blocks that they selected, in
ascending order, each block with a bit mask of the queries that want it.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.lists import Unions

#: Stands for no block, after every block.
_NONE = jnp.iinfo(jnp.int32).max


def split_tiles(x, queries, fill):
    """x [B, T, ...] as [B, tiles, queries, ...]; what is missing of the last tile is `fill`."""
    tiles = -(-x.shape[1] // queries)
    pad = [(0, 0)] * x.ndim
    pad[1] = (0, tiles * queries - x.shape[1])
    x = jnp.pad(x, pad, constant_values=fill)
    return x.reshape(x.shape[0], tiles, queries, *x.shape[2:])


def unions(block_indices, q_positions, *, queries: int, block_size: int, num_keys: int) -> Unions:
    """The blocks that each tile of neighbouring queries needs, by two sorts.

    Args:
      block_indices: int32 [B, T, K, M], distinct within a row, -1 for none.
      q_positions: int32 [B, T].
      queries: of a tile, at most 31.
      block_size: l'.
      num_keys: S; blocks that begin beyond it are none.
    """
    num_blocks = -(-num_keys // block_size)
    blocks = jnp.moveaxis(split_tiles(block_indices, queries, -1), 3, 1)  # [B, K, tiles, q, M]
    real = (blocks >= 0) & (blocks < num_blocks)
    query = jnp.arange(queries, dtype=jnp.int32)[:, None]
    keys = jnp.where(real, blocks * queries + query, _NONE)
    keys = jax.lax.sort(keys.reshape(*keys.shape[:3], -1), is_stable=False)

    blocks = jnp.where(keys == _NONE, _NONE, keys // queries)
    bits = jnp.where(keys == _NONE, 0, 1 << keys % queries)
    # Those who selected the same block follow each other: the first one gathers their bits.
    first = (keys != _NONE) & (blocks != _shifted(blocks, -1))
    masks = bits
    for by in range(1, queries):
        masks |= jnp.where(_shifted(blocks, by) == blocks, _shifted(bits, by), 0)
    blocks, masks = jax.lax.sort(
        (jnp.where(first, blocks, _NONE), jnp.where(first, masks, 0)), num_keys=1, is_stable=False
    )

    smallest = split_tiles(q_positions, queries, _NONE).min(axis=2)[:, None, :, None]
    passed = (blocks < num_blocks) & ((blocks + 1) * block_size - 1 <= smallest)
    counts = jnp.stack([(masks != 0).sum(axis=-1), passed.sum(axis=-1)], axis=-1)
    return Unions(blocks, masks, counts.astype(jnp.int32))


def _shifted(x, by):
    """x[..., i + by] at i; -1 beyond the ends."""
    x = x[..., by:] if by > 0 else x[..., :by]
    ends = (0, by) if by > 0 else (-by, 0)
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [ends], constant_values=-1)
