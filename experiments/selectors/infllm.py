"""InfLLM (arXiv 2402.04617): a few representative keys of each block."""

import jax
import jax.numpy as jnp

from experiments.selectors.base import Selector, group_heads, into_blocks


class InfLLM(Selector):
    """score = q · sum of the block's representative keys, summed over the heads of a group.

    Representative are the keys with the highest mean product with the local queries: those from the
    key on, in its own block and the next num_local_blocks - 1. All of them have been seen when the
    block is chosen from, because until then it is forced.

    Attributes:
      representatives: keys of a block.
    """

    representatives: int = 4

    def scores(self, x, q, k, document_starts):
        """See `Selector.scores`."""
        size, length = self.nsa.select_block_size, k.shape[1]
        q, k = jax.lax.stop_gradient((group_heads(q, k.shape[2]), k.astype(jnp.float32)))
        token = jnp.arange(length)
        query, key = token[:, None], token[None]
        local = (query >= key) & (query // size - key // size < self.nsa.num_local_blocks)
        sums = jnp.einsum("btkgh,bskh,ts->bsk", q, k, local.astype(jnp.float32))
        received = sums / local.sum(axis=0)[:, None]
        ranked = into_blocks(received, size)
        # The filling of the last block must not represent it.
        real = into_blocks(jnp.ones_like(received), size) > 0
        ranked = jnp.moveaxis(jnp.where(real, ranked, -jnp.inf), 2, -1)
        _, best = jax.lax.top_k(ranked, min(self.representatives, size))
        chosen = jnp.moveaxis(jax.nn.one_hot(best, size).sum(axis=-2), -1, 2)
        keys = jnp.einsum("bjskh,bjsk->bjkh", into_blocks(k, size), chosen)
        return jnp.einsum("btkgh,bjkh->btkj", q, keys)
