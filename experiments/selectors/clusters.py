"""Clustered keys after ClusterKV (arXiv 2412.03213), made causal by clustering anew each chunk."""

import jax
import jax.numpy as jnp

from experiments.selectors.base import Selector, group_heads, into_blocks


class Clusters(Selector):
    """A key stands for its cluster: score = logsumexp over the block of q · centroid of the key.

    Before each chunk of queries all earlier keys are clustered anew by k-means on their directions,
    and a centroid is the mean of its keys. Keys of the chunk itself stand for themselves. Summed
    over the heads of a group; with blocks of one token, whole clusters come in order.

    Attributes:
      chunk: queries between two clusterings.
      num_clusters: of all earlier keys.
      iterations: of k-means, from keys at even distances.
    """

    chunk: int = 64
    num_clusters: int = 16
    iterations: int = 5

    def scores(self, x, q, k, document_starts):
        """See `Selector.scores`."""
        q, k = jax.lax.stop_gradient((group_heads(q, k.shape[2]), k.astype(jnp.float32)))
        length = q.shape[1]
        chunks = jnp.moveaxis(into_blocks(q, self.chunk), 1, 0)

        def one_chunk(indexed):
            index, q = indexed
            stand_ins = jax.vmap(jax.vmap(self.stand_ins, (1, None), 1), (0, None))(
                k, index * self.chunk
            )
            return jnp.einsum("btkgh,bskh->btkgs", q, stand_ins)

        scores = jax.lax.map(one_chunk, (jnp.arange(len(chunks)), chunks))
        scores = jnp.moveaxis(scores, 0, 1).reshape(q.shape[0], -1, *scores.shape[3:])[:, :length]
        size = self.nsa.select_block_size
        padding = [(0, 0)] * 4 + [(0, -length % size)]
        scores = jnp.pad(scores * q.shape[-1] ** -0.5, padding, constant_values=-jnp.inf)
        blocks = scores.reshape(*scores.shape[:4], -1, size)
        return jax.nn.logsumexp(blocks, axis=-1).sum(axis=3)

    def stand_ins(self, k, end):
        """Replaces the keys [S, H] before `end` by the centroids of their clusters."""
        known = (jnp.arange(len(k)) < end)[:, None]
        directions = k / jnp.maximum(jnp.linalg.norm(k, axis=-1, keepdims=True), 1e-6)
        starts = (jnp.arange(self.num_clusters) * end) // self.num_clusters

        def assign(centroids):
            nearest = jnp.argmax(directions @ centroids.T, axis=-1)
            return jnp.where(known, jax.nn.one_hot(nearest, self.num_clusters), 0.0)

        def improve(centroids, _):
            member = assign(centroids)
            sums = member.T @ directions
            empty = member.sum(axis=0)[:, None] == 0
            return jnp.where(empty, centroids, sums), None

        centroids, _ = jax.lax.scan(improve, directions[starts], None, self.iterations)
        member = assign(centroids)
        means = (member.T @ k) / jnp.maximum(member.sum(axis=0)[:, None], 1)
        return jnp.where(known, member @ means, k)
