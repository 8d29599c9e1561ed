"""Compressed blocks: how tokens are cut into them, where they lie, and when they may be seen.

Block i holds the tokens i*d to i*d + l - 1 (equation 7, counted from 0); neighbouring blocks
overlap where d < l.
"""

import jax.numpy as jnp

from nsa_jax.typing import Array, Float, Int


def num_compressed_blocks(num_tokens: int, *, block_size: int, stride: int) -> int:
    """The number of complete blocks, C, that `num_tokens` tokens make: 0 below `block_size`."""
    return max((num_tokens - block_size) // stride + 1, 0)


def split_into_blocks(
    x: Float[Array, "B S K H"], *, block_size: int, stride: int
) -> Float[Array, "B C l K H"]:
    """Cuts a sequence into its complete overlapping blocks.

    Args:
      x: keys or values, [B, S, K, H].
      block_size: l, a multiple of `stride`.
      stride: d.

    Returns:
      [B, C, l, K, H], where block i is `x[:, i*d : i*d + l]`.
    """
    num_blocks = num_compressed_blocks(x.shape[1], block_size=block_size, stride=stride)
    cells_per_block = block_size // stride
    num_cells = num_blocks + cells_per_block - 1 if num_blocks else 0
    cells = x[:, : num_cells * stride].reshape(x.shape[0], num_cells, stride, *x.shape[2:])
    # A block is l/d neighbouring cells. Slices, unlike a gather, have slices as their gradient.
    return jnp.concatenate([cells[:, c : c + num_blocks] for c in range(cells_per_block)], axis=2)


def block_starts(num_blocks: int, *, stride: int) -> Int[Array, " C"]:
    """The position of each block's first token, int32."""
    return stride * jnp.arange(num_blocks, dtype=jnp.int32)


def complete_blocks(
    num_tokens: Int[Array, "*rows"], *, block_size: int, stride: int
) -> Int[Array, "*rows"]:
    """`num_compressed_blocks` of numbers that are known at run time alone."""
    return jnp.maximum((num_tokens - block_size) // stride + 1, 0)


def visible_blocks(
    q_positions: Int[Array, "B T"],
    document_starts: Int[Array, "B T"],
    *,
    block_size: int,
    stride: int,
) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """The interval [lo, hi) of compressed blocks that each query may see.

    A block is visible when it is complete, i*d + l - 1 <= t, and begins in the query's document.
    Before a document's first block is complete the interval is empty: hi <= lo.
    """
    lo = -(-document_starts // stride)
    return lo, complete_blocks(q_positions + 1, block_size=block_size, stride=stride)
