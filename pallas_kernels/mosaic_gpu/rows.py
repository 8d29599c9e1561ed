"""Tiles of rows: which rows of a key/value head's queries lie beside each other, and their copies.

A row is one query head of one query. The T * G rows of a key/value head are cut into tiles of 64.
With 8 heads or more, a tile is whole queries one after another, each with its G heads, which lie
beside each other in memory. With fewer, it is 64 // G queries of the first head, then those of the
second, and so on: copies move 8 rows at least. Arrays with one number a row or a query are small,
and are brought into this order, or out of it, outside of the kernels.
"""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu.common import LOG2E, ROWS, TILE_ROWS


def queries_per_tile(group):
    """How many queries a tile of a group of heads holds."""
    return ROWS // group


def num_tiles(num_queries, group, multiple=1):
    """Tiles that hold all rows, rounded up to a multiple."""
    return pl.cdiv(num_queries, queries_per_tile(group) * multiple) * multiple


def padded_queries(x, group):
    """[B, T, ...], T as the copies want it: with few heads a group they move whole tiles of 8."""
    if group >= TILE_ROWS or x.shape[1] % TILE_ROWS == 0:
        return x
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % TILE_ROWS)] + [(0, 0)] * (x.ndim - 2))


def split_heads(x, num_kv_heads):
    """[B, T, N, ...] as [B, T, K, G, ...]."""
    return x.reshape(*x.shape[:2], num_kv_heads, x.shape[2] // num_kv_heads, *x.shape[3:])


def from_queries(x, group, tiles, fill):
    """Numbers of queries [B, T] as numbers of rows [B, tiles, 64], `fill` beyond T."""
    queries = queries_per_tile(group)
    x = jnp.pad(x, ((0, 0), (0, tiles * queries - x.shape[1])), constant_values=fill)
    x = x.reshape(x.shape[0], tiles, queries)
    if group >= TILE_ROWS:
        return jnp.repeat(x, group, axis=2)
    return jnp.tile(x, (1, 1, group))


def from_heads(x, num_kv_heads, tiles, fill):
    """Numbers of heads [B, T, N] as numbers of rows [B, K, tiles, 64], `fill` beyond T."""
    x = split_heads(x, num_kv_heads)
    batch, num_queries, _, group = x.shape
    queries = queries_per_tile(group)
    padding = ((0, 0), (0, tiles * queries - num_queries), (0, 0), (0, 0))
    x = jnp.pad(x, padding, constant_values=fill)
    x = x.reshape(batch, tiles, queries, num_kv_heads, group)
    order = (0, 3, 1, 2, 4) if group >= TILE_ROWS else (0, 3, 1, 4, 2)
    return x.transpose(order).reshape(batch, num_kv_heads, tiles, ROWS)


def to_heads(x, num_queries, group):
    """Numbers of rows [B, K, tiles, 64] as numbers of heads [B, T, N]."""
    batch, num_kv_heads, tiles, _ = x.shape
    queries = queries_per_tile(group)
    if group >= TILE_ROWS:
        x = x.reshape(batch, num_kv_heads, tiles, queries, group).transpose(0, 2, 3, 1, 4)
    else:
        x = x.reshape(batch, num_kv_heads, tiles, group, queries).transpose(0, 2, 4, 1, 3)
    return x.reshape(batch, tiles * queries, num_kv_heads * group)[:, :num_queries]


def lse2_and_dots(lse, out, d_out):
    """lse in base 2, +inf on an empty row, so that its probabilities are 0; and out . d_out.

    The latter less the gradient of lse is what every score's gradient of a row has in common.

    Returns:
      Two float32 [B, T, N].
    """
    dots = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(axis=-1)
    return jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2E), dots


def _boxes(ref, batch, kv_head, tile):
    """The parts of a tile that one copy each moves: their rows in it, and their query."""
    group = ref.shape[3]
    queries = queries_per_tile(group)
    first = tile * queries
    if group >= TILE_ROWS:
        for i in range(queries):
            yield pl.ds(i * group, group), first + i, lambda t: ref.at[batch, t, kv_head]
    else:
        first = pl.multiple_of(first, queries)
        for head in range(group):
            yield (
                pl.ds(head * queries, queries),
                first,
                lambda t, head=head: ref.at[batch, pl.ds(t, queries), kv_head, head],
            )


def copies(group):
    """How many copies move a tile."""
    return queries_per_tile(group) if group >= TILE_ROWS else group


def load(ref, buffer, barrier, batch, kv_head, tile, first=0):
    """Begins to copy a tile into shared memory; `copies` arrivals at the barrier say it is there.

    Args:
      ref: [B, T, K, G, features] in global memory. Rows beyond T become some other ones, or 0.
      buffer: [64, some features] in shared memory.
      barrier: a barrier.
      batch: which row of the batch.
      kv_head: which key/value head.
      tile: which tile of its rows.
      first: the first of the features.
    """
    columns = pl.ds(first, buffer.shape[1])
    last = ref.shape[1] - 1
    for rows, query, box in _boxes(ref, batch, kv_head, tile):
        at = query if ref.shape[3] < TILE_ROWS else jnp.minimum(query, last)
        plgpu.copy_gmem_to_smem(box(at).at[:, columns], buffer.at[rows], barrier)


def store(ref, buffer, batch, kv_head, tile):
    """Begins to copy a tile, committed to shared memory, to where it belongs.

    The memory is free after `plgpu.wait_smem_to_gmem(0, wait_read_only=True)`.
    """
    for rows, query, box in _boxes(ref, batch, kv_head, tile):

        @pl.when(query < ref.shape[1])
        def _(rows=rows, query=query, box=box):
            plgpu.copy_smem_to_gmem(buffer.at[rows], box(query), commit_group=False)

    plgpu.commit_smem_to_gmem_group()  # one for all: each takes its time
