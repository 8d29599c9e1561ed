"""Where compressed blocks lie and who may see them."""

import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax.config import NSAConfig
from nsa_jax.ops import compression
from nsa_jax.ops.branches import compressed_attention

GEOMETRIES = [(32, 16), (16, 16), (8, 4), (6, 2), (5, 1)]


@pytest.mark.parametrize(("l", "d"), GEOMETRIES)
@pytest.mark.parametrize("num_tokens", [0, 1, 4, 5, 31, 32, 33, 47, 48, 100])
def test_blocks_hold_the_tokens_of_equation_7(l, d, num_tokens):  # noqa: E741
    x = jnp.arange(num_tokens, dtype=jnp.float32).reshape(1, num_tokens, 1, 1)
    blocks = compression.split_into_blocks(x, block_size=l, stride=d)[0, :, :, 0, 0]
    expected = [list(range(i, i + l)) for i in range(0, num_tokens - l + 1, d)]
    assert blocks.tolist() == expected
    assert compression.num_compressed_blocks(num_tokens, block_size=l, stride=d) == len(expected)


@pytest.mark.parametrize(("l", "d"), GEOMETRIES)
def test_a_block_is_visible_exactly_when_complete(l, d):  # noqa: E741
    t = jnp.arange(100, dtype=jnp.int32)[None]
    lo, hi = compression.visible_blocks(t, jnp.zeros_like(t), block_size=l, stride=d)
    assert (lo == 0).all()
    for position in range(100):
        complete = [i for i in range(100) if i * d + l - 1 <= position]
        assert hi[0, position] == len(complete)


def test_blocks_that_straddle_documents_are_complete_for_nobody():
    t = jnp.arange(48, dtype=jnp.int32)[None]
    starts = jnp.where(t < 16, 0, 16)
    lo, hi = compression.visible_blocks(t, starts, block_size=8, stride=4)
    # Blocks start at 0, 4, 8 in the first document (12 straddles), at 16, 20, ... in the second.
    assert (lo[0, 15], hi[0, 15]) == (0, 3)
    assert lo[0, 16] == 4
    assert hi[0, 22] <= 4, "nothing complete before token 23"
    assert (lo[0, 23], hi[0, 23]) == (4, 5)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_the_edge_query_sees_its_block(implementation):
    """At t = i*d + l - 1 block i appears; one token earlier it does not."""
    nsa = NSAConfig(8, 4, 16, num_selected_blocks=3)
    q = jnp.zeros((1, 40, 1, 2))  # equal scores: the output is the mean of the visible values
    v = (10.0 ** jnp.arange(9)).reshape(1, 9, 1, 1)
    k = jnp.zeros((1, 9, 1, 2))
    out, lse = compressed_attention(q, k, v, config=nsa, implementation=implementation)
    out, lse = np.asarray(out)[0, :, 0, 0], np.asarray(lse)[0, :, 0]
    assert (out[:7] == 0).all()
    assert np.isneginf(lse[:7]).all()
    np.testing.assert_allclose(out[[7, 10, 11, 14, 15]], [1, 1, 5.5, 5.5, 37], rtol=1e-6)
    np.testing.assert_allclose(np.exp(lse[[7, 10, 11, 15, 39]]), [1, 1, 2, 3, 9], rtol=1e-6)
