"""One seed in the configuration, one named stream for each thing that is random.

A stream depends on the seed and on its own name alone, so that adding a stream, or drawing more
from one of them, leaves the others as they were.
"""

import hashlib

import jax


def stream_seed(seed: int, name: str) -> int:
    """Returns the seed of the stream `name`, an integer in [0, 2**31)."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def stream_key(seed: int, name: str) -> jax.Array:
    """Returns the JAX random key of the stream `name`."""
    return jax.random.key(stream_seed(seed, name))
