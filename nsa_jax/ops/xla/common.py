"""What the XLA operations share: layout, matrix products and the masked exponential."""

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


def log_sum_exp(maximum: Array, total: Array) -> Array:
    """The natural logarithm of a running softmax's denominator; -inf on an empty row."""
    return jnp.where(total > 0, maximum + jnp.log(jnp.where(total > 0, total, 1.0)), -jnp.inf)


def keep_seen(x: Array, seen: Array) -> Array:
    """Zeroes rows of keys or values that no query of the tile may see.

    A masked probability is 0, but 0 times a NaN in memory that nobody may read is a NaN. (A NaN in
    a value that some query of the tile sees still reaches the others of that tile.)
    """
    return jnp.where(seen[..., None], x, 0)
