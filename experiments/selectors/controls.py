"""The controls between which a selector should lie: chance, position alone, and hindsight."""

import jax
import jax.numpy as jnp

from experiments.selectors.base import Selector, full_attention_mass


class Random(Selector):
    """Blocks by lot: a hash of the query's bits and the block, no function of the keys.

    It needs no random state, yet differs between rows, positions and updates.
    """

    def scores(self, x, q, k, document_starts):
        """See `Selector.scores`."""
        length, size = q.shape[1], self.nsa.select_block_size
        bits = jax.lax.bitcast_convert_type(q.astype(jnp.float32), jnp.uint32)
        odd = 2 * jnp.arange(bits.shape[2] * bits.shape[3], dtype=jnp.uint32) + 1
        query = (bits.reshape(*bits.shape[:2], -1) * odd).sum(axis=-1, dtype=jnp.uint32)
        slot = jnp.arange(k.shape[2] * -(-length // size), dtype=jnp.uint32)
        lots = _mix(query[..., None] + _mix(slot + 1)) >> 8  # 24 bits, exact as float32
        return lots.astype(jnp.float32).reshape(*q.shape[:2], k.shape[2], -1)


class Static(Selector):
    """The most recent blocks, whatever is in them: with the initial ones, attention sinks."""

    def scores(self, x, q, k, document_starts):
        """See `Selector.scores`."""
        blocks = jnp.arange(-(-q.shape[1] // self.nsa.select_block_size), dtype=jnp.float32)
        return jnp.broadcast_to(blocks, (*q.shape[:2], k.shape[2], len(blocks)))


class Oracle(Selector):
    """The attention that the block would get from full attention, summed over a group's heads.

    What no selector that saves work can know. With blocks of one token it is the paper's Exact-Top.
    """

    def scores(self, x, q, k, document_starts):
        """See `Selector.scores`."""
        return full_attention_mass(q, k, document_starts, self.nsa.select_block_size)


def _mix(x):
    """A bijection of 32-bit words in which each bit of the input changes half of the output."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
