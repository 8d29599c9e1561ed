"""interval_attention: each query attends one interval of keys.

Tiles of queries walk the tiles of keys between the smallest lo and the largest hi of the tile, with
a running softmax, so that work and memory follow the intervals and no [T, S] array is built.
"""

import functools

import jax
import jax.numpy as jnp

from nsa_jax.ops.xla.common import (
    accumulation_dtype,
    finish_softmax,
    gated,
    group_heads,
    join_axis,
    keep_seen,
    pad_axis,
    softmax_delta,
    softmax_gradients,
    split_axis,
    start_softmax,
    ungroup_heads,
    update_softmax,
)
from nsa_jax.typing import Array, Float, Int

TILE_QUERIES = 128
TILE_KEYS = 128


def interval_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    lo: Int[Array, "B T"],
    hi: Int[Array, "B T"],
    scale: float,
    longest: int | None = None,
    gate: Float[Array, "B T N"] | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Attention of query t over the keys j with lo[b, t] <= j < hi[b, t].

    Differentiable in q, k, v and the gate, through both results.

    Args:
      q: queries.
      k: keys; K divides N.
      v: values.
      lo: int32, at least 0, not decreasing along t.
      hi: int32, not decreasing along t; a row with hi <= lo is empty.
      scale: multiplies the scores.
      longest: a bound on hi - lo, if one is known, by which kernels choose their tiles; not used
        here.
      gate: None, or [B, T, N] in float32 (float64 for float64 inputs): multiplies the outputs.

    Returns:
      The outputs in the dtype of q, or of the gate, exactly 0 on an empty row, and the natural
      logarithm of the softmax's denominator in float32, -inf on an empty row.
    """
    del longest
    out, lse = _attention(q, k, v, lo, hi, scale)
    return gated(out, gate), lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q, k, v, lo, hi, scale):
    return _forward(q, k, v, lo, hi, scale)[0]


def _query_tiles(arrays, lo, hi, num_keys, num_kv_heads):
    """Tiles of queries [tiles, B, K, t, G, ...], and of their intervals [tiles, B, t]."""
    size = min(TILE_QUERIES, lo.shape[1])
    hi = jnp.minimum(hi, num_keys)
    arrays = [split_axis(group_heads(x, num_kv_heads), 2, size) for x in arrays]
    return arrays, split_axis(lo, 1, size), split_axis(hi, 1, size)  # padded queries see nothing


def _join_queries(x, num_queries):
    return ungroup_heads(join_axis(x, 2, num_queries))


def _key_tiles(x):
    """Keys or values as [B, K, S', H], S' a multiple of the tile, and the tile's size."""
    size = min(TILE_KEYS, max(x.shape[1], 1))
    return pad_axis(jnp.moveaxis(x, 2, 1), 2, size), size


def _tile_range(lo, hi, size):
    """The first key tile that a tile of queries needs, and the one after its last."""
    some = hi > lo
    first = jnp.min(jnp.where(some, lo, jnp.iinfo(jnp.int32).max)) // size
    end = -(-jnp.max(jnp.where(some, hi, 0)) // size)
    return first, end


def _load(k, v, lo, hi, tile, size):
    """One tile of keys and of values, and who sees what: mask [B, 1, t, 1, s]."""
    key = tile * size + jnp.arange(size, dtype=jnp.int32)
    mask = (key >= lo[:, :, None]) & (key < hi[:, :, None])
    seen = mask.any(axis=1)[:, None]
    k = jax.lax.dynamic_slice_in_dim(k, tile * size, size, axis=2)
    v = jax.lax.dynamic_slice_in_dim(v, tile * size, size, axis=2)
    return keep_seen(k, seen), keep_seen(v, seen), mask[:, None, :, None, :]


def _forward(q, k, v, lo, hi, scale):
    keys, size = _key_tiles(k)
    values, _ = _key_tiles(v)

    def query_tile(_, tile):
        (q,), lo, hi = tile

        def step(index, carry):
            k, v, mask = _load(keys, values, lo, hi, index, size)
            return update_softmax(carry, q, k, v, mask, scale)

        start = start_softmax(q, v.shape[-1])
        carry = jax.lax.fori_loop(*_tile_range(lo, hi, size), step, start)
        return None, finish_softmax(carry, q.dtype)

    tiles = _query_tiles([q], lo, hi, k.shape[1], k.shape[2])
    _, (out, lse) = jax.lax.scan(query_tile, None, tiles)
    out, lse = _join_queries(out, q.shape[1]), _join_queries(lse, q.shape[1])
    return (out, lse), (q, k, v, lo, hi, out, lse)


def _backward(scale, residuals, gradients):
    q, k, v, lo, hi, out, lse = residuals
    d_out, d_lse = gradients
    dtype = accumulation_dtype(q)
    num_queries, num_keys, num_kv_heads = q.shape[1], k.shape[1], k.shape[2]
    keys, size = _key_tiles(k)
    values, _ = _key_tiles(v)
    delta = softmax_delta(out, d_out, d_lse)

    def query_tile(carry, tile):
        rows, lo, hi = tile

        def step(index, carry):
            dq, dk, dv = carry
            k, v, mask = _load(keys, values, lo, hi, index, size)
            dq_tile, dk_tile, dv_tile = softmax_gradients(rows, k, v, mask, scale)
            dk = _add_tile(dk, dk_tile, index * size)
            dv = _add_tile(dv, dv_tile, index * size)
            return dq + dq_tile, dk, dv

        dq = jnp.zeros_like(rows[0], dtype)
        dq, *carry = jax.lax.fori_loop(*_tile_range(lo, hi, size), step, (dq, *carry))
        return carry, dq.astype(q.dtype)

    tiles = _query_tiles([q, d_out, lse, delta], lo, hi, num_keys, num_kv_heads)
    start = [jnp.zeros_like(keys, dtype), jnp.zeros_like(values, dtype)]
    (dk, dv), dq = jax.lax.scan(query_tile, start, tiles)
    dq = _join_queries(dq, num_queries)
    dk = jnp.moveaxis(dk[:, :, :num_keys], 1, 2).astype(k.dtype)
    dv = jnp.moveaxis(dv[:, :, :num_keys], 1, 2).astype(v.dtype)
    return dq, dk, dv, None, None


def _add_tile(x, tile, start):
    old = jax.lax.dynamic_slice_in_dim(x, start, tile.shape[2], axis=2)
    return jax.lax.dynamic_update_slice_in_dim(x, old + tile, start, axis=2)


_attention.defvjp(_forward, _backward)
