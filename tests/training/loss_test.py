import math

import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax.training import loss


def test_sums_against_numbers_worked_out_by_hand():
    # Probabilities 1/4, 3/4 at the first position and 1/2, 1/2 at the second.
    logits = jnp.log(jnp.array([[[1.0, 3.0], [1.0, 1.0]]]))
    targets = jnp.array([[0, 1]])
    sums = loss.token_sums(logits, targets, jnp.array([[2.0, 1.0]]))
    assert float(sums.nats) == pytest.approx(2 * math.log(4) + math.log(2), rel=1e-6)
    assert float(sums.weight) == 3
    assert float(sums.correct) == 0  # 1 is the likelier first; a tie goes to 0, the target is 1


def test_a_token_of_weight_zero_counts_for_nothing():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(2, 5, 7)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 7, (2, 5)))
    weights = jnp.ones((2, 5)).at[1].set(0)
    some = loss.token_sums(logits, targets, weights)
    first = loss.token_sums(logits[:1], targets[:1], weights[:1])
    np.testing.assert_array_equal(some, first)


def test_bfloat16_logits_are_summed_in_float32():
    # 4096 tokens of ln 2 nats each: a bfloat16 sum would stop growing at 256.
    logits = jnp.zeros((1, 4096, 2), jnp.bfloat16)
    sums = loss.token_sums(logits, jnp.zeros((1, 4096), jnp.int32), jnp.ones((1, 4096)))
    assert sums.nats.dtype == jnp.float32
    # Tolerance: 4096 float32 additions of rounding error 6e-8 each, in a tree.
    assert float(sums.nats) == pytest.approx(4096 * math.log(2), rel=1e-5)


def test_bits_of_a_uniform_byte():
    assert loss.bits(math.log(256)) == pytest.approx(8)
