"""Quest (arXiv 2406.10774): an upper bound of the block's scores, without parameters."""

import jax.numpy as jnp

from experiments.selectors.base import Selector, group_heads, into_blocks


class Quest(Selector):
    """Products of the query with the coordinate-wise extremes of the block's keys.

    score = sum_c max(q_c max_{i in block} k_ic, q_c min_{i in block} k_ic), summed over the heads
    of a group. No key of the block can score higher for a head than this.
    """

    def scores(self, x, q, k, document_starts):
        """See `Selector.scores`."""
        blocks = into_blocks(k.astype(jnp.float32), self.nsa.select_block_size)
        q = group_heads(q, k.shape[2])
        highest, lowest = (
            jnp.einsum("btkgh,bjkh->btkj", part, extreme)
            for part, extreme in (
                (jnp.maximum(q, 0), blocks.max(axis=2)),
                (jnp.minimum(q, 0), blocks.min(axis=2)),
            )
        )
        return highest + lowest
