"""What the XLA operations share: layout, matrix products, the running softmax and its gradient."""

import jax
import jax.numpy as jnp

from nsa_jax.typing import Array


def accumulation_dtype(x: Array) -> jnp.dtype:
    """float32, or float64 for float64 inputs."""
    return jnp.promote_types(x.dtype, jnp.float32)


def dot(equation: str, a: Array, b: Array) -> Array:
    """An einsum that accumulates in float32 and never rounds float32 operands (no tf32)."""
    return jnp.einsum(
        equation,
        a,
        b,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=accumulation_dtype(a),
    )


def sum_over_queries(a: Array, b: Array) -> Array:
    """[B, K, t, G, s] and [B, K, t, G, h] to [B, K, s, h], summed over a tile's query heads."""
    # As one contracted axis: a product of two is transposed in memory first (on CPUs, 1.5 times
    # the time).
    a, b = (x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (a, b))
    return dot("bkrs,bkrh->bksh", a, b)


def group_heads(x: Array, num_kv_heads: int) -> Array:
    """[B, T, N, ...] to [B, K, T, G, ...]: the heads of a group beside their keys."""
    x = x.reshape(*x.shape[:2], num_kv_heads, x.shape[2] // num_kv_heads, *x.shape[3:])
    return jnp.moveaxis(x, 2, 1)


def ungroup_heads(x: Array) -> Array:
    """The inverse of `group_heads`."""
    x = jnp.moveaxis(x, 1, 2)
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3], *x.shape[4:])


def filled_rows(x: Array, value: float, width: int | None = None) -> Array:
    """Accumulators [..., width], or [...] without width, for the rows [..., H] of x.

    They are made from x, and not from its shape, so that inside shard_map they vary over the same
    mesh axes: a loop wants its carry to come out as it went in.
    """
    rows = jnp.full_like(x[..., 0], value, accumulation_dtype(x))
    return rows if width is None else jnp.repeat(rows[..., None], width, axis=-1)


def pad_axis(x: Array, axis: int, multiple: int) -> Array:
    """Pads an axis with zeros at its end to a multiple, and to one at least."""
    size = max(-(-x.shape[axis] // multiple), 1) * multiple
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def split_axis(x: Array, axis: int, size: int) -> Array:
    """Cuts an axis, padded, into tiles of `size`; the tiles lead, ready for `lax.scan`."""
    x = pad_axis(x, axis, size)
    x = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def join_axis(x: Array, axis: int, length: int) -> Array:
    """The inverse of `split_axis`, without the padding."""
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, length, axis=axis)


def masked_exp(scores: Array, mask: Array, maximum: Array) -> Array:
    """exp(scores - maximum) where the mask is true, else exactly 0; `maximum` may be -inf there."""
    maximum = jnp.where(maximum > -jnp.inf, maximum, 0.0)
    return jnp.where(mask, jnp.exp(jnp.where(mask, scores - maximum, 0.0)), 0.0)


def start_softmax(q: Array, v_head_dim: int) -> tuple[Array, Array, Array]:
    """A running softmax before its first key: maximum, total and output of each row of q."""
    return filled_rows(q, -jnp.inf), filled_rows(q, 0), filled_rows(q, 0, v_head_dim)


def update_softmax(carry, q: Array, k: Array, v: Array, mask: Array, scale: float):
    """Takes a tile of keys [B, K, s, H] and values into the softmax of queries [B, K, t, G, H]."""
    maximum, total, out = carry
    scores = dot("bktgh,bksh->bktgs", q, k) * scale
    new_maximum = jnp.maximum(maximum, jnp.where(mask, scores, -jnp.inf).max(axis=-1))
    decay = masked_exp(maximum, maximum > -jnp.inf, new_maximum)
    p = masked_exp(scores, mask, new_maximum[..., None])
    out = out * decay[..., None] + dot("bktgs,bksv->bktgv", p.astype(v.dtype), v)
    return new_maximum, total * decay + p.sum(axis=-1), out


def finish_softmax(carry, dtype) -> tuple[Array, Array]:
    """The output in `dtype`, 0 on an empty row, and the log of the denominator, -inf there."""
    maximum, total, out = carry
    some = total > 0
    lse = jnp.where(some, maximum + jnp.log(jnp.where(some, total, 1.0)), -jnp.inf)
    # So that vmap over the values alone maps lse as well: a custom_vjp of which some results are
    # mapped gives the gradients of the others, summed over the mapped axis, to the backward pass of
    # each element, and sums what comes from it once more.
    lse = jnp.where(out[..., 0] == out[..., 0], lse, lse)
    return (out / jnp.where(some, total, 1.0)[..., None]).astype(dtype), lse


def gated(out: Array, gate: Array | None) -> Array:
    """The outputs [B, T, N, V] of a branch times its gate [B, T, N], in the gate's dtype."""
    return out if gate is None else gate[..., None] * out.astype(gate.dtype)


def softmax_delta(out: Array, d_out: Array, d_lse: Array) -> Array:
    """What the gradient of each score of a row subtracts; it also carries what comes by lse."""
    dtype = accumulation_dtype(out)
    return (out.astype(dtype) * d_out.astype(dtype)).sum(axis=-1) - d_lse


def softmax_gradients(rows, k: Array, v: Array, mask: Array, scale: float):
    """The gradients that a tile of keys and values gives to its queries, its keys and its values.

    Args:
      rows: q, d_out, lse and delta of the queries, [B, K, t, G, ...].
      k: keys [B, K, s, H].
      v: values [B, K, s, V].
      mask: who sees what, [B, K or 1, t, 1, s].
      scale: of the scores.
    """
    q, d_out, lse, delta = rows
    scores = dot("bktgh,bksh->bktgs", q, k) * scale
    p = masked_exp(scores, mask, lse[..., None])
    dp = dot("bktgv,bksv->bktgs", d_out, v)
    ds = (p * (dp - delta[..., None]) * scale).astype(q.dtype)
    dq = dot("bktgs,bksh->bktgh", ds, k)
    return dq, sum_over_queries(ds, q), sum_over_queries(p.astype(d_out.dtype), d_out)


def keep_seen(x: Array, seen: Array) -> Array:
    """Zeroes rows of keys or values that no query of the tile may see.

    A masked probability is 0, but 0 times a NaN in memory that nobody may read is a NaN. (A NaN in
    a value that some query of the tile sees still reaches the others of that tile.)
    """
    return jnp.where(seen[..., None], x, 0)
