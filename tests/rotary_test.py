"""RoPE by hand, and what it is for: scores that depend on distances alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax.rotary import apply_rope


def test_by_hand():
    x = jnp.array([1.0, 0.0, 0.0, 2.0]).reshape(1, 1, 1, 4)
    # Pairs (0, 2) and (1, 3) turn by t and t / 10 with theta = 100; here t = 3.
    actual = apply_rope(x, jnp.array([[3]]), theta=100.0)[0, 0, 0]
    expected = [np.cos(3), -2 * np.sin(0.3), np.sin(3), 2 * np.cos(0.3)]
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_position_zero_changes_nothing_and_dtype_stays():
    x = jax.random.normal(jax.random.key(0), (2, 1, 3, 8), jnp.bfloat16)
    y = apply_rope(x, jnp.zeros((1, 1), jnp.int32), theta=10_000.0)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(x, y)


def test_scores_depend_on_the_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))

    def score(at_q, at_k):
        turned = (
            apply_rope(x, jnp.array([[at]]), theta=1000.0) for x, at in ((q, at_q), (k, at_k))
        )
        return jnp.vdot(*turned)

    np.testing.assert_allclose(score(7, 2), score(105, 100), rtol=1e-4)
    assert abs(score(7, 2) - score(8, 2)) > 1e-3


def test_an_odd_head_dimension_is_refused():
    with pytest.raises(ValueError, match="head_dim=5 must be even"):
        apply_rope(jnp.ones((1, 1, 1, 5)), jnp.zeros((1, 1)), theta=1.0)
