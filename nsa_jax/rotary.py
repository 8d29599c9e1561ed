"""Rotary position embeddings (RoPE, arXiv 2104.09864)."""

import jax.numpy as jnp

from nsa_jax.typing import Array, Float, Int


def apply_rope(
    x: Float[Array, "B T N H"], positions: Int[Array, "B T"], *, theta: float
) -> Float[Array, "B T N H"]:
    """Rotates the feature pairs (i, i + H/2) by the angle positions * theta**(-2i/H).

    Args:
      x: queries or keys.
      positions: int32; the batch dimension may be 1.
      theta: the base of the wavelengths, in tokens.

    Returns:
      The rotated array in x's dtype; the angles are computed in float32.

    Raises:
      ValueError: if H is odd.
    """
    half, odd = divmod(x.shape[-1], 2)
    if odd:
        raise ValueError(f"head_dim={x.shape[-1]} must be even for rotary position embeddings")
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
