"""A gate as an argument of an attention, and as a product with the output of an oracle."""

import jax
import jax.numpy as jnp


def some_shut(q):
    """A gate for queries q [B, T, N, H], 0 for every third of them."""
    gate = jax.nn.sigmoid(jax.random.normal(jax.random.key(5), q.shape[:3]))
    return gate.at[:, ::3].set(0)


def both_ways(attention, oracle, *where):
    """The two as functions of the gate, q, k and v to out and lse.

    lse is 0, and has no gradient, where it is -inf and where the gate is 0, which stops it.
    """

    def counted(gate, out, lse):
        return out, jnp.where((gate == 0) | (lse == -jnp.inf), 0, lse)

    def argument(gate, *qkv):
        return counted(gate, *attention(*qkv, *where, gate=gate))

    def product(gate, *qkv):
        out, lse = oracle(*qkv, *where)
        return counted(gate, gate[..., None] * out, lse)

    return argument, product
