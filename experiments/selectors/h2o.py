"""H2O (arXiv 2306.14048): heavy hitters, the keys that have received most attention so far."""

import jax
import jax.numpy as jnp

from experiments.selectors.base import Selector, group_heads


class HeavyHitters(Selector):
    """Keeps n tokens and never takes one back: what leaves the cache is gone for later queries.

    A new token that makes the cache too full pushes out the one that has received the least
    attention from the queries so far, summed over the heads of the group; the first
    num_initial_blocks and the last num_local_blocks tokens stay. Queries attend what is kept, one
    after another. Blocks are single tokens.
    """

    def scores(self, x, q, k, document_starts):
        """See `Selector.scores`; raises ValueError for blocks of more than one token."""
        nsa = self.nsa
        if nsa.select_block_size != 1:
            raise ValueError(f"select_block_size={nsa.select_block_size} must be 1 for H2O")
        q, k = jax.lax.stop_gradient((group_heads(q, k.shape[2]), k.astype(jnp.float32)))
        q = q * q.shape[-1] ** -0.5
        token = jnp.arange(k.shape[1])

        def step(carry, query):
            kept, received = carry  # [B, K, S]
            t, q, start = query
            start = start[:, None, None]
            kept = (kept | (token == t)) & (token >= start)
            stays = (token < start + nsa.num_initial_blocks) | (token > t - nsa.num_local_blocks)
            weakest = jnp.argmin(jnp.where(kept & ~stays, received, jnp.inf), axis=-1)
            full = kept.sum(axis=-1) > nsa.num_selected_blocks
            kept &= ~(full[..., None] & (token == weakest[..., None]))
            scores = jnp.einsum("bkgh,bskh->bkgs", q, k)
            p = jax.nn.softmax(jnp.where(kept[:, :, None], scores, -jnp.inf), axis=-1)
            received += p.sum(axis=2)
            return (kept, received), jnp.where(kept, received, -jnp.inf)

        shape = (k.shape[0], k.shape[2], k.shape[1])
        queries = (token, jnp.moveaxis(q, 1, 0), document_starts.T)
        _, scores = jax.lax.scan(step, (jnp.zeros(shape, bool), jnp.zeros(shape)), queries)
        return jnp.moveaxis(scores, 0, 1)
