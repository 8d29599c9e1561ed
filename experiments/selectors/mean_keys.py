"""MoBA (arXiv 2502.13189): the block's mean key, without parameters."""

import jax.numpy as jnp

from experiments.selectors.base import Selector, group_heads, into_blocks


class MeanKeys(Selector):
    """score = q · mean of the block's keys, summed over the heads of a group."""

    def scores(self, x, q, k, document_starts):
        """See `Selector.scores`."""
        means = into_blocks(k.astype(jnp.float32), self.nsa.select_block_size).mean(axis=2)
        return jnp.einsum("btkgh,bjkh->btkj", group_heads(q, k.shape[2]), means)
