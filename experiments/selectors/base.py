"""What a selector is: scores for the blocks; which ones are forced and the top n are common to all.

To add one, subclass `Selector` in a file of its own, write `scores`, and list it in
`experiments.selectors.SELECTORS`. Scores see whole sequences. Rank and mask are not theirs to keep,
but causality is: the score of a block that is complete at a query must not depend on later tokens.
The query's own block is always forced, so that its score, made of tokens yet to come, is never
looked at.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from nsa_jax import NSAConfig
from nsa_jax.ops.selection import candidates_and_forced, top_blocks
from nsa_jax.typing import Array, Float, Int


class Selector(nn.Module):
    """Chooses the blocks of an attention layer; see `nsa_jax.modules.NativeSparseAttention`.

    Attributes:
      nsa: gives l', n and the forced blocks. With select_block_size=1 it chooses single tokens.
    """

    nsa: NSAConfig

    def scores(
        self,
        x: Float[Array, "B T D"],
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        document_starts: Int[Array, "B T"],
    ) -> Float[Array, "B T K blocks"]:
        """How much each group of each query wants each block; -inf for never.

        Args:
          x: the layer's input.
          q: rotated queries.
          k: rotated keys.
          document_starts: the position at which each query's document begins.
        """
        raise NotImplementedError

    @nn.compact
    def __call__(self, x, q, k, *, document_starts=None) -> Int[Array, "B T K M"]:
        """The blocks to attend: the forced ones and the best others, n in all, ties to the lower.

        Raises:
          ValueError: if the query's own block is not forced.
        """
        nsa = self.nsa
        if nsa.num_local_blocks < 1:
            raise ValueError(
                f"num_local_blocks={nsa.num_local_blocks} must be at least 1 with a selector: the "
                "scores of the query's own block see later tokens"
            )
        positions = jnp.broadcast_to(jnp.arange(q.shape[1], dtype=jnp.int32), q.shape[:2])
        if document_starts is None:
            document_starts = jnp.zeros_like(positions)
        scores = self.scores(x, q, k, document_starts)
        candidate, forced = candidates_and_forced(
            scores.shape[-1],
            positions,
            document_starts,
            select_block_size=nsa.select_block_size,
            num_initial_blocks=nsa.num_initial_blocks,
            num_local_blocks=nsa.num_local_blocks,
        )
        scores = jax.lax.stop_gradient(scores.astype(jnp.float32))
        return top_blocks(
            scores, candidate[:, :, None], forced[:, :, None], nsa.num_selected_blocks
        )


def into_blocks(x: Float[Array, "B S ..."], size: int) -> Float[Array, "B blocks size ..."]:
    """Cuts a sequence into blocks, the last one filled up with zeros."""
    missing = -x.shape[1] % size
    x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])


def group_heads(q: Float[Array, "B T N H"], groups: int) -> Float[Array, "B T K G H"]:
    """The query heads by the key head that they share, in float32."""
    return q.astype(jnp.float32).reshape(*q.shape[:2], groups, -1, q.shape[-1])


def attention_probabilities(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    document_starts: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T K G T"]:
    """What full causal attention would give each key; dense, for measures and teachers."""
    scores = jnp.einsum("btkgh,bskh->btkgs", group_heads(q, k.shape[2]), k.astype(jnp.float32))
    token = jnp.arange(k.shape[1])
    seen = (token <= token[:, None])[None]
    if document_starts is not None:
        seen &= token >= document_starts[:, :, None]
    scores = jnp.where(seen[:, :, None, None], scores * q.shape[-1] ** -0.5, -jnp.inf)
    return jax.nn.softmax(scores, axis=-1)


def block_mass(p: Float[Array, "B T K G S"], size: int) -> Float[Array, "B T K blocks"]:
    """The probability in each block, summed over the heads of a group."""
    p = p.sum(axis=3)
    p = jnp.pad(p, [(0, 0)] * 3 + [(0, -p.shape[-1] % size)])
    return p.reshape(*p.shape[:3], -1, size).sum(axis=-1)


def full_attention_mass(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    document_starts: Int[Array, "B T"],
    size: int,
) -> Float[Array, "B T K blocks"]:
    """The attention that each block would get from full attention, summed over a group's heads.

    For teachers and measures: no gradient flows through it. One row after another, for there are
    T x T numbers of each head: of 16 rows of 2048 tokens at once they were what filled a GPU.
    """

    def row(arrays):
        q, k, starts = (x[None] for x in arrays)
        return block_mass(attention_probabilities(q, k, starts), size)[0]

    return jax.lax.map(row, jax.lax.stop_gradient((q, k, document_starts)))
