"""Words of 32 bits, of which each stands for a block."""

import jax
import jax.numpy as jnp

WORD = 32  # bits


def shifted_right(x, bits):
    """Integers divided by 2 ** bits, their bits being those of an unsigned number."""
    return jax.lax.shift_right_logical(x, jnp.full_like(x, bits))


def ones(word):
    """How many bits of each word are set."""
    word = word - (shifted_right(word, 1) & 0x55555555)
    word = (word & 0x33333333) + (shifted_right(word, 2) & 0x33333333)
    word = (word + shifted_right(word, 4)) & 0x0F0F0F0F
    return shifted_right(word * 0x01010101, 24)


def nth_bit(word, n):
    """The position of the n-th set bit of each word, counted from 0."""
    position = jnp.zeros_like(word)
    for width in (16, 8, 4, 2, 1):
        below = ones(word & ((1 << width) - 1))
        above = n >= below
        n = jnp.where(above, n - below, n)
        word = jnp.where(above, shifted_right(word, width), word)
        position = jnp.where(above, position + width, position)
    return position
