"""Bits of words, counted and found."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.mosaic_gpu.words import nth_bit, ones


def test_bits_of_words():
    words = np.array([0b1, 0x80000000, 0xFFFFFFFF, 0b10110, 0x80010000], np.uint32)
    expected = [[i for i in range(32) if word >> i & 1] for word in words.tolist()]
    words = jnp.asarray(words.astype(np.int32))
    assert ones(words).tolist() == [len(positions) for positions in expected]
    for n in range(32):
        position = nth_bit(words, jnp.full_like(words, n)).tolist()
        for actual, positions in zip(position, expected, strict=True):
            assert n >= len(positions) or actual == positions[n]
