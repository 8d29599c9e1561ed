"""What every kernel's call is made of, with passes that are written out densely."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import calls

LENGTH, FEATURES = 7, 3


def probabilities(q, k, lo, hi, lse):
    index = jnp.arange(k.shape[1])
    seen = (index >= lo[..., None]) & (index < hi[..., None])
    scores = jnp.einsum("btnh,bsnh->bnts", q, k)
    p = jnp.exp(scores - jnp.moveaxis(lse, 1, 2)[..., None])
    return jnp.where(seen[:, None], p, 0)


def forward(q, k, v, lo, hi):
    """One key/value head a query head; each query attends the keys from lo to hi."""
    total = probabilities(q, k, lo, hi, jnp.zeros(q.shape[:3])).sum(axis=-1)
    lse = jnp.moveaxis(jnp.log(total), 1, 2)
    p = probabilities(q, k, lo, hi, jnp.where(lse == -jnp.inf, jnp.inf, lse))
    return jnp.einsum("bnts,bsnv->btnv", p, v), lse


def backward(q, k, v, lo, hi, out, lse, d_out, d_lse):
    """As kernels do it: probabilities from lse, and one number a row that scores have in common."""
    p = probabilities(q, k, lo, hi, jnp.where(lse == -jnp.inf, jnp.inf, lse))
    delta = (out * d_out).sum(axis=-1) - d_lse
    dp = jnp.einsum("btnv,bsnv->bnts", d_out, v)
    ds = p * (dp - jnp.moveaxis(delta, 1, 2)[..., None])
    return (
        jnp.einsum("bnts,bsnh->btnh", ds, k),
        jnp.einsum("bnts,btnh->bsnh", ds, q),
        jnp.einsum("bnts,btnv->bsnv", p, d_out),
    )


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture
def arrays():
    """q, k, v, lo and hi; the first query has no key."""
    q, k, v = (normal(seed, 2, LENGTH, 2, FEATURES) for seed in range(3))
    hi = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), (2, LENGTH))
    return q, k, v, jnp.maximum(hi - 4, 0), hi


def gradients_of(function, *arrays):
    """From random cotangents of out and lse, of which the second are 0 where a gate is."""
    (out, lse), pull = jax.vjp(function, *arrays)
    cotangents = normal(8, *out.shape).astype(out.dtype), normal(9, *lse.shape)
    shut = arrays[0] == 0
    return pull((cotangents[0], jnp.where(shut | (lse == -jnp.inf), 0, cotangents[1])))


def test_a_gate_is_a_product_with_the_output(arrays):
    """Gradients of the gate, too, and of what a gate of 0 shuts off, also on an empty row."""
    gate = jax.nn.sigmoid(normal(5, 2, LENGTH, 2)).at[:, ::3].set(0)
    attention = calls.differentiable(forward, backward)

    def gated(gate, *qkv):
        return attention(gate, *qkv, *arrays[3:])

    def product(gate, *qkv):
        out, lse = attention(None, *qkv, *arrays[3:])
        return gate[..., None] * out, lse

    chex.assert_trees_all_equal(gated(gate, *arrays[:3]), product(gate, *arrays[:3]))
    actual, expected = (gradients_of(f, gate, *arrays[:3]) for f in (gated, product))
    # Sums of a few float32 numbers of size 1 in another order.
    chex.assert_trees_all_close(actual, expected, atol=1e-5, rtol=0)
    shut = jnp.broadcast_to((gate == 0)[..., None], actual[1].shape)
    assert (actual[1][shut] == 0).all()
    assert (actual[0][:, 3] != 0).any()


def test_a_gates_gradients_are_slopes(arrays):
    """Of a random direction, by central differences."""
    gate = jax.nn.sigmoid(normal(5, 2, LENGTH, 2))
    attention, weights = calls.differentiable(forward, backward), normal(6, *arrays[0].shape)

    def loss(gate, *qkv):
        out, lse = attention(gate, *qkv, *arrays[3:])
        return (out * weights).sum() + jnp.where(lse == -jnp.inf, 0, lse).sum()

    at = (gate, *arrays[:3])
    along = tuple(normal(20 + i, *x.shape) for i, x in enumerate(at))
    gradients = jax.grad(loss, argnums=(0, 1, 2, 3))(*at)
    slope = sum(float((x * y).sum()) for x, y in zip(gradients, along, strict=True))
    step = 1e-2
    there, back = (
        float(loss(*(x + sign * step * y for x, y in zip(at, along, strict=True))))
        for sign in (1, -1)
    )
    # float32 losses of about 100 over a step of 0.02: 1e-5 * 100 / 0.02, and the third derivative.
    assert abs((there - back) / (2 * step) - slope) < 0.1
    assert abs(slope) > 1


def test_a_negative_gate_gives_nan_and_no_wrong_gradient(arrays):
    gate = jnp.full((2, LENGTH, 2), -0.5)
    attention = calls.differentiable(forward, backward)
    dq = jax.grad(lambda q: attention(gate, q, *arrays[1:])[0].sum())(arrays[0])
    assert np.isnan(dq[:, 1:]).all()


def test_vmap_over_gates(arrays):
    gates = jax.nn.sigmoid(normal(5, 3, 2, LENGTH, 2))
    attention = calls.differentiable(forward, backward)

    def gradients(gate):
        return jax.grad(lambda g, q: (attention(g, q, *arrays[1:])[0] ** 2).sum(), (0, 1))(
            gate, arrays[0]
        )

    expected = [gradients(gate) for gate in gates]
    actual = jax.vmap(gradients)(gates)
    for i, one in enumerate(expected):
        chex.assert_trees_all_close([x[i] for x in actual], list(one), atol=1e-5, rtol=0)
