"""selected_attention: each query attends the key blocks that it selected.

Forward and for dq, a tile of neighbouring queries, all heads of a group, walks the union of the
blocks that its queries selected; for dk and dv a block meets, item by item, the queries that
selected it. A NaN in memory that no query of a tile selected or has reached changes nothing; one in
a block that some query of the tile has passed and selected may reach others of that tile.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.lists import inverted_index, search
from pallas_kernels.mosaic_gpu import launch, lists, rows, selected_dkv, selected_dq, tuning
from pallas_kernels.mosaic_gpu.common import ROWS, TILE_ROWS, padded_keys
from pallas_kernels.mosaic_gpu.selected_forward import forward

#: Queries of a block that one program takes for dk and dv.
ITEM_QUERIES = 1024

#: Positions of a span, whose queries, all heads of a group, L2 holds a good part of; and the most
#: spans, since each item of each takes memory for a block's gradients in float32.
SPAN, MOST_SPANS = 16384, 4


def _heads(group):
    """Heads of a query in memory: copies move 8 rows at least."""
    return max(group, TILE_ROWS)


def _split_heads(x, num_kv_heads, fill=0):
    """[B, T, N, ...] as [B, T, K, heads, ...], with `fill` for heads that do not exist."""
    x = rows.split_heads(x, num_kv_heads)
    group = x.shape[3]
    padding = [(0, 0)] * x.ndim
    padding[3] = (0, _heads(group) - group)
    return jnp.pad(x, padding, constant_values=fill) if group < TILE_ROWS else x


def _join_heads(x, group):
    return x[:, :, :, :group].reshape(*x.shape[:2], -1, *x.shape[4:])


def _cut(kernel, q, k, v):
    """Heads of a query, warpgroups that compute, and queries of a tile."""
    heads = _heads(q.shape[2] // k.shape[2])
    computing = tuning.computing(kernel, q.shape[3], v.shape[3])
    return heads, computing, computing * ROWS // heads


def _tiles(kernel, q, k, v, block_indices, q_positions, block_size):
    """What a walk over tiles of queries needs: unions, and the position of each row's query."""
    heads, computing, queries = _cut(kernel, q, k, v)
    unions = lists.unions(
        *(block_indices, q_positions), queries=queries, block_size=block_size, num_keys=k.shape[1]
    )
    positions = jnp.repeat(lists.split_tiles(q_positions, queries, -1), heads, axis=2)
    return unions, positions.reshape(*positions.shape[:2], computing, ROWS)


def _from_rows(x, heads, num_queries):
    """[B, K, tiles, computing, ROWS] as [B, T, K, heads]."""
    batch, groups = x.shape[:2]
    x = x.reshape(batch, groups, -1, heads)[:, :, :num_queries]
    return jnp.moveaxis(x, 1, 2)


def _forward(q, k, v, block_indices, q_positions, *, block_size, scale):
    group = q.shape[2] // k.shape[2]
    unions, positions = _tiles("selected_forward", q, k, v, block_indices, q_positions, block_size)
    out, lse = forward(
        *(_split_heads(q, k.shape[2]), padded_keys(k), padded_keys(v), unions, positions),
        block_size=block_size,
        scale=scale,
    )
    lse = _from_rows(lse, _heads(group), q.shape[1])
    return _join_heads(out, group), _join_heads(lse, group)


def _to_rows(x, computing, fill):
    """[B, T, K, heads] as [B, K, tiles, computing, ROWS], `fill` beyond T."""
    batch, _, groups, heads = x.shape
    x = lists.split_tiles(x, computing * ROWS // heads, fill)
    return jnp.moveaxis(x, 3, 1).reshape(batch, groups, -1, computing, ROWS)


def _backward(q, k, v, block_indices, q_positions, out, lse, d_out, d_lse, *, block_size, scale):
    num_kv_heads, num_keys = k.shape[2], k.shape[1]
    lse2, dots = rows.lse2_and_dots(lse, out, d_out)
    delta = _split_heads(dots - d_lse, num_kv_heads)
    lse2 = _split_heads(lse2, num_kv_heads, jnp.inf)
    q_heads, d_out_heads = (_split_heads(x, num_kv_heads) for x in (q, d_out))
    keys, values = padded_keys(k), padded_keys(v)

    unions, positions = _tiles("selected_dq", q, k, v, block_indices, q_positions, block_size)
    dq = selected_dq.dq(
        *(q_heads, keys, values, d_out_heads),
        *(_to_rows(x, positions.shape[2], fill) for x, fill in ((lse2, jnp.inf), (delta, 0))),
        *(unions, positions),
        block_size=block_size,
        scale=scale,
    )
    index = inverted_index(
        *(block_indices, q_positions),
        num_keys=num_keys,
        block_size=block_size,
        size=ITEM_QUERIES,
        span=max(SPAN, -(-num_keys // MOST_SPANS)),
    )
    ends = (jnp.arange(-(-num_keys // block_size), dtype=jnp.int32) + 1) * block_size - 1
    passed = jax.vmap(lambda x: search(x, ends))(q_positions).astype(jnp.int32)
    partial = selected_dkv.dk_dv_of_items(
        *(q_heads, keys, values, d_out_heads, lse2, delta),
        *(index.queries, index.items, index.order, passed, q_positions),
        block_size=block_size,
        scale=scale,
    )
    dk, dv = (
        selected_dkv.sum_items(x, index.first_items, like)[:, :num_keys]
        for x, like in zip(partial, (keys, values), strict=True)
    )
    return _join_heads(dq, q.shape[2] // num_kv_heads), dk, dv, dots


def selected_attention(q, k, v, block_indices, q_positions, block_size, scale, gate=None):
    """Attention of each query over the tokens of its blocks up to its own position (equation 12).

    Differentiable in q, k, v and the gate, through both results.

    Args:
      q: queries [B, T, N, H], bfloat16 or float16; see `refusal` for what is taken.
      k: keys [B, S, K, H]; K divides N, and the G = N // K heads of a group share their blocks.
      v: values [B, S, K, V].
      block_indices: int32 [B, T, K, M], distinct within a row; -1 stands for no block.
      q_positions: int32 [B, T], the position of each query among the keys, rising along a row.
      block_size: l', tokens a block; the last block may be shorter.
      scale: a Python number that multiplies the scores.
      gate: None, or float32 [B, T, N], at least 0: multiplies out; see `calls.differentiable`.

    Returns:
      out [B, T, N, V] in the dtype of q, or of the gate, exactly 0 on an empty row, and lse
      [B, T, N] float32, the natural logarithm of the softmax's denominator, -inf on an empty row.
    """
    if q.size == 0 or k.size == 0:
        return launch.nothing_attended(q, v, gate)
    q, scale = launch.positive_scale(q, scale)
    # A query beyond the keys sees all of its blocks.
    q_positions = jnp.minimum(q_positions, k.shape[1] - 1)
    passes = (
        functools.partial(run, block_size=block_size, scale=scale) for run in (_forward, _backward)
    )
    return launch.differentiable(*passes)(gate, q, k, v, block_indices, q_positions)


def refusal(operation: str, *args, **kwargs) -> str | None:
    """Why Mosaic GPU cannot run such a call here, or None; see `pallas_kernels.KERNELS`.

    Beside what `launch.refusal` says, lists have to fit shared memory: with blocks of 64 those of
    8 million keys do in groups of 16 heads or more, of 4 million in smaller ones.
    """
    reason = launch.refusal(operation, *args, **kwargs)
    if reason or not args:
        return reason
    q, k, v, block_indices = args[:4]
    block_size = kwargs["block_size"] if "block_size" in kwargs else args[5]
    blocks = -(-k.shape[1] // block_size)
    for kernel in ("selected_forward", "selected_dq"):
        queries = _cut(kernel, q, k, v)[2]
        if not lists.Sizes.make(queries, block_indices.shape[3], blocks).fits:
            return (
                f"mosaic_gpu's selected_attention has no room for lists of {blocks} blocks for "
                f"{queries} queries at a time; fewer keys or larger blocks fit."
            )
    return None
