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
    dots = (out * d_out).sum(axis=-1)
    dp = jnp.einsum("btnv,bsnv->bnts", d_out, v)
    ds = p * (dp - jnp.moveaxis(dots - d_lse, 1, 2)[..., None])
    return (
        jnp.einsum("bnts,bsnh->btnh", ds, k),
        jnp.einsum("bnts,btnh->bsnh", ds, q),
        jnp.einsum("bnts,btnv->bsnv", p, d_out),
        dots,
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
    """From random cotangents of out and lse, of which the latter are 0 where a gate is 0."""
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


def test_a_tiny_gates_gradient_is_not_lost_in_that_of_lse(arrays):
    """Which the pass without a gate gets divided by the gate."""
    gate, attention = jnp.full((2, LENGTH, 2), 2.0**-90), calls.differentiable(forward, backward)
    (out, lse), pull = jax.vjp(lambda gate: attention(gate, *arrays), gate)
    cotangent = normal(8, *out.shape)
    (d_gate,) = pull((cotangent, jnp.where(lse == -jnp.inf, 0, 1.0)))
    plain, _ = attention(None, *arrays)
    np.testing.assert_allclose(d_gate, (plain * cotangent).sum(axis=-1), atol=1e-6, rtol=1e-6)


def test_a_negative_gate_gives_nan_and_no_wrong_gradient(arrays):
    gate = jnp.full((2, LENGTH, 2), -0.5)
    attention = calls.differentiable(forward, backward)
    dq = jax.grad(lambda q: attention(gate, q, *arrays[1:])[0].sum())(arrays[0])
    assert np.isnan(dq[:, 1:]).all()


def test_vmap_over_gates_alone(arrays):
    """With the gradient inside and outside of vmap, through out and lse."""
    gates = jax.nn.sigmoid(normal(5, 3, 2, LENGTH, 2))
    attention = calls.differentiable(forward, backward)

    def loss(gate, q):
        out, lse = attention(gate, q, *arrays[1:])
        return (out**2).sum() + jnp.where(lse == -jnp.inf, 0, lse).sum()

    each = [jax.grad(loss, (0, 1))(gate, arrays[0]) for gate in gates]
    d_gate = jnp.stack([x for x, _ in each])
    inside = jax.vmap(jax.grad(loss, (0, 1)), (0, None))(gates, arrays[0])
    chex.assert_trees_all_close(
        inside, (d_gate, jnp.stack([x for _, x in each])), atol=1e-5, rtol=0
    )
    outside = jax.grad(lambda *x: jax.vmap(loss, (0, None))(*x).sum(), (0, 1))(gates, arrays[0])
    chex.assert_trees_all_close(outside, (d_gate, sum(x for _, x in each)), atol=1e-5, rtol=0)


def test_a_small_gate_costs_float16_no_digits():
    """A long row: its probabilities times the gate would be too small for float16."""
    keys = 2048

    def rounding_backward(q, k, v, lo, hi, out, lse, d_out, d_lse):
        """Values meet probabilities of their own dtype, as they do in kernels."""
        p = probabilities(q, k, lo, hi, lse).astype(v.dtype)
        dv = jnp.einsum("bnts,btnv->bsnv", p, d_out, preferred_element_type=jnp.float32)
        return jnp.zeros_like(q), jnp.zeros_like(k), dv.astype(v.dtype), jnp.zeros(lse.shape)

    def rounding_forward(q, k, v, lo, hi):
        out, lse = forward(q, k, v, lo, hi)
        return out.astype(v.dtype), lse

    q, k, v = (
        normal(i, 1, n, 1, FEATURES).astype(jnp.float16) for i, n in ((0, 4), (1, keys), (2, keys))
    )
    lo, hi = jnp.zeros((1, 4), jnp.int32), jnp.full((1, 4), keys)
    d_out = 1024 * normal(7, 1, 4, 1, FEATURES)
    attention = calls.differentiable(rounding_forward, rounding_backward)

    def gradients(gate):
        gate = jnp.full((1, 4, 1), gate)
        _, pull = jax.vjp(lambda gate, v: attention(gate, q, k, v, lo, hi)[0], gate, v)
        return (np.asarray(x, np.float32) for x in pull(d_out))

    (expected_gate, expected), (d_gate, dv) = gradients(1.0), gradients(2.0**-11)
    error = np.linalg.norm(dv * 2**11 - expected) / np.linalg.norm(expected)
    assert error < 1e-3  # 11 bits
    out, _ = rounding_forward(q, k, v, lo, hi)
    by_hand = (out.astype(jnp.float32) * d_out).sum(axis=-1)
    np.testing.assert_allclose(expected_gate, by_hand, rtol=1e-5)
    np.testing.assert_array_equal(d_gate, expected_gate)
