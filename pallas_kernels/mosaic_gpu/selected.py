"""selected_attention: each query attends the key blocks that it selected."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu import launch, lists
from pallas_kernels.mosaic_gpu.common import ROWS, TILE_ROWS
from pallas_kernels.mosaic_gpu.launch import refusal  # noqa: F401 - see pallas_kernels.KERNELS
from pallas_kernels.mosaic_gpu.selected_forward import forward
from pallas_kernels.mosaic_gpu.selected_walk import COMPUTE


def _heads(group):
    """Heads of a query in memory: copies move 8 rows at least."""
    return max(group, TILE_ROWS)


def _split_heads(x, num_kv_heads):
    """[B, T, N, ...] as [B, T, K, heads, ...], with zeros for heads that do not exist."""
    group = x.shape[2] // num_kv_heads
    x = x.reshape(*x.shape[:2], num_kv_heads, group, *x.shape[3:])
    padding = [(0, 0)] * x.ndim
    padding[3] = (0, _heads(group) - group)
    return jnp.pad(x, padding) if group < TILE_ROWS else x


def _join_heads(x, group):
    return x[:, :, :, :group].reshape(*x.shape[:2], -1, *x.shape[4:])


def _padded_keys(x):
    """[B, S, ...], S a multiple of 8, as the copies want it."""
    padding = -x.shape[1] % TILE_ROWS
    return jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) if padding else x


def _tiles(q, k, block_indices, q_positions, block_size):
    """What both walks over tiles of queries need: unions, and the position of each row's query."""
    heads = _heads(q.shape[2] // k.shape[2])
    queries = COMPUTE * ROWS // heads
    unions = lists.unions(
        *(block_indices, q_positions), queries=queries, block_size=block_size, num_keys=k.shape[1]
    )
    positions = jnp.repeat(lists.split_tiles(q_positions, queries, -1), heads, axis=2)
    return unions, positions.reshape(*positions.shape[:2], COMPUTE, ROWS)


def _from_rows(x, heads, num_queries):
    """[B, K, tiles, COMPUTE, ROWS] as [B, T, K, heads]."""
    batch, groups = x.shape[:2]
    x = x.reshape(batch, groups, -1, heads)[:, :, :num_queries]
    return jnp.moveaxis(x, 1, 2)


def _forward(q, k, v, block_indices, q_positions, *, block_size, scale):
    group = q.shape[2] // k.shape[2]
    unions, positions = _tiles(q, k, block_indices, q_positions, block_size)
    out, lse = forward(
        *(_split_heads(q, k.shape[2]), _padded_keys(k), _padded_keys(v), unions, positions),
        block_size=block_size,
        scale=scale,
    )
    lse = _from_rows(lse, _heads(group), q.shape[1])
    return _join_heads(out, group), _join_heads(lse, group)
