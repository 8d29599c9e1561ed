"""Selection learned by an auxiliary loss (section 6.1 of the paper; SeerAttention is alike)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.selectors.base import Selector, full_attention_mass, into_blocks


class Auxiliary(Selector):
    """Own queries of the token and own keys of the blocks, taught the attention mass of the blocks.

    score = (W_q x_t) · (W_k mean of x in the block) / sqrt(width). The layer adds to the model's
    loss weight * KL(P || softmax(score)), a mean over the queries and groups that have a block to
    choose. P is the attention that each block before the query's own would get from full attention,
    summed over the heads of the group, made to sum to 1, and without gradient.

    Attributes:
      weight: of the loss.
      width: features of these queries and keys.
      detached: whether this loss trains W_q and W_k alone, and leaves the model as it is.
    """

    weight: float = 0.1
    width: int = 32
    detached: bool = False

    @nn.compact
    def scores(self, x, q, k, document_starts):
        """See `Selector.scores`."""
        if self.detached:
            x = jax.lax.stop_gradient(x)
        x, size, groups = x.astype(jnp.float32), self.nsa.select_block_size, k.shape[2]

        def project(name, inputs):
            return nn.DenseGeneral((groups, self.width), use_bias=False, name=name)(inputs)

        own_q = project("query", x)
        own_k = project("key", into_blocks(x, size).mean(axis=2))
        scores = jnp.einsum("btkh,bjkh->btkj", own_q, own_k) * self.width**-0.5
        mass = full_attention_mass(q, k, document_starts, size)
        self.sow("losses", "selection", self.weight * _kl(mass, scores, document_starts, size))
        return scores


def _kl(mass, scores, document_starts, size):
    block = jnp.arange(scores.shape[-1])
    own = jnp.arange(mass.shape[1]) // size
    complete = (block < own[:, None]) & (block >= document_starts[:, :, None] // size)
    complete = jnp.broadcast_to(complete[:, :, None], scores.shape)
    teacher = jnp.where(complete, mass, 0.0)
    teacher = teacher / jnp.maximum(teacher.sum(axis=-1, keepdims=True), 1e-30)
    some = complete.any(axis=-1)
    # A row without any block would be a softmax over nothing; it counts for nothing below.
    student = jax.nn.log_softmax(jnp.where(complete | ~some[..., None], scores, -1e30), axis=-1)
    terms = jax.scipy.special.xlogy(teacher, teacher) - teacher * student
    kl = jnp.where(some, terms.sum(axis=-1), 0.0)
    return kl.sum() / jnp.maximum(some.sum(), 1)
